"""Studies: cells to choose from on validation data, then the seeds of the best."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.core.loop import Interrupted
from experiments.core.store import ResultsStore
from experiments.core.trial import Runner


@dataclasses.dataclass(frozen=True)
class Study:
    """One row of a table: cells to choose from on validation data, then the seeds.

    Attributes:
      name: the row, unique in its experiment.
      grid: what is tried, in the phase "tune"; a single one is not tried.
      updates: of the final cells.
      seeds: how many final cells.
      tuned_by: another study whose choice is taken over, index by index, in place of
        trying this one's grid.
      metric: what is compared; a grid cell without it (it diverged or failed) loses.
      minimise: whether less of it is better.
    """

    name: str
    grid: tuple[Any, ...]
    updates: int
    seeds: int
    tuned_by: Study | None = None
    metric: str = "val_accuracy"
    minimise: bool = False

    def best(self, store: ResultsStore) -> int:
        """Index of the best grid cell by validation data; of equals, the first."""
        if self.tuned_by is not None:
            return self.tuned_by.best(store)
        if len(self.grid) == 1:
            return 0
        sign = -1 if self.minimise else 1
        values = []
        for cell in self.grid:
            record = store.get(cell.config())
            found = None if record is None else record["metrics"].get(self.metric)
            values.append(-math.inf if found is None else sign * found)
        return values.index(max(values))

    def tuning(self) -> tuple[Any, ...]:
        """The cells to try, none where there is nothing to choose."""
        if self.tuned_by is not None:
            return self.tuned_by.tuning()
        return self.grid if len(self.grid) > 1 else ()

    def final(self, best: int) -> tuple[Any, ...]:
        """The cells of all seeds, with what the validation part chose."""
        return tuple(
            dataclasses.replace(
                self.grid[best], phase="final", updates=self.updates, seed=seed
            )
            for seed in range(self.seeds)
        )

    def possible(self) -> Iterator[Any]:
        """Every cell that may be run, whatever the validation part chooses."""
        yield from self.tuning()
        for best in range(len(self.grid)):
            yield from self.final(best)

    def total(self) -> int:
        """Number of records of a finished study, without those of another."""
        return self.seeds + (0 if self.tuned_by else len(self.tuning()))

    def done(self, store: ResultsStore) -> int:
        """Number of its cells that have a record."""
        tuned = sum(store.get(c.config()) is not None for c in self.tuning())
        count = 0 if self.tuned_by else tuned
        if tuned == len(self.tuning()):
            cells = self.final(self.best(store))
            count += sum(store.get(c.config()) is not None for c in cells)
        return count


def run_studies(studies: Mapping[str, Study], runner: Runner) -> None:
    """Works until every cell of every study has a record.

    Cells that another process has in hand are left to it and asked for again.

    Raises:
      Interrupted: a signal came.
    """
    while True:
        acted = waits = False
        for study in studies.values():
            cells = [c for c in study.tuning() if not runner.has(c)]
            if not cells:
                best = study.best(runner.store)
                cells = [c for c in study.final(best) if not runner.has(c)]
            for cell in cells:
                if runner.stop.signum is not None:
                    raise Interrupted(runner.stop.signum)
                ran = runner.run(cell)
                acted, waits = acted or ran, waits or not ran
        if not any(s.done(runner.store) < s.total() for s in studies.values()):
            return
        if waits and not acted:
            time.sleep(0.5)
