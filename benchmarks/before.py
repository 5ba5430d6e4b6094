"""This checkout against an earlier commit of it, in one run, taking turns.

`--before COMMIT` checks the commit out into a temporary folder and times the same work
in both, each in a process of its own, and the data-scaling experiment's whole quick
preset, once each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.record import ROOT
from benchmarks.serve import Served, Setting
from benchmarks.timing import Effort, Record, compare, target

BEFORE, AFTER = "before", "after"


def work() -> dict[str, tuple[Any, ...]]:
    """What is timed, by its title: the arguments of `Served`."""
    found: dict[str, tuple[Any, ...]] = {}
    for length in (256, 1024, 4096):
        for backward in (False, True):
            direction = "forward + backward" if backward else "forward"
            title = f"exact attention, {direction}, T = {length:,}"
            found[title] = ("attention", length, backward)
    models = dict(vit="ViT", resnet="ResNet", hybrid="hybrid")
    for model, batch in (("vit", 64), ("vit", 128), ("resnet", 64), ("hybrid", 64)):
        setting = Setting(model, (28, 28, 1), batch)
        title = f"{models[model]} mu train step, batch {batch}"
        found[title] = ("train", dataclasses.asdict(setting))
    return found


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[pathlib.Path]:
    """A temporary checkout of a commit, with what this one serves by."""
    with tempfile.TemporaryDirectory() as folder:
        there = pathlib.Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        command = [*git, "add", "--quiet", "--detach", str(there), commit]
        subprocess.run(command, check=True)
        try:
            (there / "benchmarks").mkdir(exist_ok=True)
            source = (ROOT / "benchmarks" / "serve.py").read_text()
            (there / "benchmarks" / "serve.py").write_text(source)
            for room in ("core", "common"):  # an earlier commit gives memory back
                memory = there / "experiments" / room / "memory.py"
                if memory.parent.is_dir() and not memory.exists():
                    memory.write_text("def keep_freed_memory():\n    return False\n")
            yield there
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=True)


def _quick(folder: pathlib.Path) -> float:
    """Seconds of the whole quick preset."""
    with tempfile.TemporaryDirectory() as out:
        command = ["-m", "experiments.data_scaling", "--preset", "quick", "--out", out]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - began


def quick_preset(commit: str, effort: Effort) -> Record:
    """The whole quick preset in both checkouts, one after the other."""
    effort.say("the quick preset ...")
    with checkout(commit) as there:
        seconds = {BEFORE: _quick(there), AFTER: _quick(ROOT)}
    ratio = seconds[BEFORE] / seconds[AFTER]
    rows = [dict(name=n, milliseconds=1e3 * s) for n, s in seconds.items()]
    what = "whole `quick` preset, against its time before"
    return dict(
        title="The quick preset",
        about="The whole data-scaling experiment of `make run`, data at hand: "
        f"start, compilation, tuning, training, baselines, report. Before is "
        f"commit {commit}. One run each, one after the other.",
        tables=[dict(title="whole run", short="quick", rows=rows)],
        targets=[target(what, 2.0, 4.0, ratio, "one run each")],
    )


def group(commit: str, effort: Effort) -> Record:
    """Attention and training steps in both checkouts, taking turns."""
    tables = []
    with checkout(commit) as there:
        for title, asked in work().items():
            effort.say(f"{title} ...")
            with Served(*asked, folder=there) as old, Served(*asked) as new:
                rows = compare({BEFORE: old, AFTER: new}, [BEFORE], effort)
            tables.append(dict(title=title, short=title, rows=rows))
    return dict(
        title="Before and after",
        about=f"This checkout against commit {commit}, each in a process of "
        "its own on all cores, taking turns. A train step's figure is four updates.",
        tables=tables,
        targets=[],
    )
