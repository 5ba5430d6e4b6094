"""Runs an experiment: finds it, reads the command line, plans, works, reports.

An experiment is an `Experiment` named EXPERIMENT in ``experiments/NAME.py`` or
``experiments/NAME/experiment.py``; nothing else lists it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pathlib
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import tyro

import experiments
from attn_jax._program import Main, program, silence
from experiments.core import devices
from experiments.core.cell import Runtime, Settings, with_limits_shown
from experiments.core.engine import (
    WorkerDied,
    World,
    fail,
    leave_memory,
    make_engine,
)
from experiments.core.loop import params_file
from experiments.core.memory import keep_freed_memory
from experiments.core.observe import Progress
from experiments.core.plan import Plan, share_of
from experiments.core.rehearsal import is_message
from experiments.core.report import NothingToReport, Report, reported
from experiments.core.signals import Interrupted, StopSignal
from experiments.core.store import Record, ResultsStore, SchemaError, config_hash
from experiments.data.fetch import DataError

# Rooms of this folder that are no experiments.
ROOMS = ("core", "data", "tasks")

# What a message on one line is enough for.
KNOWN_ERRORS = (
    DataError,
    ImportError,
    OSError,
    SchemaError,
    TypeError,
    ValueError,
    WorkerDied,
)

# Seconds between two looks at cells that another run has in hand.
PATIENCE = 0.5


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that an experiment is.

    Attributes:
      name: of its folder or file; ``python -m experiments.NAME`` runs it.
      about: what it is, one line and then as many as it takes; `--help` says it.
      presets: settings by name, "quick" among them.
      minutes: preset -> about how long it takes, in words.
      plans: loads the data and plans the cells of settings.
      report: what is told of its records.
    """

    name: str
    about: str
    presets: Mapping[str, Settings]
    minutes: Mapping[str, str]
    plans: Callable[[Any], list[Plan]]
    report: Report

    @property
    def module(self) -> str:
        """What runs it, as after ``python -m``."""
        return f"experiments.{self.name}"

    @property
    def smallest(self) -> list[str]:
        """The presets that take seconds, for a smoke run: "smoke…", else "quick"."""
        return [p for p in self.presets if p.startswith("smoke")] or ["quick"]

    @property
    def committed(self) -> list[pathlib.Path]:
        """Folders of committed results."""
        root = pathlib.Path(experiments.__file__).parent / self.name / "results"
        return sorted(path.parent for path in root.rglob("results.jsonl"))


def names() -> list[str]:
    """All experiments, found by their folder or file.

    >>> "positions" in names(), "core" in names()
    (True, False)
    """
    found = pkgutil.iter_modules(experiments.__path__)
    return [m.name for m in found if m.name not in ROOMS and m.name[0] != "_"]


def find(name: str) -> Experiment:
    """An experiment by its name.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in names():
        known = ", ".join(names())
        raise ValueError(f"experiment must be one of {known}, got {name!r}.")
    module = importlib.import_module(f"experiments.{name}")
    if not hasattr(module, "EXPERIMENT"):
        module = importlib.import_module(f"experiments.{name}.experiment")
    return module.EXPERIMENT


@dataclasses.dataclass(frozen=True)
class Options:
    """A command line."""

    settings: Any
    runtime: Runtime
    preset: str


def parse(experiment: Experiment, argv: Sequence[str]) -> Options:
    """Reads a command line; the preset gives the defaults of everything else.

    Raises:
      SystemExit: for --help, and for unknown or bad values, which are named.
    """
    presets = experiment.presets
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="quick")
    preset = first.parse_known_args(argv)[0].preset
    if preset not in presets:
        preset = "quick"
    times = ", ".join(f"{name} ({experiment.minutes[name]})" for name in presets)
    settings = presets[preset]
    shape: Any = type(settings)
    kind = dataclasses.make_dataclass(
        "Arguments",
        [
            (
                "settings",
                Annotated[with_limits_shown(shape), tyro.conf.arg(name="")],
            ),
            ("runtime", Annotated[with_limits_shown(Runtime), tyro.conf.arg(name="")]),
            (
                "preset",
                Annotated[
                    Literal[tuple(presets)],
                    tyro.conf.arg(
                        help=f"Where settings come from that are not given: {times}."
                    ),
                ],
            ),
        ],
    )
    try:
        found = tyro.cli(
            kind,
            args=list(argv),
            default=kind(settings, Runtime(), preset),
            description=experiment.about,
            prog=f"python -m {experiment.module}",
        )
        return Options(found.settings, found.runtime, found.preset)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


class SettingsError(ValueError):
    """A setting was given that nothing reads."""


def watched(settings: Any) -> tuple[Any, set[str]]:
    """The same settings, and the names of those that have been read of them so far.

    >>> copy, read = watched(Runtime())
    >>> copy.workers, sorted(read)
    (0, ['workers'])
    """
    read: set[str] = set()
    fields = {field.name for field in dataclasses.fields(settings)}

    class Watched(type(settings)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in fields:
                read.add(name)
            return super().__getattribute__(name)

    copy = object.__new__(Watched)
    copy.__dict__.update(vars(settings))
    return copy, read


def idle_settings(
    settings: Any, preset: Any, read: Collection[str], plans: Sequence[Plan]
) -> list[str]:
    """Settings that are not the preset's and that planning has not read."""
    tunes = any(study.tuning() for plan in plans for study in plan.studies)
    return [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != getattr(preset, field.name)
        and (field.name not in read or (field.name == "tune_updates" and not tunes))
    ]


def make_plans(experiment: Experiment, settings: Any, preset: Any) -> list[Plan]:
    """The plans of settings, each of which must be read.

    Raises:
      SettingsError: one that differs from the preset's is not.
      DataError, ValueError: the data cannot be had; a bad value.
    """
    copy, read = watched(settings)
    plans = experiment.plans(copy)
    idle = idle_settings(settings, preset, read, plans)
    if idle:
        raise SettingsError(f"nothing would read {', '.join(idle)} here, leave it out.")
    return plans


class _Records:
    """Looks records up, each file once: no record changes while a run lasts."""

    def __init__(self, store: ResultsStore):
        self._store = store
        self._found: dict[str, Record] = {}

    def __call__(self, config: Mapping[str, Any]) -> Record | None:
        name = config_hash(config)
        if name not in self._found:
            record = self._store.get(config)
            if record is None:
                return None
            self._found[name] = record
        return self._found[name]


def begin(store: ResultsStore, plans: Sequence[Plan]) -> None:
    """Takes over what a checkout keeps of a folder, and lets failed cells try again."""
    earlier = store.folder / "results.jsonl"
    if earlier.is_file():
        store.import_jsonl(earlier)
    for plan in plans:
        for config in plan.possible():
            store.retry(config)
    while _set_lost_aside(store, plans):
        pass  # these may come after others


def _set_lost_aside(store: ResultsStore, plans: Sequence[Plan]) -> bool:
    """Lets cells run again whose parameters others need, and the folder has not.

    Such as where their records are from a results.jsonl.
    """
    get, found = _Records(store), False
    needed = {
        id(study.after)
        for plan in plans
        for study in plan.studies
        if study.after is not None and study.done(get) < study.total(get)
    }
    for plan in plans:
        for study in plan.studies if needed else ():
            if id(study) not in needed:
                continue
            lost = [
                cell
                for cell in study.final(study.best(get))
                if (get(cell.config()) or {}).get("status") == "done"
                and plan.task.keeps_params(cell)
                and not params_file(store, cell).is_file()
            ]
            for cell in lost:
                found |= store.retry(cell.config(), anyway=True)
            if lost:
                print(
                    f"Of {study.name}, {len(lost)} run again: others begin with "
                    "their parameters, which their records do not hold. Where they "
                    f"were run, copy params/ to {store.folder / 'params'} instead."
                )
    return found


def work(plans: Sequence[Plan], store: ResultsStore, runtime: Runtime) -> None:
    """Works until every cell of every plan has a record.

    Cells that another run has in hand are left to it and asked for again.

    Raises:
      Interrupted: a signal came; what was in progress is saved.
      Exit: a worker met what would befall every cell; it is told.
    """
    get = _Records(store)
    total = sum(plan.total(get) for plan in plans)
    done = sum(plan.done(get) for plan in plans)
    primary = jax.process_index() == 0
    with (
        StopSignal() as stop,
        Progress(total, done, live=None if primary else False) as progress,
    ):
        if done and primary:
            progress.say(f"{done} of {total} cells were done before.")
        world = World.of(plans, store.folder, runtime)
        engine = make_engine(world, total - done, progress, stop)
        running: dict[str, float] = {}  # until when a job is not to be given again
        ended = False
        try:
            while True:
                signum = devices.agree_any(stop.signum or 0)
                if signum:
                    raise Interrupted(signum)
                left, jobs = False, []
                for index, plan in enumerate(plans) if primary else ():
                    for job in plan.ready(get, index, group=runtime.vmap_seeds):
                        left = True
                        if plan.key(job) not in running:
                            jobs.append(job)
                if jax.process_count() > 1:  # all do what process 0 says, together
                    left, jobs = devices.agree_on((left, jobs[:1]))
                if not left and float("inf") not in running.values():
                    ended = True
                    return
                for job in jobs:
                    if not engine.free:
                        break
                    engine.submit(job)
                    running[plans[job.plan].key(job)] = float("inf")
                for job, outcome in engine.done():
                    progress.expect(sum(plan.total(get) for plan in plans))
                    key = plans[job.plan].key(job)
                    del running[key]
                    if outcome.status == "held":
                        running[key] = time.monotonic() + PATIENCE
                    elif outcome.status == "stopped":
                        raise Interrupted(stop.signum or signal.SIGTERM)
                    elif outcome.status == "error":
                        fail(outcome)
                        raise Exit(2 if outcome.is_message else 1)
                if running and max(running.values()) < float("inf"):
                    time.sleep(PATIENCE / 2)  # nothing but what others have in hand
                now = time.monotonic()
                running = {key: until for key, until in running.items() if until > now}
        except WorkerDied as error:
            engine.stop(signal.SIGTERM)
            found = sum(plan.done(_Records(store)) for plan in plans)
            raise WorkerDied(
                f"{error}; {found} of {total} cells are done, and the same command "
                "goes on from there."
            ) from error
        except BaseException:
            engine.stop(signal.SIGTERM)
            raise
        finally:
            engine.close(kill=not ended)


class Exit(Exception):
    """Ends the run with a status; what there is to say has been said."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def run(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Runs an experiment to its end.

    Args:
      experiment: what to run.
      argv: its command line; by default the process's.

    Returns:
      The exit status: 0; 1 where a cell failed or a worker died; 2 after an error that
      a message tells; 128 + signal after an interruption.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(experiment, arguments)
    runtime = options.runtime
    keep_freed_memory()
    leave_memory(runtime)
    if runtime.distributed:
        try:
            jax.distributed.initialize(
                runtime.coordinator, runtime.num_processes, runtime.process_id
            )
        except (ValueError, RuntimeError) as error:
            print(
                f"error: distributed: {error}. Where no cluster is detected, give "
                "--coordinator HOST:PORT --num-processes N --process-id I.",
                file=sys.stderr,
            )
            return 2
    primary = jax.process_index() == 0
    out = runtime.out or pathlib.Path("runs") / experiment.name / options.preset
    store = ResultsStore(out)
    try:
        if primary:
            store.check_writable()
        preset = experiment.presets[options.preset]
        whole = make_plans(experiment, options.settings, preset)
        plans = share_of(whole, runtime.shard)
        get = _Records(store)
        if primary:
            begin(store, plans)
            for plan in plans:
                print(plan.description)
            total = sum(plan.total(get) for plan in plans)
            print(f"{total} cells -> {store.folder}", flush=True)
        if any(plan.done(get) < plan.total(get) for plan in plans):
            for plan in plans:
                plan.task.rehearse(list(plan.cells()))
                if runtime.vmap_seeds and not plan.task.uniform and primary:
                    print("vmap_seeds: batches differ in shape, seeds go one by one.")
        work(plans, store, runtime)
        if not primary:
            return 0  # process 0 tells what came out
        store.export_jsonl(store.folder / "results.jsonl")
        kinds = [config for plan in whole for config in plan.kinds()]
        try:
            write = experiment.report.write
            print(reported(store.records(), write, store.folder, kinds))
        except NothingToReport as error:
            print(error)
        found = (store.get(config) for plan in plans for config in plan.possible())
        return int(any(r is not None and r["status"] == "failed" for r in found))
    except Exception as error:
        return ended_by(error, quiet=not primary)


def entry(name: str) -> Main:
    """``main(argv=None)`` of an experiment, for its ``__main__``."""

    @program
    def main(argv: Sequence[str] | None = None) -> int:
        return run(find(name), argv)

    return main


def ended_by(error: Exception, *, quiet: bool = False) -> int:
    """Tells an error that ended a run in a line where that is enough; else raises it.

    Args:
      error: what came.
      quiet: says nothing of an interruption, which process 0 does.

    Returns:
      The exit status.
    """
    if isinstance(error, Exit):
        return error.status
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
    known = isinstance(error, DataError | ImportError | OSError | WorkerDied)
    if not known and not (isinstance(error, KNOWN_ERRORS) and is_message(error)):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 1 if isinstance(error, WorkerDied) else 2


def overview() -> str:
    """All experiments: a line each, with presets, times and committed results."""
    lines = []
    for name in names():
        try:
            found = find(name)
        except (AttributeError, ImportError) as error:
            lines.append(f"{name}: no experiment ({error})")
            continue
        times = ", ".join(f"{p}: {found.minutes[p]}" for p in found.presets)
        committed = "committed results" if found.committed else "no committed results"
        line = found.about.strip().splitlines()[0]
        lines += [f"{name}: {line}", f"    {times}; {committed}"]
    return "\n".join(lines)
