"""What the programs of most experiments have in common: plan, run, report."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from experiments.common import workers
from experiments.common.config import Runtime
from experiments.common.data import DataError
from experiments.common.identity import Differs, with_differs
from experiments.common.loop import Interrupted, StopSignal
from experiments.common.memory import keep_freed_memory
from experiments.common.progress import Progress
from experiments.common.store import ResultsStore, SchemaError, shard
from experiments.common.studies import Study, run_studies
from experiments.common.trial import Runner

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
        records had it otherwise; see `experiments.common.identity`.
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
        for plan in plans:
            for name, measure in plan.baselines.items():
                config = plan.baseline_config(name)
                with store.claim(config) as claimed:
                    if not claimed or store.get(config) is not None:
                        continue
                    began = time.monotonic()
                    record = store.put(
                        config,
                        status="done",
                        metrics=measure(),
                        wall_time_s=time.monotonic() - began,
                    )
                    progress.finish(f"{plan.name} {name}", record)
            run_studies(plan.studies, plan.runner(store, runtime, progress, stop))


def drive(
    module: str,
    arguments: Sequence[str],
    *,
    out: pathlib.Path,
    runtime: Runtime,
    make_plans: Callable[[], list[Plan]],
    report: Callable[[ResultsStore], str],
) -> int:
    """Runs an experiment to its end, by workers where the machine has cores for them.

    Args:
      module: as after ``python -m``.
      arguments: its command line, which workers get too.
      out: folder of the results.
      runtime: how to run.
      make_plans: loads the data and plans the cells.
      report: writes report and figures, returns what to print.

    Returns:
      The exit status: 0, 1 or 2 after an error, 128 + signal after an interruption.
    """
    worker = workers.pin_worker()
    keep_freed_memory()
    idle = [
        f"--{name.replace('_', '-')}"
        for name in (
            "distributed vmap_seeds tensorboard steps_per_dispatch device_data"
        ).split()
        if getattr(runtime, name) != getattr(Runtime(), name)
    ]
    if idle:
        print(
            f"error: nothing would read {', '.join(idle)} here, leave it out.",
            file=sys.stderr,
        )
        return 2
    store = ResultsStore(out)
    try:
        store.check_writable()
        earlier = store.folder / "results.jsonl"
        if worker is None and earlier.is_file():
            store.import_jsonl(earlier)  # a checkout keeps this file alone
        plans = [plan.part(runtime.shard) for plan in make_plans()]
        total = sum(plan.total() for plan in plans)
        if worker is None:
            for plan in plans:
                print(plan.description)
            print(f"{total} cells -> {store.folder}", flush=True)
        count = 1 if worker else workers.worker_count(runtime)
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
                how = f"with status {status}"
                if status < 0:
                    how = f"by signal {-status} ({signal.Signals(-status).name})"
                print(
                    f"error: a worker ended {how}; {done} of {total} cells are done, "
                    "and the same command goes on from there.",
                    file=sys.stderr,
                )
                return 2 if status == 2 else 1
        else:
            _work(plans, runtime, store, worker)
        if worker is None:
            store.export_jsonl(store.folder / "results.jsonl")
            print(report(store))
    except Interrupted as interrupted:
        if worker is None:
            print(
                f"\nStopped by {interrupted}; everything is saved. The same command "
                "goes on from here.",
                flush=True,
            )
        return 128 + interrupted.signum
    except KNOWN_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
