"""Trivial baselines on the very subsets that the networks see.

Majority class, logistic regression and RBF-SVM on pixel / 255. The penalty is
chosen on a validation split cut from the subset; then the model is fitted once
more to the whole subset and meets the test set a single time.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import threadpoolctl

from experiments.data import splits
from experiments.data.images import Dataset

BASELINES = ("majority", "logistic_regression", "rbf_svm")

#: Most training images that a baseline is fitted to. The SVM's time grows with
#: the square of N (seven minutes of one core at 60,000), the regression's memory
#: with N.
CAPS = {"logistic_regression": 60_000, "rbf_svm": 60_000}

#: Inverse penalties tried.
GRIDS = {
    "logistic_regression": (0.01, 0.1, 1.0, 10.0),
    "rbf_svm": (1.0, 4.0, 16.0, 64.0),
}

#: Most images that the penalty is chosen on (training part).
TUNING_CAP = 5_000
_MAX_ITERATIONS = 300


def fit_baseline(
    model: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    seed: int,
    cap: int | None = None,
) -> dict[str, Any]:
    """Fit a baseline to a training subset and score it on the test set.

    Above its cap a baseline is fitted to a class-balanced part of the subset, and
    `n_used` < `n` says so.

    Args:
        model: "majority", "logistic_regression" or "rbf_svm".
        train_images: uint8 [n, ...], the subset; or floats, which are taken as they
            are.
        train_labels: int [n].
        test_images: uint8 or float [m, ...].
        test_labels: int [m].
        seed: Of the validation split and of the part taken above the cap.
        cap: Instead of the one in `CAPS`.

    Returns:
        Metrics: test_accuracy, n, n_used; and, where a penalty was
        chosen, C, val_accuracy (None where the subset was too small to cut a
        validation set from), C_at_edge; converged; fit_s.

    Raises:
        ValueError: The model is unknown, or images and labels do not fit together.
    """
    if model not in BASELINES:
        raise ValueError(f"model: expected one of {BASELINES}, got {model!r}")
    for name, images, labels in (
        ("train", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        if len(images) != len(labels) or not len(labels):
            raise ValueError(
                f"{name}: expected as many images as labels, at least one, got "
                f"{len(images)} and {len(labels)}"
            )
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    n = len(train_labels)
    limit = cap if cap is not None else CAPS.get(model, n)
    if n > limit:
        part = splits.balanced_subset(train_labels, limit, seed=seed)
        train_images, train_labels = train_images[part], train_labels[part]
    start = time.perf_counter()
    classes, counts = np.unique(train_labels, return_counts=True)
    metrics: dict[str, Any] = {"n": n, "n_used": len(train_labels)}
    if model == "majority" or len(classes) == 1:
        most = classes[np.argmax(counts)]
        metrics["test_accuracy"] = float(np.mean(test_labels == most))
        metrics["converged"] = True
    else:
        x, x_test = _pixels(train_images), _pixels(test_images)
        metrics |= _choose(model, x, train_labels, seed)
        fitted, metrics["converged"] = _fit(model, metrics["C"], x, train_labels)
        metrics["test_accuracy"] = float(fitted.score(x_test, test_labels))
    metrics["fit_s"] = time.perf_counter() - start
    return metrics


def _choose(model: str, x: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Choose the penalty on a validation split of at most `TUNING_CAP` images."""
    grid = GRIDS[model]
    chosen = np.arange(len(labels))
    if len(labels) > TUNING_CAP:
        chosen = splits.balanced_subset(labels, TUNING_CAP, seed=seed)
    try:
        train, val = splits.train_validation_split(
            labels, chosen, fraction=0.2, seed=seed
        )
    except ValueError:  # no class has two images: nothing to choose on
        train = val = np.empty(0, int)
    if len(np.unique(labels[train])) < 2:
        return {"C": grid[len(grid) // 2], "val_accuracy": None, "C_at_edge": False}
    scores = [
        float(_fit(model, c, x[train], labels[train])[0].score(x[val], labels[val]))
        for c in grid
    ]
    best = int(np.argmax(scores))  # of equals, the stronger penalty
    return {
        "C": grid[best],
        "val_accuracy": scores[best],
        "C_at_edge": best in (0, len(grid) - 1),
    }


def _fit(model: str, c: float, x: np.ndarray, labels: np.ndarray) -> tuple[Any, bool]:
    """Fit; also tell whether the optimiser came to an end by itself."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    fitted = (
        SVC(C=c, kernel="rbf", gamma="scale", cache_size=500)
        if model == "rbf_svm"
        else LogisticRegression(C=c, max_iter=_MAX_ITERATIONS, tol=1e-3)
    )
    # Small products: more threads only wait for each other, and the last digits
    # would depend on how many there are.
    with (
        threadpoolctl.threadpool_limits(1),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", ConvergenceWarning)
        fitted.fit(x, labels)
    stopped = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for other in caught:
        if other not in stopped:
            warnings.warn_explicit(
                other.message, other.category, other.filename, other.lineno
            )
    return fitted, not stopped


def _pixels(images: np.ndarray) -> np.ndarray:
    flat = np.asarray(images).reshape(len(images), -1)
    scale = np.float32(255 if flat.dtype == np.uint8 else 1)
    return flat.astype(np.float32) / scale


def subset_baseline(dataset: Dataset, model: str, n: int, seed: int) -> dict[str, Any]:
    """`fit_baseline` on the class-balanced subset that networks of a seed see."""
    subset = splits.balanced_subset(
        dataset.train_labels, n, seed=seed, num_classes=dataset.num_classes
    )
    return fit_baseline(
        model,
        dataset.train_images[subset],
        dataset.train_labels[subset],
        dataset.test_images,
        dataset.test_labels,
        seed=seed,
    )
