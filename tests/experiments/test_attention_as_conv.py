"""The experiment on heads and convolution: cells, records, report, command line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.attention_as_conv.presets import CPU, PRESETS, Experiment
from flax import nnx

from experiments.attention_as_conv import run
from experiments.core import train, trial
from experiments.core.cell import Runtime
from experiments.core.loop import StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore

ROOT = pathlib.Path(__file__).parents[2]

TINY = Experiment(
    ns=(9, 18),
    seeds=1,
    updates=4,
    learning_rates=(1e-2,),
    resnet_rates=(1e-2,),
    batch_size=6,
    patch=2,
    dim=4,
    depth=1,
    mlp_dim=4,
    num_heads=4,
    key_dim=2,
    resnet_widths=(4,),
    baselines=("majority",),
)


def runner(dataset, folder):
    return run.ImageRunner(
        dataset,
        ResultsStore(folder),
        Runtime(log_every=2, checkpoint_seconds=1e9),
        Progress(1, live=False),
        StopSignal(),
    )


@pytest.fixture(scope="module")
def store(dataset, tmp_path_factory):
    """A store in which every study and baseline of the tiny experiment is done."""
    folder = tmp_path_factory.mktemp("results")
    made = runner(dataset, folder)
    made.store.check_writable()
    for study in run.make_studies(TINY, dataset.name).values():
        for cell in study.final(0):
            assert made.run(cell)
    for name, measure in run.make_baselines(TINY, dataset).items():
        config = dict(task=dataset.name, model=name, phase="baseline", seed=0)
        made.store.put(config, status="done", metrics=measure(), wall_time_s=0.0)
    return made.store


def record_of(store, model, start, n=18):
    (found,) = (
        r
        for r in store.records()
        if (r["config"]["model"], r["config"].get("start"), r["config"].get("n"))
        == (model, start, n)
    )
    return found


def test_records_hold_what_the_figures_need(store):
    for model, start in [("quadratic", "convolution"), ("gaussian", "random")]:
        curves = record_of(store, model, start)["curves"]
        assert curves["observed_at"] == [0, 2, 4]
        assert np.shape(curves["centres"]) == (3, 1, 4, 2)
        assert np.shape(curves["precisions"]) == (3, 1, 4, 2, 2)
    started = record_of(store, "quadratic", "convolution")["curves"]["centres"]
    assert started[0] == [[[0, 0], [0, 1], [1, 0], [1, 1]]]
    assert started[2] != started[0]
    for model in ("relative", "relative_content"):
        metrics = record_of(store, model, "random")["metrics"]
        maps = np.asarray(metrics["maps"])
        assert maps.shape == (1, 4, 4, 4)
        np.testing.assert_allclose(maps.sum((-2, -1)), 1.0, atol=2e-3)
        assert ("content_share" in metrics) == (model == "relative_content")
    for record in store.records():
        assert 0 <= record["metrics"]["test_accuracy"] <= 1
        assert "val_accuracy" not in record["metrics"]


def test_the_largest_n_is_shared_by_both_parts_and_tuned_once():
    studies = run.make_studies(CPU, "images")
    assert len(studies) == 5 + 1 + 2 * 3
    for name, study in studies.items():
        alone = name.endswith("n=60000")
        assert (study.tuned_by is None) == alone
        assert len(study.tuning()) == 2
        assert {c.n for c in study.grid} == {int(name.partition("n=")[2])}
        if not alone:
            assert {c.n for c in study.tuned_by.grid} == {60_000}
    starts = run.make_studies(dataclasses.replace(CPU, parts=("starts",)), "images")
    assert len(starts) == 9 and starts.items() <= studies.items()


def test_tuning_never_reads_the_test_part(dataset, tmp_path, capsys):
    hidden = dataclasses.replace(dataset, test_images=None, test_labels=None)
    made = runner(hidden, tmp_path)
    made.store.check_writable()
    cell = run.cell_of(TINY, dataset.name, "resnet", None, 30)
    assert cell.phase == "tune"
    made.run(cell)
    metrics = made.store.get(cell.config())["metrics"]
    assert metrics["val_accuracy"] * 6 == round(metrics["val_accuracy"] * 6)
    chosen, held_out = made._parts(cell)
    assert not set(chosen) & set(held_out)


def test_scores_count_every_image_once(dataset, tmp_path, monkeypatch):
    made = runner(dataset, tmp_path)
    cell = run.cell_of(TINY, dataset.name, "quadratic", "random", 18)
    job = made.start(cell)
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        job.params,
    )
    images, labels = dataset.test_images, dataset.test_labels
    monkeypatch.setattr(run, "EVAL_BATCH", 7)  # 30 images: the last batch is filled up
    found = made._score(cell, params, job.hyper, images, labels)
    logits = run.program_of(cell, dataset).merge(params)(
        train.normalize(images, job.hyper)
    )
    hits = np.asarray(logits).argmax(-1) == labels
    loss = -np.asarray(jax.nn.log_softmax(logits))[np.arange(30), labels].mean()
    np.testing.assert_allclose(found, (hits.mean(), loss), rtol=1e-5)


def test_models_of_the_cpu_preset_match_in_parameters():
    counts = {}
    for model in ("quadratic", "gaussian", "relative", "resnet"):
        start = None if model == "resnet" else "random"
        cell = run.cell_of(CPU, "images", model, start, 1)
        made = nnx.eval_shape(lambda cell=cell: run.build_model(cell, (28, 28, 1), 10))
        leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
        counts[model] = sum(leaf.size for leaf in leaves)
    assert max(counts.values()) < 1.07 * min(counts.values()), counts


@pytest.mark.parametrize("model", ["gaussian", "relative_content"])
def test_train_step_at_the_papers_sizes_lowers_for_accelerators(model):
    cell = run.cell_of(PRESETS["accelerator"], "cifar10", model, "random", 500)
    cell = dataclasses.replace(cell, depth=1)  # the others are alike
    with jax.numpy_dtype_promotion("standard"):  # Flax, bfloat16
        made = nnx.eval_shape(lambda: run.build_model(cell, (32, 32, 3), 10))
        merge, params = run._split(made)
        hyper = train.Hyper(
            **trial.hyper_of(cell)._asdict(),
            label_smoothing=np.float32(0),
            mixup=np.float32(0),
            pixel_mean=np.zeros(3, np.float32),
            pixel_std=np.ones(3, np.float32),
        )
        state = jax.eval_shape(train.init_state, params, hyper)
        step = trial.make_step(
            run.make_loss(merge, 10, train.Augment(flip=True, crop=4))
        )
        batch = train.Batch(
            jax.ShapeDtypeStruct((512, 32, 32, 3), jnp.uint8),
            jax.ShapeDtypeStruct((512,), jnp.int32),
        )
        exported = jax.export.export(jax.jit(step), platforms=("cuda", "tpu"))(
            state, batch, jax.random.key(0)
        )
    assert exported.platforms == ("cuda", "tpu")


# ------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(parts=("other",)), "parts must be some of encodings, starts"),
        (dict(models=()), "models must be some of quadratic"),
        (dict(ns=(3, 3)), "ns must be numbers without repetition"),
        (dict(num_heads=5), "num_heads must be a square number"),
    ],
)
def test_settings_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        Experiment(**more)


def test_from_the_command_line(npz, tmp_path):
    command = (
        f"--task npz:{npz} --parts encodings --models quadratic --ns 12 --seeds 1 "
        "--updates 2 --learning-rates 0.01 --baselines majority --dim 4 --depth 1 "
        f"--patch 2 --batch-size 4 --workers 1 -o {tmp_path}"
    ).split()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.attention_as_conv", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["config"]["model"] for line in lines} == {
        "quadratic",
        "majority n=12 seed=0",
    }
    assert "Do heads move to a pixel grid?" in done.stdout


def test_a_baseline_is_of_the_images_that_it_saw():
    # What was fitted to a part is not taken for what is fitted to all.
    had = run.floor_differs("logistic_regression n=10000 seed=0", ())
    now = run.floor_differs("logistic_regression n=60000 seed=0", ())
    assert had == () and now == (("fitted_to", 60_000),)
    assert run.floor_differs("majority n=60000 seed=0", ()) == ()
