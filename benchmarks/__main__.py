"""`python -m benchmarks`: ours beside its peers, alternating; stores what it saw.

Nothing here is a test: it reports, on the machine that it runs on, how much faster or
slower ours is. Each group is stored as a JSON file of its own, and from all of them the
page `README.md` beside them is made. PyTorch is measured where it is installed (`make
bench` installs it).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from attn_jax._program import program
from benchmarks import (
    attention,
    group_norm,
    growth,
    long_range,
    record,
    report,
    torch_attention,
    train_step,
    workers,
)
from benchmarks.report import RESULTS
from benchmarks.timing import Effort, worst

Group = Callable[[Effort, pathlib.Path], dict[str, Any]]

OURS = "ours"
FASTEST = "the faster of PyTorch's"


def _train_steps(effort: Effort, folder: pathlib.Path) -> dict[str, Any]:
    """The training steps of the experiments, in JAX and in PyTorch."""
    tables = []
    for setting in train_step.settings(batches=(64,), smoke=effort.smoke):
        effort.say(f"{setting.title} ...")
        rows = train_step.compare(
            setting,
            rounds=effort.rounds,
            seconds=effort.seconds,
            compile=not effort.smoke,
        )
        peers = rows[0]["name"] != OURS
        for row in rows:
            ratio = [row.pop(key) for key in ("ratio", "ratio_low", "ratio_high")]
            row["against"] = {FASTEST: ratio} if peers else {}
        tables.append(
            dict(
                title=setting.title, short=setting.title, model=setting.model, rows=rows
            )
        )
    return train_steps_record(tables)


def train_steps_record(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored of the training steps: the tables, and the targets from them.

    A target is by the faster of our ways, as its base is the faster of PyTorch's.
    """
    targets = []
    for model, work in (
        ("vit", "ViT train step, against PyTorch eager and compile"),
        ("resnet", "CNN train step, against PyTorch eager channels_last and compile"),
    ):
        best = []
        for table in (t for t in tables if t["model"] == model):
            ways = [
                row
                for row in table["rows"]
                if row["name"].startswith(OURS) and row["against"]
            ]
            if ways:
                fastest = max(ways, key=lambda row: row["against"][FASTEST][0])
                short = f"{table['short']}, {fastest['name']}"
                best.append(dict(short=short, rows=[fastest | dict(name=OURS)]))
        reached, told = worst(best, OURS, FASTEST)
        targets.append(
            dict(work=work, at_least=1.0, aim=1.3, reached=reached, told=told)
        )
    return dict(
        title="Training steps",
        about="The same model from the same initial parameters, the same update; "
        "images a second on all cores, batches from the host included. The base is "
        "the fastest of PyTorch's ways, the first row; targets take the faster of "
        "ours, which splits the batch over one host device a core or does not. Memory "
        "is left out: PyTorch's cannot be told from what its compiler takes.",
        tables=tables,
        targets=targets,
    )


def _workers(effort: Effort, folder: pathlib.Path) -> dict[str, Any]:
    """One training process on all cores, against one process a core."""
    base = "one process, all cores"
    tables = []
    models = ("vit",) if effort.smoke else ("vit", "resnet")
    for model in models if hasattr(os, "sched_getaffinity") else ():
        effort.say(f"workers, {model} ...")
        speeds = workers.compare(
            model,
            rounds=min(effort.rounds, 3),
            seconds=0.1 if effort.smoke else 4.0,
        )
        rows = []
        for name, values in speeds.items():
            ratios = [v / b for v, b in zip(values, speeds[base], strict=True)]
            middle = sorted(ratios)[len(ratios) // 2]
            rows.append(
                dict(
                    name=name,
                    images_per_second=sorted(values)[len(values) // 2],
                    against={base: [middle, min(ratios), max(ratios)]},
                )
            )
        tables.append(
            dict(title=f"{model} of size mu, batch 64", short=model, rows=rows)
        )
    return dict(
        title="Workers",
        about="Several cells of an experiment on one machine: one process that uses "
        "all cores, or one process a core. Images a second, all processes together.",
        tables=tables,
        targets=[],
    )


GROUPS: dict[str, Group] = {
    "exact_attention": lambda effort, folder: attention.exact(effort),
    "memory": lambda effort, folder: attention.memory(effort),
    "attention_layer": lambda effort, folder: attention.layer(effort),
    "truncated": lambda effort, folder: attention.truncated(effort),
    "long_range": lambda effort, folder: long_range.group(effort),
    "long_range_small": lambda effort, folder: long_range.small(effort),
    "train_steps": _train_steps,
    "growth": growth.group,
    "group_norm": lambda effort, folder: group_norm.group(effort),
    "workers": _workers,
}
"""What is measured, by the name of its file."""


def measure_and_store(
    name: str, folder: pathlib.Path, *, smoke: bool, command: str
) -> dict[str, Any]:
    """Measures a group and stores it with the machine, versions and command.

    Args:
      name: in `GROUPS`.
      folder: where `<name>.json` goes.
      smoke: shapes as small as can be.
      command: as it is to be told.

    Returns:
      What was stored.
    """
    effort = Effort(
        rounds=1 if smoke else 7,
        seconds=0.0 if smoke else 0.2,
        smoke=smoke,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    began = time.perf_counter()
    told = record.about(command)  # the commit as it was when this began
    made = GROUPS[name](effort, folder)
    made = made | told
    made |= dict(smoke=smoke, seconds=time.perf_counter() - began)
    record.store(folder / f"{name}.json", made)
    return made


@program
def main(argv: list[str] | None = None) -> int:
    """Runs the groups and writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a test")
    parser.add_argument(
        "--only", choices=GROUPS, action="append", help="one group; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="folder (default: benchmarks/results; with --smoke a temporary one)",
    )
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    folder = options.out
    if folder is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if options.smoke else RESULTS
    if options.smoke:  # nearly all of its time is compilation
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of worker processes
        jax.config.update("jax_disable_most_optimizations", True)
    if not torch_attention.AVAILABLE:
        print("PyTorch is not installed: its rows are left out (see `make bench`).")
    # The folder is left out of the command: where results lie says nothing of them.
    told = ["python", "-m", "benchmarks", *(["--smoke"] if options.smoke else [])]
    for name in options.only or []:
        told += ["--only", name]
    for name in options.only or GROUPS:
        made = measure_and_store(
            name, folder, smoke=options.smoke, command=shlex.join(told)
        )
        print(report.group_text(made), flush=True)
    print(f"Stored in {folder}; the page is {report.write(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
