"""The one training loop, on a line fitted to points."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import loop
from experiments.core.cell import Runtime
from experiments.core.checkpoint import CheckpointError, Checkpoints
from experiments.core.loop import Trainer
from experiments.core.observe import Progress
from experiments.core.signals import Interrupted, StopSignal, interruptible
from experiments.core.store import ResultsStore, StoreError
from tests.experiments.lines import LineCell, LineTask

CELL = LineCell()


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

    def begin(self, label, updates, step=0, worker=0):
        super().begin(label, updates, step)
        self.begins.append(step)

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def run(tmp_path):
    """Runs cells in a folder; returns (records or None, what was told)."""

    def run(cells, folder="out", *, stop=math.inf, task=None, **runtime):
        cells = cells if isinstance(cells, list) else [cells]
        store = ResultsStore(tmp_path / folder)
        told = Told()
        settings = Runtime(**(dict(log_every=5, checkpoint_seconds=1e9) | runtime))
        trainer = Trainer(task or LineTask(), store, settings, told, Stop(stop))
        try:
            assert trainer.run(cells)
        except Interrupted:
            assert not any(store.get(cell.config()) for cell in cells)
            return None, told
        return [store.get(cell.config()) for cell in cells], told

    return run


def numbers(record):
    """What must not depend on when and how a cell was run."""
    timed = ("updates_per_s", "points_per_s")
    metrics = {k: v for k, v in record["metrics"].items() if k not in timed}
    return {k: record[k] for k in ("config", "status", "curves")} | metrics


def near(one, other, rel=1e-5):
    for name in "loss", "draw", "w":
        np.testing.assert_allclose(one["curves"][name], other["curves"][name], rel)
    score = one["metrics"]["test_error"]
    assert score == pytest.approx(other["metrics"]["test_error"], rel=rel)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of an uninterrupted run."""
    store = ResultsStore(tmp_path_factory.mktemp("whole"))
    settings = Runtime(log_every=5, checkpoint_seconds=1e9)
    assert Trainer(LineTask(), store, settings, Told(), Stop()).run([CELL])
    return store.get(CELL.config())


def test_a_run_learns_and_its_record_is_complete(whole):
    metrics, curves = whole["metrics"], whole["curves"]
    assert whole["status"] == "done" and metrics["updates"] == 12
    assert set(curves) == {"step", "loss", "draw", "observed_at", "w"}
    assert curves["step"] == [5, 10, 12] and curves["observed_at"] == [0, 5, 10, 12]
    assert curves["w"][0] == 0 and abs(curves["w"][-1] - 3) < 2.5
    assert curves["loss"][-1] < curves["loss"][0]
    assert len(set(curves["draw"])) == 3  # each step has a key of its own
    assert metrics["params"] == 1
    assert metrics["points_per_s"] == pytest.approx(8 * metrics["updates_per_s"])


# Step 3 lies between points of the curve, 5 and 10 on one.
@pytest.mark.parametrize("stops", [[3], [5], [2, 6, 9], [10]])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(run, whole, stops):
    before = 0
    for stop in stops:
        records, told = run(CELL, stop=stop - before - 1)
        assert records is None and told.begins == [before]
        before = stop
    (record,), told = run(CELL)
    assert told.begins == [before], "it did not start again from 0"
    assert numbers(record) == numbers(whole)


@pytest.mark.parametrize("indexed", [True, False])
def test_scans_and_batches_from_the_host_change_nothing(run, whole, indexed):
    task = LineTask(indexed=indexed)
    (record,), _ = run(CELL, "host", device_data=False, task=task)
    near(record, whole)
    assert run(CELL, "scan", stop=1, steps_per_dispatch=4, task=task)[0] is None
    (record,), told = run(CELL, "scan", steps_per_dispatch=4, task=task)
    assert told.begins == [5]  # in fours, but points of the curve cut them
    near(record, whole)


def test_a_batch_that_is_not_split_trains_alike(run, whole):
    near(run(CELL, task=LineTask(splits=False))[0][0], whole)


def test_steps_of_other_shapes_are_dispatched_apart(run, whole, monkeypatch):
    task, sizes = LineTask(indexed=False), [8, 8, 4, 4, 4, 8]
    get = loop.Indexed.__getitem__

    def uneven(self, step):
        return jax.tree.map(lambda x: x[: sizes[step % len(sizes)]], get(self, step))

    monkeypatch.setattr(loop.Indexed, "__getitem__", uneven)
    one, many = (
        run(CELL, f"by{k}", steps_per_dispatch=k, task=task)[0][0] for k in (1, 4)
    )
    near(one, many)


def seeds(cell, count=3):
    return [dataclasses.replace(cell, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("device_data", [True, False])
def test_seeds_at_once_are_seeds_one_by_one(run, whole, device_data):
    options = dict(device_data=device_data, steps_per_dispatch=1 + device_data)
    assert run(seeds(CELL), "seeds", stop=1, **options)[0] is None
    together, told = run(seeds(CELL), "seeds", **options)
    assert told.begins == [2 * (1 + device_data)]
    alone, _ = run(seeds(CELL)[2], "alone")
    near(together[0], whole)
    near(together[2], alone[0])


def test_seeds_at_once_take_each_their_own_data(run, monkeypatch):
    def batches(self, cell, made=LineTask.batches):
        found = made(self, cell)
        own = jax.tree.map(lambda x: x + np.float32(cell.seed), found.data)
        return dataclasses.replace(found, data=own)

    monkeypatch.setattr(LineTask, "batches", batches)
    together, _ = run(seeds(CELL, 2), "seeds")
    near(together[1], run(seeds(CELL, 2)[1], "alone")[0][0])


def test_only_missing_seeds_are_trained(run):
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
    assert told.begins == [2] and numbers(record) == numbers(whole)


# ---------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_ends_the_cell(run):
    broken = dataclasses.replace(CELL, broken_at=3)
    (record,), told = run(broken)
    assert record["status"] == "diverged"
    assert record["metrics"]["diverged_at"] == 5 == record["metrics"]["updates"]
    assert record["metrics"]["params"] == 1
    assert not any("error" in name for name in record["metrics"])
    assert record["curves"]["loss"] == [None]
    assert "diverged at update 5" in told.lines[-1]


@pytest.mark.parametrize("where", ["params", "score"])
def test_no_number_after_the_last_update_is_a_divergence(run, where, monkeypatch):
    cell = dataclasses.replace(CELL, updates=1)
    if where == "params":  # the loss of an update is that before it
        found = LineTask().hyper(cell)._replace(learning_rate=np.float32(math.inf))
        monkeypatch.setattr(LineTask, "hyper", lambda *_: found)
    else:
        monkeypatch.setattr(LineTask, "score", lambda *_: {"test_error": math.nan})
    (record,), _ = run(cell)
    assert math.isfinite(record["curves"]["loss"][0])
    assert record["status"] == "diverged" and record["metrics"]["diverged_at"] == 1
    assert "test_error" not in record["metrics"]


def test_a_seed_that_diverges_leaves_the_others_alone(run, whole, monkeypatch):
    healthy = LineTask.hyper

    def hyper(self, cell):
        found = healthy(self, cell)
        nan = np.float32(math.nan)
        return found._replace(learning_rate=nan) if cell.seed else found

    monkeypatch.setattr(LineTask, "hyper", hyper)
    assert run(seeds(CELL), stop=7)[0] is None  # NaN goes through a checkpoint
    records, told = run(seeds(CELL))
    assert told.begins == [8]
    assert [r["status"] for r in records] == ["done", "diverged", "diverged"]
    assert records[1]["metrics"]["diverged_at"] == 5
    near(records[0], whole)


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
    assert numbers(record) == numbers(whole)


def test_a_half_written_checkpoint_is_not_there(run, whole, interrupted):
    for step in 8, 9:
        left = interrupted / f"{step}.orbax-checkpoint-tmp" / "state"
        left.mkdir(parents=True)
        (left / "junk").write_text("x")
    assert run(CELL, stop=0)[1].begins == [7]  # saves step 8, over what is left of it
    (record,), told = run(CELL)
    assert told.begins == [8] and not any("warning" in line for line in told.lines)
    assert numbers(record) == numbers(whole)
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
    assert numbers(record) == numbers(whole)
    with pytest.raises(StoreError, match="SIGTERM.*is lost.*No space left.*Free some"):
        run(CELL, "stopped", stop=3)


def test_parameters_are_kept_and_are_those_that_were_scored(run, tmp_path):
    (record, _), _ = run(seeds(CELL, 2))
    store = ResultsStore(tmp_path / "out")
    params = loop.load_params(store, CELL, {"w": jnp.zeros(())})
    assert float(params["w"]) == record["curves"]["w"][-1]
    with pytest.raises(ValueError, match="other shapes"):
        loop.load_params(store, CELL, {"w": jnp.zeros(2)})
    with pytest.raises(FileNotFoundError, match="were not kept"):
        loop.load_params(store, seeds(CELL, 2)[1], {"w": jnp.zeros(())})


class Averaging(LineTask):
    """Scores the mean of the last three parameters."""

    def hyper(self, cell):
        found = super().hyper(cell)
        return found._replace(more=found.more | {"averaged": np.float32(3)})


def test_what_is_averaged_is_scored_kept_and_resumed(run, tmp_path):
    (record,), _ = run(CELL, task=Averaging(), log_every=1)
    kept = loop.load_params(ResultsStore(tmp_path / "out"), CELL, {"w": jnp.zeros(())})
    mean = np.mean(record["curves"]["w"][-3:])
    assert float(kept["w"]) == pytest.approx(mean, rel=1e-6)
    assert run(CELL, "again", task=Averaging(), log_every=1, stop=10)[0] is None
    (again,), told = run(CELL, "again", task=Averaging(), log_every=1)
    assert told.begins == [11] and numbers(again) == numbers(record)
    both, _ = run(seeds(CELL, 2), "both", task=Averaging(), log_every=1)
    near(both[0], record)


# ---------------------------------------------------------- failures and records


def test_a_cell_that_fails_is_a_record_with_its_traceback(run):
    (record,), told = run(CELL, task=LineTask(fails=(("final", 0),)))
    assert record["status"] == "failed"
    assert record["metrics"]["error"] == "RuntimeError: no luck with this one"
    assert "in score\n" in record["metrics"]["traceback"]
    assert "failed, RuntimeError: no luck" in told.lines[-1]


def test_a_full_disk_is_not_the_matter_of_one_cell(run, monkeypatch):
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):

        def score(*_, error=error):
            raise error

        monkeypatch.setattr(LineTask, "score", score)
        with pytest.raises(type(error)):
            run(CELL)
    assert loop.ends_the_run(Interrupted(signal.SIGTERM))
    assert loop.ends_the_run(BrokenPipeError(32, "nobody reads"))
    assert not loop.ends_the_run(MemoryError())
    assert not loop.ends_the_run(FileNotFoundError(2, "gone"))


def test_cells_of_another_process_are_left_to_it(tmp_path):
    store = ResultsStore(tmp_path)
    trainer = Trainer(LineTask(), store, Runtime(), Told(), Stop())
    with ResultsStore(tmp_path).claim(CELL.config()) as claimed:
        assert claimed and not trainer.run([CELL])
    assert store.get(CELL.config()) is None


def test_tensorboard_files_by_flag(run, tmp_path):
    run(CELL)
    assert not list(tmp_path.rglob("events.*"))
    run(CELL, "flag", tensorboard=True)
    (file,) = (tmp_path / "flag" / "tensorboard").rglob("events.*")
    assert b"train/loss" in file.read_bytes() and b"test_error" in file.read_bytes()


# ------------------------------------------------------------------- signals


def test_a_signal_during_scoring_keeps_what_was_trained(run, whole, monkeypatch):
    def score(*_):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch, StopSignal() as stop:
        patch.setattr(LineTask, "score", score)
        patch.setitem(globals(), "Stop", lambda _: stop)
        assert run(CELL)[0] is None
    (record,), told = run(CELL)
    assert told.begins == [CELL.updates] and numbers(record) == numbers(whole)


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


def test_a_function_in_another_thread_is_left_at_a_signal():
    forever = threading.Event()
    assert interruptible(lambda: 3, StopSignal()) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0, StopSignal())
    with StopSignal() as stop, pytest.raises(Interrupted):
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        interruptible(forever.wait, stop)
    forever.set()
