"""Do heads of self-attention on images move to a pixel grid, as a convolution has?

`python -m experiments.attention_as_conv --preset cpu` trains fully-attentional models
with quadratic, generalised Gaussian and learned relative encodings, the last with and
without content, beside a ResNet of as many parameters; and it starts heads as the
convolution of the theorem, for several numbers of training images N. The report shows
where heads look before, during and after training (Cordonnier et al.,
arXiv:1911.03584).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from attn_jax._program import program
from experiments.attention_as_conv.presets import PRESETS, Experiment
from experiments.core import driver
from experiments.core.cell import Runtime

MODULE = "experiments.attention_as_conv"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Self-attention that places its heads, against the convolution."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["quick", "cpu", "accelerator"] = "quick"
    """Where settings come from that are not given: quick (under a minute), cpu (half an
    hour on two cores), accelerator (CIFAR-10 at the paper's sizes)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; see `experiments.core.driver.parse`."""
    return driver.parse(Arguments, PRESETS, argv, module=MODULE, description=__doc__)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)

    from experiments.attention_as_conv.report import write_report
    from experiments.attention_as_conv.run import make_plans

    return driver.drive(
        MODULE,
        arguments,
        out=options.runtime.out
        or pathlib.Path("runs/attention_as_conv") / options.preset,
        runtime=options.runtime,
        experiment=options.experiment,
        preset=PRESETS[options.preset],
        make_plans=make_plans,
        write_report=write_report,
    )


if __name__ == "__main__":
    sys.exit(main())
