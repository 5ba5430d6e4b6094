"""Where the minutes of a run go: imports, data, XLA, training, report; and a rerun.

Every experiment's quick preset in a process of its own, cells one after the other.
Another process of the same command finds all cells done: what a rerun costs.
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.record import ROOT
from benchmarks.timing import Effort, Record, target

#: Preset that is run, where it is not "quick": that one takes half an hour.
INSTEAD = {"long_range": "smoke", "seq2seq": "smoke"}

#: Part of a run -> what of `experiments.core.run` does it.
PARTS = {"data": "make_plans", "cells": "work", "report": "reported"}


def child(began: float, name: str, arguments: list[str]) -> dict[str, float]:
    """Runs an experiment here and tells the seconds of its parts.

    Args:
      began: when this process was started, `time.time()` of the one that did.
      name: of the experiment.
      arguments: of its command line.

    Returns:
      Part -> seconds: of `PARTS`, and "import", "XLA" (compilation, within "cells"),
      "whole"; and "peak_bytes", what the process held at most.
    """
    import jax

    from experiments.core import run

    experiment = run.find(name)
    took = {"import": time.time() - began, "XLA": 0.0} | dict.fromkeys(PARTS, 0.0)

    def heard(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            took["XLA"] += duration_secs

    def timed(part: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return fn(*given, **more)
            finally:
                took[part] += time.perf_counter() - start

        return call

    jax.monitoring.register_event_duration_secs_listener(heard)
    for part, attribute in PARTS.items():
        setattr(run, attribute, timed(part, getattr(run, attribute)))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = run.run(experiment, arguments)
    if status:
        raise RuntimeError(f"{name} ended with status {status}: {said.getvalue()}")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return took | {"whole": time.time() - began, "peak_bytes": peak}


def spent(name: str, preset: str, out: pathlib.Path) -> dict[str, float]:
    """The seconds of the parts of a run, in a process of its own."""
    arguments = ["--preset", preset, "--engine", "inline", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.minutes", repr(time.time()), name]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def group(effort: Effort) -> Record:
    """Every experiment's quick preset, and a rerun of it, once each."""
    from experiments.core import run

    rows: list[dict[str, Any]] = []
    for name in ["offsets"] if effort.smoke else run.names():
        experiment = run.find(name)
        preset = INSTEAD.get(name, "quick")
        if effort.smoke:
            (preset, *_) = experiment.smallest
        effort.say(f"{name}, {preset} ...")
        with tempfile.TemporaryDirectory() as folder:
            first, again = (spent(name, preset, pathlib.Path(folder)) for _ in "12")
        rows.append(dict(name=name, preset=preset, first=first, again=again))
    slowest = max(row["again"]["whole"] for row in rows)
    return dict(
        title="Where the minutes go",
        about="The quick preset of every experiment, data at hand, in one process on "
        "all cores, once: seconds of the clock. XLA is compilation; training and "
        "scoring is what is left of the cells' time, tracing and baselines in it; "
        "checks are what is tried before anything runs. A rerun finds every cell "
        "done; its memory is that of data and report.",
        targets=[
            target("rerun of a finished run, 5 s against it", 1.0, 1.0, 5 / slowest, "")
        ],
        minutes=rows,
    )


if __name__ == "__main__":
    print(json.dumps(child(float(sys.argv[1]), sys.argv[2], sys.argv[3:])))
