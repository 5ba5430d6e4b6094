"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

MODELS = ("quadratic", "gaussian", "relative", "relative_content", "resnet")
PARTS = ("encodings", "starts")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Fully-attentional image models: where heads look, and how they start."""

    task: str = "fashion_mnist"
    """fashion_mnist, cifar10, cifar100, digits, or npz:PATH."""
    allow_fallback: bool = False
    """Use scikit-learn's digits where the images of the task cannot be had."""
    parts: tuple[str, ...] = PARTS
    """encodings: all models at the largest N. starts: quadratic encoding from random
    places and as a convolution, and the ResNet, at every N."""
    models: tuple[str, ...] = MODELS
    """Models of the part "encodings"."""
    ns: tuple[int, ...] = (300, 3_000, 60_000)
    """Numbers of training images."""
    seeds: int = 3
    """Seeds: each draws its own subset, initial parameters and order of the images."""
    updates: int = 1_000
    """Optimiser steps of every cell."""
    content_updates: int = 400
    """The same for "relative_content", an update of which takes about eight times as
    long as one without content."""
    tune_updates: int = 200
    """Optimiser steps of a tuning cell."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    """Peaks of the schedule for attention; the validation part chooses for each
    encoding and start, at the largest N."""
    resnet_rates: tuple[float, ...] = (5e-3, 1.5e-2)
    """The same for the ResNet."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices."""
    batch_size: int = 16
    """Images a step."""
    crop: int = 0
    """Pixels of random-crop padding; 0 = off."""
    patch: int = 2
    """Side in pixels of the squares that become tokens."""
    dim: int = 24
    """Width."""
    depth: int = 3
    """Layers."""
    mlp_dim: int = 48
    """Width of the feed-forward network."""
    num_heads: int = 9
    """Heads, a square number."""
    key_dim: int = 16
    """Size of queries and keys, with content."""
    alpha: float = 12.0
    """Sharpness of heads that start as a convolution."""
    resnet_widths: tuple[int, ...] = (10, 20, 32)
    """Channels of the ResNet's stages, one block each, to match in parameters."""
    resnet_stem_stride: int = 2
    """Stride of the ResNet's first convolution."""
    baselines: tuple[str, ...] = ("majority", "logistic_regression")
    """Trivial baselines on the same subsets."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation; parameters stay float32."""

    def __post_init__(self) -> None:
        known = ("majority", "logistic_regression", "rbf_svm")
        for name, ok, expected in (
            (
                "parts",
                bool(self.parts) and set(self.parts) <= set(PARTS),
                f"some of {', '.join(PARTS)}",
            ),
            (
                "models",
                bool(self.models) and set(self.models) <= set(MODELS),
                f"some of {', '.join(MODELS)}",
            ),
            ("ns", bool(self.ns) and min(self.ns, default=0) >= 1, "numbers >= 1"),
            ("ns", len(set(self.ns)) == len(self.ns), "numbers without repetition"),
            (
                "baselines",
                set(self.baselines) <= set(known),
                f"some of {', '.join(known)}",
            ),
            ("learning_rates", bool(self.learning_rates), "at least one number"),
            ("resnet_rates", bool(self.resnet_rates), "at least one number"),
            ("resnet_widths", bool(self.resnet_widths), "at least one number"),
            (
                "num_heads",
                self.num_heads >= 1
                and (
                    "starts" not in self.parts
                    or math.isqrt(self.num_heads) ** 2 == self.num_heads
                ),
                "a square number, one head for each place of a kernel",
            ),
            ("patch", self.patch >= 1, "at least 1"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("updates", self.updates >= 1, "at least 1"),
            ("content_updates", self.content_updates >= 1, "at least 1"),
            ("tune_updates", self.tune_updates >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )


QUICK = Experiment(
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
)

CPU = Experiment()

ACCELERATOR = Experiment(
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
)

PRESETS: Mapping[str, Experiment] = {
    "quick": QUICK,
    "cpu": CPU,
    "accelerator": ACCELERATOR,
}
