"""What the programs of most experiments have in common: plan, run, report."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tyro

from attn_jax._program import silence
from experiments.core import workers
from experiments.core.cell import Runtime
from experiments.core.identity import Differs, with_differs
from experiments.core.loop import (
    Interrupted,
    StopSignal,
    ends_the_run,
    interruptible,
    store_failure,
)
from experiments.core.memory import keep_freed_memory
from experiments.core.observe import Progress
from experiments.core.rehearsal import is_message
from experiments.core.report import reported
from experiments.core.store import Record, ResultsStore, SchemaError, shard
from experiments.core.studies import Study, run_studies
from experiments.core.trial import Runner
from experiments.data.fetch import DataError

# What a message on one line is enough for.
KNOWN_ERRORS = (DataError, ImportError, OSError, SchemaError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All there is to run on one task.

    Attributes:
      name: of the task.
      description: of its data, one line.
      studies: by name.
      baselines: name -> what gives its metrics; one record each.
      runner: makes what trains the cells, of (store, runtime, progress, stop).
      differs: name of a baseline -> what its numbers are made of, as far as committed
        records had it otherwise; see `experiments.core.identity`.
    """

    name: str
    description: str
    studies: Mapping[str, Study]
    baselines: Mapping[str, Callable[[], dict[str, Any]]]
    runner: Callable[[ResultsStore, Runtime, Progress, StopSignal], Runner]
    differs: Mapping[str, Differs] = dataclasses.field(default_factory=dict)

    def part(self, which: str) -> Plan:
        """The studies of one machine, "i/n"; baselines go with the first."""
        mine = shard(list(self.studies.items()), which)
        first = which.partition("/")[0] == "1"
        baselines = self.baselines if first else {}
        return dataclasses.replace(self, studies=dict(mine), baselines=baselines)

    def total(self) -> int:
        """Number of records when all is done."""
        return len(self.baselines) + sum(s.total() for s in self.studies.values())

    def done(self, store: ResultsStore) -> int:
        """Number of records there are."""
        found = sum(
            store.get(self.baseline_config(n)) is not None for n in self.baselines
        )
        return found + sum(study.done(store) for study in self.studies.values())

    def kinds(self) -> Iterator[dict[str, Any]]:
        """Configs of this plan, one of each kind at least."""
        yield from map(self.baseline_config, self.baselines)
        yield from (study.grid[0].config() for study in self.studies.values())

    def possible(self) -> Iterator[dict[str, Any]]:
        """Configs of all records there may be, whatever validation data choose."""
        yield from map(self.baseline_config, self.baselines)
        for study in self.studies.values():
            yield from (cell.config() for cell in study.possible())

    def baseline_config(self, name: str) -> dict[str, Any]:
        """What names the record of a baseline."""
        config = dict(task=self.name, model=name, phase="baseline", seed=0)
        return with_differs(config, self.differs.get(name, ()))


def parse(
    arguments: type[Any],
    presets: Mapping[str, Any],
    argv: Sequence[str],
    *,
    module: str,
    description: str | None,
) -> Any:
    """Reads a command line; the preset gives the defaults of everything else.

    Args:
      arguments: dataclass of (experiment, runtime, preset).
      presets: experiments by name, "quick" among them.
      argv: the command line.
      module: as after ``python -m``.
      description: what ``--help`` says first.

    Raises:
      SystemExit: for --help, and for unknown or bad values, which are named.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in presets:
        preset = "quick"
    try:
        return tyro.cli(
            arguments,
            args=list(argv),
            default=arguments(presets[preset], Runtime(), preset),
            description=description,
            prog=f"python -m {module}",
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def watched(settings: Any) -> tuple[Any, set[str]]:
    """The same settings, and the names of those that have been read of them so far.

    >>> copy, read = watched(Runtime())
    >>> copy.workers, sorted(read)
    (0, ['workers'])
    """
    read: set[str] = set()
    names = {field.name for field in dataclasses.fields(settings)}

    class Watched(type(settings)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in names:
                read.add(name)
            return super().__getattribute__(name)

    copy = object.__new__(Watched)
    copy.__dict__.update(vars(settings))
    return copy, read


def idle_settings(
    experiment: Any, preset: Any, read: Collection[str], plans: Sequence[Plan]
) -> list[str]:
    """Settings that are not the preset's and that planning has not read.

    Args:
      experiment: the settings.
      preset: where those come from that were not given.
      read: names, see `watched`.
      plans: what was planned.
    """
    tunes = any(s.tuning() for plan in plans for s in plan.studies.values())
    return [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(experiment)
        if getattr(experiment, field.name) != getattr(preset, field.name)
        and (field.name not in read or (field.name == "tune_updates" and not tunes))
    ]


class _Floors:
    """The baselines of a plan: each is measured once, by whoever comes first."""

    def __init__(
        self, plan: Plan, store: ResultsStore, progress: Progress, stop: StopSignal
    ):
        self.plan, self.store = plan, store
        self.progress, self.stop = progress, stop

    def run(self) -> tuple[bool, bool]:
        """Measures those that have no record; (measured one, another is at work).

        Raises:
          Interrupted: a signal came.
        """
        ran = waits = False
        for name, measure in self.plan.baselines.items():
            if self.stop.signum is not None:
                raise Interrupted(self.stop.signum)
            config = self.plan.baseline_config(name)
            if self.store.get(config) is not None:
                continue
            with self.store.claim(config) as claimed:
                waits = waits or not claimed
                if claimed and self.store.get(config) is None:
                    self._measure(f"{self.plan.name} {name}", config, measure)
                    ran = True
        return ran, waits

    def _measure(
        self,
        label: str,
        config: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
    ) -> None:
        self.progress.begin(label, 1)
        began = time.monotonic()
        try:
            metrics = interruptible(measure, self.stop)
        except Exception as error:
            if ends_the_run(error):
                raise
            record = store_failure(self.store, config, error, began)
        else:
            record = self.store.put(
                config,
                status="done",
                metrics=metrics,
                wall_time_s=time.monotonic() - began,
            )
        self.progress.finish(label, record)


def _work(
    plans: Sequence[Plan],
    runtime: Runtime,
    store: ResultsStore,
    worker: tuple[int, int] | None,
) -> None:
    total = sum(plan.total() for plan in plans)
    done = sum(plan.done(store) for plan in plans)
    status = workers.status_file(store, worker[0]) if worker else None
    with (
        StopSignal(os.getppid() if worker else None) as stop,
        Progress(total, done, status_file=status) as progress,
    ):
        if done and worker is None:
            progress.say(f"{done} of {total} cells were done before.")
        floors = [_Floors(plan, store, progress, stop) for plan in plans]
        for plan, floor in zip(plans, floors, strict=True):
            floor.run()
            if plan.studies:
                runner = plan.runner(store, runtime, progress, stop)
                run_studies(plan.studies, runner)
        while True:  # until those are there that others had in hand
            found = [floor.run() for floor in floors]
            if not any(waits for _, waits in found):
                return
            if not any(ran for ran, _ in found):
                time.sleep(0.5)


def drive(
    module: str,
    arguments: Sequence[str],
    *,
    out: pathlib.Path,
    runtime: Runtime,
    experiment: Any,
    preset: Any,
    make_plans: Callable[[Any], list[Plan]],
    write_report: Callable[[Sequence[Record], pathlib.Path], str],
) -> int:
    """Runs an experiment to its end, by workers where the machine has cores for them.

    Args:
      module: as after ``python -m``.
      arguments: its command line, which workers get too.
      out: folder of the results.
      runtime: how to run.
      experiment: what to run, a dataclass.
      preset: the experiment that gave the settings that were not given.
      make_plans: loads the data and plans the cells of an experiment.
      write_report: writes report and figures of records, returns what to print.

    Returns:
      The exit status: 0; 1 where a cell failed or a worker ended early; 2 after an
      error that a message tells; 128 + signal after an interruption.
    """
    worker = workers.pin_worker()
    keep_freed_memory()
    if worker is None:
        workers.leave_memory(runtime)
    idle = [
        f"--{name.replace('_', '-')}"
        for name in (
            "distributed vmap_seeds tensorboard steps_per_dispatch device_data"
        ).split()
        if getattr(runtime, name) != getattr(Runtime(), name)
    ]
    store = ResultsStore(out)
    try:
        if not idle:
            store.check_writable()
            copy, read = watched(experiment)
            whole = make_plans(copy)
            idle = idle_settings(experiment, preset, read, whole)
        if idle:
            raise SettingsError(
                f"nothing would read {', '.join(idle)} here, leave it out."
            )
        plans = [plan.part(runtime.shard) for plan in whole]
        if worker is None:
            begin(store, [config for plan in plans for config in plan.possible()])
        total = sum(plan.total() for plan in plans)
        left = total - sum(plan.done(store) for plan in plans)
        if worker is None:
            for plan in plans:
                print(plan.description)
            print(f"{total} cells -> {store.folder}", flush=True)
        if worker is None and left:
            for plan in plans:
                quiet = Progress(0, live=False)
                plan.runner(store, runtime, quiet, StopSignal()).rehearse(
                    [cell for s in plan.studies.values() for cell in s.grid]
                )
        # No more processes than there are cells for them.
        count = 1 if worker else min(workers.worker_count(runtime), max(1, left))
        if count > 1:
            status = workers.run_workers(
                count,
                module,
                arguments,
                store,
                total=total,
                count_done=lambda: sum(plan.done(store) for plan in plans),
            )
            if status:
                done = sum(plan.done(store) for plan in plans)
                return workers.ended_early(status, done, total)
        else:
            _work(plans, runtime, store, worker)
        if worker is not None:
            return 0  # what failed is told once, by the process that waits for all
        store.export_jsonl(store.folder / "results.jsonl")
        kinds = [config for plan in whole for config in plan.kinds()]
        print(reported(store.records(), write_report, store.folder, kinds))
        found = (store.get(config) for plan in plans for config in plan.possible())
        return int(any(r is not None and r["status"] == "failed" for r in found))
    except Exception as error:
        return ended_by(error, quiet=worker is not None)


class SettingsError(ValueError):
    """A setting was given that nothing reads."""


def begin(store: ResultsStore, possible: Iterable[Mapping[str, Any]]) -> None:
    """Takes over what a checkout keeps of a folder, and lets failed cells try again."""
    earlier = store.folder / "results.jsonl"
    if earlier.is_file():
        store.import_jsonl(earlier)
    for config in possible:
        store.retry(config)


def ended_by(error: Exception, *, quiet: bool = False) -> int:
    """Tells an error that ended a run in a line where that is enough; else raises it.

    Args:
      error: what came.
      quiet: says nothing of an interruption, which the parent does.

    Returns:
      The exit status.
    """
    if isinstance(error, Interrupted):
        if not quiet:
            print(
                f"\nStopped by {error}; everything is saved. The same command "
                "goes on from here.",
                flush=True,
            )
        return 128 + error.signum
    if isinstance(error, BrokenPipeError):
        silence()
        return 128 + signal.SIGPIPE
    known = isinstance(error, DataError | ImportError | OSError)
    if not known and not (isinstance(error, KNOWN_ERRORS) and is_message(error)):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 2
