"""Self-attention in a pair of networks that draw: does it pay its cost?

`python -m experiments.gan --preset quick` trains, on Fashion-MNIST, two players whose
map of half the picture's side is given self-attention, or a convolution of as many
parameters; `--preset cpu` for long enough, also with neither and with attention on the
map of a quarter. `--attention NAME` or `--attention my.py:fn` adds a row of that
variant. Pictures are scored in the features of a classifier that is trained here first.

References: Zhang et al., 2019, arXiv:1805.08318; Heusel et al., 2017, arXiv:1706.08500.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from experiments.core import identity
from experiments.core.cell import (
    Above,
    Count,
    Counts,
    Limit,
    Rates,
    Rule,
    Settings,
    at_least,
    attention_digest,
    some_of,
)
from experiments.core.plan import Plan, Study, beside
from experiments.core.run import Experiment
from experiments.core.store import config_hash
from experiments.data.images import load
from experiments.gan.cells import GanCell, GanTask, JudgeCell
from experiments.gan.report import REPORT

ROWS: Mapping[str, dict[str, Any]] = {
    "none": dict(kind="none", attention=None),
    "convolution": dict(kind="convolution", attention=None),
    "attention": dict(kind="attention"),
    "convolution:quarter": dict(kind="convolution", attention=None, shrink=4),
    "attention:quarter": dict(kind="attention", shrink=4),
}
"""What a map is given; by default that of half the picture's side."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """What is run."""

    task: str = "fashion_mnist"
    """fashion_mnist, cifar10, digits, or npz:PATH; of square pictures, sides a multiple
    of 4."""
    rows: Annotated[tuple[str, ...], some_of(ROWS)] = ("convolution", "attention")
    """What a map of both players is given: none, convolution, attention, on that of
    half the picture's side, or of a quarter."""
    attention: str | None = None
    """One more row: this variant at half the side, by name or path/file.py:function."""
    n: Count | None = None
    """Training pictures; None: all but the validation part."""
    held: Count = 5_000
    """Validation pictures, cut from the training part."""
    samples: Annotated[int, at_least(10)] = 10_000
    """Pictures that are drawn to be scored; at most as many as the test part has."""
    width: Count = 16
    """Channels of the largest map; the smaller ones have two and four times as many."""
    latent: Count = 64
    """Numbers that a picture is drawn from."""
    seeds: Count = 3
    """Seeds of each row: initial parameters, order of the pictures, what is drawn."""
    updates: Count = 10_000
    """Steps of both players in a final cell."""
    tune_updates: Count = 2_000
    """Steps of a tuning cell."""
    learning_rates: Rates = (1e-3, 2e-3, 4e-3, 8e-3)
    """Peaks of the discriminator's schedule, ascending; for each row the FID to
    validation pictures chooses. Those in the middle are tried first, and further ones
    while the best lies at an end."""
    share: Annotated[float, Limit(lambda x: 0 < x <= 1, "above 0, at most 1")] = 0.25
    """Rate of the generator, as a share of the discriminator's."""
    batch_size: Count = 64
    """Real pictures a step, and as many that are drawn."""
    judge_widths: Counts = (16, 32, 64)
    """Channels of the classifier's stages."""
    judge_updates: Count = 2_000
    """Its optimiser steps."""
    judge_rate: Above = 4e-3
    """Peak of its schedule."""

    def rules(self) -> Iterator[Rule]:
        rates = self.learning_rates
        yield "learning_rates", tuple(sorted(set(rates))) == rates, "ascending"


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        task="digits",
        held=20,
        samples=40,
        width=4,
        latent=8,
        seeds=1,
        updates=2,
        learning_rates=(1e-3,),
        batch_size=8,
        judge_widths=(4, 8),
        judge_updates=2,
    ),
    "quick": Config(
        samples=2_000,
        seeds=1,
        updates=300,
        learning_rates=(4e-3,),
        judge_updates=300,
    ),
    "cpu": Config(rows=tuple(ROWS)),
    "accelerator": Config(
        task="cifar10",
        rows=tuple(ROWS),
        width=64,
        latent=128,
        updates=100_000,
        tune_updates=10_000,
        learning_rates=(1e-4, 2e-4, 4e-4, 8e-4),
        batch_size=128,
        judge_widths=(64, 128, 256),
        judge_updates=20_000,
    ),
}


def judge_of(config: Config, task: str, n: int, differs: identity.Differs) -> JudgeCell:
    """The cell of the classifier."""
    return JudgeCell(
        task=task,
        model="judge",
        seed=0,
        phase="final",
        updates=config.judge_updates,
        n=n,
        learning_rate=config.judge_rate,
        widths=config.judge_widths,
        samples=config.samples,
        differs=differs,
    )


def studies_of(
    config: Config, task: str, n: int, differs: identity.Differs = ()
) -> list[Study]:
    """The classifier, then all rows."""
    judge = judge_of(config, task, n, differs)
    before = Study("judge", (judge,), config.judge_updates, 1)
    rows = {name: ROWS[name] for name in config.rows}
    if config.attention is not None:
        digest = attention_digest(config.attention)
        rows[f"attention {config.attention}"] = dict(
            attention=config.attention, attention_sha256=digest
        )
    cell = GanCell(
        task=task,
        model="gan",
        seed=0,
        phase="tune",
        updates=config.tune_updates,
        weight_decay=0.0,
        n=n,
        batch_size=config.batch_size,
        width=config.width,
        latent=config.latent,
        share=config.share,
        samples=config.samples,
        judge=config_hash(judge.config()),
        differs=differs,
    )
    rates = config.learning_rates
    return [before] + [
        Study(
            name,
            tuple(dataclasses.replace(cell, learning_rate=r, **own) for r in rates),
            config.updates,
            config.seeds,
            metric="val_fid",
            minimise=True,
            first=beside(len(rates)),
            after=before,
        )
        for name, own in rows.items()
    ]


def plans(config: Config) -> list[Plan]:
    """Loads the pictures, and plans all cells.

    Raises:
      DataError: the pictures cannot be had.
      ValueError: they have other sides than the players can draw, or there are fewer.
    """
    dataset = load(config.task)
    rows, columns, _ = dataset.image_shape
    if rows != columns or rows % 4:
        raise ValueError(
            f"task must be of square pictures with a side that is a multiple of 4, got "
            f"{rows} x {columns} of {config.task!r}."
        )
    have = len(dataset.train_labels) - config.held
    n = have if config.n is None else config.n
    if not 0 < n <= have:
        raise ValueError(
            f"n must be at most {have:,}, the training pictures beside the "
            f"{config.held:,} of validation, got {n:,}."
        )
    task, differs = identity.of_images(dataset)
    studies = studies_of(config, task, n, differs)
    return [
        Plan(
            GanTask(dataset, config.held, studies[0].grid[0]),
            dataset.describe(),
            studies,
        )
    ]


EXPERIMENT = Experiment(
    name="gan",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "half a minute",
        "quick": "four minutes, two cores",
        "cpu": "two nights, two cores",
        "accelerator": "hours, an accelerator",
    },
    plans=plans,
    report=REPORT,
)
