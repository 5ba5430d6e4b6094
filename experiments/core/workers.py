"""Processes on one machine that share the cells of an experiment."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from experiments.core.cell import Runtime
from experiments.core.loop import Interrupted, StopSignal
from experiments.core.observe import Display, read_statuses
from experiments.core.store import ResultsStore

WORKER_VARIABLE = "ATTN_JAX_WORKER"


def worker_count(runtime: Runtime) -> int:
    """How many processes share the cells on this machine.

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


def available_cores() -> list[int]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def pin_worker() -> tuple[int, int] | None:
    """In a worker, takes its share of the cores; returns (index, count), else None."""
    value = os.environ.get(WORKER_VARIABLE)
    if value is None:
        return None
    index, count = (int(part) for part in value.split("/"))
    cores = available_cores()
    if hasattr(os, "sched_setaffinity") and len(cores) >= count:
        os.sched_setaffinity(0, cores[index::count])
    return index, count


def environment_of(
    index: int, count: int, environment: Mapping[str, str]
) -> dict[str, str]:
    """Environment of a worker, which alone sees its part of the accelerators.

    >>> environment_of(1, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6"})["CUDA_VISIBLE_DEVICES"]
    '5'
    """
    found = {**environment, WORKER_VARIABLE: f"{index}/{count}"}
    if _left:
        found.pop(_UNSHARED, None)
    if jax.default_backend() != "cpu" or "CUDA_VISIBLE_DEVICES" in environment:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(count)]
        if len(names) >= count:
            found["CUDA_VISIBLE_DEVICES"] = names[index]
    return found


_UNSHARED = "XLA_PYTHON_CLIENT_PREALLOCATE"
_left: list[str] = []  # what `leave_memory` set


def leave_memory(runtime: Runtime) -> None:
    """Makes a process that only starts workers take no accelerator's memory.

    Call it before the first computation.
    """
    if runtime.workers > 1 and _UNSHARED not in os.environ:
        os.environ[_UNSHARED] = "false"
        _left.append(_UNSHARED)


def status_file(store: ResultsStore, index: int) -> pathlib.Path:
    """Where a worker tells what it does."""
    return store.locks / f"worker-{index}.status"


def run_workers(
    count: int,
    module: str,
    arguments: Sequence[str],
    store: ResultsStore,
    *,
    total: int,
    count_done: Callable[[], int],
) -> int:
    """Starts workers with this process's own arguments and waits for them.

    Args:
      count: how many.
      module: what this process runs, as after ``python -m``.
      arguments: its command line.
      store: where records go.
      total: number of cells.
      count_done: how many of them have a record.

    Returns:
      0 when all ended well, else the first exit status that was not 0.

    Raises:
      Interrupted: a signal came; the workers have saved and ended.
    """
    display = Display(total) if sys.stdout.isatty() else None
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.PIPE if display else None
    processes = []
    with StopSignal() as stop:
        for index in range(count):
            environment = environment_of(index, count, os.environ)
            if display:
                environment["PYTHONIOENCODING"] = "utf-8:replace"  # as it is read
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches them through us, once
                )
            )
        try:
            _watch(processes, stop, display, store, count_done)
        finally:
            if display:
                display.stop()
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
        if stop.signum is not None:
            raise Interrupted(stop.signum)
    codes = [process.returncode for process in processes]
    return next((code for code in codes if code), 0)


def ended_early(status: int, done: int, total: int) -> int:
    """Says that a worker ended before its time; returns the exit status."""
    how = f"with status {status}"
    if status < 0:
        how = f"by signal {-status} ({signal.Signals(-status).name})"
    print(
        f"error: a worker ended {how}; {done} of {total} cells are done, "
        "and the same command goes on from there.",
        file=sys.stderr,
    )
    return 2 if status == 2 else 1


def _watch(
    processes: Sequence[subprocess.Popen[str]],
    stop: StopSignal,
    display: Display | None,
    store: ResultsStore,
    count_done: Callable[[], int],
) -> None:
    files = [status_file(store, index) for index in range(len(processes))]
    if display:
        display.start()
        for process in processes:
            assert process.stdout is not None
            os.set_blocking(process.stdout.fileno(), False)
    told = False
    while any(process.poll() is None for process in processes):
        if stop.signum is not None and not told:
            told = True
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        if display:
            for process in processes:
                assert process.stdout is not None
                for line in process.stdout:
                    display.print(line.rstrip("\n"))
            display.draw(list(read_statuses(files)), count_done())
        time.sleep(0.5)
    if display:
        for process in processes:
            assert process.stdout is not None
            for line in process.stdout:
                display.print(line.rstrip("\n"))
