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

from experiments.attention_as_conv import report, run
from experiments.core import train, trial
from experiments.core.cell import Runtime
from experiments.core.loop import StopSignal
from experiments.core.observe import Progress
from experiments.core.report import rows_of
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


# ------------------------------------------------------------------- the report


def test_measures_of_a_convolution_and_of_a_blur():
    places = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    centres = np.stack([places.reshape(9, 2), 0.5 + 2 * places.reshape(9, 2)])
    precisions = np.stack([24.0 * np.eye(2)] * 9 + [np.eye(2)] * 9).reshape(2, 9, 2, 2)
    found = report.grid_measures(centres, precisions)
    assert found["distinct"].tolist() == [9, 9]
    assert found["in_3x3"].tolist() == [1.0, pytest.approx(1 / 9)]
    assert found["one_token"].tolist() == [1.0, 0.0]
    np.testing.assert_allclose(found["distance"], [0.0, np.sqrt(0.5)])
    # Four tokens are nearest to a centre in the middle of them.
    side = np.arange(-20, 20) + 0.5
    line = np.exp(-0.5 * side**2)
    np.testing.assert_allclose(found["peak"][1], (line / line.sum()).max() ** 2)


def test_chance_is_that_of_a_place_anywhere():
    places = np.random.default_rng(0).uniform(-5, 5, (200_000, 2))
    apart = np.linalg.norm(places - np.round(places), axis=-1).mean()
    assert abs(apart - report.CHANCE) < 1e-3


def finished(model, start, end, seed=0):
    """A record of heads that went from ``start`` to ``end``, each (spread, shift)."""
    places = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1)
    places = places.reshape(1, 9, 2)
    ends = [
        (places + shift, np.tile(spread**2 * np.eye(2), (1, 9, 1, 1)))
        for spread, shift in (start, end)
    ]
    return dict(
        config=dict(
            model=model, start="random", n=10, seed=seed, phase="final", updates=5
        ),
        status="done",
        metrics=dict(test_accuracy=0.5),
        curves=dict(
            observed_at=[0, 5],
            centres=[c.tolist() for c, _ in ends],
            precisions=[p.tolist() for _, p in ends],
        ),
    )


@pytest.mark.parametrize(
    ("end", "answer"), [((5.0, 0.0), "yes"), ((1.0, 0.0), "no"), ((5.0, 0.4), "no")]
)
def test_the_verdict_follows_its_rule(end, answer):
    rows = rows_of([finished("quadratic", (1.0, 0.4), end, s) for s in range(3)])
    *_, text = report.verdict(rows)
    assert f"**{answer}**" in text


def test_report_is_drawn_from_the_records_alone(store, tmp_path):
    report.REPORT.write(store.records(), tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in [
        "training_quadratic.png",
        "training_quadratic_convolution.png",
        "training_gaussian.png",
        "centres.png",
        "maps_relative.png",
        "maps_relative_content.png",
        "starts.png",
    ]:
        assert f"]({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for name in ("ResNet", "majority class", "generalised Gaussian"):
        assert f"| {name}" in text or f", {name} |" in text
    assert "| 9 |" in text and "| 18 |" in text


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


def test_a_baseline_counts_at_the_number_of_images_that_it_saw():
    def floor(n, used, accuracy):
        config = dict(phase="baseline", model=f"logistic_regression n={n}", seed=0)
        metrics = dict(baseline="logistic_regression", n=n, n_used=used)
        return dict(config=config, metrics=metrics | dict(test_accuracy=accuracy))

    capped, whole = floor(60_000, 10_000, 0.829), floor(60_000, 60_000, 0.844)
    assert report.baselines([capped]) == {}
    found = report.baselines([capped, whole])
    assert found[60_000]["logistic_regression"].mean == 0.844
    # What was fitted to a part is not taken for what is fitted to all.
    had = run.floor_differs("logistic_regression n=10000 seed=0", ())
    now = run.floor_differs("logistic_regression n=60000 seed=0", ())
    assert had == () and now == (("fitted_to", 60_000),)
    assert run.floor_differs("majority n=60000 seed=0", ()) == ()
