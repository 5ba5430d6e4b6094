"""Plans the cells of the experiment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from experiments.core import identity
from experiments.core.cell import attention_digest
from experiments.core.driver import Plan
from experiments.core.identity import Differs
from experiments.core.studies import Study
from experiments.data import sequence_tasks
from experiments.data.sequences import SequenceData
from experiments.sequence_labelling.presets import Experiment, traits_of
from experiments.tasks.labelling import LabelCell, LabelRunner


def base_cell(
    experiment: Experiment, task: str, model: str, **traits: Any
) -> LabelCell:
    """The cell of a model with the experiment's settings; ``traits`` go before them."""
    named = traits_of(model)
    common: dict[str, Any] = dict(
        task=task,
        seed=0,
        phase="tune",
        updates=experiment.tune_updates,
        tokens=experiment.tokens,
        dim=experiment.dim,
        depth=experiment.depth,
        mlp_dim=2 * experiment.dim,
        id_dropout=experiment.id_dropout,
        dropout_rate=experiment.dropout_rate,
    )
    body = named["model"]
    if body == "cnn":
        common["kernel"] = experiment.kernel
    if body == "transformer":
        common |= dict(
            attention=experiment.attention,
            num_heads=experiment.num_heads,
            positions=experiment.encoding,
        )
    cell = LabelCell(**(common | named | traits))
    return dataclasses.replace(cell, attention_sha256=attention_digest(cell.attention))


def plan_studies(
    experiment: Experiment, task: str, differs: Differs = ()
) -> dict[str, Study]:
    """All studies by name, in the order of their importance.

    The models first; what is varied about one of them, and a smaller N, takes over the
    learning rate that was chosen for it on the whole training part.
    """

    def grid(model: str, **traits: Any) -> tuple[LabelCell, ...]:
        cell = base_cell(experiment, task, model, differs=differs, **traits)
        return tuple(
            dataclasses.replace(cell, learning_rate=rate)
            for rate in experiment.learning_rates
        )

    studies = {
        model: Study(model, grid(model), experiment.updates, experiment.seeds)
        for model in experiment.models
    }

    def vary(name: str, model: str, like: str, **traits: Any) -> None:
        if like not in studies:
            raise ValueError(
                f"models: {name!r} is a variation of {like!r}, which is not among "
                f"models={experiment.models!r}."
            )
        studies[name] = Study(
            name,
            grid(model, **({"n": experiment.sweep_n} | traits)),
            experiment.sweep_updates,
            experiment.seeds,
            tuned_by=studies[like],
        )

    windows = [name for name in experiment.models if name.startswith("window:")]
    for window in experiment.windows:
        # The rate of the widest of those that were tuned.
        widest = max(windows, key=lambda name: traits_of(name)["window"], default=None)
        vary(f"sweep window={window}", f"window:{window}", widest or "window:W")
    for left, right in experiment.contexts:
        vary(
            f"context {left}+{right}",
            "transformer",
            "transformer",
            attention="truncated",
            left=left,
            right=right,
        )
    if experiment.contexts:
        vary("context full", "transformer", "transformer")
    for heads in experiment.heads:
        vary(f"heads={heads}", "transformer", "transformer", num_heads=heads)
    for score in experiment.scores:
        vary(f"score={score}", "transformer", "transformer", attention=score)
    for encoding in experiment.positions:
        vary(f"positions={encoding}", "transformer", "transformer", positions=encoding)
    for depth in experiment.depths:
        vary(f"depth={depth}", "transformer", "transformer", depth=depth)
    for n in (*experiment.ns, None) if experiment.ns else ():
        for model in experiment.models:
            vary(f"n={n or 'all'} {model}", model, model, n=n)
    return studies


def baselines(task: str, data: SequenceData) -> dict[str, Callable[[], dict[str, Any]]]:
    """What needs no training, by name."""
    if "pos" in task:
        return sequence_tasks.tagging_baselines(data)
    return {"majority": functools.partial(sequence_tasks.majority, data)}


def make_plans(experiment: Experiment) -> list[Plan]:
    """Loads the task and plans its cells.

    Raises:
      DataError, ValueError: the data cannot be had; a bad value.
    """
    data = sequence_tasks.load_task(experiment.task)
    for n in (*experiment.ns, experiment.sweep_n):
        if n is not None and n > len(data.train):
            raise ValueError(
                f"ns, sweep_n: {n} is larger than the training part of {data.name}, "
                f"which has {len(data.train)} sequences."
            )
    differs = identity.of_sequences(data)
    studies = plan_studies(experiment, data.name, differs)
    floors = baselines(data.name, data)
    return [
        Plan(
            data.name,
            data.describe(),
            studies,
            floors,
            functools.partial(LabelRunner, data, save_params=_is_first_transformer),
            dict.fromkeys(floors, differs),
        )
    ]


def _is_first_transformer(cell: LabelCell) -> bool:
    """Whether attention maps may be drawn of a cell."""
    return cell.model == "transformer" and cell.seed == 0
