"""Plans the cells of the experiment."""

from __future__ import annotations

import dataclasses
import functools

from experiments.core import identity
from experiments.core.driver import Plan
from experiments.core.identity import Differs
from experiments.core.studies import Study
from experiments.data import sequence_tasks
from experiments.data.sequences import Part, SequenceData
from experiments.positions.presets import Experiment
from experiments.tasks.labelling import LabelCell, LabelRunner


def cell_of(
    experiment: Experiment,
    data: SequenceData,
    encoding: str,
    differs: Differs = (),
) -> LabelCell:
    """The cell of an encoding, before a learning rate is chosen."""
    order = data.name.startswith("order")
    return LabelCell(
        task=data.name,
        model="transformer",
        seed=0,
        phase="tune",
        updates=experiment.tune_updates,
        tokens=experiment.tokens,
        dim=experiment.dim,
        depth=experiment.depth,
        mlp_dim=2 * experiment.dim,
        num_heads=experiment.num_heads,
        attention="dot_product",
        positions=encoding,
        position_options=(("clip", experiment.clip),) if encoding == "shaw" else (),
        train_length=None if order else experiment.train_length,
        id_dropout=0.0 if order else experiment.id_dropout,
        dropout_rate=0.0,
        differs=differs,
    )


def by_length(data: SequenceData, experiment: Experiment) -> SequenceData:
    """The task with its test part scored by length, under a name that says so."""
    test = data.test
    groups = sequence_tasks.length_groups(test.labels, experiment.edges)
    edges = "-".join(map(str, experiment.edges[1:]))
    return dataclasses.replace(
        data,
        name=f"{data.name}_by_length_{edges}",
        test=Part(test.inputs, test.labels, groups),
    )


def make_plans(experiment: Experiment) -> list[Plan]:
    """Loads the tasks and plans their cells.

    Raises:
      DataError: the data cannot be had.
    """
    plans = []
    for task in experiment.tasks:
        data = sequence_tasks.load_task(task)
        if task != "order":
            data = by_length(data, experiment)
        updates = experiment.order_updates if task == "order" else experiment.updates
        differs = identity.of_sequences(data)
        studies: dict[str, Study] = {}
        for encoding in experiment.encodings:
            cell = cell_of(experiment, data, encoding, differs)
            studies[encoding] = Study(
                encoding,
                tuple(
                    dataclasses.replace(cell, learning_rate=rate)
                    for rate in experiment.learning_rates
                ),
                updates,
                experiment.seeds,
                tuned_by=next(iter(studies.values()), None),
            )
        plans.append(
            Plan(
                data.name,
                data.describe(),
                studies,
                {"majority": functools.partial(sequence_tasks.majority, data)},
                functools.partial(LabelRunner, data),
                {"majority": differs},
            )
        )
    return plans
