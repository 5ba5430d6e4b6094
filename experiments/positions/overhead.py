"""What each position encoding costs in time: one train step beside that of none.

`python -m experiments.positions.overhead --out FOLDER` writes overhead.json: the steps
of all encodings take turns in one process, and each turn gives one ratio to the step
without positions, so that a slow moment of the machine slows both. The ratio told is
the median.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from attn_jax._program import program
from attn_jax.nn.positional import POSITIONS
from experiments.core import optim
from experiments.core.store import provenance
from experiments.data import sequence_tasks
from experiments.data.fetch import DataError
from experiments.data.sequences import SequenceData, padded
from experiments.positions.experiment import PRESETS, cell_of
from experiments.tasks import labelling

# Besides the encodings as they are: FLOATER's gradients by the adjoint equation.
ADJOINT = "floater, adjoint"


def _step(
    data: SequenceData, encoding: str, length: int, tokens: int
) -> Callable[[], None]:
    """A function that does one train step and waits for it."""
    options: dict[str, Any] = {}
    if encoding == ADJOINT:
        encoding, options = "floater", {"adjoint": "adjoint"}
    cell = cell_of(PRESETS["cpu"], data, encoding)
    if options:
        cell = dataclasses.replace(cell, position_options=tuple(options.items()))
    program = labelling.program_of.__wrapped__(labelling.program_key(cell, data))
    cell = dataclasses.replace(cell, learning_rate=1e-3, updates=100, warmup=0.01)
    hyper = labelling.LabelTask(data).hyper(cell)
    state = optim.init_state(program.initial_params(0), hyper)
    train_step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    long_enough = np.flatnonzero(data.train.lengths >= length // 2)
    rows = tokens // length
    part = data.train.take(long_enough[:rows])
    part = part.cut(length)
    batch = jax.device_put(padded(part, range(len(part)), rows, length))
    rng = jax.random.key(0)
    holder = [state]

    def step() -> None:
        holder[0], metrics = train_step(holder[0], batch, rng)
        jax.block_until_ready((holder[0], metrics))

    return step


def measure(
    data: SequenceData,
    encodings: Sequence[str],
    *,
    length: int,
    tokens: int,
    turns: int,
) -> dict[str, dict[str, float]]:
    """Times train steps of encodings in turns.

    Args:
      data: the task.
      encodings: position encodings, without "none".
      length: vectors a sequence.
      tokens: vectors a batch.
      turns: how often each is timed.

    Returns:
      By encoding: the median ratio to the step without positions, its quartiles, and
      the median seconds.
    """
    steps = {name: _step(data, name, length, tokens) for name in ("none", *encodings)}
    for step in steps.values():  # compiles
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    found = {}
    for name in steps:
        ratios = [a / b for a, b in zip(seconds[name], seconds["none"], strict=True)]
        low, middle, high = (
            statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
        )
        found[name] = dict(
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            seconds=statistics.median(seconds[name]),
        )
    return found


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes overhead.json; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default="runs/positions/cpu")
    parser.add_argument("--task", default="pos", choices=("pos", "order", "toy_pos"))
    parser.add_argument("--length", type=int, default=32, help="vectors a sequence")
    parser.add_argument("--tokens", type=int, default=2048, help="vectors a batch")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args(argv)
    try:
        data = sequence_tasks.load_task(options.task)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = [name for name in POSITIONS if name != "none"] + [ADJOINT]
    found = measure(
        data, names, length=options.length, tokens=options.tokens, turns=options.turns
    )
    record = dict(
        task=options.task,
        length=options.length,
        tokens=options.tokens,
        turns=options.turns,
        encodings=found,
        provenance=provenance(),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "overhead.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, row in found.items():
        print(
            f"{name:16} {row['ratio']:.2f} x the step of none "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        )
    print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
