"""The experiment on heads and convolution: cells, scores, plans, and a run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from experiments.attention_as_conv import cells, grid
from experiments.attention_as_conv.cells import ConvTask
from experiments.attention_as_conv.experiment import (
    EXPERIMENT,
    MODELS,
    PARTS,
    PRESETS,
    Config,
    cell_of,
    floors_of,
    make_studies,
)
from experiments.core import optim, run
from experiments.core.store import ResultsStore
from experiments.tasks.images import Augment, Batch, image_program, normalize

CPU = PRESETS["cpu"]
TINY = Config(
    ns=(9, 18),
    seeds=1,
    updates=4,
    content_updates=4,
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
    long_updates=6,
    kernels=(3,),
    heads_per_place=(1,),
    decays=(0.3,),
    teacher_rates=(0.1,),
    teacher_updates=4,
    teacher_seeds=2,
    teacher_channels=2,
    teacher_side=4,
)


# ------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def folder(npz, tmp_path_factory):
    """Where every study and baseline of the tiny experiment is done."""
    out = tmp_path_factory.mktemp("results")
    tiny = {"quick": dataclasses.replace(TINY, task=f"npz:{npz}", parts=PARTS)}
    options = f"--engine inline --log-every 2 --out {out}".split()
    with pytest.MonkeyPatch.context() as patch:  # pixels take long
        patch.setattr(Figure, "savefig", lambda _, path, **__: path.touch())
        assert run.run(dataclasses.replace(EXPERIMENT, presets=tiny), options) == 0
    return out


def record_of(folder, model, start, n=18):
    wanted = model, start, n
    names = ("model", "start", "n")
    (found,) = (
        r
        for r in ResultsStore(folder).records()
        if tuple(map(r["config"].get, names)) == wanted
    )
    return found


def test_records_hold_what_the_figures_need(folder):
    for model, start in [("quadratic", "convolution"), ("gaussian", "random")]:
        curves = record_of(folder, model, start)["curves"]
        assert curves["observed_at"] == [0, 2, 4]
        assert np.shape(curves["centres"]) == (3, 1, 4, 2)
        assert np.shape(curves["precisions"]) == (3, 1, 4, 2, 2)
    started = record_of(folder, "quadratic", "convolution")["curves"]["centres"]
    assert started[0] == [[[0, 0], [0, 1], [1, 0], [1, 1]]]
    assert started[2] != started[0]
    for model in ("relative", "relative_content"):
        metrics = record_of(folder, model, "random")["metrics"]
        maps = np.asarray(metrics["maps"])
        assert maps.shape == (1, 4, 4, 4)
        np.testing.assert_allclose(maps.sum((-2, -1)), 1.0, atol=2e-3)
        assert ("content_share" in metrics) == (model == "relative_content")
    for record in ResultsStore(folder).records():
        if not record["config"]["task"].startswith("convolution"):
            assert 0 <= record["metrics"]["test_accuracy"] <= 1
            assert "val_accuracy" not in record["metrics"]


def test_the_report_shows_every_model_and_figure(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    for name in [
        "training_quadratic.png",
        "training_quadratic_convolution.png",
        "training_gaussian.png",
        "centres.png",
        "maps_relative.png",
        "maps_relative_content.png",
        "starts.png",
    ]:
        assert f"]({name})" in text and (folder / name).is_file()
    for name in ("ResNet", "majority class", "generalised Gaussian"):
        assert f"| {name}" in text or f", {name} |" in text
    assert "| 9 |" in text and "| 18 |" in text


# ------------------------------------------------------------------ the teacher


def test_a_student_is_told_by_its_error_and_by_the_places_it_finds(folder):
    records = ResultsStore(folder).records()
    some = [r for r in records if r["config"]["task"] == "convolution-3x3"]
    students = {r["config"]["seed"]: r for r in some if "kernel" in r["config"]}
    for record in students.values():
        assert record["metrics"]["test_loss"] > 0.1
        assert 0 <= record["metrics"]["offsets"] <= 1
        assert len(record["curves"]["found"]) == 3
    assert np.shape(students[0]["curves"]["centres"]) == (3, 9, 2)
    assert "centres" not in students[1]["curves"]
    errors = [r["metrics"] for r in some if "baseline" in r["metrics"]]
    floors = {(m["baseline"], m["of_seed"]): m["test_loss"] for m in errors}
    assert len(floors) == 4
    assert max(floors["theorem", 0], floors["theorem", 1]) < 1e-9
    assert 0.1 < floors["frozen", 0] < 1 and floors["frozen", 0] != floors["frozen", 1]
    assert "heads find its places" in (folder / "report.md").read_text("utf-8")


def test_places_are_found_by_heads_that_look_at_one_token():
    centres = np.array([[0, 0.2], [0, -0.2], [1, 1], [-1, 1], [2, 0]])
    sharp = np.array([25, 25, 25, 0.1, 25])[:, None, None] * np.eye(2)
    assert grid.offsets_found(centres, sharp, 3) == 2
    assert grid.offsets_found(centres, sharp, 5) == 3


# ------------------------------------------------------------------ scores


def test_tuning_never_reads_the_test_part(dataset):
    task = ConvTask(dataclasses.replace(dataset, test_images=None, test_labels=None))
    cell = cell_of(TINY, dataset.name, "resnet", None, 30)
    assert cell.phase == "tune"
    found = task.score(cell, task.initial_params(cell))
    assert found["val_accuracy"] * 6 == round(found["val_accuracy"] * 6)
    chosen, held_out = task.parts(cell)
    assert not set(chosen) & set(held_out)


def test_scores_count_every_image_once(dataset):
    task = ConvTask(dataset)
    cell = cell_of(TINY, dataset.name, "quadratic", "random", 18)
    cell = dataclasses.replace(cell, phase="final", seed=1)
    params = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape),
        task.initial_params(cell),
    )
    task.eval_batch = 7  # 30 images: the last batch is filled up
    found = task.score(cell, params)
    images, labels = dataset.test_images, dataset.test_labels
    apply = task.program(cell).more["apply"]
    logits = np.asarray(apply(params, normalize(images, task.hyper(cell))))
    loss = -np.asarray(jax.nn.log_softmax(logits))[np.arange(30), labels].mean()
    wanted = (logits.argmax(-1) == labels).mean(), loss
    found = found["test_accuracy"], found["test_loss"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


# ------------------------------------------------------------------ cells and plans


def test_the_largest_n_is_shared_by_both_parts_and_tuned_once():
    several = dataclasses.replace(CPU, ns=(300, 3_000, 60_000), models=MODELS)
    studies = make_studies(several, "images")
    assert len(studies) == 5 + 1 + 2 * 3
    for name, study in studies.items():
        alone = name.endswith("n=60000")
        assert (study.tuned_by is None) == alone
        assert len(study.tuning()) == (3 if name.startswith("resnet") else 4)
        assert {c.n for c in study.grid} == {int(name.partition("n=")[2])}
        if not alone:
            assert {c.n for c in study.tuned_by.grid} == {60_000}
    starts = make_studies(dataclasses.replace(several, parts=("starts",)), "images")
    assert len(starts) == 9 and starts.items() <= studies.items()


def test_a_floor_of_more_images_than_once_has_a_record_of_its_own(dataset):
    """What was fitted to a part is not taken for what is fitted to all."""
    floors = floors_of(CPU, dataset, "images", ())
    made = {f.config["model"]: f.config.get("differs") for f in floors}
    fitted = {f"logistic_regression n=60000 seed={seed}" for seed in range(3)}
    assert {name for name in made if made[name]} == fitted
    assert all(made[name] == {"fitted_to": 60_000} for name in fitted)


def test_models_of_the_cpu_preset_match_in_parameters():
    counts = {}
    for model in ("quadratic", "gaussian", "relative", "resnet"):
        start = None if model == "resnet" else "random"
        cell = cell_of(CPU, "images", model, start, 1)
        made = nnx.eval_shape(
            lambda cell=cell: cells.build_model(cell, (28, 28, 1), 10)
        )
        leaves = jax.tree.leaves(nnx.state(made, nnx.Param))
        counts[model] = sum(leaf.size for leaf in leaves)
    assert max(counts.values()) < 1.07 * min(counts.values()), counts


@pytest.mark.parametrize("model", ["gaussian", "relative_content"])
def test_train_step_at_the_papers_sizes_lowers_for_accelerators(model):
    cell = cell_of(PRESETS["accelerator"], "cifar10", model, "random", 500)
    cell = dataclasses.replace(cell, depth=1)  # the others are alike

    def build(seed):
        return nnx.eval_shape(lambda: cells.build_model(cell, (32, 32, 3), 10, seed))

    with jax.numpy_dtype_promotion("standard"):  # Flax, bfloat16
        choice = Augment(flip=True, crop=4, alone=True)
        program = image_program(build, cells.split, 10, choice)
        pixels = dict(pixel_mean=np.zeros(3), pixel_std=np.ones(3))
        hyper = optim.hyper_of(cell, label_smoothing=0, mixup=0, **pixels)
        state = jax.eval_shape(optim.init_state, program.initial_params(0), hyper)
        batch = Batch(
            jax.ShapeDtypeStruct((512, 32, 32, 3), jnp.uint8),
            jax.ShapeDtypeStruct((512,), jnp.int32),
        )
        step = jax.jit(optim.make_step(program.loss))
        exported = jax.export.export(step, platforms=("cuda", "tpu"))(
            state, batch, jax.random.key(0)
        )
    assert exported.platforms == ("cuda", "tpu")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(parts=("other",)), "parts must be some of encodings, starts"),
        (dict(models=()), f"models must be some of {', '.join(MODELS)}"),
        (dict(num_heads=5), "num_heads must be a square number"),
    ],
)
def test_settings_that_cannot_be(more, message):
    with pytest.raises(ValueError, match=message):
        Config(**more)
