"""Attention against recurrent networks: copying a word, and images pixel by pixel.

`python -m experiments.attention_vs_rnn --preset cpu` trains decoders that differ in
what mixes tokens over time (softmax attention, linear attention, Reformer, an LSTM) and
scores them; `--task copy` or `--task images` runs one of the two tasks. `python -m
experiments.attention_vs_rnn.timing` measures how fast they generate and train. The
report puts both beside the paper (Katharopoulos et al., 2020, arXiv:2006.16236).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from experiments.attention_vs_rnn import data
from experiments.attention_vs_rnn.cells import (
    MODELS,
    CopyTask,
    DecoderCell,
    PixelTask,
    known_model,
)
from experiments.attention_vs_rnn.data import SYMBOLS
from experiments.attention_vs_rnn.report import REPORT
from experiments.core import identity
from experiments.core.cell import (
    Above,
    Count,
    Limit,
    Rates,
    Rule,
    Settings,
    attention_digest,
)
from experiments.core.plan import Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data.images import load

_MODELS = Limit(
    lambda x: 1 <= len(x) == len(set(x)) and all(map(known_model, x)),
    f"some of {', '.join(MODELS)}, a variant with a step, or path/file.py:fn",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Decoders that differ in what mixes tokens over time.

    Two tasks. "copy": a random word of 10 symbols comes twice, "0 w 0 w", and the
    second time counts. "images": the pixels of Fashion-MNIST one after the other.
    """

    task: Literal["both", "copy", "images"] = "both"
    """What is run."""
    seeds: Count = 3
    """Seeds of each model: initial parameters and order of the batches."""
    copy_models: Annotated[tuple[str, ...], _MODELS] = (
        "softmax",
        "linear",
        "reformer",
        "lstm",
    )
    """Models of "copy": softmax, linear, reformer, lstm, or path/file.py:function."""
    copy_length: Annotated[int, Limit(lambda x: x >= 8, "at least 8")] = 128
    """Symbols of a sequence of "copy", with padding."""
    copy_dim: Count = 64
    """Width; an LSTM has 5/4 as many hidden units."""
    copy_heads: Count = 4
    """Heads."""
    copy_linear_heads: tuple[Count, ...] = ()
    """Linear attention is run with so many heads as well, at the same width."""
    copy_depth: Count = 2
    """Layers."""
    copy_batch: Count = 16
    """Sequences an update."""
    copy_updates: Count = 1_400
    """Optimiser steps."""
    copy_rates: Rates = (5e-3,)
    """Peaks of the learning rate's schedule; of several, validation chooses one for
    each model."""
    copy_trial: Count = 500
    """Optimiser steps of a rate that is tried."""
    copy_test: Count = 512
    """Sequences that are scored."""
    chunk_size: Count = 32
    """Reformer: tokens of a chunk."""
    num_rounds: Count = 1
    """Reformer: rounds of hashing."""
    image_models: Annotated[tuple[str, ...], _MODELS] = ("softmax", "linear", "lstm")
    """Models of "images"."""
    image_dim: Count = 64
    """Width."""
    image_heads: Count = 4
    """Heads."""
    image_depth: Count = 2
    """Layers."""
    image_batch: Count = 16
    """Images an update."""
    image_updates: Count = 300
    """Optimiser steps."""
    image_rate: Above = 4e-3
    """Peak of the learning rate's schedule."""
    components: Count = 10
    """Logistics in the mixture of a pixel."""
    image_test: Count = 1000
    """Test images that are scored, the first ones; None of them is trained on."""
    samples: Count = 16
    """Images that the first seed draws."""
    completions: Count = 8
    """Test images whose lower half the first seed draws."""

    def rules(self) -> Iterator[Rule]:
        for task in ("copy", "image"):
            dim, heads = (getattr(self, f"{task}_{name}") for name in ("dim", "heads"))
            yield f"{task}_dim", dim % heads == 0, f"a multiple of {task}_heads"
            yield f"{task}_dim", dim % 4 == 0, "a multiple of 4"
        fits = all(self.copy_dim % heads == 0 for heads in self.copy_linear_heads)
        yield "copy_linear_heads", fits, "divisors of copy_dim"


PRESETS: Mapping[str, Config] = {
    "quick": Config(
        seeds=1,
        copy_models=("softmax", "lstm"),
        copy_length=32,
        copy_dim=16,
        copy_heads=2,
        copy_depth=1,
        copy_batch=8,
        copy_updates=40,
        copy_test=64,
        chunk_size=16,
        image_models=("linear",),
        image_dim=16,
        image_heads=2,
        image_depth=1,
        image_batch=4,
        image_updates=6,
        components=5,
        image_test=16,
        samples=1,
        completions=1,
    ),
    "cpu": Config(
        copy_models=("softmax", "linear", "lstm"),
        copy_length=64,
        copy_dim=128,
        copy_linear_heads=(16,),
        copy_batch=8,
        copy_updates=2_000,
        copy_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "accelerator": Config(
        copy_dim=256,
        copy_heads=8,
        copy_depth=4,
        copy_batch=64,
        copy_updates=6_000,
        copy_rates=(1e-3,),
        num_rounds=4,
        image_dim=256,
        image_heads=8,
        image_depth=8,
        image_batch=32,
        image_updates=40_000,
        image_rate=4e-4,
        image_test=10_000,
    ),
}


def cell_of(config: Config, task: str, model: str, **sizes: Any) -> DecoderCell:
    """The cell of a model; images give their name and the sizes."""
    copies, reformer = task == "copy", model == "reformer"
    part = "copy" if copies else "image"
    common = {
        name: getattr(config, f"{part}_{field}")
        for name, field in (
            ("updates", "updates"),
            ("batch_size", "batch"),
            ("dim", "dim"),
            ("num_heads", "heads"),
            ("depth", "depth"),
            ("test_size", "test"),
        )
    }
    if copies:
        sizes = dict(length=config.copy_length, learning_rate=config.copy_rates[0])
    else:
        sizes |= dict(
            components=config.components,
            samples=config.samples,
            completions=config.completions,
            learning_rate=config.image_rate,
        )
    return DecoderCell(
        task=task,
        model=model,
        attention_sha256=attention_digest(model),
        seed=0,
        phase="tune",
        chunk_size=config.chunk_size if reformer else None,
        num_rounds=config.num_rounds if reformer else None,
        **common,
        **sizes,
    )


def _studies(
    config: Config, task: str, models: tuple[str, ...], **sizes: Any
) -> list[Study]:
    found = []
    for model in models:
        cell = cell_of(config, task, model, **sizes)
        if task != "copy":
            updates, seeds = cell.updates, config.seeds
            found.append(Study(model, (cell,), updates, seeds, None, "val_bits", True))
            continue
        more = config.copy_linear_heads if model == "linear" else ()
        found += [
            _copy_study(config, dataclasses.replace(cell, num_heads=heads))
            for heads in (cell.num_heads, *more)
        ]
    return found


def _copy_study(config: Config, cell: DecoderCell) -> Study:
    """The learning rates of a model that copies, and its seeds."""
    tried = config.copy_trial if len(config.copy_rates) > 1 else cell.updates
    grid = tuple(
        dataclasses.replace(cell, learning_rate=rate, updates=tried)
        for rate in config.copy_rates
    )
    name = f"{cell.model}, {cell.num_heads} heads"
    return Study(name, grid, config.copy_updates, config.seeds)


def plans(config: Config) -> list[Plan]:
    """Loads the images and plans the cells of both tasks, or of one.

    Raises:
      DataError: the images cannot be had.
    """
    found = []
    if config.task in ("both", "copy"):
        length = config.copy_length
        about = (
            f"copy: sequences of {length} symbols, words of {length // 4} to "
            f"{(length - 2) // 2 - 1} out of {SYMBOLS}, drawn anew"
        )
        studies = _studies(config, "copy", config.copy_models)
        floors = baselines_of("copy", data.copy_baselines())
        found.append(Plan(CopyTask(), about, studies, floors))
    if config.task in ("both", "images"):
        dataset = load("fashion_mnist")
        height, width, _ = dataset.image_shape
        task, differs = identity.of_images(dataset)
        sizes = dict(length=height * width, height=height, differs=differs)
        studies = _studies(config, task, config.image_models, **sizes)
        made_of = identity.differs(
            task, data_sha256=dataset.sha256, image_test=config.image_test
        )
        measures = data.image_baselines(dataset, config.image_test)
        floors = baselines_of(task, measures, made_of)
        found.append(Plan(PixelTask(dataset), dataset.describe(), studies, floors))
    return found


EXPERIMENT = Experiment(
    name="attention_vs_rnn",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "quick": "a minute",
        "cpu": "an hour and a half, one core",
        "accelerator": "the paper's sizes, on GPU or TPU",
    },
    plans=plans,
    report=REPORT,
)
