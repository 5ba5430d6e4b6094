"""Sequence labelling: a set of vectors in, one label a vector out.

`python -m experiments.sequence_labelling --preset pos` tags the Brown corpus,
`--preset phones` labels the frames of recorded speech: by a fully connected network
for each vector, over a window, by a convolution, a recurrent network, and
self-attention. `--help` lists every setting. A run that was interrupted, by whatever,
goes on where it was when started again.
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
from experiments.sequence_labelling.presets import PRESETS, Experiment

MODULE = "experiments.sequence_labelling"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sequence labelling: a set of vectors in, one label a vector out."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["smoke", "smoke_phones", "quick", "pos", "pos_fine", "phones"] = (
        "quick"
    )
    """Where settings come from that are not given: smoke and smoke_phones (seconds, on
    synthetic data, a test), quick (minutes), pos and phones (an hour each on two
    cores), pos_fine (Brown's own tags)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; see `experiments.core.driver.parse`."""
    return driver.parse(Arguments, PRESETS, argv, module=MODULE, description=__doc__)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)

    from experiments.sequence_labelling.report import write_report
    from experiments.sequence_labelling.run import make_plans

    return driver.drive(
        MODULE,
        arguments,
        out=options.runtime.out
        or pathlib.Path("runs/sequence_labelling") / options.preset,
        runtime=options.runtime,
        experiment=options.experiment,
        preset=PRESETS[options.preset],
        make_plans=make_plans,
        write_report=write_report,
    )


if __name__ == "__main__":
    sys.exit(main())
