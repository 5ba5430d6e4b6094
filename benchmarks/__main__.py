"""`python -m benchmarks`: ours beside its peers, alternating; stores what it saw.

Nothing here is a test: it reports, on the machine that it runs on, how much faster or
slower ours is. Each group is stored as a JSON file of its own, and from all of them the
page `README.md` beside them is made. PyTorch is measured where it is installed (`make
bench` installs it).
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax

from attn_jax._program import program
from benchmarks import (
    accelerator,
    all_steps,
    attention,
    before,
    growth,
    long_range,
    minutes,
    record,
    report,
    train_step,
)
from benchmarks.report import RESULTS
from benchmarks.timing import Effort, Record
from benchmarks.torch_attention import AVAILABLE

Group = Callable[[Effort], Record]

GROUPS: dict[str, Group] = {
    "exact_attention": attention.exact,
    "memory": attention.memory,
    "attention_layer": attention.layer,
    "truncated": attention.truncated,
    "long_range": long_range.group,
    "long_range_small": long_range.small,
    "train_steps": all_steps.group,
    "image_steps": train_step.group,
    "growth": growth.group,
    "group_norm": attention.group_norm,
    "workers": train_step.workers,
    "minutes": minutes.group,
    "accelerator": accelerator.group,
}
"""What is measured, by the name of its file."""


def _before(commit: str) -> dict[str, Group]:
    """What is measured against an earlier commit."""
    made = dict(before=before.group, quick_preset=before.quick_preset)
    return {name: functools.partial(fn, commit) for name, fn in made.items()}


def measure_and_store(name: str, group: Group, effort: Effort, command: str) -> Record:
    """Measures a group and stores it with the machine, versions and command.

    Args:
      name: of its file in ``effort.folder``.
      group: what measures it.
      effort: how long.
      command: as it is to be told.

    Returns:
      What was stored.
    """
    assert effort.folder is not None
    began = time.perf_counter()
    told = record.about(command)  # the commit as it was when this began
    made = group(effort) | told
    made |= dict(smoke=effort.smoke, seconds=time.perf_counter() - began)
    record.store(effort.folder / f"{name}.json", made)
    return made


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the groups and writes the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a test")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"of {', '.join(GROUPS)}; with --before of before, quick_preset",
    )
    parser.add_argument(
        "--before", metavar="COMMIT", help="this checkout against an earlier commit"
    )
    parser.add_argument("--page", action="store_true", help="the page anew, no more")
    parser.add_argument("--size", default="mu", help="of the models of image_steps")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[64], help="of image_steps (default 64)"
    )
    parser.add_argument(
        "--eager", action="store_true", help="train_steps without torch.compile"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="folder (default: benchmarks/results; with --smoke a temporary one)",
    )
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(arguments)
    folder = options.out
    if folder is None:
        folder = pathlib.Path(tempfile.mkdtemp()) if options.smoke else RESULTS
    if options.page:
        if not any(folder.glob("*.json")):
            parser.error(f"no results in {folder}")
        print(f"Wrote {report.write(folder)}")
        return 0
    groups = _before(options.before) if options.before else GROUPS
    unknown = [name for name in options.only or () if name not in groups]
    if unknown:
        parser.error(f"--only must be of {', '.join(groups)}, got {', '.join(unknown)}")
    if options.smoke:  # nearly all of its time is compilation
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of other processes
        jax.config.update("jax_disable_most_optimizations", True)
    if not AVAILABLE:
        print("PyTorch is not installed: its rows are left out (see `make bench`).")
    effort = Effort(
        rounds=1 if options.smoke else 7,
        seconds=0.0 if options.smoke else 0.2,
        smoke=options.smoke,
        say=lambda text: print(text, file=sys.stderr, flush=True),
        size=options.size,
        batches=tuple(options.batch),
        folder=folder,
        compile=not (options.eager or options.smoke),
    )
    # The folder is left out of the command: where results lie says nothing of them.
    if options.out is not None:
        at = next(i for i, a in enumerate(arguments) if a.startswith("--out"))
        del arguments[at : at + (1 if "=" in arguments[at] else 2)]
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    for name in options.only or groups:
        made = measure_and_store(name, groups[name], effort, command)
        print(report.group_text(made), flush=True)
    print(f"Stored in {folder}; the page is {report.write(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
