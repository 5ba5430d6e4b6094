"""`python -m experiments` lists the experiments; with a name it runs one.

`python -m experiments NAME --redraw FOLDER` writes the report of a folder anew from its
records alone; without a folder all committed ones, without a name those of all.
`python -m experiments --smallest` names the presets that take seconds.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from attn_jax._program import program


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Lists, runs, or redraws; the exit status."""
    from experiments.core import run

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n{run.overview()}")
        return 0
    if arguments == ["--smallest"]:
        every = [run.find(name) for name in run.names()]
        print("\n".join(f"{e.name}:{p}" for e in every for p in e.smallest))
        return 0
    try:
        if "--redraw" in arguments:
            return redraw(arguments)
        found = run.find(arguments[0])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run.run(found, arguments[1:])


def redraw(arguments: Sequence[str]) -> int:
    """Writes reports and figures anew, from stored results alone."""
    from experiments.core import report, run

    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=redraw.__doc__
    )
    parser.add_argument("name", nargs="?", help="an experiment; by default all")
    parser.add_argument(
        "--redraw",
        nargs="?",
        type=pathlib.Path,
        metavar="FOLDER",
        help="of its results",
    )
    parser.add_argument("--out", type=pathlib.Path, help="write there instead")
    options = parser.parse_args(arguments)
    if options.redraw:
        found = run.find(options.name).report
        print(report.redraw(found, options.redraw, options.out))
        return 0
    for name in [options.name] if options.name else run.names():
        experiment = run.find(name)
        for folder in experiment.committed:
            out = options.out and options.out / name / folder.name
            report.redraw(experiment.report, folder, out)
            print(f"-> {folder}/report.md", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
