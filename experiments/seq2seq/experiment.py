"""Spelling to phones, English to Spanish: a model decides how long its answer is.

`python -m experiments.seq2seq --preset quick` trains a Transformer and LSTMs, with
attention and without, on English words and how they are said; `--preset cpu` for as
long as it takes. `--preset table3` varies the Transformer as the paper does.
`--preset verses_quick` and `--preset verses` translate verses, from all pairs and from
fewer. `--attention my.py:fn` adds a row in which a variant of your own does all that
it can, to any of them.

References: Vaswani et al., 2017, arXiv:1706.03762; Bahdanau et al., 2015,
arXiv:1409.0473.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from experiments.core import identity
from experiments.core.cell import (
    Amount,
    Count,
    Limit,
    Rates,
    Rule,
    Settings,
    Share,
    at_least,
    attention_digest,
    some_of,
)
from experiments.core.plan import Plan, Study, baselines_of, beside
from experiments.core.run import Experiment
from experiments.seq2seq.cells import (
    MODELS,
    PairCell,
    PairTask,
    is_recurrent,
    training_part,
)
from experiments.seq2seq.report import REPORT
from experiments.seq2seq.tasks import TASKS, floors

Changes = Mapping[str, Any]

TABLE_3: Mapping[str, tuple[Changes, ...]] = {
    "heads": (dict(num_heads=1), dict(num_heads=2), dict(num_heads=8)),
    "keys": (dict(key_dim=8), dict(key_dim=16)),
    "depth": (dict(depth=1), dict(depth=2), dict(depth=4)),
    "width": (dict(dim=64, mlp_dim=256), dict(dim=192, mlp_dim=768)),
    "mlp": (dict(mlp_dim=128), dict(mlp_dim=1024)),
    "dropout": (dict(dropout_rate=0.0), dict(dropout_rate=0.2)),
    "smoothing": (dict(label_smoothing=0.1),),
    "positions": (
        dict(positions="learned"),
        dict(positions="rope"),
        dict(positions="none"),
    ),
    "norm": (dict(norm="post"),),
    "schedule": (dict(schedule="noam"),),
    "averaged": (dict(averaged=10),),
}
"""Rows of the paper's Table 3, ours beside them: what is changed of the base model, one
thing at a time; a width has its feed-forward network's."""

WHOLE = 24_000
"""Training pairs that the number of updates is meant for, about those of the verses."""

NUMBERS = Limit(
    lambda x: len(x) == len(set(x)) and min(x, default=1) >= 1,
    "numbers >= 1, each once",
)
NAMES = Limit(
    lambda x: 1 <= len(x) == len(set(x)),
    f"{', '.join(MODELS)}, names of variants or path/file.py:function; each once",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What is run."""

    task: Literal["cmudict", "verses", "toy_words", "toy_verses"] = "cmudict"
    """Words of the CMU Pronouncing Dictionary to phones, verses from English to
    Spanish, or made-up ones for tests."""
    models: Annotated[tuple[str, ...], NAMES] = tuple(MODELS)
    """Rows: transformer, lstm_attention, lstm (one vector of the whole source), or an
    attention variant by name or path/file.py:function."""
    attention: str | None = None
    """One more row: a variant that takes every part of the Transformer that it can."""
    varied: Annotated[tuple[str, ...], some_of(TABLE_3, least=0)] = ()
    """What of the Transformer is varied besides, as in the paper's Table 3."""
    ns: Annotated[tuple[int, ...], NUMBERS] = ()
    """Further rows of the Transformer, of so many training pairs each, drawn anew for
    every seed; they take updates by the root of their number."""
    vocabulary: Count = 4_000
    """Byte pairs of verses, of both languages together."""
    dim: Count = 128
    """Width."""
    depth: Count = 3
    """Blocks of the encoder, and of the decoder."""
    mlp_dim: Count = 512
    """Hidden width of the feed-forward networks."""
    num_heads: Count = 4
    """Heads."""
    key_dim: Annotated[int | None, at_least(1)] = None
    """Size of a head's queries and keys; None = its share of the width."""
    positions: Literal["sinusoidal", "learned", "rope", "none"] = "sinusoidal"
    """Positions of attention, in the encoder and in the decoder."""
    norm: Literal["pre", "post"] = "pre"
    """Layer normalisation before each part, or behind it as in the paper."""
    dropout_rate: Share = 0.1
    """Of embedded symbols, of what each part adds, and of hidden units."""
    label_smoothing: Share = 0.0
    """Share of each label that is spread over all symbols; .1 in the paper."""
    schedule: Literal["cosine", "noam"] = "cosine"
    """How the learning rate falls behind its warm-up: to zero, or as the paper's."""
    averaged: Count = 1
    """Points of training whose parameters are averaged, the last and those before it, a
    hundredth of the updates apart; 5 in the paper."""
    train_length: Count = 16
    """Pairs whose source has more symbols, or whose target as many, are not trained
    on."""
    tokens: Count = 1_024
    """Symbols of a batch, with padding."""
    updates: Count = 12_000
    """Optimiser steps of a final cell."""
    tune_updates: Count = 1_000
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (1e-3, 2e-3, 4e-3, 8e-3)
    """Peaks of the schedule, ascending; for each model the validation part chooses.
    Those in the middle are tried first, and further ones while the best lies at an
    end."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay of matrices."""
    seeds: Count = 3
    """Seeds of each row: initial parameters, order of the batches, dropout."""
    beams: Count = 4
    """Sequences that the search goes on with; greedy ones are told beside."""
    length_penalty: Amount = 0.0
    """How much the search favours long answers, see `attn_jax.beam_search`."""
    written: Annotated[int | None, at_least(1)] = None
    """Test sources that targets are written for; None = all."""
    baselines: bool = True
    """Whether what needs no network is measured: letters by themselves and in the
    letters around; the source itself, and the translation of the most similar one."""

    def rules(self) -> Iterator[Rule]:
        rates = self.learning_rates
        yield "learning_rates", tuple(sorted(set(rates))) == rates, "ascending"
        divides = self.dim % self.num_heads == 0
        yield "num_heads", divides, f"a divisor of dim={self.dim}"
        again = self.attention in self.models
        yield "attention", not again, f"none of models={self.models}"
        for name in ("varied", "ns"):
            needed = not getattr(self, name) or "transformer" in self.models
            yield name, needed, "left out without a model 'transformer'"

    @property
    def rows(self) -> tuple[str, ...]:
        """All models."""
        return self.models + ((self.attention,) if self.attention else ())


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        task="toy_words",
        dim=8,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        train_length=6,
        tokens=64,
        updates=4,
        tune_updates=2,
        learning_rates=(3e-3,),
        beams=2,
        written=8,
        seeds=1,
    ),
    "smoke_verses": Config(
        task="toy_verses",
        models=("transformer",),
        ns=(20,),
        vocabulary=100,
        dim=8,
        depth=1,
        mlp_dim=16,
        num_heads=2,
        key_dim=2,
        label_smoothing=0.1,
        schedule="noam",
        averaged=2,
        train_length=12,
        tokens=64,
        updates=8,
        tune_updates=2,
        learning_rates=(3e-3,),
        beams=2,
        written=6,
        seeds=1,
    ),
    "quick": Config(
        dim=64,
        depth=2,
        mlp_dim=256,
        updates=1_500,
        learning_rates=(4e-3,),
        written=2_000,
    ),
    "cpu": Config(),
    "verses_quick": Config(
        task="verses",
        models=("transformer", "lstm_attention"),
        vocabulary=2_000,
        dim=64,
        depth=2,
        mlp_dim=256,
        train_length=48,
        updates=1_500,
        learning_rates=(4e-3,),
        written=200,
    ),
    "verses": Config(
        task="verses",
        models=("transformer", "lstm_attention"),
        ns=(1_000, 3_000, 10_000),
        dropout_rate=0.2,
        label_smoothing=0.1,
        train_length=64,
        updates=10_000,
        length_penalty=0.6,
        written=1_000,
    ),
    "table3": Config(models=("transformer",), varied=tuple(TABLE_3)),
    "accelerator": Config(
        dim=256,
        depth=4,
        mlp_dim=1_024,
        tokens=8_192,
        updates=20_000,
        tune_updates=2_000,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        label_smoothing=0.1,
    ),
    "verses_accelerator": Config(
        task="verses",
        ns=(1_000, 3_000, 10_000),
        varied=("schedule", "averaged", "dropout"),
        vocabulary=8_000,
        dim=256,
        depth=4,
        mlp_dim=1_024,
        dropout_rate=0.3,
        label_smoothing=0.1,
        train_length=96,
        tokens=8_192,
        updates=12_000,
        tune_updates=2_000,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        length_penalty=0.6,
    ),
}


def updates_for(config: Config, pairs: int) -> int:
    """Updates of a row that has so many training pairs.

    >>> updates_for(Config(updates=1_000), 6_000), updates_for(Config(), 10**6)
    (500, 12000)
    """
    share = min(1.0, (pairs / WHOLE) ** 0.5)
    return max(config.averaged, round(config.updates * share))


def study_of(
    config: Config,
    name: str,
    model: str,
    differs: identity.Differs,
    changes: Changes,
    base: Study | None = None,
) -> Study:
    """A row: a model, and what is changed of it; then ``base`` chooses the rate."""
    rates = config.learning_rates
    recurrent = is_recurrent(model)
    attention = None if model in MODELS else model
    traits: dict[str, Any] = dict(
        task=config.task,
        model=model,
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        weight_decay=config.weight_decay,
        attention=attention,
        attention_sha256=attention_digest(attention),
        tokens=config.tokens,
        train_length=config.train_length,
        dim=config.dim,
        depth=config.depth,
        mlp_dim=config.mlp_dim,
        num_heads=config.num_heads,
        key_dim=None if recurrent else config.key_dim,
        positions=None if recurrent else config.positions,
        norm="pre" if recurrent else config.norm,
        dropout_rate=config.dropout_rate,
        label_smoothing=config.label_smoothing,
        schedule=config.schedule,
        averaged=config.averaged,
        beams=config.beams,
        length_penalty=config.length_penalty,
        written=config.written,
        differs=differs,
    ) | dict(changes)
    grid = tuple(PairCell(learning_rate=rate, **traits) for rate in rates)
    first = beside(len(rates))
    pairs = traits.get("pairs")
    updates = config.updates if pairs is None else updates_for(config, pairs)
    return Study(name, grid, updates, config.seeds, base, "val_loss", True, first)


def studies_of(config: Config, differs: identity.Differs = ()) -> list[Study]:
    """All rows; what is varied, and fewer pairs, take the Transformer's rate over."""
    found = [study_of(config, model, model, differs, {}) for model in config.rows]
    by_name = {study.name: study for study in found}
    for kind in config.varied:
        for changes in TABLE_3[kind]:
            if all(getattr(config, key) == value for key, value in changes.items()):
                continue  # the base itself
            name = ", ".join(f"{key}={value}" for key, value in changes.items())
            base = by_name["transformer"]
            found.append(study_of(config, name, "transformer", differs, changes, base))
    for n in config.ns:
        rest = differs, dict(pairs=n), by_name["transformer"]
        found.append(study_of(config, f"{n} pairs", "transformer", *rest))
    return found


def plans(config: Config) -> list[Plan]:
    """Loads the pairs, and plans all cells.

    Raises:
      ValueError: a row is of more pairs than there are.
    """
    kind = TASKS[config.task]
    data = kind.load(config.vocabulary if kind.has_vocabulary else 0)
    differs = identity.differs(config.task, data_sha256=data.sha256)
    measures = floors(config.task, data, config.written) if config.baselines else {}
    made_of = identity.differs(
        config.task, data_sha256=data.sha256, written=config.written
    )
    if config.ns:
        training_part(data, config.train_length, max(config.ns), 0)
    return [
        Plan(
            PairTask(data),
            data.describe(),
            studies_of(config, differs),
            baselines_of(config.task, measures, made_of),
        )
    ]


EXPERIMENT = Experiment(
    name="seq2seq",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "half a minute",
        "smoke_verses": "half a minute",
        "quick": "twenty minutes, two cores",
        "cpu": "hours, two cores",
        "verses_quick": "half an hour, two cores",
        "verses": "six hours, two cores",
        "table3": "a day, two cores",
        "accelerator": "hours, an accelerator",
        "verses_accelerator": "hours, an accelerator",
    },
    plans=plans,
    report=REPORT,
)
