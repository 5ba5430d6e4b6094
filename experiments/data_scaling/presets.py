"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from attn_jax.models import MODELS, SIZES
from experiments.data_scaling.tasks import Scenes


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
        names = {
            "learning_rates": "learning_rate",
            "weight_decays": "weight_decay",
            "label_smoothings": "label_smoothing",
            "crops": "crop",
            "mixups": "mixup",
            "dropout_rates": "dropout_rate",
        }
        for values in itertools.product(*(getattr(self, name) for name in names)):
            yield dict(zip(names.values(), values, strict=True))


def family_size(name: str, default: str) -> tuple[str, str]:
    """Splits "family" or "family:size".

    >>> family_size("resnet:mu_local", "mu"), family_size("vit", "mu")
    (('resnet', 'mu_local'), ('vit', 'mu'))
    """
    family, _, size = name.partition(":")
    return family, size or default


def _known(name: str) -> bool:
    family, size = family_size(name, "mu")
    return family in MODELS and size in SIZES[family]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Accuracy on a fixed test set as a function of the number of training images."""

    task: str = "fashion_mnist"
    """fashion_mnist, cifar10, cifar100, digits, npz:PATH, or scenes."""
    scenes: Scenes = dataclasses.field(default_factory=Scenes)
    """How scenes are composed, for --task scenes."""
    allow_fallback: bool = False
    """Use scikit-learn's digits where the images of the task cannot be had."""
    models: tuple[str, ...] = ("vit", "resnet", "hybrid")
    """Families: vit, resnet, hybrid, mlp; "family:size" for another size than SIZE."""
    size: Literal["mu", "ti", "s", "b"] = "mu"
    """Size of every family; within a size FLOPs are near (`attn_jax models`)."""
    patch: int | None = None
    """Side of the ViT's patches in pixels; by default the size's where it divides the
    image, else the largest that leaves at least 4 x 4."""
    attention: str | None = None
    """Attention variant inside the ViT: a name or path/file.py:function."""
    ns: tuple[int, ...] = (100, 1_000, 10_000)
    """Numbers of training images."""
    seeds: int = 3
    """Seeds of each (model, N): each draws its own subset and initial parameters."""
    baselines: tuple[str, ...] = ("majority", "logistic_regression", "rbf_svm")
    """Trivial baselines on the same subsets."""
    protocol: Literal["updates", "epochs"] = "updates"
    """"updates": as many updates for every N. "epochs": EPOCHS at the largest N, and
    in inverse proportion more at smaller N."""
    updates: int = 1_000
    """Optimiser steps of a cell, for the protocol "updates"."""
    epochs: float = 8.0
    """Passes at the largest N, for the protocol "epochs"."""
    max_epochs: float | None = 50.0
    """Most passes over a training set; None = no cap."""
    min_updates: int = 1_000
    """Updates below which max-epochs does not cut."""
    batch_size: int = 64
    """Images a step."""
    tune_updates: int = 500
    """Most updates of a tuning cell."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters stay float32."""
    flip: bool = True
    """Random left-right flips, for every cell."""
    warmup: float = 0.1
    """Share of the updates that warm up."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    vit: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the ViT."""
    resnet: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the ResNet."""
    hybrid: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the hybrid."""
    mlp: Grid = dataclasses.field(default_factory=Grid)
    """Grid of the MLP."""

    def __post_init__(self) -> None:
        known_baselines = ("majority", "logistic_regression", "rbf_svm")
        for name, ok, expected in (
            (
                "models",
                bool(self.models) and all(map(_known, self.models)),
                f"at least one of {', '.join(MODELS)}, or family:size",
            ),
            ("size", self.size in SIZES["vit"], f"one of {', '.join(SIZES['vit'])}"),
            (
                "baselines",
                set(self.baselines) <= set(known_baselines),
                f"some of {', '.join(known_baselines)}",
            ),
            ("ns", bool(self.ns) and min(self.ns, default=0) >= 1, "numbers >= 1"),
            ("ns", len(set(self.ns)) == len(self.ns), "numbers without repetition"),
            ("models", len(set(self.models)) == len(self.models), "names once each"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("updates", self.updates >= 1, "at least 1"),
            ("epochs", self.epochs > 0, "above 0"),
            (
                "max_epochs",
                self.max_epochs is None or self.max_epochs > 0,
                "above 0, or none",
            ),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("tune_updates", self.tune_updates >= 1, "at least 1"),
            ("patch", self.patch is None or self.patch >= 1, "at least 1, or none"),
            ("min_updates", self.min_updates >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )
        if self.task == "scenes" and self.flip:
            raise ValueError(
                "flip must be off for scenes, got True: a mirrored scene has another "
                "label. Use --no-flip."
            )
        families = {family_size(name, self.size)[0] for name in self.models}
        if self.attention is not None and "vit" not in families:
            raise ValueError(
                f"attention={self.attention!r} goes into the ViT, but models="
                f"{self.models!r} has no 'vit'."
            )


SMOKE = Experiment(
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
)

QUICK = Experiment(
    allow_fallback=True,
    ns=(100, 500, 2_500, 12_500),
    updates=250,
    tune_updates=75,
    max_epochs=None,
    vit=Grid(learning_rates=(1e-3, 3e-3)),
    resnet=Grid(learning_rates=(5e-3, 1.5e-2)),
    hybrid=Grid(learning_rates=(1e-3, 3e-3)),
)

CPU = Experiment(
    ns=(100, 1_000, 3_000, 10_000, 60_000),
    updates=7_500,
    max_epochs=48,
    min_updates=3_000,
    tune_updates=750,
    vit=Grid(
        learning_rates=(1.5e-3, 3e-3), weight_decays=(0.1,), label_smoothings=(0.0, 0.1)
    ),
    resnet=Grid(learning_rates=(5e-3, 1.5e-2), label_smoothings=(0.0, 0.1)),
    hybrid=Grid(learning_rates=(1e-3, 3e-3), label_smoothings=(0.0, 0.1)),
)

SCENES = Experiment(
    task="scenes",
    scenes=Scenes(rule="pointer", grid=3, item=10, cells=4),
    patch=10,
    ns=(4_000, 16_000, 64_000),
    updates=3_000,
    max_epochs=None,
    models=("vit", "resnet", "resnet:mu_local"),
    baselines=("majority",),
    flip=False,
    vit=Grid(learning_rates=(1e-3,)),
    resnet=Grid(learning_rates=(1e-2,)),
)

ACCELERATOR = Experiment(
    task="cifar10",
    size="s",
    ns=(500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000),
    updates=40_000,
    max_epochs=None,
    batch_size=512,
    dtype="bfloat16",
    vit=Grid(
        learning_rates=(3e-4, 1e-3),
        weight_decays=(0.05, 0.3),
        label_smoothings=(0.1,),
        crops=(4,),
        mixups=(0.0, 0.2),
    ),
    resnet=Grid(
        learning_rates=(1e-3, 3e-3),
        weight_decays=(0.05, 0.3),
        label_smoothings=(0.1,),
        crops=(4,),
        mixups=(0.0, 0.2),
    ),
    hybrid=Grid(
        learning_rates=(3e-4, 1e-3),
        weight_decays=(0.05, 0.3),
        label_smoothings=(0.1,),
        crops=(4,),
        mixups=(0.0, 0.2),
    ),
)


def idle_settings(experiment: Experiment, preset: Experiment) -> list[str]:
    """Settings that differ from the preset's but that nothing would read.

    >>> idle_settings(dataclasses.replace(QUICK, epochs=3.0), QUICK)
    ['epochs: the protocol is "updates"']
    """
    families = {family_size(name, experiment.size)[0] for name in experiment.models}
    unused = {
        "epochs": experiment.protocol == "updates" and 'the protocol is "updates"',
        "updates": experiment.protocol == "epochs" and 'the protocol is "epochs"',
        "scenes": experiment.task != "scenes" and 'the task is not "scenes"',
        "patch": "vit" not in families and "no model is a ViT",
    }
    for family in MODELS:
        unused[family] = family not in families and f"no model is of family {family}"
    return [
        f"{name}: {why}"
        for name, why in unused.items()
        if why and getattr(experiment, name) != getattr(preset, name)
    ]


PRESETS: Mapping[str, Experiment] = {
    "smoke": SMOKE,
    "quick": QUICK,
    "cpu": CPU,
    "scenes": SCENES,
    "accelerator": ACCELERATOR,
}
