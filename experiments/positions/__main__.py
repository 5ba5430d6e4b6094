"""Position encodings: none, sinusoidal, learned, Shaw, FLOATER, RoPE, ALiBi, T5.

`python -m experiments.positions --preset cpu` trains encoders that differ in their
position encoding alone, on short sequences, and scores them on short and on longer
ones. `python -m experiments.positions.overhead` measures what each costs in time. The
report puts both beside the three properties that encodings are compared by: inductive,
data-driven, parameter-efficient (Liu et al., 2020, arXiv:2003.09229, Table 1).
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
from experiments.positions.presets import PRESETS, Experiment

MODULE = "experiments.positions"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Position encodings compared by what they are said to be good for."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["smoke", "quick", "cpu"] = "quick"
    """Where settings come from that are not given: smoke (seconds, a test), quick
    (minutes), cpu (half an hour on two cores)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; see `experiments.core.driver.parse`."""
    return driver.parse(Arguments, PRESETS, argv, module=MODULE, description=__doc__)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)

    from experiments.positions.report import write_report
    from experiments.positions.run import make_plans

    return driver.drive(
        MODULE,
        arguments,
        out=options.runtime.out or pathlib.Path("runs/positions") / options.preset,
        runtime=options.runtime,
        experiment=options.experiment,
        preset=PRESETS[options.preset],
        make_plans=make_plans,
        write_report=write_report,
    )


if __name__ == "__main__":
    sys.exit(main())
