"""Attention against recurrent networks: copying a word, and images pixel by pixel.

`python -m experiments.attention_vs_rnn --preset cpu` trains decoders that differ in
what mixes tokens over time (softmax attention, linear attention, Reformer, an LSTM) and
scores them; `--task copy` or `--task images` runs one of the two tasks. `python -m
experiments.attention_vs_rnn.timing` measures how fast they generate and train. The
report puts both beside the paper (Katharopoulos et al., 2020, arXiv:2006.16236).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from attn_jax._program import program
from experiments.attention_vs_rnn.presets import PRESETS, Experiment
from experiments.core import driver
from experiments.core.cell import Runtime

MODULE = "experiments.attention_vs_rnn"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Attention against recurrent networks."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    runtime: Annotated[Runtime, tyro.conf.arg(name="")]
    preset: Literal["quick", "cpu", "accelerator"] = "quick"
    """Where settings come from that are not given: quick (under a minute, a test), cpu
    (45 core minutes), accelerator (the paper's sizes)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Reads the command line; see `experiments.core.driver.parse`."""
    return driver.parse(Arguments, PRESETS, argv, module=MODULE, description=__doc__)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)

    from experiments.attention_vs_rnn.report import write_report
    from experiments.attention_vs_rnn.run import make_plans

    folder = pathlib.Path("runs/attention_vs_rnn") / options.preset
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
