"""Graph neural networks are attention on edges: a theorem, words, and molecules.

`python -m experiments.graphs --preset cpu` runs all tasks, `--task dictionary`,
`wordnet`, `melting_point` or `logp` one of them: DictionaryLookup, which attention of
GAT's kind cannot solve (Brody et al., 2021, arXiv:2105.14491); the nodes of WordNet's
noun graph, all of it at every update; and molecules, with attention on bonds, on all
pairs of atoms with a bias, and without any bonds. `python -m experiments.graphs.timing`
measures time and memory of an update.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from attn_jax._program import program
from experiments.core import driver
from experiments.core.cell import Runtime
from experiments.graphs.presets import PRESETS, Experiment

MODULE = "experiments.graphs"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Graph neural networks are attention on edges."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["quick", "cpu", "accelerator"] = "quick"
    """Where settings come from that are not given: quick (under a minute, a test), cpu
    (an hour on one core), accelerator (larger models)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; see `experiments.core.driver.parse`."""
    return driver.parse(Arguments, PRESETS, argv, module=MODULE, description=__doc__)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)

    from experiments.graphs.report import write_report
    from experiments.graphs.run import make_plans

    folder = pathlib.Path("runs/graphs") / options.preset
    return driver.drive(
        MODULE,
        arguments,
        out=options.runtime.out or folder,
        runtime=options.runtime,
        experiment=options.experiment,
        preset=PRESETS[options.preset],
        make_plans=make_plans,
        write_report=write_report,
    )


if __name__ == "__main__":
    sys.exit(main())
