"""Do heads of self-attention on images move to a pixel grid, as a convolution has?

`python -m experiments.attention_as_conv --preset cpu` trains fully-attentional models
with quadratic, generalised Gaussian and learned relative encodings beside a ResNet of
as many parameters (with content: `--models relative_content`); and it starts heads as
the convolution of the theorem, for one or more numbers of training images N (`--ns`).
The report shows where heads look before, during and after training (Cordonnier et al.,
arXiv:1911.03584).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from experiments.attention_as_conv import teacher
from experiments.attention_as_conv.cells import ConvCell, ConvTask
from experiments.attention_as_conv.report import REPORT
from experiments.attention_as_conv.teacher import TeacherCell, TeacherTask
from experiments.core import identity
from experiments.core.cell import (
    Amount,
    Count,
    Counts,
    Dtype,
    Limit,
    Natural,
    Rates,
    Rule,
    Settings,
    at_least,
    some_of,
)
from experiments.core.plan import Baseline, Plan, Study, baselines_of
from experiments.core.run import Experiment
from experiments.data import images as data
from experiments.data.images import Dataset
from experiments.tasks.baselines import BASELINES, CAPS, subset_baseline

MODELS = ("quadratic", "gaussian", "relative", "relative_content", "resnet")
IMAGE_PARTS = ("encodings", "starts")
PARTS = (*IMAGE_PARTS, "long", "teacher")

# Committed floors of more images than this were fitted to a part of so many.
EARLIER_CAP = 10_000

_ODD = Limit(lambda x: bool(x) and all(s % 2 and s > 1 for s in x), "odd numbers >= 3")


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Fully-attentional image models: where heads look, and how they start."""

    task: str = "fashion_mnist"
    """fashion_mnist, cifar10, cifar100, digits, or npz:PATH."""
    allow_fallback: bool = False
    """Use scikit-learn's digits where the images of the task cannot be had."""
    parts: Annotated[tuple[str, ...], some_of(PARTS)] = IMAGE_PARTS
    """encodings: all models at the largest N. starts: quadratic encoding from random
    places and as a convolution, and the ResNet, at every N. long: quadratic encoding
    at the largest N for more updates. teacher: no images, a convolution to imitate."""
    models: Annotated[tuple[str, ...], some_of(MODELS)] = MODELS
    """Models of the part "encodings"."""
    ns: Counts = (300, 3_000, 60_000)
    """Numbers of training images."""
    seeds: Count = 3
    """Seeds: each draws its own subset, initial parameters and order of the images."""
    updates: Count = 1_000
    """Optimiser steps of every cell."""
    content_updates: Count = 400
    """The same for "relative_content", an update of which takes about eight times as
    long as one without content."""
    tune_updates: Count = 200
    """Optimiser steps of a tuning cell."""
    learning_rates: Rates = (1e-2, 3e-2, 1e-1, 3e-1)
    """Peaks of the schedule for attention; the validation part chooses for each
    encoding and start, at the largest N."""
    long_updates: Count = 3_000
    """Optimiser steps of the part "long", whose rate is chosen in runs of as many
    steps as others'."""
    resnet_rates: Rates = (5e-3, 1.5e-2, 5e-2)
    """The same for the ResNet."""
    weight_decay: Amount = 0.05
    """Decoupled weight decay of matrices."""
    batch_size: Count = 16
    """Images a step."""
    crop: Natural = 0
    """Pixels of random-crop padding; 0 = off."""
    patch: Count = 2
    """Side in pixels of the squares that become tokens."""
    dim: Count = 24
    """Width."""
    depth: Count = 3
    """Layers."""
    mlp_dim: Count = 48
    """Width of the feed-forward network."""
    num_heads: Count = 9
    """Heads, a square number."""
    key_dim: Count = 16
    """Size of queries and keys, with content."""
    alpha: float = 12.0
    """Sharpness of heads that start as a convolution."""
    resnet_widths: Annotated[tuple[int, ...], at_least(1)] = (10, 20, 32)
    """Channels of the ResNet's stages, one block each, to match in parameters."""
    resnet_stem_stride: Count = 2
    """Stride of the ResNet's first convolution."""
    baselines: Annotated[tuple[str, ...], some_of(BASELINES, least=0)] = (
        "majority",
        "logistic_regression",
    )
    """Trivial baselines on the same subsets."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters stay float32."""
    kernels: Annotated[tuple[int, ...], _ODD] = (3, 5)
    """Teacher: sides of the kernels that are imitated."""
    heads_per_place: Counts = (1, 2)
    """Teacher: heads for each place of the kernel."""
    decays: Annotated[tuple[float, ...], at_least(0)] = (0.0, 0.3)
    """Teacher: weight decays of the heads' value maps."""
    teacher_rates: Rates = (3e-2, 1e-1, 3e-1)
    """Teacher: learning rates tried, in runs of full length, on fresh noise."""
    teacher_updates: Count = 3_000
    """Teacher: optimiser steps."""
    teacher_seeds: Count = 6
    """Teacher: seeds, each with a kernel and a start of its own."""
    teacher_channels: Count = 4
    """Teacher: channels of the noise."""
    teacher_side: Count = 10
    """Teacher: rows and columns of the noise."""
    teacher_batch: Count = 4
    """Teacher: pictures of noise a step."""

    def rules(self) -> Iterator[Rule]:
        square = math.isqrt(self.num_heads) ** 2 == self.num_heads
        words = "a square number, one head for each place of a kernel"
        yield "num_heads", square or "starts" not in self.parts, words
        yield "resnet_widths", bool(self.resnet_widths), "at least one number"


PRESETS: Mapping[str, Config] = {
    "quick": Config(
        allow_fallback=True,
        ns=(100, 200),
        seeds=1,
        updates=20,
        content_updates=20,
        learning_rates=(2e-2,),
        resnet_rates=(1e-2,),
        patch=4,
        dim=16,
        depth=1,
        mlp_dim=32,
        num_heads=4,
        key_dim=8,
        resnet_widths=(8, 16),
        baselines=("majority",),
    ),
    "cpu": Config(models=("quadratic", "gaussian", "relative", "resnet"), ns=(60_000,)),
    "teacher": Config(parts=("teacher",)),
    "long": Config(parts=("long",), ns=(60_000,), baselines=(), long_updates=20_000),
    "accelerator": Config(
        task="cifar10",
        ns=(500, 5_000, 50_000),
        updates=30_000,
        content_updates=30_000,
        tune_updates=3_000,
        learning_rates=(3e-4, 1e-3),
        resnet_rates=(1e-3, 3e-3),
        batch_size=512,
        crop=4,
        dim=400,
        depth=6,
        mlp_dim=512,
        key_dim=400,
        resnet_widths=(64, 128, 256, 512),
        resnet_stem_stride=1,
        dtype="bfloat16",
    ),
}


def cell_of(
    config: Config,
    task: str,
    model: str,
    start: str | None,
    n: int,
    differs: identity.Differs = (),
) -> ConvCell:
    """The cell of a model, before a learning rate is chosen."""
    own: dict[str, Any]
    if model == "resnet":
        own = dict(widths=config.resnet_widths, stem_stride=config.resnet_stem_stride)
    else:
        names = "patch dim depth mlp_dim num_heads".split()
        own = {name: getattr(config, name) for name in names} | {"start": start}
        if start == "convolution":
            own["alpha"] = config.alpha
        if model == "relative_content":
            own["key_dim"] = config.key_dim
    return ConvCell(
        task=task,
        model=model,
        n=n,
        seed=0,
        phase="tune",
        updates=min(config.updates, config.tune_updates),
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        crop=config.crop,
        dtype=config.dtype,
        differs=differs,
        **own,
    )


def make_studies(
    config: Config, task: str, differs: identity.Differs = ()
) -> dict[str, Study]:
    """The studies, those that others take their learning rate from first."""
    largest = max(config.ns)
    wanted: list[tuple[str, str | None, int]] = []
    if "encodings" in config.parts:
        for model in config.models:
            wanted.append((model, None if model == "resnet" else "random", largest))
    if "starts" in config.parts:
        for n in sorted(config.ns, reverse=True):
            wanted += [
                ("quadratic", "random", n),
                ("quadratic", "convolution", n),
                ("resnet", None, n),
            ]
    studies: dict[str, Study] = {}
    for model, start, n in dict.fromkeys(wanted):
        rates = config.resnet_rates if model == "resnet" else config.learning_rates
        cell = cell_of(config, task, model, start, n, differs)
        name = " ".join(filter(None, (model, start)))
        content = model == "relative_content"
        studies[f"{name} n={n}"] = Study(
            f"{name} n={n}",
            tuple(dataclasses.replace(cell, learning_rate=rate) for rate in rates),
            config.content_updates if content else config.updates,
            config.seeds,
            tuned_by=None if n == largest else studies[f"{name} n={largest}"],
        )
    if "long" in config.parts:
        cell = cell_of(config, task, "quadratic", "random", largest, differs)
        rates = config.learning_rates
        grid = tuple(dataclasses.replace(cell, learning_rate=rate) for rate in rates)
        studies["long"] = Study("long", grid, config.long_updates, config.seeds)
    return studies


def teacher_plan(config: Config) -> Plan:
    """Attention that imitates convolutions of noise, by kernel, heads and decay."""
    studies: list[Study] = []
    baselines: list[Baseline] = []
    for side in config.kernels:
        task = f"convolution-{side}x{side}"
        for heads in (side**2 * count for count in config.heads_per_place):
            for decay in config.decays:
                cell = TeacherCell(
                    task=task,
                    model="quadratic",
                    seed=0,
                    phase="tune",
                    updates=config.teacher_updates,
                    batch_size=config.teacher_batch,
                    weight_decay=decay,
                    kernel=side,
                    num_heads=heads,
                    channels=config.teacher_channels,
                    side=config.teacher_side,
                )
                grid = tuple(
                    dataclasses.replace(cell, learning_rate=rate)
                    for rate in config.teacher_rates
                )
                studies.append(
                    Study(
                        f"{task} heads={heads} decay={decay:g}",
                        grid,
                        config.teacher_updates,
                        config.teacher_seeds,
                        metric="val_loss",
                        minimise=True,
                    )
                )
            floors = teacher.floors(cell, config.teacher_seeds)
            baselines += baselines_of(task, floors)
    described = (
        f"teacher: convolutions of white noise, {config.teacher_side} x "
        f"{config.teacher_side} in {config.teacher_channels} channels, generated"
    )
    return Plan(TeacherTask(), described, studies, baselines)


def _named(dataset: Dataset, model: str, n: int, seed: int) -> dict[str, Any]:
    return {"baseline": model} | subset_baseline(dataset, model, n, seed)


def floors_of(
    config: Config, dataset: Dataset, task: str, differs: identity.Differs
) -> tuple[Baseline, ...]:
    """The trivial baselines, on the very subsets that the networks see."""
    measures, made_of = {}, {}
    for model in config.baselines:
        for n in config.ns:
            for seed in range(config.seeds):
                name = f"{model} n={n} seed={seed}"
                measures[name] = functools.partial(_named, dataset, model, n, seed)
                made_of[name] = differs
                if model != "majority" and n > EARLIER_CAP:
                    made_of[name] += (("fitted_to", min(n, CAPS[model])),)
    return baselines_of(task, measures, made_of)


def plans(config: Config) -> list[Plan]:
    """Loads the images and plans the cells.

    Raises:
      DataError: the data cannot be had.
      ValueError: a setting does not fit the data.
    """
    if "teacher" in config.parts:
        images = tuple(part for part in config.parts if part != "teacher")
        rest = plans(dataclasses.replace(config, parts=images)) if images else []
        return [teacher_plan(config), *rest]
    dataset = data.load(config.task, allow_fallback=config.allow_fallback)
    for n in config.ns:
        if n > len(dataset.train_labels):
            raise ValueError(
                f"ns must be at most {len(dataset.train_labels)}, the training images "
                f"of {dataset.name}, got {n}."
            )
    height, width, _ = dataset.image_shape
    if height % config.patch or width % config.patch:
        raise ValueError(
            f"patch must divide images of {height} x {width} pixels, got "
            f"{config.patch}."
        )
    task, differs = identity.of_images(dataset)
    studies = list(make_studies(config, task, differs).values())
    floors = floors_of(config, dataset, task, differs)
    return [Plan(ConvTask(dataset), dataset.describe(), studies, floors)]


EXPERIMENT = Experiment(
    name="attention_as_conv",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "quick": "a minute and a half",
        "cpu": "half an hour, two cores",
        "teacher": "ten minutes",
        "long": "a quarter of an hour, one core",
        "accelerator": "CIFAR-10 on GPU or TPU",
    },
    plans=plans,
    report=REPORT,
)
