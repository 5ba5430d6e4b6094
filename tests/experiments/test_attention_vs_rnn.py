"""Attention against recurrent networks: tasks, cells, pictures, report, timing."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.attention_vs_rnn.presets import PRESETS, Experiment

from experiments.attention_vs_rnn import __main__ as program
from experiments.attention_vs_rnn import report, run, tasks
from experiments.attention_vs_rnn.logistic_mixture import (
    logistic_mixture_log_prob,
    logistic_mixture_sample,
)
from experiments.core import driver, train, trial
from experiments.core.cell import Runtime
from experiments.core.store import ResultsStore

TINY = dataclasses.replace(
    PRESETS["quick"],
    dim=8,
    copy_models=("linear", "lstm"),
    copy_length=16,
    copy_updates=3,
    copy_test=8,
    image_models=("linear",),
    image_updates=3,
    components=2,
    image_test=8,
    completions=2,
)


def test_sequences_to_copy():
    batch = tasks.copy_batch("train", 0, 3, batch_size=64, length=128)
    sizes = set()
    for row, counted in zip(batch.tokens, batch.counted, strict=True):
        size = int(counted.sum())
        sizes.add(size)
        word = row[1 : 1 + size]
        assert row[0] == row[1 + size] == 0
        assert (word > 0).all()
        assert (word <= tasks.SYMBOLS).all()
        np.testing.assert_array_equal(word, row[counted])
        assert not row[2 * size + 2 :].any()
    assert min(sizes) >= 32
    assert max(sizes) <= 62
    assert len(sizes) > 10
    again = tasks.copy_batch("train", 0, 3, batch_size=64, length=128)
    np.testing.assert_array_equal(batch.tokens, again.tokens)
    for other in (("train", 0, 4), ("train", 1, 3), ("test", 0, 3), ("val", 0, 3)):
        drawn = tasks.copy_batch(*other, batch_size=64, length=128)
        assert (drawn.tokens != batch.tokens).any(), other
    test = tasks.copy_batch("test", 5, 0, batch_size=2, length=16)
    np.testing.assert_array_equal(
        test.tokens, tasks.copy_batch("test", 0, 0, batch_size=2, length=16).tokens
    )


def test_packed_images_come_back():
    images = np.random.default_rng(0).integers(0, 256, (3, 20)).astype(np.uint8)
    text = tasks.pack(images)
    assert json.loads(json.dumps(text)) == text
    np.testing.assert_array_equal(tasks.unpack(text, 20), images)


def test_baselines_are_what_one_counts(dataset):
    baselines = tasks.image_baselines(dataset, 30)
    found = {name: measure() for name, measure in baselines.items()}
    assert found["uniform"]["test_bits"] == 8.0
    rows = tasks.image_parts(dataset)[0]
    counts = np.bincount(dataset.train_images[rows].ravel(), minlength=256)
    added = found["histogram of all pixels"]["smoothing"] / 256
    bits = -np.log2((counts + added) / (counts + added).sum())
    wanted = bits[dataset.test_images.ravel()].mean()
    assert found["histogram of all pixels"]["test_bits"] == pytest.approx(wanted)
    assert all(math.isfinite(row["val_bits"]) for row in found.values())
    guess = tasks.copy_baselines()["uniform guess"]()
    assert guess == dict(test_accuracy=0.1, test_loss=pytest.approx(math.log(10)))


def test_bits_of_pixels_are_those_of_the_mixture():
    cell = run.cell_of(TINY, "toy", "linear", length=16, height=4)
    program = run.programs(run.Shape.of(cell))
    params = program.initial_params(0)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    bits = run.pixel_bits(program.functions, params, pixels)
    state = program.functions.init(2, 16)
    token = jnp.full(2, tasks.START, jnp.int32)
    step = jax.jit(program.functions.step)
    for t in range(16):
        state, outputs = step(params, state, token)
        token = jnp.asarray(pixels[:, t])
        wanted = logistic_mixture_log_prob(outputs, token) / -math.log(2)
        np.testing.assert_allclose(bits[:, t], wanted, rtol=1e-4)


@pytest.fixture(scope="module")
def store(dataset, tmp_path_factory):
    """A run of both tasks in tiny."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load", lambda name: dataset)
        status = driver.drive(
            program.MODULE,
            [],
            out=folder,
            runtime=Runtime(workers=1, log_every=1),
            experiment=TINY,
            preset=TINY,
            make_plans=run.make_plans,
            write_report=report.REPORT.write,
        )
    assert status == 0
    return ResultsStore(folder)


def test_cells_are_scored_and_drawn(store, dataset):
    records = {(r["config"]["task"], r["config"]["model"]): r for r in store.records()}
    assert len(records) == 3 + 5
    for model in ("linear", "lstm"):
        metrics = records["copy", model]["metrics"]
        assert 0 <= metrics["test_accuracy"] <= 1
        assert metrics["params"] > 100
        assert metrics["flops"] > 100
        assert len(records["copy", model]["curves"]["accuracy"]) == 3
    metrics = records["toy", "linear"]["metrics"]
    assert 0 < metrics["test_bits"] < 12
    assert 0 < metrics["val_bits"] < 12
    truth = tasks.unpack(metrics["completed"], 64)
    completed = tasks.unpack(metrics["completions"], 64)
    np.testing.assert_array_equal(
        truth, tasks.flat_images(dataset.test_images[:2]).astype(np.uint8)
    )
    np.testing.assert_array_equal(truth[:, :32], completed[:, :32])
    assert (truth[:, 32:] != completed[:, 32:]).any()
    assert tasks.unpack(metrics["samples"], 64).shape == (1, 64)


def test_the_accelerators_train_step_lowers():
    experiment = dataclasses.replace(PRESETS["accelerator"], image_depth=1)
    cell = run.cell_of(experiment, "toy", "linear", length=784, height=28)
    shape = run.Shape.of(cell)
    step = run.programs(shape).step
    params = run.programs(shape).initial_params(0)
    state = jax.eval_shape(lambda p: train.init_state(p, trial.hyper_of(cell)), params)
    pixels = jax.ShapeDtypeStruct((2, 784), jnp.int32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    exported = jax.export.export(step, platforms=("cuda", "tpu"))(state, pixels, rng)
    assert exported.platforms == ("cuda", "tpu")


def test_command_line_and_settings():
    options = program.parse(["--preset", "cpu", "--task", "copy", "--seeds", "2"])
    assert options.experiment == dataclasses.replace(
        PRESETS["cpu"], task="copy", seeds=2
    )
    with pytest.raises(ValueError, match="copy_models must be some of"):
        Experiment(copy_models=("gru",))
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        Experiment(num_heads=3)
    cell = run.cell_of(TINY, "copy", "linear")
    with pytest.raises(ValueError, match="chunk_size is for model='reformer'"):
        dataclasses.replace(cell, chunk_size=4)
    with pytest.raises(ValueError, match="model must be one of"):
        dataclasses.replace(cell, model="gru")
    assert logistic_mixture_sample(jax.random.key(0), jnp.zeros((2, 6))).shape == (2,)
