"""The loop that trains cells, on a line fitted to points."""

from __future__ import annotations

import dataclasses
import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import trial
from experiments.common.config import Runtime
from experiments.common.loop import Interrupted, StopSignal
from experiments.common.progress import Progress
from experiments.common.store import ResultsStore
from experiments.common.studies import Study, run_studies


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
