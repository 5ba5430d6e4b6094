"""The loop that trains cells, on a line fitted to points."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.core.studies import Study, run_studies

from experiments.core import loop, trial
from experiments.core.cell import Runtime
from experiments.core.loop import Interrupted, StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore, StoreError


@dataclasses.dataclass(frozen=True)
class LineCell:
    """y = w x by least squares."""

    seed: int = 0
    updates: int = 8
    phase: str = "final"
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip_norm: float = 1e9
    split: bool = True
    broken_at: int | None = None
    label = "a line"

    def __post_init__(self):
        trial.check_recipe(self)

    def config(self):
        return dataclasses.asdict(self)


@functools.cache
def compiled():
    def loss_fn(params, batch, rng, hyper):
        x, y = batch
        error = params["w"][None] * x - y
        return jnp.mean(error**2), {"draw": jax.random.uniform(rng)}

    return jax.jit(trial.make_step(loss_fn), donate_argnums=0)


class LineRunner(trial.Runner):
    def start(self, cell):
        def batch(step):
            x = np.random.default_rng([cell.seed, step]).standard_normal(8)
            y = 3 * x * (np.nan if step == cell.broken_at else 1.0)
            return x.astype(np.float32), y.astype(np.float32)

        params = {"w": jnp.zeros(())}
        return trial.Job(params, compiled(), batch, split=cell.split)

    def result(self, cell, params):
        error = abs(float(params["w"]) - 3)
        return {f"{'val' if cell.phase == 'tune' else 'test'}_error": error}

    def costs(self, cell):
        return {"params": 1}

    def observe(self, cell, params):
        return {"w": float(params["w"])}


class StopAfter(StopSignal):
    """A signal that comes after so many looks at it."""

    def __init__(self, looks):
        super().__init__()
        self.looks = looks

    @property
    def signum(self):
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


def runner(folder, stop=None, **more):
    runtime = Runtime(log_every=2, checkpoint_seconds=1e9)
    progress = Progress(1, live=False)
    return LineRunner(
        ResultsStore(folder), runtime, progress, stop or StopSignal(), **more
    )


def test_an_interrupted_cell_goes_on_to_the_same_numbers(tmp_path):
    cell = LineCell()
    whole = runner(tmp_path / "a", save_params=lambda cell: True)
    assert whole.run(cell) and whole.run(cell)
    one = whole.store.get(cell.config())
    with pytest.raises(Interrupted):
        runner(tmp_path / "b", StopAfter(1)).run(cell)
    again = runner(tmp_path / "b")
    assert not again.has(cell)
    assert again.run(cell)
    two = again.store.get(cell.config())
    assert two["curves"] == one["curves"]
    assert two["metrics"]["test_error"] == one["metrics"]["test_error"]
    curves = one["curves"]
    assert curves["step"] == [2, 4, 6, 8]
    assert curves["observed_at"] == [0, 2, 4, 6, 8]
    assert curves["w"][0] == 0 and len(curves["w"]) == 5
    assert set(curves) == {"step", "observed_at", "w", "loss", "draw"}
    assert len(set(curves["draw"])) == 4  # each step has a key of its own
    assert abs(curves["w"][-1] - 3) < abs(curves["w"][0] - 3)
    assert one["metrics"]["params"] == 1 and one["metrics"]["updates"] == 8
    # What was kept is what was scored.
    params = trial.load_params(whole.store, cell, {"w": jnp.zeros(())})
    assert abs(float(params["w"]) - 3) == one["metrics"]["test_error"]
    with pytest.raises(ValueError, match="other shapes"):
        trial.load_params(whole.store, cell, {"w": jnp.zeros(2)})
    with pytest.raises(FileNotFoundError, match="were not kept"):
        trial.load_params(again.store, cell, {"w": jnp.zeros(())})


def test_a_loss_that_is_no_number_ends_in_a_record_that_says_where(tmp_path):
    cell = LineCell(broken_at=3)
    found = runner(tmp_path)
    assert found.run(cell)
    record = found.store.get(cell.config())
    assert record["status"] == "diverged"
    assert record["metrics"]["diverged_at"] == 4
    assert record["metrics"]["params"] == 1
    assert not any("error" in name for name in record["metrics"])


def test_a_batch_that_is_not_split_trains_alike(tmp_path):
    losses = []
    for split in (True, False):
        cell = LineCell(split=split)
        found = runner(tmp_path)
        found.run(cell)
        losses.append(found.store.get(cell.config())["curves"]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("minimise", "best"), [(True, 1), (False, 0)])
def test_a_study_takes_the_best_and_leaves_what_diverged(tmp_path, minimise, best):
    tries = [
        LineCell(phase="tune", learning_rate=rate, broken_at=broken)
        for rate, broken in ((1e-3, None), (0.5, None), (0.4, 1))
    ]
    study = Study(
        "line",
        tuple(tries),
        updates=4,
        seeds=2,
        metric="val_error",
        minimise=minimise,
    )
    found = runner(tmp_path)
    assert (study.done(found.store), study.total()) == (0, 5)
    run_studies({"line": study}, found)
    assert study.best(found.store) == best
    assert study.done(found.store) == 5
    finals = study.final(best)
    assert [cell.seed for cell in finals] == [0, 1]
    assert all(found.has(cell) and cell.updates == 4 for cell in finals)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", -1, "0 or more"),
        ("updates", 0, "at least 1"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("inf"), "finite"),
        ("weight_decay", -1.0, "0 or more"),
        ("warmup", 1.0, r"in \[0, 1\)"),
        ("clip_norm", 0.0, "above 0"),
        ("phase", "test", "'tune' or 'final'"),
    ],
)
def test_a_bad_recipe_is_named(field, value, expected):
    with pytest.raises(ValueError, match=f"{field} must be .*{expected}"):
        LineCell(**{field: value})


# ------------------------------------------- signals, failures, and no number at all


def test_a_signal_is_seen_at_the_next_step_and_nothing_is_lost(tmp_path):
    cell = LineCell()
    whole = runner(tmp_path / "a")
    whole.runtime = dataclasses.replace(whole.runtime, log_every=5)
    assert whole.run(cell)
    steps = []
    # Within a window of the curve, on its end, and after the last update.
    for looks in (1, 1, 3):
        some = runner(tmp_path / "b", StopAfter(looks))
        some.runtime = whole.runtime
        some.progress.begin = lambda label, updates, step=0: steps.append(step)
        with pytest.raises(Interrupted):
            some.run(cell)
    assert steps == [0, 2, 4]
    again = runner(tmp_path / "b")
    again.runtime = whole.runtime
    assert again.run(cell)
    one, two = (r.store.get(cell.config()) for r in (whole, again))
    assert one["curves"]["step"] == [5, 8]
    assert two["curves"] == one["curves"]
    assert two["metrics"]["test_error"] == one["metrics"]["test_error"]


def test_a_signal_during_scoring_keeps_what_was_trained(tmp_path):
    cell = LineCell()
    found = runner(tmp_path)

    def result(cell, params):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    found.result = result
    with pytest.raises(Interrupted), found.stop:
        found.run(cell)
    again = runner(tmp_path)
    begun = []
    again.progress.begin = lambda label, updates, step=0: begun.append(step)
    assert again.run(cell) and begun == [cell.updates]
    assert again.store.get(cell.config())["curves"]["step"] == [2, 4, 6, 8]


@pytest.mark.parametrize("where", ["params", "score"])
def test_no_number_after_the_last_update_is_a_divergence(tmp_path, where):
    found = runner(tmp_path)
    cell, scores = LineCell(updates=1), {"test_error": 0.5}
    if where == "params":  # the loss of an update is that before it
        job = found.start(cell)

        def step(state, batch, rng):
            state, metrics = job.step(state, batch, rng)
            return state._replace(params={"w": jnp.float32(jnp.nan)}), metrics

        found.start = lambda cell: job._replace(step=step)
    else:
        scores = {"test_error": float("nan")}
    found.result = lambda cell, params: scores
    assert found.run(cell)
    record = found.store.get(cell.config())
    assert record["status"] == "diverged" and record["metrics"]["diverged_at"] == 1
    assert "test_error" not in record["metrics"]


class SometimesBroken(LineRunner):
    """Cannot score some learning rates, and one seed."""

    broken = (0.2,)

    def result(self, cell, params):
        if cell.learning_rate in self.broken or (cell.phase, cell.seed) == ("final", 1):
            raise RuntimeError("no luck with this one")
        return super().result(cell, params)


def test_a_cell_that_fails_becomes_a_record_and_the_rest_goes_on(tmp_path):
    grid = tuple(LineCell(phase="tune", learning_rate=r) for r in (0.2, 0.1, 1e-3))
    study = Study("line", grid, 4, 3, metric="val_error", minimise=True)
    told = []
    found = SometimesBroken(
        ResultsStore(tmp_path), Runtime(), Progress(1, live=False), StopSignal()
    )
    found.progress.say = told.append
    run_studies({"line": study}, found)
    store = found.store
    assert study.best(store) == 1, "chosen among those that did not fail"
    statuses = [store.get(cell.config())["status"] for cell in study.final(1)]
    assert statuses == ["done", "failed", "done"]
    metrics = store.get(grid[0].config())["metrics"]
    assert metrics["error"] == "RuntimeError: no luck with this one"
    assert "in result\n" in metrics["traceback"]
    assert any("failed, RuntimeError: no luck" in line for line in told)
    # The next run tries again what failed, and that alone.
    again = LineRunner(store, Runtime(), Progress(1, live=False), StopSignal())
    configs = [cell.config() for cell in study.possible()]
    assert sum(store.retry(config) for config in configs) == 2
    assert study.done(store) < study.total()
    run_studies({"line": study}, again)
    assert {r["status"] for r in store.records()} == {"done"}


def test_a_full_disk_is_not_the_matter_of_one_cell(tmp_path, monkeypatch):
    found = runner(tmp_path)

    def full(*arguments, **more):
        raise StoreError(errno.ENOSPC, "cannot write results")

    monkeypatch.setattr(found.store, "put", full)
    with pytest.raises(StoreError):
        found.run(LineCell())
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "full")):

        def result(cell, params, error=error):
            raise error

        found.result = result
        with pytest.raises(type(error)):
            found.run(LineCell())


def test_a_function_in_another_thread_is_left_at_a_signal():
    forever = threading.Event()
    assert loop.interruptible(lambda: 3, StopSignal()) == 3
    with pytest.raises(ZeroDivisionError):
        loop.interruptible(lambda: 1 // 0, StopSignal())
    with StopSignal() as stop, pytest.raises(Interrupted):
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
        loop.interruptible(forever.wait, stop)
    forever.set()
