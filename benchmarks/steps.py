"""The training steps of all experiments: what is measured, exported, compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments.core import optim, run
from experiments.core.loop import Program

Presets = Mapping[str, tuple[str, ...]]

PRESETS: Presets = {
    "data_scaling": ("accelerator", "images", "phones"),
    "attention_as_conv": ("quick",),
    "attention_vs_rnn": ("cpu",),
    "detection": ("quick",),
    "gan": ("quick",),
    "graphs": ("cpu",),
    "long_range": ("quick",),
    "offsets": ("relations",),
    "positions": ("cpu",),
    "seq2seq": ("cpu",),
    "sequence_labelling": ("pos", "phones"),
}
"""What each experiment trains at the size that its results are of."""

# Data that can be had everywhere, in place of what is downloaded, of like shape.
REPLACED = {"cifar10": "fashion_mnist"}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step, and a batch that it is called with."""

    name: str
    task: Any  # a `Task`; each kind has data of its own
    cell: Any
    batch: Any

    @property
    def unit(self) -> str:
        """What a batch has rows of."""
        return self.task.unit or "rows"

    @property
    def rows(self) -> int:
        """Of a batch."""
        return len(jax.tree.leaves(self.batch)[0])

    @property
    def program(self) -> Program:
        """What it computes."""
        return self.task.program(self.cell)

    @property
    def hyper(self) -> optim.Hyper:
        """The numbers that it reads as data."""
        return self.task.hyper(self.cell)

    def of(self, cell: Any) -> Step:
        """The same on another cell."""
        return dataclasses.replace(self, cell=cell)

    def jitted(self) -> Any:
        """``(state, batch, rng) -> (state, metrics)``; takes the state's memory."""
        return jax.jit(optim.make_step(self.program.loss), donate_argnums=0)

    def made(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted step, and what goes in, as shapes."""
        program, hyper = self.program, self.hyper
        params = jax.eval_shape(lambda: program.initial_params(0))
        state = jax.eval_shape(lambda p: optim.init_state(p, hyper), params)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.batch
        )
        rng = jax.eval_shape(lambda: jax.random.key(0))
        return self.jitted(), (state, shapes, rng)


def steps(
    presets: Presets = PRESETS, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[Step]:
    """The steps of the experiments, those that share a program once.

    Args:
      presets: of each experiment.
      wanted: by its name, whether a step is made.
    """
    for name, chosen in presets.items():
        experiment = run.find(name)
        for preset in chosen:
            settings: Any = experiment.presets[preset]
            task = getattr(settings, "task", None)
            if task in REPLACED:
                settings = dataclasses.replace(settings, task=REPLACED[task])
            seen = set()
            for plan in experiment.plans(settings):
                for study in plan.studies:
                    title = f"{name} {preset}: {study.name}"
                    if not wanted(title):
                        continue
                    cell = study.grid[0]
                    program = plan.task.program(cell)
                    if id(program) not in seen:
                        seen.add(id(program))
                        batch = plan.task.batches(cell)[0]
                        yield Step(title, plan.task, cell, batch)
