"""How fast each model of the arena trains, and in how much memory.

`python -m experiments.long_range.speed FOLDER` writes speed.json for the models that
FOLDER has results of; the report then draws accuracy against speed. Times are medians
of processor time on one core, in one run, the programs taken in turn.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.core import optim
from experiments.core.measure import Folder, again, measures, one_core, seconds_of
from experiments.core.report import load
from experiments.data.symbols import Fold, SymbolData
from experiments.long_range.cells import LongCell, LongTask
from experiments.long_range.experiment import Config, study_of
from experiments.long_range.figures import SPEED


def random_data(length: int, count: int) -> SymbolData:
    """Bytes drawn evenly, of two classes: what they are says nothing of the time."""
    random = np.random.Generator(np.random.PCG64([0, 30]))
    x = random.integers(0, 256, (count, length)).astype(np.uint8)
    part = Fold.of(x, random.integers(0, 2, count))
    return SymbolData.drawn(f"bytes_{length}", 0, [part] * 3, 256, 2)


def steps_of(cell: LongCell, task: LongTask) -> tuple[Any, int]:
    """A call that trains for one more update each time, and bytes that it takes."""
    program, hyper = task.program(cell), task.hyper(cell)
    state = optim.init_state(task.initial_params(cell), hyper)
    operands = task.batches(cell)[0], jax.random.key(0)
    step = jax.jit(optim.make_step(program.loss), donate_argnums=0)
    compiled = step.lower(state, *operands).compile()
    memory = compiled.memory_analysis()
    taken = 0 if memory is None else int(memory.temp_size_in_bytes)
    return again(compiled, jax.tree.map(jax.numpy.asarray, state), *operands), taken


def measure(
    folder: Folder, length: int = 1_024, batch_size: int = 4, repeats: int = 5
) -> dict[str, Any]:
    """Times an update of each model on sequences of one length.

    Args:
      folder: of results, whose models are taken and where speed.json goes.
      length: T.
      batch_size: sequences of an update.
      repeats: timed updates of each model.
    """
    one_core()
    configs = [r["config"] for r in load(folder) if r["config"]["phase"] == "final"]
    models = list(dict.fromkeys(config["model"] for config in configs))
    data = random_data(length, batch_size)
    task = LongTask({data.name: data})
    settings = Config(batch_size=batch_size, learning_rates=(1e-3,), updates=1_000)
    calls = {}
    for model in models:
        study = study_of(settings, data.name, model, 64, length)
        cell = dataclasses.replace(study.grid[0], updates=1_000)
        calls[model] = steps_of(cell, task)
    times: dict[str, list[float]] = {model: [] for model in models}
    for turn in range(repeats + 1):
        for model, (call, _) in calls.items():
            found = seconds_of(call, 1, warm=not turn, clock=time.process_time)
            times[model] += found if turn else []
    return dict(
        length=length,
        batch_size=batch_size,
        models={
            model: dict(seconds=statistics.median(times[model]), bytes=taken)
            for model, (_, taken) in calls.items()
        },
    )


main = measures(SPEED, measure)

if __name__ == "__main__":
    sys.exit(main())
