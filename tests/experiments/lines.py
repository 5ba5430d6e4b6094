"""A toy experiment: a line fitted to points, in a blink."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core import devices
from experiments.core.cell import Cell, Count, Natural, Rates, Settings
from experiments.core.loop import Indexed, Program, Task, in_epochs
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.report import NothingToReport, rows_of
from experiments.core.run import Experiment, run


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineCell(Cell):
    """y = w x by least squares, with noise in x."""

    task: str = "lines"
    model: str = "line"
    seed: Natural = 0
    updates: Count = 12
    learning_rate: float = 0.1
    weight_decay: float = 0.0
    warmup: float = 0.0
    clip_norm: float = 1e9
    batch_size: int = 8
    broken_at: int | None = None


@functools.cache
def program(rows_are_numbers: bool) -> Program:
    def loss(params, batch, rng, hyper):
        x, y = batch
        noise = jax.random.normal(rng, x.shape) * hyper.more["noise"]
        error = params["w"][None] * (x + noise) - y
        return jnp.mean(error**2), {"draw": jax.random.uniform(rng)}

    def errors(params, batch):
        x, y = batch
        return jnp.abs(params["w"][None] * x - y)

    return Program(lambda seed: {"w": jnp.zeros(())}, loss, {"errors": errors})


class LineTask(Task):
    """Points on a line of slope 3.

    Args:
      indexed: batches are rows of fixed points, else made for every update.
      splits: as of `Task`.
      fails: (phase, seed) of cells that cannot be scored.
      dies: file that says whether a worker has been killed in seed 0; "" kills none.
      waits: file without which no cell gets its twentieth batch; "" waits for none.
    """

    unit = "points"

    def __init__(
        self,
        *,
        indexed: bool = True,
        splits: bool = True,
        fails: tuple[tuple[str, int], ...] = (),
        dies: str = "",
        waits: str = "",
    ):
        self.indexed, self.splits, self.fails, self.dies = indexed, splits, fails, dies
        self.waits = waits
        x = np.random.default_rng(0).standard_normal(40).astype(np.float32)
        self.points = x, 3 * x

    def program(self, cell: LineCell) -> Program:
        return program(True)

    def hyper(self, cell: LineCell) -> Any:
        from experiments.core import optim

        return optim.hyper_of(cell, noise=0.1)

    def batches(self, cell: LineCell) -> Any:
        rows = in_epochs(cell, len(self.points[0]))
        found = Indexed(self.points, rows)
        if self.indexed and cell.broken_at is None and not self.waits:
            return found
        return _Made(found, cell.broken_at, self.waits)

    def costs(self, cell: LineCell) -> dict[str, Any]:
        return {"params": 1}

    def observe(self, cell: LineCell, params: Any) -> dict[str, Any]:
        if self.dies and cell.seed == 0:
            _die_once(pathlib.Path(self.dies))
        return {"w": float(params["w"])}

    def keeps_params(self, cell: LineCell) -> bool:
        return cell.seed == 0

    def score(self, cell: LineCell, params: Any) -> dict[str, Any]:
        if (cell.phase, cell.seed) in self.fails:
            raise RuntimeError("no luck with this one")
        errors = devices.call(self.program(cell).more["errors"], params, self.points)
        part = "val" if cell.phase == "tune" else "test"
        return {f"{part}_error": float(errors.mean())}


class _Made:
    """Batches made for every update; from one on, no numbers, or not yet."""

    def __init__(self, found: Indexed, broken_at: int | None, waits: str):
        self.found, self.broken_at, self.waits = found, broken_at, waits

    def __getitem__(self, step: int) -> Any:
        while self.waits and step >= 20 and not pathlib.Path(self.waits).exists():
            time.sleep(0.01)
        x, y = self.found[step]
        broken = self.broken_at is not None and step >= self.broken_at
        return x, np.full_like(y, np.nan) if broken else y


def _die_once(marker: pathlib.Path) -> None:
    """Kills this process, as a machine out of memory does, the second time."""
    if marker.exists() and marker.read_text() == "begun":
        marker.write_text("killed")
        os.kill(os.getpid(), signal.SIGKILL)
    elif not marker.exists():
        marker.write_text("begun")


def floor() -> dict[str, Any]:
    return {"test_error": 3.0}


def slow() -> dict[str, Any]:
    print("begun", flush=True)
    time.sleep(600)
    return {}


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Lines."""

    task: str = "lines"
    """lines, or squares that have corners."""
    rates: Rates = (0.1,)
    """Learning rates."""
    seeds: Count = 3
    """Seeds."""
    updates: Count = 12
    """Updates."""
    tune_updates: Count = 4
    """Updates of a tuning cell."""
    corners: Count = 4
    """Read for squares alone."""
    fails: int = -1
    """Seed that cannot be scored."""
    dies: str = ""
    """File that says whether the worker has died yet."""
    waits: str = ""
    """File without which no cell gets its twentieth batch."""
    slow: bool = False
    """Whether the floor takes for ever."""


def plans(config: Config) -> list[Plan]:
    if config.task == "squares":
        assert config.corners
    grid = tuple(
        LineCell(phase="tune", learning_rate=rate, updates=config.tune_updates)
        for rate in config.rates
    )
    study = Study("line", grid, config.updates, config.seeds, None, "val_error", True)
    fails = (("final", config.fails),)
    task = LineTask(fails=fails, dies=config.dies, waits=config.waits)
    floors = baselines_of("lines", {"zero": slow if config.slow else floor})
    return [Plan(task, "lines: two points", [study], floors)]


class Report:
    """Says how many records there are."""

    def write(self, records: Any, folder: pathlib.Path) -> str:
        if not rows_of(records):
            raise NothingToReport("records: there is no finished cell to report.")
        text = "\n".join(f"{r['config'].get('seed')} {r['status']}" for r in records)
        (folder / "report.md").write_text(text, encoding="utf-8")
        return f"REPORT of {len(records)} records"


EXPERIMENT = Experiment(
    name="lines",
    about="Lines.",
    presets={"quick": Config()},
    minutes={"quick": "a second"},
    plans=plans,
    report=Report(),
)


def run_here(folder: pathlib.Path, arguments: list[str]) -> int:
    """Runs the experiment in this process; the exit status."""
    return run(EXPERIMENT, ["--out", str(folder), *arguments])
