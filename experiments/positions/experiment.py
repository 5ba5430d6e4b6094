"""Position encodings: none, sinusoidal, learned, Shaw, FLOATER, RoPE, ALiBi, T5.

Encoders that differ in their position encoding alone are trained on short sequences and
scored on short and on longer ones: `python -m experiments.positions --preset cpu`.
`python -m experiments.positions.overhead` measures what each costs in time. The report
puts both beside the three properties that encodings are compared by: inductive,
data-driven, parameter-efficient (Liu et al., 2020, arXiv:2003.09229, Table 1).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import numpy as np

from attn_jax.nn.positional import POSITIONS
from experiments.core import identity
from experiments.core.cell import (
    Count,
    Limit,
    Natural,
    Rates,
    Rule,
    Settings,
    Share,
    some_of,
)
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data import sequence_tasks
from experiments.data.sequences import Part, SequenceData
from experiments.positions.report import REPORT
from experiments.tasks import labelling
from experiments.tasks.labelling import LabelCell, LabelTask

TASKS = ("pos", "order", "toy_pos")

# What the committed table compares.
ENCODINGS = (
    "none",
    "sinusoidal",
    "learned",
    "shaw",
    "sinusoidal_floater",
    "rotation_flow",
    "rope",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Encoders that differ in their position encoding alone, scored by length."""

    tasks: Annotated[tuple[str, ...], some_of(TASKS)] = ("pos", "order")
    """pos: tags of the Brown corpus; order: each label is the symbol two places before,
    which only the order tells (synthetic); toy_pos: a synthetic stand-in."""
    encodings: Annotated[tuple[str, ...], some_of(POSITIONS)] = ENCODINGS
    """Position encodings, see `attn_jax.nn.positional`."""
    clip: Natural = 16
    """Shaw: the farthest offset with a vector of its own."""
    train_length: Count = 20
    """Longest sentence of the training part; longer ones are only scored. (In "order",
    training sequences have up to 32 symbols.)"""
    edges: Annotated[
        tuple[int, ...],
        Limit(
            lambda x: len(x) >= 2 and list(x) == sorted(set(x)),
            "two ascending numbers or more",
        ),
    ] = (0, 20, 30, 40, 64)
    """Ends of the bins of sentence length that are scored by themselves."""
    seeds: Count = 3
    """Seeds of each encoding: initial parameters and order of the batches."""
    updates: Count = 2_000
    """Optimiser steps on sentences."""
    order_updates: Count = 2_000
    """Optimiser steps on "order"."""
    tune_updates: Count = 500
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (1e-3, 3e-3)
    """Peaks of the schedule; of several, the validation part chooses one for each
    encoding."""
    tokens: Count = 512
    """Labels a batch, with padding."""
    dim: Count = 64
    """Width."""
    depth: Count = 2
    """Layers."""
    num_heads: Count = 4
    """Heads."""
    id_dropout: Share = 0.1
    """How often training hides which word it is, on sentences."""

    def rules(self) -> Iterator[Rule]:
        whole = self.dim % self.num_heads == 0
        yield "dim", whole, f"a multiple of num_heads={self.num_heads}"


PRESETS = {
    "smoke": Config(
        tasks=("toy_pos",),
        encodings=("none", "sinusoidal_floater", "rope", "learned"),
        edges=(0, 8, 64),
        train_length=8,
        seeds=1,
        updates=3,
        learning_rates=(3e-3,),
        tokens=256,
        dim=16,
        depth=1,
        num_heads=2,
    ),
    "quick": Config(
        tasks=("order",),
        encodings=("none", "sinusoidal", "learned", "rope", "shaw", "t5"),
        order_updates=150,
        learning_rates=(3e-3,),
        tokens=2_048,
        dim=48,
    ),
    "cpu": Config(),
}


def cell_of(
    config: Config, data: SequenceData, encoding: str, differs: identity.Differs = ()
) -> LabelCell:
    """The cell of an encoding, before a learning rate is chosen."""
    order = data.name.startswith("order")
    return LabelCell(
        task=data.name,
        model="transformer",
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        tokens=config.tokens,
        dim=config.dim,
        depth=config.depth,
        mlp_dim=2 * config.dim,
        num_heads=config.num_heads,
        attention="dot_product",
        positions=encoding,
        position_options=(("clip", config.clip),) if encoding == "shaw" else (),
        train_length=None if order else config.train_length,
        id_dropout=0.0 if order else config.id_dropout,
        dropout_rate=0.0,
        differs=differs,
    )


def by_length(data: SequenceData, edges: tuple[int, ...]) -> SequenceData:
    """The task with its test part scored by length, under a name that says so."""
    test = data.test
    groups = sequence_tasks.length_groups(test.labels, edges)
    name = f"{data.name}_by_length_{'-'.join(map(str, edges[1:]))}"
    test = Part(test.inputs, test.labels, groups)
    return dataclasses.replace(data, name=name, test=test)


def trained_positions(data: SequenceData) -> dict[str, float]:
    """All is right where training has been, and beyond it the most frequent label.

    What an encoding keeps of longer sequences if it knows nothing of positions that
    training has not seen: their first part.
    """
    longest = int(data.train.lengths.max())
    often = int(np.bincount(np.concatenate(list(data.train.labels))).argmax())
    guessed = [
        np.where(np.arange(len(y)) < longest, y, often) for y in data.test.labels
    ]
    found = labelling.scores(data.test, guessed)
    return {f"test_{name}": value for name, value in found.items()}


def plans(config: Config) -> list[Plan]:
    """Loads the tasks and plans their cells; raises DataError."""
    found = []
    for task in config.tasks:
        data = sequence_tasks.load_task(task)
        if task != "order":
            data = by_length(data, config.edges)
        updates = config.order_updates if task == "order" else config.updates
        differs = identity.of_sequences(data)
        studies = []
        for encoding in config.encodings:
            cell = cell_of(config, data, encoding, differs)
            grid = tuple(
                dataclasses.replace(cell, learning_rate=rate)
                for rate in config.learning_rates
            )
            studies.append(Study(encoding, grid, updates, config.seeds))
        floors = {"majority": functools.partial(sequence_tasks.majority, data)}
        if task == "order":
            floors["trained_positions"] = functools.partial(trained_positions, data)
        baselines = baselines_of(data.name, floors, differs)
        found.append(Plan(LabelTask(data), data.describe(), studies, baselines))
    return found


EXPERIMENT = Experiment(
    name="positions",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "seconds",
        "quick": "minutes",
        "cpu": "half an hour, two cores",
    },
    plans=plans,
    report=REPORT,
)
