"""Which variant gives up how much for how much speed? Long Range Arena, in our size.

`python -m experiments.long_range --preset quick` asks for recall alone: what linear
attention cannot hold and softmax can. `--preset cpu` runs all tasks and variants;
`--attention my.py:fn` adds a row for a variant of your own. One encoder for all, equal
updates, one tuned rate for each task and model, no other difference.

Reference: Tay et al., 2020, arXiv:2011.04006.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from attn_jax.variant import resolve
from experiments.core import identity
from experiments.core.cell import (
    Count,
    Counts,
    Dtype,
    Limit,
    Natural,
    Rates,
    Rule,
    Settings,
    attention_digest,
    some_of,
)
from experiments.core.plan import Baseline, Plan, Study, baselines_of, beside
from experiments.core.run import Experiment
from experiments.data.symbols import SymbolData
from experiments.long_range import baselines
from experiments.long_range.cells import BODIES, SOFTMAX, LongCell, LongTask
from experiments.long_range.report import REPORT
from experiments.long_range.tasks import TASKS, load

# Exact attention block by block from this length on: the same numbers, less memory.
BLOCKWISE_FROM = 256

# Share of the symbols that pretraining masks, by the beginning of the data's name; of
# others .15, as the paper has it for text.
MASKED = dict.fromkeys(("image", "pathfinder", "pathfinder32", "pathfinder128"), 0.5)
MASKED |= {"listops": 0.1}

NAMES = Limit(
    lambda x: 1 <= len(x) == len(set(x)),
    f"softmax, {', '.join(BODIES)}, names of variants or path/file.py:function; each "
    "once",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What is run."""

    tasks: Annotated[tuple[str, ...], some_of(TASKS)] = ("recall",)
    """Tasks, those that matter most first."""
    size: Literal["smoke", "cpu", "paper"] = "cpu"
    """Lengths and numbers of sequences: `paper` has those of the papers."""
    lra_release: pathlib.Path | None = None
    """Folder of the official files, from which ListOps, Retrieval and Pathfinder are
    read."""
    models: Annotated[tuple[str, ...], NAMES] = (SOFTMAX, "linear")
    """Rows, those that matter most first: softmax (exact attention), the name of any
    other variant, path/file.py:function, gru, s4d or cnn."""
    attention: str | None = None
    """One more row: a variant by name or path/file.py:function."""
    widths: Counts = (64,)
    """Widths of every model; the memory of linear attention grows with its square."""
    depth: Count = 2
    """Layers."""
    num_heads: Count = 2
    """Heads of attention."""
    positions: str = "sinusoidal"
    """Position encoding of attention, see `attn_jax.nn.positional`."""
    bigrams: Annotated[tuple[str, ...], some_of(TASKS, least=0)] = (
        "recall",
        "induction",
    )
    """Tasks in which a position reads the symbol before it too, by a table of its own,
    as a short convolution would: they are then a matter of memory alone."""
    batch_size: Count = 32
    """Sequences, or pairs of them, of an update."""
    updates: Count = 640
    """Optimiser steps of every final cell."""
    tune_updates: Count = 160
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Peaks of the schedule, ascending; for each task and model the validation part
    chooses one. Those in the middle are tried first, and further ones while the best
    lies at an end."""
    self_pretrain: Natural = 0
    """Updates that restore masked symbols of the task's own training sequences before
    it is learnt (arXiv:2310.02980): one more row for each model but the CNN, beside the
    one from scratch, whose rate it takes over; none for bigrams. 0: none."""
    seeds: Count = 3
    """Seeds of each row: initial parameters and order of the batches."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters stay float32."""

    def rules(self) -> Iterator[Rule]:
        rates = self.learning_rates
        yield "learning_rates", tuple(sorted(set(rates))) == rates, "ascending"
        for width in self.widths:
            words = f"a divisor of all widths={self.widths}"
            yield "num_heads", width % self.num_heads == 0, words
        again = self.attention in self.models
        yield "attention", not again, f"none of models={self.models}"

    @property
    def rows(self) -> tuple[str, ...]:
        """All models."""
        return self.models + ((self.attention,) if self.attention else ())


# Those of the paper that are not among the first, and two that came after.
VARIANTS = (
    "performer",
    "linformer",
    "longformer",
    "bigbird",
    "block_local",
    "luna",
    "nystromformer",
    "sparse_strided",
    "reformer",
    "sinkhorn",
    "synthesizer_dense",
)
# Skyformer's protocol, on lengths of the paper.
PAPER = Config(
    tasks=("listops", "text", "retrieval", "image", "pathfinder"),
    size="paper",
    models=(SOFTMAX, "linear", "s4d", "gru", "cnn", *VARIANTS),
    updates=50_000,
    tune_updates=5_000,
    learning_rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
)


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        tasks=(
            "listops",
            "text",
            "language",
            "retrieval",
            "image",
            "pathfinder",
            "recall",
            "copying",
            "induction",
        ),
        size="smoke",
        models=(SOFTMAX,),
        widths=(8,),
        depth=1,
        batch_size=8,
        updates=3,
        tune_updates=2,
        learning_rates=(3e-3,),
        seeds=1,
    ),
    "quick": Config(
        models=(SOFTMAX, "linear"),
        widths=(16, 32, 64),
        updates=650,
        tune_updates=300,
        learning_rates=(3e-3, 1e-2, 3e-2),
    ),
    "cpu": Config(
        tasks=(
            "listops",
            "pathfinder",
            "image",
            "retrieval",
            "text",
            "language",
            "copying",
            "induction",
        ),
        models=(SOFTMAX, "linear", "s4d", "gru", "cnn", *VARIANTS),
    ),
    "pathfinder": Config(
        tasks=("pathfinder_easy",),
        models=("cnn", SOFTMAX, "s4d"),
        updates=8_000,
        tune_updates=2_000,
        learning_rates=(1e-3, 3e-3, 1e-2),
    ),
    "pretrained": Config(
        tasks=("listops", "image"),
        models=(SOFTMAX, "linear", "luna", "s4d"),
        self_pretrain=640,
    ),
    "paper": PAPER,
    "accelerator": dataclasses.replace(
        PAPER,
        tasks=(*PAPER.tasks, "recall", "copying", "induction", "pathx"),
        dtype="bfloat16",
    ),
}


# ------------------------------------------------------------------- the cells


def traits_of(model: str, config: Config, length: int) -> dict:
    """What the name of a model says of its cells.

    Raises:
      ValueError: it names no variant.
    """
    if model in BODIES:
        return {}
    exact = "dot_product" if length < BLOCKWISE_FROM else "blockwise"
    attention = exact if model == SOFTMAX else model
    resolve(attention)  # a name that is none is told before anything runs
    return dict(
        attention=attention,
        attention_sha256=attention_digest(attention),
        num_heads=config.num_heads,
        positions=config.positions,
    )


def _kind(task: str) -> str:
    """The task, with which the name of its data begins."""
    return task.split("_")[0]


def study_of(
    config: Config,
    task: str,
    model: str,
    width: int,
    length: int,
    differs: identity.Differs = (),
    scratch: Study | None = None,
) -> Study:
    """The row of a model on a task.

    Args:
      config: the settings.
      task: name of the data.
      model: of `Config.rows`.
      width: D.
      length: T of the sequences.
      differs: of the data.
      scratch: the row from scratch, of which this is the one with pretraining.
    """
    first_updates = config.self_pretrain if scratch else 0
    rates = config.learning_rates
    grid = tuple(
        LongCell(
            task=task,
            model=model,
            seed=0,
            phase="tune",
            updates=config.tune_updates + first_updates,
            pretrain_updates=first_updates,
            masked=MASKED.get(_kind(task), 0.15) if scratch else 0.0,
            learning_rate=rate,
            batch_size=config.batch_size,
            dim=width,
            depth=config.depth,
            mlp_dim=2 * width,
            bigram=_kind(task) in config.bigrams,
            dtype=config.dtype,
            differs=differs,
            **traits_of(model, config, length),
        )
        for rate in rates
    )
    first = beside(len(rates))
    name = f"{task} {model} width={width}{' pretrained' * bool(scratch)}"
    updates = config.updates + first_updates
    # By the loss: where a task is learnt, many rates are right in all.
    return Study(name, grid, updates, config.seeds, scratch, "val_loss", True, first)


def studies_of(
    config: Config,
    lengths: Mapping[str, int],
    differs: Mapping[str, identity.Differs] | None = None,
) -> list[Study]:
    """All rows, those of the first models first.

    Args:
      config: the settings.
      lengths: name of the data -> T.
      differs: name of the data -> in what it differs.
    """
    found = []
    for model in config.rows:
        for task, length in lengths.items():
            for width in config.widths:
                about = task, model, width, length, (differs or {}).get(task, ())
                found.append(study_of(config, *about))
                restores = model != "cnn" and _kind(task) not in config.bigrams
                if config.self_pretrain and restores:
                    found.append(study_of(config, *about, scratch=found[-1]))
    return found


def floors_of(data: SymbolData, differs: identity.Differs) -> tuple[Baseline, ...]:
    """What needs no network."""
    measures = {
        "majority": functools.partial(baselines.majority, data),
        "linear": functools.partial(baselines.linear, data),
    }
    if data.name.startswith("pathfinder"):
        measures["flood"] = functools.partial(baselines.flood, data)
    return baselines_of(data.name, measures, differs)


def plans(config: Config) -> list[Plan]:
    """Loads the data, and plans all cells in one plan, the first models first."""
    data = [load(name, config.size, config.lra_release) for name in config.tasks]
    differs = {
        one.name: identity.differs(one.name, data_sha256=one.sha256) for one in data
    }
    studies = studies_of(config, {one.name: one.length for one in data}, differs)
    floors = [floor for one in data for floor in floors_of(one, differs[one.name])]
    about = "\n".join(one.describe() for one in data)
    task = LongTask({one.name: one for one in data})
    return [Plan(task, about, studies, floors)]


EXPERIMENT = Experiment(
    name="long_range",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "a minute or two",
        "quick": "half an hour, one core",
        "cpu": "a day, two cores",
        "pathfinder": "hours, two cores",
        "pretrained": "hours, two cores",
        "paper": "days, an accelerator",
        "accelerator": "days, an accelerator",
    },
    plans=plans,
    report=REPORT,
)
