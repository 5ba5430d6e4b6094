from __future__ import annotations

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import loop, train
from experiments.core.cell import Cell, Runtime, attention_digest
from experiments.core.checkpoint import CheckpointError, Checkpoints
from experiments.core.loop import Interrupted, Runner, StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore, StoreError

pytestmark = pytest.mark.usefixtures("tiny")

CELL = Cell(
    task="toy", model="vit", size="mu", patch=4, n=60, seed=0, updates=12,
    batch_size=16, learning_rate=3e-3,
)  # fmt: skip
# Draws random numbers in each step.
RANDOM = dataclasses.replace(CELL, dropout_rate=0.1, crop=1, flip=True)


class Stop(StopSignal):
    """Asks to stop the `after`-th time that somebody looks."""

    def __init__(self, after=math.inf):
        super().__init__()
        self.left = after

    @property
    def signum(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


class Told(Progress):
    """Remembers what it was told."""

    def __init__(self):
        super().__init__(1, live=False)
        self.begins, self.lines = [], []

    def begin(self, label, updates, step=0):
        self.begins.append(step)

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def run(dataset, tmp_path):
    """Runs cells in a folder; returns (records or None, what was told)."""

    def run(cells, folder="out", *, stop=math.inf, data=dataset, **runtime):
        cells = cells if isinstance(cells, list) else [cells]
        store = ResultsStore(tmp_path / folder)
        told = Told()
        settings = Runtime(**(dict(log_every=5, checkpoint_seconds=1e9) | runtime))
        runner = Runner(data, store, settings, told, Stop(stop))
        try:
            assert runner.run(cells)
        except Interrupted:
            assert not any(store.get(cell.config()) for cell in cells)
            return None, told
        return [store.get(cell.config()) for cell in cells], told

    return run


def numbers(record):
    """What must not depend on when and how a cell was run."""
    metrics = {k: v for k, v in record["metrics"].items() if k != "images_per_s"}
    return {k: record[k] for k in ("config", "status", "curves")} | metrics


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """Records of uninterrupted runs."""
    store = ResultsStore(tmp_path_factory.mktemp("whole"))
    settings = Runtime(log_every=5, checkpoint_seconds=1e9)
    runner = Runner(dataset, store, settings, Told(), Stop())
    for cell in CELL, RANDOM:
        assert runner.run([cell])
    return {cell: store.get(cell.config()) for cell in (CELL, RANDOM)}


def test_a_run_learns_and_its_record_is_complete(whole, dataset):
    record = whole[CELL]
    metrics = record["metrics"]
    assert record["status"] == "done" and metrics["updates"] == 12
    assert record["curves"]["step"] == [5, 10, 12]
    assert record["curves"]["loss"][-1] < record["curves"]["loss"][0]
    assert metrics["params"] > 0 and metrics["flops"] > 0
    assert 0 <= metrics["test_accuracy"] <= 1 and metrics["test_loss"] > 0
    assert metrics["data_sha256"] == dataset.sha256
    # The first point of the curve, from its definition.
    key = loop._ProgramKey.of(CELL, dataset, train.data_mesh(), False, True)
    assert metrics["train_accuracy"] == round(metrics["train_accuracy"] * 60) / 60
    assert key.num_classes == 3


# Step 3 lies between points of the curve, 5 and 10 on one.
@pytest.mark.parametrize("stops", [[3], [5], [2, 6, 9], [10]])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, whole, stops):
    before = 0
    for stop in stops:
        records, told = run(RANDOM, stop=stop - before - 1)
        assert records is None and told.begins == [before]
        before = stop
    (record,), told = run(RANDOM)
    assert told.begins == [before], "it did not start again from 0"
    assert numbers(record) == numbers(whole[RANDOM])


def test_scans_and_batches_from_the_host_change_nothing(run, whole):
    (record,), _ = run(CELL, "host", device_data=False)
    # Another program of the same sums: the last bit of a loss may differ.
    ours, wanted = numbers(record), numbers(whole[CELL])
    for name in "test_loss", "train_loss":
        if name in wanted:
            assert ours.pop(name) == pytest.approx(wanted.pop(name), rel=1e-5)
    assert ours == wanted
    assert run(RANDOM, "scan", stop=1, steps_per_dispatch=4)[0] is None
    (record,), told = run(RANDOM, "scan", steps_per_dispatch=4)
    assert told.begins == [5]  # in fours, but points of the curve cut them
    for name in "loss", "accuracy":
        np.testing.assert_allclose(
            record["curves"][name], whole[RANDOM]["curves"][name], rtol=1e-5
        )


def seeds(cell, count=3):
    return [dataclasses.replace(cell, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("device_data", [True, False])
def test_seeds_at_once_are_seeds_one_by_one(run, whole, device_data):
    options = dict(device_data=device_data)
    assert run(seeds(RANDOM), "seeds", stop=2, **options)[0] is None
    together, told = run(seeds(RANDOM), "seeds", **options)
    assert told.begins == [3]
    assert numbers(together[0])["config"] == RANDOM.config()
    alone, _ = run(seeds(RANDOM)[2], "alone")
    for a, b in ((together[0], whole[RANDOM]), (together[2], alone[0])):
        for name in "loss", "accuracy":
            np.testing.assert_allclose(a["curves"][name], b["curves"][name], rtol=1e-5)
        for name in "test_loss", "test_accuracy", "train_accuracy":
            assert a["metrics"][name] == pytest.approx(b["metrics"][name], rel=1e-5)


def test_only_missing_seeds_are_trained(run, whole):
    first = run(CELL)[0][0]
    records, told = run(seeds(CELL, 2))
    assert records[0] == first, "a finished cell was computed again"
    assert told.begins == [0] and records[1]["config"]["seed"] == 1
    assert run(seeds(CELL, 2))[1].begins == []


def test_one_and_several_seeds_keep_their_own_checkpoints(run, whole):
    assert run(seeds(CELL, 2), stop=2)[0] is None
    assert run(CELL, stop=1)[1].begins == [0]
    assert run(seeds(CELL, 2), stop=2)[1].begins == [3]
    (record,), told = run(CELL)
    assert told.begins == [2] and numbers(record) == numbers(whole[CELL])


# ---------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_ends_the_cell(run, whole):
    broken = dataclasses.replace(CELL, learning_rate=1e37, model="mlp", patch=None)
    (record,), told = run(broken)
    assert record["status"] == "diverged"
    assert record["metrics"]["diverged_at"] == 5 == record["metrics"]["updates"]
    assert "test_accuracy" not in record["metrics"]
    assert record["curves"]["loss"] == [None]
    assert "diverged at update 5" in told.lines[-1]
    # It may also break in the last update, after the last loss was measured.
    (record,), _ = run(dataclasses.replace(broken, updates=1))
    assert record["status"] == "diverged" and record["metrics"]["diverged_at"] == 1
    assert math.isfinite(record["curves"]["loss"][0])
    assert "test_accuracy" not in record["metrics"]


def test_a_seed_that_diverges_leaves_the_others_alone(run, whole, monkeypatch):
    healthy = loop._hyper

    def hyper(cell, *rest):
        found = healthy(cell, *rest)
        return (
            found._replace(learning_rate=np.float32(math.nan)) if cell.seed else found
        )

    monkeypatch.setattr(loop, "_hyper", hyper)
    assert run(seeds(RANDOM, 3), stop=7)[0] is None  # NaN goes through a checkpoint
    records, told = run(seeds(RANDOM, 3))
    assert told.begins == [8]
    assert [r["status"] for r in records] == ["done", "diverged", "diverged"]
    assert records[1]["metrics"]["diverged_at"] == 5
    np.testing.assert_allclose(
        records[0]["curves"]["loss"], whole[RANDOM]["curves"]["loss"], rtol=1e-5
    )
    assert records[0]["metrics"]["test_loss"] == pytest.approx(
        whole[RANDOM]["metrics"]["test_loss"], rel=1e-5
    )


# --------------------------------------------------------------- checkpoints


@pytest.fixture
def interrupted(run, tmp_path):
    """The folder of the checkpoints of a run that was interrupted at step 7."""
    run(CELL, stop=6)
    return ResultsStore(tmp_path / "out").checkpoint_dir(CELL.config())


@pytest.mark.parametrize("part", ["progress", "state", "everything"])
def test_a_damaged_checkpoint_starts_the_cell_anew(run, whole, interrupted, part):
    for file in (interrupted / "7").rglob("*"):
        if file.is_file() and part in (*file.parts, "everything")[-4:]:
            file.write_bytes(file.read_bytes()[:5])
    (record,), told = run(CELL)
    assert told.begins == [0]
    assert told.lines[0].startswith("warning: cannot read the checkpoint")
    (kept,) = interrupted.parent.glob("*.corrupt")
    assert kept.name in told.lines[0] and (kept / "7").is_dir()
    assert numbers(record) == numbers(whole[CELL])


def test_a_half_written_checkpoint_is_not_there(run, whole, interrupted):
    for step in 8, 9:
        left = interrupted / f"{step}.orbax-checkpoint-tmp" / "state"
        left.mkdir(parents=True)
        (left / "junk").write_text("x")
    assert run(CELL, stop=0)[1].begins == [7]  # saves step 8, over what is left of it
    (record,), told = run(CELL)
    assert told.begins == [8] and not any("warning" in line for line in told.lines)
    assert numbers(record) == numbers(whole[CELL])
    assert not interrupted.exists()


def test_a_checkpoint_of_another_state_is_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    state = {"a": jax.numpy.arange(4.0)}
    assert checkpoints.restore(state) is None
    checkpoints.save(3, state, {"x": 1})
    found, progress = checkpoints.restore(state)
    np.testing.assert_array_equal(found["a"], state["a"])
    assert progress == {"x": 1}
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        checkpoints.restore({"a": jax.numpy.zeros((2, 4))})


def test_a_full_disk_stops_no_run_but_is_told(run, whole, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Checkpoints, "_manager", full)
    (record,), told = run(CELL, checkpoint_seconds=0)
    assert "warning: cannot write a checkpoint" in told.lines[0]
    assert "No space left" in told.lines[0]
    assert numbers(record) == numbers(whole[CELL])
    with pytest.raises(StoreError, match="SIGTERM.*is lost.*No space left.*Free some"):
        run(CELL, "stopped", stop=3)


# ---------------------------------------------------------- data and records


def test_tuning_reads_no_test_image_and_no_validation_image(run, dataset):
    tune = dataclasses.replace(CELL, phase="tune", model="mlp", patch=None)
    split = loop.split_of(tune, dataset)
    assert len(split.train) == 48 and len(split.validation) == 12
    assert not set(split.train) & set(split.validation)
    assert set(split.train) | set(split.validation) == set(
        loop.split_of(dataclasses.replace(tune, phase="final"), dataset).train
    )
    blind = dataclasses.replace(dataset, test_images=None, test_labels=None)
    (record,), _ = run(tune, data=blind)
    assert {"val_accuracy", "val_loss"} <= set(record["metrics"])
    # Other pixels in the validation split change its score and nothing else.
    images = dataset.train_images.copy()
    images[split.validation] = 255 - images[split.validation]
    other = dataclasses.replace(blind, train_images=images)
    (changed,), _ = run(tune, "other", data=other)
    assert changed["curves"] == record["curves"]
    assert changed["metrics"]["train_accuracy"] == record["metrics"]["train_accuracy"]
    assert changed["metrics"]["val_loss"] != record["metrics"]["val_loss"]


def test_scores_are_those_of_all_images_whatever_the_batch(run, whole, monkeypatch):
    monkeypatch.setattr(loop, "EVAL_BATCH", 7)  # 30 images: a rest of 2
    (record,), _ = run(CELL)
    for name in "test_accuracy", "test_loss", "train_accuracy":
        assert record["metrics"][name] == pytest.approx(whole[CELL]["metrics"][name])


def test_cells_of_another_process_are_left_to_it(dataset, tmp_path):
    store = ResultsStore(tmp_path)
    runner = Runner(dataset, store, Runtime(), Told(), Stop())
    with ResultsStore(tmp_path).claim(CELL.config()) as claimed:
        assert claimed and not runner.run([CELL])
    assert store.get(CELL.config()) is None


def test_tensorboard_files_by_flag(run, tmp_path):
    mlp = dataclasses.replace(CELL, model="mlp", patch=None)
    run(mlp)
    assert not list(tmp_path.rglob("events.*"))
    run(mlp, "flag", tensorboard=True)
    (file,) = (tmp_path / "flag" / "tensorboard").rglob("events.*")
    assert b"train/loss" in file.read_bytes() and b"test_accuracy" in file.read_bytes()


def test_an_edited_attention_file_does_not_change_a_run(dataset, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def fn(query, key, value):\n    return value\n")
    cell = dataclasses.replace(
        CELL,
        attention=f"{file}:fn",
        attention_sha256=attention_digest(f"{file}:fn"),
    )
    mesh = train.data_mesh()
    loop.check(cell, dataset, mesh)
    file.write_text("def fn(query, key, value):\n    return 2 * value\n")
    loop.check(cell, dataset, mesh)  # what was loaded is what runs
    fresh = dataclasses.replace(cell, attention_sha256="0" * 64)
    with pytest.raises(ValueError, match="was edited while the run was starting"):
        loop.check(fresh, dataset, mesh)


# ------------------------------------------------------------------- signals


def test_a_later_signal_acts_as_usual(monkeypatch):
    # A background job of a shell starts with SIGINT ignored: set what is usual.
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            assert stop.signum is None
            signal.raise_signal(signal.SIGINT)
            assert stop.signum == signal.SIGINT
            signal.raise_signal(signal.SIGINT)  # at once: the same request once more
            monkeypatch.setattr(stop, "GRACE", -1.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outer)


def test_a_worker_ends_with_the_process_that_started_it():
    assert StopSignal(os.getppid()).signum is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert StopSignal(gone.pid).signum == signal.SIGTERM


def test_a_cell_that_fails_is_a_record_with_its_traceback(run, monkeypatch):
    def scores(*_):
        raise RuntimeError("no scores today")

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_scores", scores)
        (record,), told = run(CELL, "failing")
    assert record["status"] == "failed"
    assert record["metrics"]["error"] == "RuntimeError: no scores today"
    assert "in scores\n" in record["metrics"]["traceback"]
    assert "failed, RuntimeError: no scores today" in told.lines[-1]


def test_a_seed_that_the_last_update_broke_is_told_from_the_others(run, monkeypatch):
    step = train.make_train_step

    def make(*arguments):
        one = step(*arguments)

        def broken(state, batch, rng):
            state, metrics = one(state, batch, rng)
            bad = jax.random.key_data(rng)[-1] == 1  # seed 1
            lost = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), state.params)
            return state._replace(params=lost), metrics

        return broken

    monkeypatch.setattr(train, "make_train_step", make)
    loop.programs.cache_clear()
    mlp = dataclasses.replace(CELL, model="mlp", patch=None, updates=1)
    found, _ = run(seeds(mlp), "last")
    loop.programs.cache_clear()
    assert [record["status"] for record in found] == ["done", "diverged", "done"]
    assert found[1]["metrics"]["diverged_at"] == 1
