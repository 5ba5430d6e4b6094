"""The plan of the experiment, and how cells of images are trained and scored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import build
from experiments.core import engine
from experiments.core.cell import Runtime, attention_digest
from experiments.core.loop import Trainer
from experiments.core.observe import Progress
from experiments.core.signals import Stop
from experiments.core.store import ResultsStore
from experiments.data import images as data
from experiments.data.fetch import DataError
from experiments.data_scaling import experiment, sequences
from experiments.data_scaling.experiment import (
    PRESETS,
    Config,
    Grid,
    ScalingCell,
    ScalingTask,
    studies_of,
)
from experiments.data_scaling.tasks import Scenes, load_task, task_name
from experiments.tasks import labelling

CONFIG = Config(
    ns=(20, 60),
    seeds=2,
    updates=50,
    tune_updates=10,
    models=("vit", "resnet"),
    baselines=("majority",),
    vit=Grid(learning_rates=(1e-3, 3e-3)),
    resnet=Grid(learning_rates=(1e-2,)),
)
SHAPE = (8, 8, 1)
CELL = ScalingCell(
    task="toy", model="vit", size="mu", patch=4, n=60, seed=0, updates=6,
    batch_size=16, learning_rate=3e-3,
)  # fmt: skip
MLP = dataclasses.replace(CELL, model="mlp", patch=None)


def test_the_plan_holds_every_cell_once_the_largest_first(dataset):
    studies = studies_of(CONFIG, "toy", SHAPE)
    assert [study.name for study in studies] == [
        f"{model} n={n}" for n in (60, 20) for model in ("vit", "resnet")
    ]
    vit = studies[0]
    assert [cell.learning_rate for cell in vit.grid] == [1e-3, 3e-3]
    assert {(c.phase, c.updates, c.seed, c.patch) for c in vit.grid} == {
        ("tune", 10, 0, 2)
    }
    # Two to choose between and two seeds; nothing to choose and two seeds.
    assert [study.total() for study in studies] == [4, 2, 4, 2]
    floors = experiment.baselines_of(CONFIG, dataset, "toy")
    assert [(f.config["n"], f.config["seed"]) for f in floors] == [
        (60, 0), (60, 1), (20, 0), (20, 1),
    ]  # fmt: skip
    assert floors[0].measure()["n"] == 60


def test_no_clipping_survives_the_store(tmp_path):
    """The store writes infinity as text; a final cell needs the number."""
    endless = dataclasses.replace(CONFIG, clip_norm=float("inf"))
    study = studies_of(endless, "toy", SHAPE)[0]
    assert {cell.clip_norm for cell in study.final(1)} == {float("inf")}


def test_every_preset_plans_cells():
    for name, preset in PRESETS.items():
        if preset.task in sequences.TASKS:
            assert sequences.studies_of(preset, name), name
            continue
        shape = (32, 32, 3) if preset.task == "cifar10" else (28, 28, 1)
        shape = (30, 30, 1) if preset.task == "scenes" else shape
        assert studies_of(preset, name, shape), name


@pytest.mark.parametrize(
    ("runtime", "count"),
    [(Runtime(workers=3), 3), (Runtime(), 2), (Runtime(distributed=True), 1)],
)
def test_workers_by_default_one_a_core(monkeypatch, runtime, count):
    monkeypatch.setattr(engine, "available_cores", lambda: [0, 1])
    monkeypatch.setattr(engine.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(engine.jax, "local_device_count", lambda: 1)
    assert engine.worker_count(runtime) == count
    monkeypatch.setattr(engine.jax, "default_backend", lambda: "gpu")
    assert engine.worker_count(Runtime()) == 1


def test_scenes_are_named_by_what_makes_their_data(monkeypatch, dataset):
    assert task_name("fashion_mnist", Scenes()) == "fashion_mnist"
    few = Scenes(rule="pointer", grid=3, item=8, cells=3, pool=20, test=10)
    assert task_name("scenes", few).endswith("-pool20-test10")
    monkeypatch.setattr(
        "experiments.data_scaling.tasks.data.load", lambda *_, **__: dataset
    )
    made = load_task("scenes", few)
    assert made.name == task_name("scenes", few) + "-toy"
    assert made.train_images.shape == (20, 24, 24, 1) and len(made.test_labels) == 10


def test_digits_stand_in_with_what_they_can_serve(monkeypatch, capsys):
    digits = data.load("digits")
    monkeypatch.setattr(experiment, "load_task", lambda *_, **__: digits)
    (plan,) = experiment.plans(PRESETS["images"])
    assert "2500" in capsys.readouterr().out
    cells = list(plan.cells())
    assert {cell.n for cell in cells} == {100, 500}
    assert {(cell.task, cell.flip) for cell in cells} == {("digits", False)}
    assert {cell.patch for cell in cells if cell.model == "vit"} == {2}


def test_images_stand_in_for_speech_where_that_is_allowed(monkeypatch, capsys):
    def missing(name):
        raise DataError("no speech here")

    digits = data.load("digits")
    monkeypatch.setattr(sequences.sequence_tasks, "load_task", missing)
    monkeypatch.setattr(experiment, "load_task", lambda *_, **__: digits)
    (plan,) = experiment.plans(PRESETS["quick"])
    assert "no speech here\nImages stand in for phones" in capsys.readouterr().out
    assert {cell.model for cell in plan.cells()} == {"vit", "resnet"}
    with pytest.raises(DataError, match="no speech here"):
        experiment.plans(dataclasses.replace(PRESETS["quick"], allow_fallback=False))


def test_an_explicit_patch_is_kept_or_refused():
    shape = (28, 28, 1)

    def patches(config):
        return {c.patch for s in studies_of(config, "t", shape) for c in s.grid}

    fits = dataclasses.replace(PRESETS["images"], patch=4, models=("vit",))
    assert patches(fits) == {4}
    with pytest.raises(ValueError, match="patch must divide the images of 28 x 28"):
        patches(dataclasses.replace(fits, patch=5))
    with pytest.raises(ValueError, match="patch must be at least 1"):
        dataclasses.replace(fits, patch=0)
    own = dataclasses.replace(fits, patch=None, models=("vit", "vit:ti"))
    assert patches(own) == {7, 4}


def test_models_of_matched_scenes_cost_the_same_and_see_what_is_said():
    preset = PRESETS["scenes"]
    preset = dataclasses.replace(preset, models=(*preset.models, "resnet:mu_item"))
    shapes = {
        s.name.split()[0]: s.grid[0] for s in studies_of(preset, "t", (30, 30, 1))
    }
    found = {
        name: experiment.cost_of(
            (
                *(getattr(cell, trait) for trait in experiment._SHAPE),
                False,
                (30, 30, 1),
                10,
            )
        )
        for name, cell in shapes.items()
    }
    for cost in found.values():
        for name in ("params", "flops"):
            assert 0.87 < cost[name] / found["vit"][name] < 1.15, name
    fields = {name: cost.get("receptive_field") for name, cost in found.items()}
    assert fields == {
        "vit": None,
        "resnet:mu_cell": 11,
        "resnet:mu_grid": 115,
        "resnet:mu_item": 11,
    }


@pytest.mark.parametrize(("size", "alone"), [("mu_cell", True), ("mu_item", False)])
def test_what_a_position_depends_on_is_its_field_but_for_group_norms(size, alone):
    model = build(
        "resnet", size, image_shape=(30, 30, 1), num_classes=10, rngs=nnx.Rngs(0)
    )
    image = jax.random.normal(jax.random.key(0), (1, 30, 30, 1))

    def first(image):
        x = model.stem(image)
        for block in model.blocks:
            x = block(x)
        return jnp.sum(jnp.square(model.norm(x)[0, 0, 0, :64]))

    slopes = jnp.abs(jax.grad(first)(image))[0, :, :, 0]
    assert slopes[:11, :11].max() > 1e-4
    beyond = slopes.at[:11, :11].set(0.0).max()
    assert (beyond == 0.0) == alone and (alone or beyond > 1e-6)


@pytest.mark.parametrize("preset", ["phones", "pos"])
def test_convolutions_and_self_attention_for_sequences_cost_the_same(preset):
    config = dataclasses.replace(PRESETS[preset], ns=(300,))
    inputs = sequences.sequence_tasks.load_task(f"toy_{preset}").inputs
    found = {}
    for study in sequences.studies_of(config, preset):
        traits = tuple(getattr(study.grid[0], name) for name in labelling._SHAPE)
        key = labelling.ProgramKey(traits, inputs, 12, 64, False)
        found[study.name.split()[0]] = labelling.model_cost(key)
    like = found["attention"]
    for name, cost in found.items():
        if name.startswith(("cnn", "attention")):
            params = cost.params - cost.input_params, like.params - like.input_params
            assert 0.9 < params[0] / params[1] < 1.1, (name, params)
            assert 0.9 < cost.flops / like.flops < 1.1, (name, cost, like)


def test_scenes_are_never_mirrored():
    with pytest.raises(ValueError, match="flip must be off for scenes"):
        dataclasses.replace(PRESETS["images"], task="scenes")


def test_whole_utterances_through_windows_are_labelled_in_their_place():
    speech = sequences.recut(sequences.sequence_tasks.load_task("toy_phones"), 16)
    assert max(map(len, speech.whole_test.labels)) > 40
    config = dataclasses.replace(
        PRESETS["smoke_sequences"], models=("window:0", "cnn:2"), ns=(8,)
    )
    task = sequences.SpeechTask(speech)
    for study in sequences.studies_of(config, speech.name):
        (cell,) = study.final(0)
        params = jax.tree.map(
            lambda x: np.sin(7 * np.arange(x.size, dtype="f4")).reshape(x.shape),
            task.initial_params(cell),
        )
        found = task.score(cell, params)
        # What sees less than half a window says the same as on the whole.
        assert found["test_windows_accuracy"] == found["test_whole_accuracy"]
    with pytest.raises(ValueError, match="labels.crop must be left out but for"):
        sequences.recut(speech, 17)


# --------------------------------------------------------------- cells of images


def trained(cell, dataset, folder, task=ScalingTask):
    store = ResultsStore(folder)
    progress = Progress(1, live=False)
    assert Trainer(task(dataset), store, Runtime(), progress, Stop()).run([cell])
    record = store.get(cell.config())
    assert record["status"] == "done", record["metrics"]
    return record


@pytest.mark.usefixtures("tiny")
def test_a_record_is_complete(dataset, tmp_path):
    metrics = trained(CELL, dataset, tmp_path)["metrics"]
    assert metrics["params"] > 0 and metrics["flops"] > 0
    assert 0 <= metrics["test_accuracy"] <= 1 and metrics["test_loss"] > 0
    assert metrics["data_sha256"] == dataset.sha256
    assert metrics["train_accuracy"] == round(metrics["train_accuracy"] * 60) / 60


@pytest.mark.usefixtures("tiny")
def test_tuning_reads_no_test_image_and_no_validation_image(dataset, tmp_path):
    tune, task = dataclasses.replace(MLP, phase="tune"), ScalingTask(dataset)
    train, validation = task.parts(tune)
    assert len(train) == 48 and len(validation) == 12
    assert not set(train) & set(validation)
    whole = task.parts(dataclasses.replace(tune, phase="final"))[0]
    assert set(train) | set(validation) == set(whole)
    blind = dataclasses.replace(dataset, test_images=None, test_labels=None)
    record = trained(tune, blind, tmp_path / "a")
    assert {"val_accuracy", "val_loss"} <= set(record["metrics"])
    # Other pixels in the validation split change its score and nothing else.
    images = dataset.train_images.copy()
    images[validation] = 255 - images[validation]
    other = dataclasses.replace(blind, train_images=images)
    changed = trained(tune, other, tmp_path / "b")
    assert changed["curves"] == record["curves"]
    assert changed["metrics"]["train_accuracy"] == record["metrics"]["train_accuracy"]
    assert changed["metrics"]["val_loss"] != record["metrics"]["val_loss"]


@pytest.mark.usefixtures("tiny")
def test_scores_are_those_of_all_images_whatever_the_batch(dataset, tmp_path):
    class InSevens(ScalingTask):
        eval_batch = 7  # 30 images: a rest of 2

    whole = trained(MLP, dataset, tmp_path / "a")["metrics"]
    parts = trained(MLP, dataset, tmp_path / "b", InSevens)["metrics"]
    for name in "test_accuracy", "test_loss", "train_accuracy":
        assert parts[name] == pytest.approx(whole[name])


@pytest.mark.usefixtures("tiny")
def test_an_edited_attention_file_does_not_change_a_run(dataset, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def fn(query, key, value):\n    return value\n")
    name = f"{file}:fn"
    cell = dataclasses.replace(
        CELL, attention=name, attention_sha256=attention_digest(name)
    )
    task = ScalingTask(dataset)
    task.rehearse([cell])
    file.write_text("def fn(query, key, value):\n    return 2 * value\n")
    task.rehearse([cell])  # what was loaded is what runs
    fresh = dataclasses.replace(cell, attention_sha256="0" * 64)
    with pytest.raises(ValueError, match="was edited since the run began"):
        task.rehearse([fresh])
