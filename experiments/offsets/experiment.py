"""What a label needs lies some places away: how far may it be, in how many directions?

`python -m experiments.offsets --preset k_back`: each label is the symbol k places
before. A fully connected window must hold it, and grows with k; self-attention does
not. `--preset relations`: each label takes numbers of up to eight vectors nearby, of
each another one. A head has one set of weights for all it reads: how many heads does it
take? (Vaswani et al., 2017, arXiv:1706.03762, section 3.2.2.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from experiments.core import identity
from experiments.core.cell import Count, Limit, Rates, Rule, Settings, at_least, some_of
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data import sequence_tasks
from experiments.offsets.cells import Known, Several, Signs, one_label
from experiments.offsets.report import REPORT
from experiments.tasks.labelling import LabelCell

# Options of position encodings: tables as far as the sequences of "back" reach.
ENCODINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "rope": (),
    "shaw": (("clip", 127),),
    "sinusoidal": (),
    "t5": (("num_buckets", 512), ("max_distance", 512)),
}
# Of "relations": a number of its own for each offset below 16.
NEAR = (("num_buckets", 64), ("max_distance", 64))

Ascending = Limit(lambda x: list(x) == sorted(set(x)) and x, "ascending, one at least")
Sizes = Annotated[tuple[int, ...], at_least(1), Ascending]


@dataclasses.dataclass(frozen=True)
class Common(Settings):
    """What both kinds of task have."""

    seeds: Count = 3
    """Seeds of each model: initial parameters and order of the batches."""
    updates: Count = 600
    """Optimiser steps of self-attention."""
    tune_updates: Count = 200
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Peaks of the schedule, chosen on the validation part of the hardest task."""
    tokens: Count = 1_024
    """Labels a batch."""
    dim: Count = 32
    """Width."""


@dataclasses.dataclass(frozen=True)
class Back(Common):
    """The symbol k places before, by windows and by self-attention."""

    offsets: Sizes = (2, 4, 8, 16, 32, 64)
    """k."""
    windows: Sizes = (2, 4, 8, 16, 32, 64)
    """Vectors on either side that a fully connected window holds; for each k those that
    do not hold the place, and the one that just does."""
    encodings: Annotated[tuple[str, ...], some_of(ENCODINGS)] = (
        "rope",
        "t5",
        "sinusoidal",
    )
    """Position encodings of self-attention; of several, validation chooses one."""
    window_updates: Count = 200
    """Optimiser steps of windows."""


@dataclasses.dataclass(frozen=True)
class Relations(Common):
    """Numbers of k vectors nearby, by self-attention of h heads."""

    counts: Sizes = (1, 2, 4, 8)
    """k, the relations that a label needs."""
    heads: Sizes = (1, 2, 4, 8)
    """h."""
    updates: Count = 300
    learning_rates: Rates = (3e-3, 1e-2, 3e-2)
    dim: Count = 64

    def rules(self) -> Iterator[Rule]:
        for heads in self.heads:
            yield "dim", self.dim % heads == 0, f"a multiple of {heads} heads"


PRESETS: dict[str, Common] = {
    "smoke": Back(
        offsets=(2,),
        windows=(2,),
        encodings=("rope",),
        seeds=1,
        updates=3,
        window_updates=3,
        tune_updates=3,
        dim=8,
    ),
    "smoke_relations": Relations(
        counts=(1, 2), heads=(1, 2), seeds=1, updates=3, tune_updates=3, dim=8
    ),
    "quick": Back(
        offsets=(2, 8),
        windows=(2, 8),
        encodings=("rope",),
        seeds=1,
        learning_rates=(1e-2,),
    ),
    "k_back": Back(),
    "relations": Relations(),
}


Differs = Mapping[str, identity.Differs]


def cell_of(config: Common, task: str, model: str, **traits: Any) -> LabelCell:
    """The cell of a model of one layer, before a learning rate is chosen."""
    if model == "transformer":
        traits = dict(attention="dot_product") | traits
    return LabelCell(
        task=task,
        model=model,
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        tokens=config.tokens,
        dim=config.dim,
        depth=1,
        mlp_dim=2 * config.dim,
        dropout_rate=0.0,
        **traits,
    )


def _study(
    config: Common,
    name: str,
    cells: Sequence[LabelCell],
    tuned_by: Study | None,
    updates: int,
) -> Study:
    """Cells at each learning rate."""
    grid = tuple(
        dataclasses.replace(cell, learning_rate=rate)
        for cell in cells
        for rate in config.learning_rates
    )
    # By the loss: many are right in all.
    metric = "val_loss"
    return Study(name, grid, updates, config.seeds, tuned_by, metric, True)


def back_studies(config: Back, differs: Differs) -> list[Study]:
    """Studies of every k; what is tuned is tuned at the largest k, of the widest."""
    if config.windows[-1] > config.offsets[-1]:
        raise ValueError(
            f"windows must be at most the largest of offsets={config.offsets}, got "
            f"{config.windows}."
        )
    tuned: dict[str, Study] = {}
    found = []

    def study(name: str, kind: str, cells: Sequence[LabelCell], updates: int) -> None:
        made = _study(config, name, cells, tuned.get(kind), updates)
        tuned.setdefault(kind, made)
        found.append(made)

    for k in reversed(config.offsets):
        task = f"back:{k}"
        of = functools.partial(cell_of, config, task, differs=differs.get(task, ()))
        cells = [
            of(
                "transformer",
                num_heads=1,
                positions=name,
                position_options=ENCODINGS[name],
            )
            for name in config.encodings
        ]
        study(f"{task} self-attention", "self-attention", cells, config.updates)
        for window in reversed([w for w in config.windows if w <= k]):
            cell = of("window", window=window)
            study(f"{task} window={window}", "window", [cell], config.window_updates)
    return found


def relations_studies(config: Relations, differs: Differs) -> list[Study]:
    """Studies of every k and h; each h is tuned at the largest k."""
    tuned: dict[int, Study] = {}
    found = []
    for k in reversed(config.counts):
        task = f"relations:{k}"
        for heads in config.heads:
            cell = cell_of(
                config,
                task,
                "transformer",
                num_heads=heads,
                positions="t5",
                position_options=NEAR,
                differs=differs.get(task, ()),
            )
            name, tuned_by = f"{task} h={heads}", tuned.get(heads)
            made = _study(config, name, [cell], tuned_by, config.updates)
            tuned.setdefault(heads, made)
            found.append(made)
    return found


def studies_of(config: Common, differs: Differs | None = None) -> list[Study]:
    """All studies of settings, those that others take their tuning from first.

    Args:
      config: the settings.
      differs: of the data, by the name of the task.
    """
    if isinstance(config, Back):
        return back_studies(config, differs or {})
    assert isinstance(config, Relations)
    return relations_studies(config, differs or {})


def plans(config: Common) -> list[Plan]:
    """Draws the data and plans the cells, in one plan: k takes rates from another."""
    kind, sizes = "back", getattr(config, "offsets", ())
    if isinstance(config, Relations):
        kind, sizes = "relations", config.counts
    data = {f"{kind}:{k}": sequence_tasks.load_task(f"{kind}:{k}") for k in sizes}
    made = Signs if kind == "relations" else Known
    tasks = {name: made(some) for name, some in data.items()}
    differs = {name: identity.of_sequences(some) for name, some in data.items()}
    floors = [
        baseline
        for name, some in data.items()
        for baseline in baselines_of(
            name, {"one label": functools.partial(one_label, some)}, differs[name]
        )
    ]
    about = next(iter(data.values())).describe()
    return [Plan(Several(tasks), about, studies_of(config, differs), floors)]


EXPERIMENT = Experiment(
    name="offsets",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "seconds",
        "smoke_relations": "seconds",
        "quick": "a minute or two",
        "k_back": "a quarter of an hour, one core",
        "relations": "a quarter of an hour, one core",
    },
    plans=plans,
    report=REPORT,
)
