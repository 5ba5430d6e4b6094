"""Self-attention against convolution as the training set grows.

`python -m experiments.data_scaling --preset quick` trains self-attention and two
convolutions of small receptive field on nested subsets of recorded speech, `--preset
phones` more of them; `--preset cpu` a ViT, a ResNet and a hybrid on images. Each writes
results.jsonl, report.md and figures.

Reference: Dosovitskiy et al., arXiv:2010.11929, Figures 3 and 4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from flax import nnx

from attn_jax import models
from attn_jax.models import MODELS, SIZES, default_patch
from attn_jax.tools.cost import model_cost
from experiments.core import identity, optim
from experiments.core.cell import (
    Amount,
    Clip,
    Count,
    Counts,
    Dtype,
    Limit,
    Rule,
    Settings,
    Share,
    at_least,
    attention_digest,
    some_of,
    variant_of,
)
from experiments.core.loop import Program
from experiments.core.plan import Baseline, Plan, Study
from experiments.core.run import Experiment
from experiments.data.fetch import DataError
from experiments.data.images import Dataset
from experiments.data_scaling import sequences
from experiments.data_scaling.report import REPORT
from experiments.data_scaling.tasks import Scenes, load_task
from experiments.tasks.baselines import BASELINES, subset_baseline
from experiments.tasks.images import Augment, ImageCell, ImageTask, image_program

# Most training images of a baseline whose time grows with the square of N.
BASELINE_CAPS = {"rbf_svm": 60_000}

# What a grid tries, and the field of a cell that it is.
GRID = {
    "learning_rates": "learning_rate",
    "weight_decays": "weight_decay",
    "label_smoothings": "label_smoothing",
    "crops": "crop",
    "mixups": "mixup",
    "dropout_rates": "dropout_rate",
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Hyper-parameters tried for each N; every combination is one tuning cell."""

    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peaks of the schedule."""
    weight_decays: tuple[float, ...] = (0.05,)
    """Decoupled weight decay."""
    label_smoothings: tuple[float, ...] = (0.0,)
    """Share of the label spread over all classes."""
    crops: tuple[int, ...] = (0,)
    """Pixels of random-crop padding; 0 = off."""
    mixups: tuple[float, ...] = (0.0,)
    """α of mixup; 0 = off."""
    dropout_rates: tuple[float, ...] = (0.0,)
    """Dropout of the model; 0 alone for "resnet"."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name):
                raise ValueError(f"{field.name} must hold at least one value, got ().")

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination, as arguments of a `Cell`."""
        for values in itertools.product(*(getattr(self, name) for name in GRID)):
            yield dict(zip(GRID.values(), values, strict=True))


def family_size(name: str, default: str) -> tuple[str, str]:
    """Splits "family" or "family:size".

    >>> family_size("resnet:mu_item", "mu"), family_size("vit", "mu")
    (('resnet', 'mu_item'), ('vit', 'mu'))
    """
    family, _, size = name.partition(":")
    return family, size or default


def _known(name: str) -> bool:
    family, size = family_size(name, "mu")
    return family in MODELS and size in SIZES[family]


_IMAGE_MODELS = f"{', '.join(MODELS)}, or family:size"
FAMILIES = Limit(
    lambda x: 1 <= len(x) == len(set(x)),
    f"for images {_IMAGE_MODELS}; for sequences {sequences.WORDS}; each once",
)


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Accuracy on a fixed test set as a function of the number of training examples."""

    task: str = "fashion_mnist"
    """Images: fashion_mnist, cifar10, cifar100, digits, npz:PATH, or scenes. Sequences
    with a label a vector: phones (speech), pos, pos_fine (text), or toy_phones,
    toy_pos."""
    scenes: Scenes = dataclasses.field(default_factory=Scenes)
    """How scenes are composed, for --task scenes."""
    labels: sequences.Labels = dataclasses.field(default_factory=sequences.Labels)
    """How sequences are labelled, for tasks of sequences."""
    allow_fallback: bool = False
    """Use Fashion-MNIST where the sequences of the task cannot be had, and
    scikit-learn's digits where the images cannot."""
    models: Annotated[tuple[str, ...], FAMILIES] = ("vit", "resnet", "hybrid")
    """Of images, families: vit, resnet, hybrid, mlp; "family:size" for another size
    than SIZE. Of sequences: "cnn:R" and "attention:R", which see R vectors on either
    side, attention, gru, lstm, "window:W"."""
    size: Literal["mu", "ti", "s", "b"] = "mu"
    """Size of every family; within a size FLOPs are near (`attn_jax models`)."""
    patch: Annotated[int | None, at_least(1)] = None
    """Side of the ViT's patches in pixels; by default the size's where it divides the
    image, else the largest that leaves at least 4 x 4."""
    attention: str | None = None
    """Attention variant inside the ViT, or "attention": a name or
    path/file.py:function."""
    ns: Counts = (100, 1_000, 10_000)
    """Numbers of training images or sequences."""
    seeds: Count = 3
    """Seeds of each (model, N): each draws its own subset and initial parameters."""
    baselines: Annotated[tuple[str, ...], some_of(BASELINES, least=0)] = BASELINES
    """Trivial baselines on the same subsets."""
    protocol: Literal["updates", "epochs"] = "updates"
    """"updates": as many updates for every N. "epochs": EPOCHS at the largest N, and
    in inverse proportion more at smaller N."""
    updates: Count = 1_000
    """Optimiser steps of a cell, for the protocol "updates"."""
    epochs: Annotated[float, Limit(lambda x: x > 0, "above 0")] = 8.0
    """Passes at the largest N, for the protocol "epochs"."""
    max_epochs: Annotated[
        float | None, Limit(lambda x: x is None or x > 0, "above 0, or none")
    ] = 50.0
    """Most passes over a training set; None = no cap."""
    min_updates: Count = 1_000
    """Updates below which max-epochs does not cut."""
    batch_size: Count = 64
    """Images a step."""
    tune_updates: Count = 500
    """Most updates of a tuning cell."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters stay float32."""
    flip: bool = True
    """Random left-right flips, for every cell."""
    warmup: Share = 0.1
    """Share of the updates that warm up."""
    clip_norm: Clip = 1.0
    """Largest global norm of a gradient."""
    vit: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the ViT."""
    resnet: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the ResNet."""
    hybrid: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the hybrid."""
    mlp: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the MLP."""

    def rules(self) -> Iterator[Rule]:
        if self.task in sequences.TASKS:
            known = all(sequences.traits_of(x, self.labels) for x in self.models)
            yield "models", known, f"of {sequences.WORDS}, for task={self.task!r}"
            placed = self.attention is None or "attention" in self.models
            yield "attention", placed, "left out without a model 'attention'"
            return
        known = all(map(_known, self.models))
        yield "models", known, f"of {_IMAGE_MODELS}, for task={self.task!r}"
        mirrored = self.task == "scenes" and self.flip
        yield (
            "flip",
            not mirrored,
            "off for scenes (a mirrored scene has another label)",
        )
        families = {family_size(name, self.size)[0] for name in self.models}
        placed = self.attention is None or "vit" in families
        yield "attention", placed, f"left out without a 'vit' in models={self.models!r}"


_SMOOTHED = (0.0, 0.1)
_FIELDS = ("gru", "attention:30", "cnn:64", "attention:6")
_AUGMENTED = Grid(
    weight_decays=(0.05, 0.3), label_smoothings=(0.1,), crops=(4,), mixups=(0.0, 0.2)
)


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        task="digits",
        flip=False,
        ns=(40, 80),
        updates=4,
        batch_size=8,
        seeds=1,
        models=("vit", "resnet", "hybrid", "mlp"),
        vit=Grid(learning_rates=(1e-3,)),
        resnet=Grid(learning_rates=(3e-3,)),
        hybrid=Grid(learning_rates=(1e-3,)),
        mlp=Grid(learning_rates=(1e-3,)),
    ),
    "quick": Config(
        task="phones",
        allow_fallback=True,
        ns=(40, 400, 7_675),
        models=("attention", "cnn:6", "cnn:2"),
        updates=300,
        labels=sequences.Labels(crop=64, tokens=1_024, learning_rates=(8e-3,)),
    ),
    "images": Config(
        allow_fallback=True,
        ns=(100, 500, 2_500, 12_500),
        updates=250,
        tune_updates=75,
        max_epochs=None,
        resnet=Grid(learning_rates=(5e-3, 1.5e-2)),
    ),
    "cpu": Config(
        ns=(100, 1_000, 3_000, 10_000, 60_000),
        updates=7_500,
        max_epochs=48,
        min_updates=3_000,
        tune_updates=750,
        vit=Grid((1.5e-3, 3e-3), (0.1,), _SMOOTHED),
        resnet=Grid((5e-3, 1.5e-2), label_smoothings=_SMOOTHED),
        hybrid=Grid((1e-3, 3e-3), label_smoothings=_SMOOTHED),
    ),
    "scenes": Config(
        task="scenes",
        scenes=Scenes(rule="pointer", grid=3, item=10, cells=4, pool=256_000),
        patch=10,
        ns=(4_000, 64_000, 256_000),
        seeds=5,
        updates=12_000,
        tune_updates=3_000,
        max_epochs=None,
        models=("vit", "resnet:mu_cell", "resnet:mu_grid"),
        baselines=("majority",),
        flip=False,
        vit=Grid(learning_rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
        resnet=Grid(learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    ),
    "smoke_sequences": Config(
        task="toy_phones",
        ns=(4, 8),
        seeds=1,
        models=("cnn:6", "attention", "attention:6", "gru"),
        updates=4,
        tune_updates=2,
        labels=sequences.Labels(tokens=512, dim=8, num_heads=1, learning_rates=(3e-3,)),
    ),
    "phones": Config(
        task="phones",
        ns=(40, 120, 400, 1_200, 4_000, 7_675),
        seeds=5,
        models=("attention", "cnn:2", "cnn:6", "cnn:30", *_FIELDS),
        updates=800,
        tune_updates=200,
        labels=sequences.Labels(crop=64, tokens=1_024),
    ),
    "pos": Config(
        task="pos",
        ns=(300, 1_000, 3_000, 10_000, 45_997),
        seeds=5,
        models=("attention", "cnn:6", "window:2", "gru"),
        updates=3_000,
        tune_updates=500,
        labels=sequences.Labels(tokens=1_024),
    ),
    "accelerator": Config(
        task="cifar10",
        size="s",
        ns=(500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000),
        updates=40_000,
        max_epochs=None,
        batch_size=512,
        dtype="bfloat16",
        vit=dataclasses.replace(_AUGMENTED, learning_rates=(3e-4, 1e-3)),
        resnet=dataclasses.replace(_AUGMENTED, learning_rates=(1e-3, 3e-3)),
        hybrid=dataclasses.replace(_AUGMENTED, learning_rates=(3e-4, 1e-3)),
    ),
}


# ------------------------------------------------------------------- the cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingCell(ImageCell):
    """One (model, attention, N, seed, hyper-parameters).

    Attributes:
      model, size: see `attn_jax.models`.
      attention: attention variant of the model; None is its default.
      attention_sha256: of the file, where ``attention`` names one: an edited
        variant is another cell.
      patch: side of the ViT's patches in pixels; None for other models.
      protocol: how ``updates`` came from n, see `updates_of`.
      label_smoothing: share of the label spread over all classes.
      mixup: α of the Beta distribution; 0 = off.
      dropout_rate: of the model.
      validation_fraction, validation_maximum: size of the validation split.
    """

    size: str
    attention: str | None = None
    attention_sha256: str | None = None
    patch: int | None = None
    protocol: str = "updates"
    label_smoothing: Share = 0.0
    mixup: Amount = 0.0
    dropout_rate: Share = 0.0
    validation_fraction: Annotated[float, Limit(lambda x: 0 < x < 1, "in (0, 1)")] = 0.2
    validation_maximum: Count = 5000

    def traits(self) -> Iterator[str]:
        yield self.size if self.attention is None else f"{self.size}[{self.attention}]"
        yield f"n={self.n}"

    def tries(self) -> Iterator[str]:
        yield from super().tries()
        for name in "weight_decay label_smoothing crop mixup dropout_rate".split():
            if getattr(self, name):
                yield f"{name.replace('_', ' ')} {getattr(self, name):g}"


_SHAPE = (
    "model size attention attention_sha256 patch dropout_rate dtype flip crop".split()
)
Shape = tuple[Any, ...]


def shape_of(cell: ScalingCell, dataset: Dataset) -> Shape:
    """What a compiled program depends on; cells that agree in it share one."""
    traits = tuple(getattr(cell, name) for name in _SHAPE)
    return (*traits, cell.mixup > 0, dataset.image_shape, dataset.num_classes)


def build_model(shape: Shape, seed: int) -> nnx.Module:
    """The model of a cell with its initial parameters."""
    model, size, attention, digest, patch, dropout_rate, dtype, *_ = shape
    return models.build(
        model,
        size,
        image_shape=shape[-2],
        num_classes=shape[-1],
        attention=None if attention is None else variant_of(attention, digest),
        overrides={} if patch is None else {"patch": patch},
        dropout_rate=dropout_rate,
        dtype=jnp.dtype(dtype) if dtype != "float32" else None,
        rngs=nnx.Rngs(seed),
    )


@functools.lru_cache(maxsize=32)
def program_of(shape: Shape) -> Program:
    """What cells of a shape compute."""
    _, _, attention, digest, _, dropout_rate, _, flip, crop, mixup, *_ = shape
    draws = attention is not None and variant_of(attention, digest).stochastic
    return image_program(
        functools.partial(build_model, shape),
        optim.split_model,
        shape[-1],
        Augment(flip, crop, mixup, dropout_rate > 0 or draws),
    )


@functools.lru_cache(maxsize=64)
def cost_of(shape: Shape) -> dict[str, Any]:
    """Parameters, FLOPs of an image's forward pass, and a ResNet's receptive field."""
    shape = tuple("float32" if x == "bfloat16" else x for x in shape)
    cost = model_cost(build_model(shape, 0), shape[-2])
    found = dict(params=cost.params, flops=cost.flops)
    if shape[0] == "resnet":
        model: Any = nnx.eval_shape(lambda: build_model(shape, 0))
        found["receptive_field"] = model.receptive_field()
    return found


class ScalingTask(ImageTask):
    """Classifies the images of one data set."""

    def validation_size(self, cell: ScalingCell) -> tuple[float, int]:
        return cell.validation_fraction, cell.validation_maximum

    def program(self, cell: ScalingCell) -> Program:
        return program_of(shape_of(cell, self.dataset))

    def costs(self, cell: ScalingCell) -> dict[str, Any]:
        found = cost_of(shape_of(cell, self.dataset))
        return found | {"data_sha256": self.dataset.sha256}


# -------------------------------------------------------------------- the plan


def updates_of(config: Config, n: int) -> int:
    """Number of optimiser steps that the protocol gives to n training images.

    "updates": the same number of steps for every n, as ViT's Figure 4
    (arXiv:2010.11929). "epochs": ``epochs`` passes at the largest N and in inverse
    proportion more (rounded to whole passes of whole batches) at smaller n, as ConViT's
    Table 2 (arXiv:2103.10697). ``max_epochs`` caps the passes of either, but never
    below ``min_updates``: without it, the smallest sets are seen thousands of times.

    >>> few = Config(ns=(1000,), updates=50, batch_size=10, max_epochs=3, min_updates=1)
    >>> updates_of(few, 100)
    30
    >>> updates_of(dataclasses.replace(few, protocol="epochs", epochs=2.0,
    ...                                max_epochs=None), 100)
    200
    """
    per_epoch = n / config.batch_size
    if config.protocol == "updates":
        steps = float(config.updates)
    else:
        per_epoch = max(1, n // config.batch_size)
        steps = round(config.epochs * max(config.ns) / n) * per_epoch
    if config.max_epochs is not None:
        cap = max(config.min_updates, math.ceil(config.max_epochs * per_epoch))
        steps = min(steps, cap)
    return max(1, int(steps))


def _patch(
    config: Config, model: str, size: str, image_shape: tuple[int, int, int]
) -> int | None:
    """The ViT's patch: the one asked for, which must fit, else near the size's."""
    if model != "vit":
        return None
    if config.patch is None:
        return default_patch(image_shape, SIZES["vit"][size]["patch"])
    height, width, _ = image_shape
    if height % config.patch or width % config.patch:
        raise ValueError(
            f"patch must divide the images of {height} x {width} pixels, got "
            f"{config.patch}."
        )
    return config.patch


def studies_of(
    config: Config,
    task: str,
    image_shape: tuple[int, int, int],
    differs: identity.Differs = (),
) -> list[Study]:
    """A study for each (model, N), the largest N first: workers end together.

    Args:
      config: what to run.
      task: name under which the cells are stored.
      image_shape: (height, width, channels) of its images.
      differs: what of the data is not as committed records had it.

    Raises:
      ValueError: a value no cell can have.
    """
    studies = []
    for n in sorted(config.ns, reverse=True):
        updates = updates_of(config, n)
        for name in config.models:
            model, size = family_size(name, config.size)
            attention = config.attention if model == "vit" else None
            grid: Grid = getattr(config, model)
            cells = tuple(
                ScalingCell(
                    task=task,
                    model=model,
                    size=size,
                    attention=attention,
                    attention_sha256=attention_digest(attention),
                    patch=_patch(config, model, size, image_shape),
                    n=n,
                    seed=0,
                    phase="tune",
                    protocol=config.protocol,
                    updates=min(updates, config.tune_updates),
                    batch_size=config.batch_size,
                    warmup=config.warmup,
                    clip_norm=config.clip_norm,
                    flip=config.flip,
                    dtype=config.dtype,
                    differs=differs,
                    **point,
                )
                for point in grid.points()
            )
            studies.append(Study(f"{name} n={n}", cells, updates, config.seeds))
    return studies


def baselines_of(
    config: Config, dataset: Dataset, task: str, differs: identity.Differs = ()
) -> list[Baseline]:
    """The trivial baselines, on the very subsets that the networks see."""
    found = []
    for n in sorted(config.ns, reverse=True):
        for name in config.baselines:
            if n > BASELINE_CAPS.get(name, n):
                continue  # it would be fitted to a smaller N's subset once more
            for seed in range(config.seeds):
                made = dict(task=task, model=name, n=n, seed=seed, phase="baseline")
                measure = functools.partial(subset_baseline, dataset, name, n, seed)
                label = f"{task} {name} n={n} seed={seed}"
                made = identity.with_differs(made, differs)
                found.append(Baseline(made, measure, label))
    return found


def fitting(config: Config, dataset: Dataset) -> Config:
    """The settings, or where digits stand in, less what they cannot serve; says so.

    Raises:
      ValueError: the data cannot serve.
    """
    have = len(dataset.train_labels)
    stands_in = dataset.name == "digits" != config.task and config.task != "scenes"
    if stands_in:
        dropped = [n for n in config.ns if n > have]
        if dropped:
            print(f"left out, more than the {have} images there are: N = {dropped}")
        ns = tuple(n for n in config.ns if n <= have) or (have,)
        config = dataclasses.replace(config, ns=ns, flip=False)
    for n in config.ns:
        if n > have:
            raise ValueError(
                f"ns: N={n} is larger than the training set of {dataset.name}, which "
                f"has {have} images: use --ns with numbers up to {have}."
            )
        if n < 2 * dataset.num_classes:
            raise ValueError(
                f"ns: N={n} leaves no validation split for {dataset.num_classes} "
                f"classes: use at least {2 * dataset.num_classes}."
            )
    return config


def plans(config: Config) -> list[Plan]:
    """Loads the images and plans the cells.

    Raises:
      DataError, ValueError: the data cannot be had or cannot serve; a bad value.
    """
    if config.task in sequences.TASKS:
        try:
            return sequences.plans(config)
        except DataError as error:
            if not config.allow_fallback:
                raise
            print(f"{error}\nImages stand in for {config.task}: preset images, less.")
            config = dataclasses.replace(
                PRESETS["images"], ns=(100, 500, 2_500), models=("vit", "resnet")
            )
    scenes = config.scenes if config.task == "scenes" else Scenes()
    dataset = load_task(config.task, scenes, allow_fallback=config.allow_fallback)
    config = fitting(config, dataset)
    # Data that stood in for what was asked for is stored under its own name.
    task, differs = identity.of_images(dataset)
    studies = studies_of(config, task, dataset.image_shape, differs)
    floors = baselines_of(config, dataset, task, differs)
    return [Plan(ScalingTask(dataset), dataset.describe(), studies, floors)]


EXPERIMENT = Experiment(
    name="data_scaling",
    about=__doc__,
    presets=PRESETS,
    minutes={
        "smoke": "seconds, a test",
        "quick": "four minutes, two cores; recorded speech",
        "images": "minutes, two cores",
        "smoke_sequences": "seconds, a test",
        "phones": "hours, two cores; recorded speech",
        "pos": "hours, two cores; text",
        "cpu": "hours, two cores",
        "scenes": "hours; composed scenes, equal FLOPs and parameters",
        "accelerator": "CIFAR-10 on GPU or TPU",
    },
    plans=plans,
    report=REPORT,
)
