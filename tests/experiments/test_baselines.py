from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments.data import images as data
from experiments.data import splits
from experiments.tasks import baselines


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def fit(model, digits, n, **more):
    part = splits.balanced_subset(digits.train_labels, n, seed=0)
    train = digits.train_images[part], digits.train_labels[part]
    test = digits.test_images, digits.test_labels
    return baselines.fit_baseline(model, *train, *test, seed=0, **more)


@pytest.mark.parametrize(
    ("model", "at_least"),
    [("logistic_regression", 0.85), ("rbf_svm", 0.90)],
)
def test_it_learns_digits_and_repeats_itself(digits, model, at_least):
    first = fit(model, digits, 300)
    assert first["test_accuracy"] > at_least
    assert first["C"] in baselines.GRIDS[model]
    assert 0 < first["val_accuracy"] <= 1
    assert first["n"] == first["n_used"] == 300
    assert first["converged"]
    part = baselines.subset_baseline(digits, model, 300, seed=0)
    assert {**first, "fit_s": 0} == {**part, "fit_s": 0}


def test_the_majority_class_is_that_of_the_training_subset():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    found = baselines.fit_baseline(
        "majority",
        images,
        np.array([2, 2, 2, 0, 1, 1]),
        images[:4],
        np.array([2, 0, 0, 0]),
        seed=0,
    )
    assert found["test_accuracy"] == 0.25


def test_the_penalty_is_chosen_on_the_subset_alone(digits):
    """Other test labels change the score, not the choice."""
    wrong = dataclasses.replace(digits, test_labels=(digits.test_labels + 1) % 10)
    one, two = (fit("logistic_regression", d, 200) for d in (digits, wrong))
    assert (one["C"], one["val_accuracy"]) == (two["C"], two["val_accuracy"])
    assert one["test_accuracy"] > 0.8 > 0.2 > two["test_accuracy"]


def test_the_final_fit_uses_the_whole_subset(digits):
    part = splits.balanced_subset(digits.train_labels, 60, seed=0)
    x = digits.train_images[part].reshape(60, -1).astype(np.float32) / 255
    found = fit("logistic_regression", digits, 60)
    direct = LogisticRegression(C=found["C"], max_iter=300, tol=1e-3)
    direct.fit(x, digits.train_labels[part])
    test = digits.test_images.reshape(len(digits.test_images), -1)
    expected = direct.score(test.astype(np.float32) / 255, digits.test_labels)
    assert found["test_accuracy"] == pytest.approx(expected)


def test_a_cap_is_said(digits):
    capped = fit("rbf_svm", digits, 400, cap=100)
    assert (capped["n"], capped["n_used"]) == (400, 100)
    assert baselines.CAPS["rbf_svm"] == 60_000


def test_one_image_a_class_leaves_nothing_to_choose_on(digits):
    found = fit("rbf_svm", digits, 10)
    assert found["val_accuracy"] is None
    assert found["test_accuracy"] > 0.2


def test_an_optimiser_that_runs_out_of_steps_is_recorded(digits, monkeypatch):
    monkeypatch.setattr(baselines, "_MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit("logistic_regression", digits, 50)["converged"] is False


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        ("svm", 4, "model: expected one of .*got 'svm'"),
        ("majority", 3, "train: expected as many images as labels.*got 4 and 3"),
        ("majority", 0, "train: expected as many images as labels.*got 4 and 0"),
    ],
)
def test_bad_arguments_are_named(model, count, message):
    images = np.zeros((4, 2, 2, 1), np.uint8)
    labels = np.zeros(4, int)
    with pytest.raises(ValueError, match=message):
        baselines.fit_baseline(model, images, labels[:count], images, labels, seed=0)
