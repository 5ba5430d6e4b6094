"""What each position encoding costs in time: one train step beside that of none.

`python -m experiments.positions.overhead FOLDER` writes overhead.json: the steps of all
encodings take turns in one process, and each turn gives one ratio to the step without
positions, so that a slow moment of the machine slows both. The ratio told is their
median.
"""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from experiments.core import optim
from experiments.core.measure import Folder, measures, repeated, seconds_of
from experiments.data import sequence_tasks
from experiments.data.sequences import SequenceData, padded
from experiments.positions.experiment import ENCODINGS, PRESETS, cell_of
from experiments.positions.report import MEASURED
from experiments.tasks import labelling

# Besides the encodings as they are: FLOATER with the steps of its authors' code, and
# with gradients by the adjoint equation, as in the paper.
FIVE = "five steps a position"
BESIDES: dict[str, dict[str, Any]] = {
    f"sinusoidal_floater, {FIVE}": dict(steps_per_position=5),
    f"sinusoidal_floater, {FIVE}, adjoint": dict(
        steps_per_position=5, adjoint="adjoint"
    ),
}


def _step(
    data: SequenceData, encoding: str, length: int, tokens: int
) -> Callable[[], Any]:
    """A function that does one train step."""
    cell = cell_of(PRESETS["cpu"], data, encoding.split(", ")[0])
    if encoding in BESIDES:
        options = tuple(BESIDES[encoding].items())
        cell = dataclasses.replace(cell, position_options=options)
    program = labelling.program_of.__wrapped__(labelling.program_key(cell, data))
    cell = dataclasses.replace(cell, learning_rate=1e-3, updates=100, warmup=0.01)
    hyper = labelling.LabelTask(data).hyper(cell)
    state = optim.init_state(program.initial_params(0), hyper)
    rows = tokens // length
    long_enough = np.flatnonzero(data.train.lengths >= length // 2)
    part = data.train.take(long_enough[:rows]).cut(length)
    batch = jax.device_put(padded(part, range(len(part)), rows, length))
    return repeated(program.loss, state, batch, jax.random.key(0))


def measure(
    folder: Folder = pathlib.Path("runs/positions/cpu"),
    *,
    task: Literal["pos", "order", "toy_pos"] = "pos",
    length: int = 32,
    tokens: int = 2048,
    turns: int = 15,
) -> dict[str, Any]:
    """Times a train step of each position encoding beside that of none.

    Args:
      folder: of the results.
      task: whose sequences.
      length: vectors a sequence.
      tokens: vectors a batch.
      turns: how often each is timed.

    Returns:
      The settings, and by encoding: the median ratio to the step without positions, its
      quartiles, and the median seconds.
    """
    data = sequence_tasks.load_task(task)
    names = [*ENCODINGS, *BESIDES]
    steps = {name: _step(data, name, length, tokens) for name in names}
    for step in steps.values():
        seconds_of(step, 1)  # compiles
    turn = [
        {name: seconds_of(step, 1, warm=False)[0] for name, step in steps.items()}
        for _ in range(turns)
    ]
    found = {}
    for name in names:
        ratios = [seconds[name] / seconds["none"] for seconds in turn]
        ends = statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
        found[name] = dict(zip(("ratio_low", "ratio", "ratio_high"), ends, strict=True))
        found[name]["seconds"] = statistics.median(seconds[name] for seconds in turn)
        print("{:48} {ratio:.2f} x the step of none".format(name, **found[name]))
    sizes = dict(task=task, length=length, tokens=tokens, turns=turns)
    return sizes | dict(encodings=found)


main = measures(MEASURED, measure)

if __name__ == "__main__":
    sys.exit(main())
