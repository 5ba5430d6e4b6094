"""What there is to run on one task, and which of it can be run now."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from experiments.core.cell import Cell
from experiments.core.identity import Differs, with_differs
from experiments.core.loop import Task
from experiments.core.store import Record, config_hash, shard


def beside(count: int, at: int | None = None) -> tuple[int, int]:
    """An index of so many, by default the middle one, and those beside it.

    As `Study.first` takes them: (first, last).

    >>> beside(5), beside(4), beside(4, 3), beside(1)
    ((1, 3), (0, 2), (2, 3), (0, 0))
    """
    at = (count - 1) // 2 if at is None else at
    return max(0, at - 1), min(at + 1, count - 1)


# Looks a record up by its config.
Get = Callable[[Mapping[str, Any]], Record | None]


@dataclasses.dataclass(frozen=True)
class Study:
    """One row of a table: cells to choose from on validation data, then the seeds.

    Attributes:
      name: the row, unique in its plan.
      grid: what is tried, in the phase "tune"; a single one is not tried.
      updates: of the final cells.
      seeds: how many final cells.
      tuned_by: another study whose choice is taken over, index by index, in place of
        trying this one's grid.
      metric: what is compared; a grid cell without it (it diverged or failed) loses.
      minimise: whether less of it is better.
      first: (first, last) index of the grid, which is ordered, that is tried at once;
        where the best lies at an end of what was tried and the grid goes on there, the
        next is tried too. None: all of it.
      after: another study, of this plan or another, that must be done before: cells of
        this one begin with what its cells have learnt, see `Task.first_params`. That is
        in the folder's params/, which records alone do not have.
    """

    name: str
    grid: tuple[Any, ...]
    updates: int
    seeds: int
    tuned_by: Study | None = None
    metric: str = "val_accuracy"
    minimise: bool = False
    first: tuple[int, int] | None = None
    after: Study | None = None

    def _value(self, cell: Any, get: Get) -> float | None:
        """What is compared, more is better; None without a record."""
        record = get(cell.config())
        if record is None:
            return None
        found = record["metrics"].get(self.metric)
        return -math.inf if found is None else -found if self.minimise else found

    def best(self, get: Get) -> int:
        """Index of the best grid cell by validation data; of equals, the first."""
        if self.tuned_by is not None:
            return self.tuned_by.best(get)
        if len(self.grid) == 1:
            return 0
        values = [self._value(cell, get) for cell in self.grid]
        known = [-math.inf if value is None else value for value in values]
        return known.index(max(known))

    def tuning(self, get: Get = lambda config: None) -> tuple[Any, ...]:
        """The cells to try as far as that is known, none with nothing to choose."""
        if self.tuned_by is not None:
            return self.tuned_by.tuning(get)
        if len(self.grid) == 1:
            return ()
        low, high = self.first or (0, len(self.grid) - 1)
        while True:
            tried = self.grid[low : high + 1]
            values = [self._value(cell, get) for cell in tried]
            known = [value for value in values if value is not None]
            if len(known) < len(tried):
                return tried
            best = low + known.index(max(known))
            if best == low > 0:
                low -= 1
            elif best == high < len(self.grid) - 1:
                high += 1
            else:
                return tried

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
        if self.tuned_by is None and len(self.grid) > 1:
            yield from self.grid
        for best in range(len(self.grid)):
            yield from self.final(best)

    def total(self, get: Get = lambda config: None) -> int:
        """Number of records when it is done, as far as that is known; see `tuning`."""
        return self.seeds + (0 if self.tuned_by else len(self.tuning(get)))

    def done(self, get: Get) -> int:
        """Number of its cells that have a record."""
        tuning = self.tuning(get)
        tuned = sum(get(c.config()) is not None for c in tuning)
        count = 0 if self.tuned_by else tuned
        if tuned == len(tuning):
            cells = self.final(self.best(get))
            count += sum(get(c.config()) is not None for c in cells)
        return count

    def waits(self, get: Get) -> bool:
        """Whether what it comes after is not done yet."""
        return self.after is not None and self.after.done(get) < self.after.total(get)


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A record that needs no training.

    Attributes:
      config: what names it.
      measure: gives its metrics; picklable (a function of a module, or
        ``functools.partial`` of one), so that a worker can have it.
      label: for progress lines.
    """

    config: Mapping[str, Any]
    measure: Callable[[], dict[str, Any]]
    label: str


def baselines_of(
    task: str,
    measures: Mapping[str, Callable[[], dict[str, Any]]],
    differs: Mapping[str, Differs] | Differs = (),
) -> tuple[Baseline, ...]:
    """Baselines of a task that have one record each, by name.

    Args:
      task: name of the data.
      measures: name -> what gives the metrics.
      differs: what the numbers are made of, as far as committed records had it
        otherwise: of all, or by name; see `experiments.core.identity`.
    """
    found = []
    for name, measure in measures.items():
        made_of = differs.get(name, ()) if isinstance(differs, Mapping) else differs
        config = dict(task=task, model=name, phase="baseline", seed=0)
        found.append(Baseline(with_differs(config, made_of), measure, f"{task} {name}"))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is given: a baseline, or cells that are trained at once.

    Attributes:
      plan: index of the plan.
      baseline: index among the plan's baselines, or None.
      cells: they differ in their seed alone.
    """

    plan: int
    cells: tuple[Any, ...] = ()
    baseline: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All there is to run on one task.

    Attributes:
      task: what the cells are.
      description: of the data, one line.
      studies: in the order of need; those that others take their tuning from first.
      baselines: one record each.
    """

    task: Task
    description: str
    studies: Sequence[Study]
    baselines: Sequence[Baseline] = ()

    def part(self, which: str) -> Plan:
        """The share of one machine, "i/n"."""
        mine = shard([*self.baselines, *self.studies], which)
        return dataclasses.replace(
            self,
            studies=[x for x in mine if isinstance(x, Study)],
            baselines=[x for x in mine if isinstance(x, Baseline)],
        )

    def total(self, get: Get = lambda config: None) -> int:
        """Number of records when all is done, as far as that is known."""
        return len(self.baselines) + sum(s.total(get) for s in self.studies)

    def done(self, get: Get) -> int:
        """Number of records there are."""
        found = sum(get(b.config) is not None for b in self.baselines)
        return found + sum(study.done(get) for study in self.studies)

    def cells(self) -> Iterator[Cell]:
        """The cells of all grids."""
        for study in self.studies:
            yield from study.grid

    def kinds(self) -> Iterator[Mapping[str, Any]]:
        """Configs of this plan, one of each kind at least."""
        yield from (b.config for b in self.baselines)
        yield from (study.grid[0].config() for study in self.studies)

    def possible(self) -> Iterator[Mapping[str, Any]]:
        """Configs of all records there may be, whatever validation data choose."""
        yield from (b.config for b in self.baselines)
        for study in self.studies:
            yield from (cell.config() for cell in study.possible())

    def ready(self, get: Get, index: int = 0, *, group: bool = False) -> Iterator[Job]:
        """What has no record and can be run now, in the order of need.

        A study's finals are ready once its tuning is done; none of it is before what
        it comes after is.

        Args:
          get: looks a record up.
          index: of this plan, for the jobs.
          group: whether the seeds of a study are one job.
        """
        for i, baseline in enumerate(self.baselines):
            if get(baseline.config) is None:
                yield Job(index, baseline=i)
        seen: set[str] = set()
        for study in self.studies:
            if study.waits(get):
                continue
            tuning = [c for c in study.tuning(get) if get(c.config()) is None]
            if tuning:
                groups = [(cell,) for cell in tuning]
            else:
                cells = study.final(study.best(get))
                cells = tuple(c for c in cells if get(c.config()) is None)
                whole = group and self.task.uniform and len(cells) > 1
                groups = [cells] if whole else [(cell,) for cell in cells]
            for cells in groups:
                job = Job(index, cells)
                if self.key(job) not in seen:  # another study tunes the same
                    seen.add(self.key(job))
                    yield job

    def key(self, job: Job) -> str:
        """What tells a job of this plan from others: the hashes of its records."""
        configs = [cell.config() for cell in job.cells]
        if job.baseline is not None:
            configs = [dict(self.baselines[job.baseline].config)]
        return " ".join(map(config_hash, configs))


def _up_to(study: Study | None) -> Iterator[Study]:
    """A study, what it comes after, what that comes after …"""
    while study is not None:
        yield study
        study = study.after


def share_of(plans: Sequence[Plan], which: str) -> list[Plan]:
    """The share of one machine of all plans, "i/n", and all that it comes after.

    Machines whose shares come after one study need a folder that they share: then one
    of them runs it. In folders of their own each does, and what they learn is equal to
    rounding only.
    """
    found = [plan.part(which) for plan in plans]
    names = {
        id(study) for plan in found for mine in plan.studies for study in _up_to(mine)
    }
    return [
        dataclasses.replace(part, studies=[s for s in plan.studies if id(s) in names])
        for plan, part in zip(plans, found, strict=True)
    ]
