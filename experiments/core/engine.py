"""Engines: what runs the jobs of a plan, here, in processes, or on a Ray cluster.

`Engine.submit(job)` takes a job where `free` says so, `done()` gives those that ended,
`stop()` makes the rest save and end. A worker holds the tasks of all plans, which it
was given once: it neither plans nor loads anything anew. One that dies takes its job
with it for a moment: the job goes on elsewhere from its checkpoint.
"""

from __future__ import annotations

import abc
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

import jax

from experiments.core import devices
from experiments.core.cell import Runtime
from experiments.core.loop import Task, Trainer, ends_the_run, store_failure
from experiments.core.memory import keep_freed_memory
from experiments.core.observe import Progress, Relay
from experiments.core.plan import Baseline, Job, Plan
from experiments.core.rehearsal import is_message
from experiments.core.signals import Interrupted, Stop, StopSignal, interruptible
from experiments.core.store import ResultsStore

# How often a job may lose its worker before the run gives up.
DEATHS = 3

# Seconds that a worker whose parent is gone has to save what it is at.
PATIENCE = 60.0


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of a job, again and again."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended: "done", "held" by another run, "stopped", or with an error.

    An error's own traceback stays with the worker; ``text`` is what to print, a
    message alone where ``is_message``.
    """

    status: Literal["done", "held", "stopped", "error"]
    text: str = ""
    is_message: bool = False


@dataclasses.dataclass(frozen=True)
class World:
    """What every worker is given once: all but the studies of the plans."""

    tasks: tuple[Task, ...]
    baselines: tuple[tuple[Baseline, ...], ...]
    folder: pathlib.Path
    runtime: Runtime

    @classmethod
    def of(cls, plans: Sequence[Plan], folder: pathlib.Path, runtime: Runtime) -> World:
        """The world of some plans."""
        return cls(
            tuple(plan.task for plan in plans),
            tuple(tuple(plan.baselines) for plan in plans),
            folder,
            runtime,
        )


class Worker:
    """Runs jobs, one after another, in this process."""

    def __init__(self, world: World, progress: Progress, stop: Stop):
        self.world, self.progress, self.stop = world, progress, stop
        self.store = ResultsStore(world.folder)
        self._trainers: dict[int, Trainer] = {}

    def run(self, job: Job) -> Outcome:
        """Runs a job; what is the matter of its cell alone becomes its record.

        Raises:
          Interrupted: a signal came; what was done is saved.
          Exception: what would befall the next job too.
        """
        if self.stop.signum is not None:
            raise Interrupted(self.stop.signum)
        if job.baseline is not None:
            ran = self._measure(self.world.baselines[job.plan][job.baseline])
        else:
            if job.plan not in self._trainers:
                task = self.world.tasks[job.plan]
                self._trainers[job.plan] = Trainer(
                    task, self.store, self.world.runtime, self.progress, self.stop
                )
            ran = self._trainers[job.plan].run(job.cells)
        return Outcome("done" if ran else "held")

    def outcome(self, job: Job) -> Outcome:
        """`run`, for a caller in another process: errors become an outcome."""
        try:
            return self.run(job)
        except Interrupted:
            return Outcome("stopped")
        except Exception as error:
            known = is_message(error) or isinstance(error, OSError)
            text = str(error) if known else traceback.format_exc()
            return Outcome("error", text, known)

    def _measure(self, baseline: Baseline) -> bool:
        """Measures a baseline; on a cluster, process 0 alone."""
        ran = 1
        if jax.process_index() == 0:
            with self.store.claim(baseline.config) as claimed:
                ran = int(claimed)
                if claimed and self.store.get(baseline.config) is None:
                    self._measured(baseline)
        return bool(devices.agree(ran))

    def _measured(self, baseline: Baseline) -> None:
        self.progress.begin(baseline.label, 1)
        began = time.monotonic()
        config = baseline.config
        cluster = jax.process_count() > 1
        try:
            if cluster:
                metrics = baseline.measure()
            else:
                metrics = interruptible(baseline.measure, self.stop)
        except Exception as error:
            if ends_the_run(error) or cluster:
                raise
            record = store_failure(self.store, config, error, began)
        else:
            record = self.store.put(
                config,
                status="done",
                metrics=metrics,
                wall_time_s=time.monotonic() - began,
            )
        self.progress.finish(baseline.label, record)


class Engine(abc.ABC):
    """Runs jobs somewhere."""

    @property
    @abc.abstractmethod
    def free(self) -> bool:
        """Whether `submit` may be called."""

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Takes a job."""

    @abc.abstractmethod
    def done(self) -> list[tuple[Job, Outcome]]:
        """Jobs that ended since the last call; waits a moment where none did."""

    def stop(self, signum: int) -> None:  # noqa: B027
        """Makes running jobs save and end, and waits for that."""

    def close(self, *, kill: bool = False) -> None:  # noqa: B027
        """Ends the workers; with ``kill`` also one that hangs."""


class Inline(Engine):
    """Runs each job at once, in this process."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._done: list[tuple[Job, Outcome]] = []

    @property
    def free(self) -> bool:
        return not self._done

    def submit(self, job: Job) -> None:
        self._done.append((job, self._worker.run(job)))

    def done(self) -> list[tuple[Job, Outcome]]:
        found, self._done = self._done, []
        return found


class Slots(Engine):
    """Workers elsewhere, a job each; one that dies is replaced.

    A subclass says how a worker is started, given a job, asked and ended.
    """

    def __init__(self, count: int, progress: Progress):
        self.progress = progress
        self._workers: list[Any] = [None] * count
        self._running: dict[int, tuple[Job, Any]] = {}
        self._deaths: dict[str, int] = {}

    @abc.abstractmethod
    def _start(self, slot: int) -> Any:
        """A worker."""

    @abc.abstractmethod
    def _give(self, worker: Any, job: Job) -> Any:
        """A future of the job's outcome.

        Raises:
          WorkerDied: the worker did, before.
        """

    @abc.abstractmethod
    def _wait(self, futures: Sequence[Any], seconds: float) -> None:
        """Waits until one of them has ended, or for so long."""

    @abc.abstractmethod
    def _ended(self, future: Any) -> Outcome | None:
        """What came of a job, None while it runs.

        Raises:
          WorkerDied: its worker did.
        """

    @property
    def free(self) -> bool:
        return len(self._running) < min(len(self._workers), self._room())

    def _room(self) -> int:
        """How many workers there is room for at present."""
        return len(self._workers)

    def submit(self, job: Job) -> None:
        idle = [i for i in range(len(self._workers)) if i not in self._running]
        slot = min(idle, key=lambda i: self._workers[i] is None)  # one that is there
        if self._workers[slot] is None:
            self._workers[slot] = self._start(slot)
        try:
            future = self._give(self._workers[slot], job)
        except WorkerDied:  # while it had nothing to do
            self._discard(slot)
            self._workers[slot] = self._start(slot)
            future = self._give(self._workers[slot], job)
        self._running[slot] = job, future

    def _tell(self) -> None:
        """Hands on what workers say of their progress."""

    def done(self, seconds: float = 0.5) -> list[tuple[Job, Outcome]]:
        self._wait([future for _, future in self._running.values()], seconds)
        if not self._running:  # there is no room for any at present
            time.sleep(seconds)
        self._tell()
        found = []
        for slot, (job, future) in list(self._running.items()):
            try:
                outcome = self._ended(future)
            except WorkerDied as error:
                del self._running[slot]
                self._discard(slot)
                name = repr(job)
                self._deaths[name] = self._deaths.get(name, 0) + 1
                if self._deaths[name] >= DEATHS:
                    raise WorkerDied(f"{_name(job)}: {error}") from error
                self.progress.say(
                    f"warning: {error} in {_name(job)}, which goes on elsewhere."
                )
                found.append((job, Outcome("held")))  # it is given again
                continue
            if outcome is not None:
                del self._running[slot]
                found.append((job, outcome))
        return found

    def _discard(self, slot: int) -> None:
        self._workers[slot] = None


def _name(job: Job) -> str:
    return str(job.cells[0].label) if job.cells else f"baseline {job.baseline}"


# ------------------------------------------------------------------ processes


def available_cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def take_share(slot: int, count: int) -> None:
    """Makes this process one of ``count``: its cores, and its accelerator.

    Call it before the first computation.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    if len(names) >= count:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[slot]
    cores = available_cores()
    if hasattr(os, "sched_setaffinity") and len(cores) >= count:
        os.sched_setaffinity(0, cores[slot::count])


_WORKER: Worker | None = None
_busy = threading.Lock()


def _begin(slot: int, count: int, world: bytes, messages: Any, parent: int) -> None:
    """Makes this process a worker."""
    global _WORKER
    os.setpgrp()  # Ctrl-C reaches us by our parent, once
    take_share(slot, count)
    keep_freed_memory()

    def watch() -> None:  # a worker does not outlive a run that was killed
        while os.getppid() == parent:
            time.sleep(0.5)
        _busy.acquire(timeout=PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _WORKER = Worker(pickle.loads(world), Relay(slot, messages), StopSignal(parent))


def _work(job: Job) -> Outcome:
    """Runs a job in a worker."""
    assert _WORKER is not None and isinstance(_WORKER.stop, StopSignal)
    with _busy, _WORKER.stop:
        return _WORKER.outcome(job)


class Processes(Slots):
    """Workers are processes of this machine, each a pool of one.

    Args:
      count: how many.
      world: what they are given.
      progress: who is told.
    """

    def __init__(self, count: int, world: World, progress: Progress):
        super().__init__(count, progress)
        try:
            self._world = pickle.dumps(world)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"engine: a task or a baseline cannot be sent to workers ({error}): "
                "use functions of a module, not of a function, or --engine inline."
            ) from error
        self._context = multiprocessing.get_context("spawn")
        self._messages = self._context.SimpleQueue()
        self._pids: dict[int, concurrent.futures.Future[int]] = {}

    def _start(self, slot: int) -> Any:
        share = (slot, len(self._workers), self._world, self._messages, os.getpid())
        pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=self._context, initializer=_begin, initargs=share
        )
        with unshared_memory():
            self._pids[slot] = pool.submit(os.getpid)
        return pool

    def _give(self, worker: Any, job: Job) -> Any:
        try:
            return worker.submit(_work, job)
        except BrokenProcessPool as error:
            raise WorkerDied("a worker process was killed or crashed") from error

    def _wait(self, futures: Sequence[Any], seconds: float) -> None:
        first = concurrent.futures.FIRST_COMPLETED
        concurrent.futures.wait(futures, seconds, return_when=first)

    def _ended(self, future: Any) -> Outcome | None:
        if not future.done():
            return None
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise WorkerDied("a worker process was killed or crashed") from error

    def _tell(self) -> None:
        while not self._messages.empty():
            self.progress.heard(*self._messages.get())

    def _discard(self, slot: int) -> None:
        self._workers[slot].shutdown(wait=False)
        super()._discard(slot)

    def stop(self, signum: int) -> None:
        for slot in self._running:
            with contextlib.suppress(ProcessLookupError, BrokenProcessPool):
                os.kill(self._pids[slot].result(), signal.SIGTERM)
        while not all(future.done() for _, future in self._running.values()):
            self._wait([future for _, future in self._running.values()], 0.5)
            self._tell()

    def close(self, *, kill: bool = False) -> None:
        for slot, pool in enumerate(self._workers):
            if pool is None:
                continue
            if kill and self._pids[slot].done():
                with contextlib.suppress(ProcessLookupError, BrokenProcessPool):
                    os.kill(self._pids[slot].result(), signal.SIGKILL)
            pool.shutdown(wait=True, cancel_futures=True)
        self._tell()


@contextlib.contextmanager
def unshared_memory() -> Iterator[None]:
    """What a process that only starts workers sets of an accelerator is not theirs."""
    ours = os.environ.pop(_PREALLOCATE) if _left else None
    try:
        yield
    finally:
        if ours is not None:
            os.environ[_PREALLOCATE] = ours


_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_left: list[bool] = []  # whether we set it


def leave_memory(runtime: Runtime) -> None:
    """Makes a process that only starts workers take no accelerator's memory.

    Call it before the first computation.
    """
    starts = runtime.workers > 1 or runtime.engine in ("processes", "ray")
    if starts and _PREALLOCATE not in os.environ:
        os.environ[_PREALLOCATE] = "false"
        _left.append(True)


# ------------------------------------------------------------------------ ray


class Ray(Slots):
    """Workers are actors of a Ray cluster, spread over its nodes.

    The cluster is the one that RAY_ADDRESS names, else this machine. An actor has a
    GPU of its own where the cluster has any: Ray says which before JAX is imported.
    All nodes must see the results folder and the same code. A lost node's jobs go on
    elsewhere from their checkpoints.

    Args:
      count: how many; 0: one a GPU, or one a core where there is none.
      world: what they are given.
      progress: who is told.
    """

    def __init__(self, count: int, world: World, progress: Progress):
        try:
            import ray
        except ImportError as error:
            raise ImportError(
                "engine: ray is not installed; pip install 'attn-jax[cluster]'."
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ours = signal.getsignal(signal.SIGTERM)  # Ray puts one of its own there
            with unshared_memory():
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=30)
            signal.signal(signal.SIGTERM, ours)
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self._resource = "GPU" if gpus else "CPU"
        super().__init__(count or gpus or max(1, int(found.get("CPU", 1))), progress)
        self._actor = ray.remote(_Actor).options(
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            max_concurrency=2,  # `stop` comes while `run` is at work
            scheduling_strategy="SPREAD",
        )
        self._world = ray.put(world)
        self._coming: dict[int, Any] = {}  # by slot, a future that its actor is there

    def done(self, seconds: float = 0.5) -> list[tuple[Job, Outcome]]:
        """Jobs that ended; those that wait for room go to who has nothing to do."""
        found = super().done(seconds)
        if all(w is None or i in self._running for i, w in enumerate(self._workers)):
            return found
        for slot, (job, _) in list(self._running.items()):
            if not self._ray.wait([self._coming[slot]], timeout=0)[0]:
                del self._running[slot]
                self._ray.kill(self._workers[slot])
                self._workers[slot] = None
                found.append((job, Outcome("held")))
        return found

    def _room(self) -> int:
        """What is left of the cluster: nodes are lost, and others join."""
        return int(self._ray.cluster_resources().get(self._resource, 0))

    def _start(self, slot: int) -> Any:
        actor: Any = self._actor.remote(slot, self._world)
        self._coming[slot] = actor.ready.remote()
        return actor

    def _discard(self, slot: int) -> None:
        """Gives up those without a job too: they may have been on the same node."""
        super()._discard(slot)
        for other, worker in enumerate(self._workers):
            if worker is not None and other not in self._running:
                self._ray.kill(worker)
                super()._discard(other)

    def _give(self, worker: Any, job: Job) -> Any:
        return worker.run.remote(job)

    def _wait(self, futures: Sequence[Any], seconds: float) -> None:
        if futures:
            self._ray.wait(list(futures), timeout=seconds)

    def _ended(self, future: Any) -> Outcome | None:
        if not self._ray.wait([future], timeout=0)[0]:
            return None
        try:
            outcome, told = self._ray.get(future)
        except (
            self._ray.exceptions.RayActorError,
            self._ray.exceptions.WorkerCrashedError,
        ) as error:
            why = str(error).strip().split("\n")[0][:200]
            raise WorkerDied(f"a node or an actor was lost ({why})") from error
        for method, arguments in told:
            self.progress.heard(0, method, *arguments)
        return outcome

    def stop(self, signum: int) -> None:
        for slot in self._running:
            self._workers[slot].stop.remote(signum)
        futures = [future for _, future in self._running.values()]
        if futures:
            self._ray.wait(futures, num_returns=len(futures))

    def close(self, *, kill: bool = False) -> None:
        for worker in self._workers:
            if worker is not None:
                self._ray.kill(worker)


class _Actor:
    """A worker on a Ray cluster."""

    def __init__(self, slot: int, world: World):
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):
            cores = available_cores()
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, {cores[slot % len(cores)]})
        keep_freed_memory()
        self._told: list[tuple[str, tuple[Any, ...]]] = []
        self._stop = Stop()
        self._worker = Worker(world, Relay(0, self), self._stop)

    def ready(self) -> bool:
        """Tells that it is there."""
        return True

    def put(self, message: tuple[Any, ...]) -> None:
        """Keeps what is said of a cell until its job has ended."""
        _, method, *arguments = message
        if method in ("finish", "say"):
            self._told.append((method, tuple(arguments)))

    def run(self, job: Job) -> tuple[Outcome, list[tuple[str, tuple[Any, ...]]]]:
        """Runs a job."""
        outcome = self._worker.outcome(job)
        told, self._told = self._told, []
        return outcome, told

    def stop(self, signum: int) -> None:
        """Makes the job that runs save and end."""
        self._stop.ask(signum)


def worker_count(runtime: Runtime) -> int:
    """How many cells run at once on this machine.

    Raises:
      ValueError: more were asked for than there are accelerators, one for each.
    """
    if runtime.workers:
        most = runtime.workers
        if most > 1 and jax.default_backend() != "cpu":
            # Which chips a process sees is told by CUDA_VISIBLE_DEVICES alone.
            many = jax.default_backend() in ("gpu", "cuda", "rocm")
            most = jax.local_device_count() if many else 1
        if runtime.workers > most:
            raise ValueError(
                f"workers must be at most {most} here, one for each accelerator, got "
                f"{runtime.workers}: two processes on one would fight for its memory."
            )
        return runtime.workers
    if runtime.distributed or jax.default_backend() != "cpu":
        return 1
    forced = jax.local_device_count() > 1  # a test of several host devices
    return 1 if forced else max(1, len(available_cores()))


def make_engine(world: World, jobs: int, progress: Progress, stop: Stop) -> Engine:
    """The engine that a runtime asks for.

    Args:
      world: what its workers are given.
      jobs: how many there are left; no more workers than that are started.
      progress: who is told.
      stop: of this process.
    """
    runtime = world.runtime
    if runtime.engine == "ray":
        return Ray(runtime.workers, world, progress)
    count = 1 if runtime.engine == "inline" else min(worker_count(runtime), jobs)
    if count > 1 or runtime.engine == "processes":
        return Processes(max(1, count), world, progress)
    return Inline(Worker(world, progress, stop))


def fail(outcome: Outcome) -> None:
    """Prints what ended a run."""
    text = f"error: {outcome.text}" if outcome.is_message else outcome.text
    print(text, file=sys.stderr)
