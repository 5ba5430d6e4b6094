from __future__ import annotations

import dataclasses

import pytest
from experiments.data_scaling.presets import PRESETS, Experiment, Grid

from experiments.core import workers
from experiments.core.cell import Runtime
from experiments.core.store import ResultsStore
from experiments.data import images as data
from experiments.data_scaling import run
from experiments.data_scaling.tasks import Scenes, load_task, task_name

EXPERIMENT = Experiment(
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


def put(store, config, **metrics):
    status = "done" if metrics else "diverged"
    store.put(config, status=status, metrics=metrics, wall_time_s=1.0)


def test_the_plan_holds_every_cell_once_the_largest_first():
    units = run.plan(EXPERIMENT, "toy", SHAPE)
    assert [(unit.model, unit.n) for unit in units] == [
        (model, n) for n in (60, 20) for model in ("vit", "resnet", "majority")
    ]
    vit = units[0]
    assert [cell.learning_rate for cell in vit.grid] == [1e-3, 3e-3]
    assert {(c.phase, c.updates, c.seed, c.patch) for c in vit.grid} == {
        ("tune", 10, 0, 2)
    }
    # Two to choose between and two seeds; nothing to choose and two seeds; two seeds.
    assert run.count_cells(units, EXPERIMENT) == 2 * (4 + 2 + 2)


def test_the_best_on_the_validation_split_is_trained_with_every_seed(tmp_path):
    store = ResultsStore(tmp_path)
    unit = run.plan(EXPERIMENT, "toy", SHAPE)[0]
    put(store, unit.grid[0].config())  # diverged
    put(store, unit.grid[1].config(), val_accuracy=0.1)
    assert run.best_point(unit, store) == 1
    assert run.count_done([unit], store, EXPERIMENT) == 2
    cells = run.final_cells(unit, 1, EXPERIMENT)
    assert [(c.seed, c.phase, c.updates, c.learning_rate) for c in cells] == [
        (0, "final", 50, 3e-3),
        (1, "final", 50, 3e-3),
    ]
    put(store, cells[0].config(), test_accuracy=0.5)
    assert run.count_done([unit], store, EXPERIMENT) == 3


def test_of_equals_the_first_is_taken(tmp_path):
    store = ResultsStore(tmp_path)
    unit = run.plan(EXPERIMENT, "toy", SHAPE)[0]
    for cell in unit.grid:
        put(store, cell.config(), val_accuracy=0.5)
    assert run.best_point(unit, store) == 0


def test_no_clipping_survives_the_store(tmp_path):
    """The store writes infinity as text; a final cell needs the number."""
    store = ResultsStore(tmp_path)
    endless = dataclasses.replace(EXPERIMENT, clip_norm=float("inf"))
    unit = run.plan(endless, "toy", SHAPE)[0]
    put(store, unit.grid[1].config(), val_accuracy=0.5)
    (cell, _) = run.final_cells(unit, run.best_point(unit, store), endless)
    assert cell.clip_norm == float("inf")


def test_every_preset_plans_cells():
    for name, preset in PRESETS.items():
        shape = (32, 32, 3) if preset.task == "cifar10" else (28, 28, 1)
        shape = (30, 30, 1) if preset.task == "scenes" else shape
        assert run.plan(preset, name, shape), name


@pytest.mark.parametrize(
    ("runtime", "environment", "count"),
    [(Runtime(workers=3), 2, 3), (Runtime(), 2, 2), (Runtime(distributed=True), 2, 1)],
)
def test_workers_by_default_one_a_core(monkeypatch, runtime, environment, count):
    monkeypatch.setattr(workers, "available_cores", lambda: list(range(environment)))
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(workers.jax, "local_device_count", lambda: 1)
    assert workers.worker_count(runtime) == count
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "gpu")
    assert workers.worker_count(Runtime()) == 1


def test_scenes_of_the_fallback_have_a_name_of_their_own(monkeypatch, dataset):
    scenes = Scenes(pool=12, test=6, item=4, item_classes=3, cells=3)
    names = set()
    for source in "fashion_mnist", "digits":
        items = dataclasses.replace(dataset, name=source)
        monkeypatch.setattr(
            "experiments.data_scaling.tasks.data.load", lambda *_, i=items, **__: i
        )
        names.add(load_task("scenes", scenes).name)
    plain = task_name("scenes", scenes)
    assert names == {plain, f"{plain}-digits"}


def test_digits_stand_in_for_the_quick_preset(monkeypatch, capsys):
    def missing(*arguments):
        raise data.DataError("no network here")

    monkeypatch.setattr(data, "_load_fashion_mnist", missing)
    experiment, dataset, units = run.prepare(PRESETS["quick"], Runtime())
    assert dataset.name == "digits"
    assert experiment.ns == (100, 500) and not experiment.flip
    assert "2500" in capsys.readouterr().out
    assert {unit.n for unit in units} == {100, 500}
    assert {cell.patch for u in units for cell in u.grid if cell.model == "vit"} == {2}


def test_an_explicit_patch_is_kept_or_refused():
    shape = (28, 28, 1)
    fits = dataclasses.replace(PRESETS["quick"], patch=4, models=("vit",))
    assert {c.patch for u in run.plan(fits, "t", shape) for c in u.grid} == {4}
    with pytest.raises(ValueError, match="patch must divide the images of 28 x 28"):
        run.plan(dataclasses.replace(fits, patch=5), "t", shape)
    with pytest.raises(ValueError, match="patch must be at least 1"):
        dataclasses.replace(fits, patch=0)
    own = dataclasses.replace(fits, patch=None, models=("vit", "vit:ti"))
    assert {c.patch for u in run.plan(own, "t", shape) for c in u.grid} == {7, 4}


def test_scenes_are_never_mirrored():
    with pytest.raises(ValueError, match="--no-flip"):
        dataclasses.replace(PRESETS["quick"], task="scenes")
