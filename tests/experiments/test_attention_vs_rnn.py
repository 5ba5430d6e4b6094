"""Decoders: tasks, cells, pictures, variants of one's own in a file."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.attention_vs_rnn import cells, data, experiment
from experiments.attention_vs_rnn.experiment import EXPERIMENT, PRESETS, cell_of
from experiments.attention_vs_rnn.logistic_mixture import logistic_mixture_log_prob
from experiments.core import optim, run
from experiments.core.store import ResultsStore
from experiments.data.images import unpack

OWN = pathlib.Path(__file__).parents[1] / "right_variants" / "decayed.py"
TINY = {
    "copy": "--copy-dim 8 --copy-length 16 --copy-updates 2 --copy-test 8",
    "images": "--image-dim 8 --components 2 --image-updates 2 --image-test 8 "
    "--completions 2",
}


def drive(out, task, *models):
    """Runs a task with some models in tiny."""
    given = f"--engine inline --task {task} {TINY[task]} --out {out}"
    names = f"--{task.removesuffix('s')}-models"
    return run.run(EXPERIMENT, [*given.split(), names, *models])


def test_sequences_to_copy():
    batch = data.copy_batch("train", 0, 3, batch_size=64, length=128)
    sizes = set()
    for row, counted in zip(batch.tokens, batch.counted, strict=True):
        size = int(counted.sum())
        sizes.add(size)
        word = row[1 : 1 + size]
        assert row[0] == row[1 + size] == 0
        assert (word > 0).all()
        assert (word <= data.SYMBOLS).all()
        np.testing.assert_array_equal(word, row[counted])
        assert not row[2 * size + 2 :].any()
    assert min(sizes) >= 32
    assert max(sizes) <= 62
    assert len(sizes) > 10
    for other in (("train", 0, 4), ("train", 1, 3), ("test", 0, 3), ("val", 0, 3)):
        drawn = data.copy_batch(*other, batch_size=64, length=128)
        assert (drawn.tokens != batch.tokens).any(), other
    some = [data.copy_batch("test", n, 0, batch_size=2, length=16) for n in (0, 5)]
    np.testing.assert_array_equal(some[0].tokens, some[1].tokens)


def test_baselines_are_what_one_counts(dataset):
    baselines = data.image_baselines(dataset, 30)
    found = {name: measure() for name, measure in baselines.items()}
    assert found["uniform"]["test_bits"] == 8.0
    rows = data.image_parts(dataset)[0]
    counts = np.bincount(dataset.train_images[rows].ravel(), minlength=256)
    added = found["histogram of all pixels"]["smoothing"] / 256
    bits = -np.log2((counts + added) / (counts + added).sum())
    wanted = bits[dataset.test_images.ravel()].mean()
    assert found["histogram of all pixels"]["test_bits"] == pytest.approx(wanted)
    assert all(math.isfinite(row["val_bits"]) for row in found.values())
    guess = data.copy_baselines()["uniform guess"]()
    assert guess == dict(test_accuracy=0.1, test_loss=pytest.approx(math.log(10)))


def test_bits_of_pixels_are_those_of_the_mixture():
    settings = dataclasses.replace(PRESETS["quick"], image_dim=8, components=2)
    cell = cell_of(settings, "toy", "linear", length=16, height=4)
    program = cells.program_of(cells.Shape.of(cell))
    functions, params = program.more["functions"], program.initial_params(0)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16)).astype(np.int32)
    bits = jax.jit(lambda p: cells.pixel_bits(functions, p, pixels))(params)
    state = functions.init(2, 16)
    token = jnp.full(2, data.START, jnp.int32)
    step = jax.jit(functions.step)
    outputs = []
    for t in range(16):
        state, output = step(params, state, token)
        outputs.append(output)
        token = jnp.asarray(pixels[:, t])
    found = jnp.stack(outputs, axis=1)
    wanted = jax.jit(logistic_mixture_log_prob)(found, jnp.asarray(pixels))
    np.testing.assert_allclose(bits, wanted / -math.log(2), rtol=1e-4)


# --------------------------------------------- whole runs, with a variant of one's own


@pytest.fixture
def toy(dataset, monkeypatch):
    """Images that a run takes in place of its own."""
    monkeypatch.setattr(experiment, "load", lambda name: dataset)
    return dataset


def test_a_file_of_ones_own_copies_and_an_edited_one_is_another_cell(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(OWN.read_text())
    assert drive(tmp_path, "copy", f"{mine}:attend", "lstm") == 0
    mine.write_text(OWN.read_text().replace("jnp.zeros(())", "jnp.ones(())"))
    assert drive(tmp_path, "copy", f"{mine}:attend", "lstm") == 0
    records = [r for r in ResultsStore(tmp_path).records() if r["curves"]]
    names = [r["config"]["model"] for r in records]
    assert sorted(names) == [f"{mine}:attend", f"{mine}:attend", "lstm"]
    for record in records:
        metrics = record["metrics"]
        assert 0 <= metrics["test_accuracy"] <= 1
        assert metrics["params"] > 100
        assert metrics["flops"] > 100
        digest = record["config"].get("attention_sha256")
        assert (digest is None) == (record["config"]["model"] == "lstm")
    losses = {r["metrics"]["test_loss"] for r in records}
    assert len(losses) == 3
    report = (tmp_path / "report.md").read_text()
    assert report.count("| mine.py:attend ") == 2
    assert "| LSTM | " in report


def test_a_file_of_ones_own_learns_images_and_draws_them(toy, tmp_path):
    assert drive(tmp_path, "images", f"{OWN}:attend") == 0
    (record,) = [r for r in ResultsStore(tmp_path).records() if r["curves"]]
    assert record["config"]["model"] == f"{OWN}:attend"
    metrics = record["metrics"]
    assert 0 < metrics["test_bits"] < 12
    assert 0 < metrics["val_bits"] < 12
    truth = unpack(metrics["completed"], (-1, 64))
    completed = unpack(metrics["completions"], (-1, 64))
    np.testing.assert_array_equal(truth, data.flat_images(toy.test_images[:2]))
    np.testing.assert_array_equal(truth[:, :32], completed[:, :32])
    assert (truth[:, 32:] != completed[:, 32:]).any()
    assert unpack(metrics["samples"], (-1, 64)).shape == (1, 64)
    assert "| decayed.py:attend " in (tmp_path / "report.md").read_text()


PUT = "Put `<function>_step` and `<function>_init_state` beside yours."


@pytest.mark.parametrize(
    ("task", "old", "new", "message"),
    [
        ("copy", "attend_step", "other", PUT),
        ("copy", "attend_init_state", "other", PUT),
        ("images", "    state = keep", "    state = keep[0]", "line 30 of"),
    ],
    ids=["no step", "no state", "a step that fails"],
)
def test_what_cannot_generate_is_refused_before_anything_runs(
    toy, tmp_path, capsys, task, old, new, message
):
    mine = tmp_path / "mine.py"
    mine.write_text(new.join(OWN.read_text().rsplit(old, 1)))
    assert drive(tmp_path / "out", task, "lstm", f"{mine}:attend") == 2
    told = capsys.readouterr().err
    assert f"attention: '{mine}:attend'" in told
    assert message in told
    assert not ResultsStore(tmp_path / "out").records()


def test_the_accelerators_train_step_lowers():
    settings = dataclasses.replace(PRESETS["accelerator"], image_depth=1)
    cell = cell_of(settings, "toy", "linear", length=784, height=28)
    program = cells.program_of(cells.Shape.of(cell))
    state = jax.eval_shape(
        lambda: optim.init_state(program.initial_params(0), optim.hyper_of(cell))
    )
    step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    pixels = jax.ShapeDtypeStruct((2, 784), jnp.int32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    exported = jax.export.export(step, platforms=("cuda", "tpu"))(state, pixels, rng)
    assert exported.platforms == ("cuda", "tpu")


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="copy_models must be some of"):
        experiment.Config(copy_models=("gru",))
    with pytest.raises(ValueError, match="copy_dim must be a multiple of copy_heads"):
        experiment.Config(copy_heads=3)
    with pytest.raises(ValueError, match="copy_linear_heads must be divisors of"):
        experiment.Config(copy_linear_heads=(3,))
    cell = cell_of(PRESETS["quick"], "copy", "linear")
    with pytest.raises(ValueError, match="chunk_size must be given for model='ref"):
        dataclasses.replace(cell, chunk_size=4)
    with pytest.raises(ValueError, match="model must be one of"):
        dataclasses.replace(cell, model="gru")
