"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

MODELS: Mapping[str, str] = {
    "softmax": "blockwise",
    "linear": "linear",
    "reformer": "reformer",
    "lstm": "lstm",
}
"""Models by name, and what mixes tokens in them; see `attn_jax.models.MIXERS`."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Decoders that differ in what mixes tokens over time.

    Two tasks. "copy": a random word of 10 symbols comes twice, "0 w 0 w", and the
    second time counts. "images": the pixels of Fashion-MNIST one after the other.

    The preset cpu takes about 45 minutes on one core: `python -m
    experiments.attention_vs_rnn --preset cpu`.
    """

    task: Literal["both", "copy", "images"] = "both"
    """What is run."""
    seeds: int = 3
    """Seeds of each model: initial parameters and order of the batches."""
    dim: int = 64
    """Width; an LSTM has 5/4 as many hidden units."""
    num_heads: int = 4
    """Heads."""
    copy_models: tuple[str, ...] = ("softmax", "linear", "reformer", "lstm")
    """Models of "copy"."""
    copy_length: int = 128
    """Symbols of a sequence of "copy", with padding."""
    copy_depth: int = 2
    """Layers."""
    copy_batch: int = 16
    """Sequences an update."""
    copy_updates: int = 1_400
    """Optimiser steps."""
    copy_rate: float = 5e-3
    """Peak of the learning rate's schedule."""
    copy_test: int = 512
    """Sequences that are scored."""
    chunk_size: int = 32
    """Reformer: tokens of a chunk."""
    num_rounds: int = 1
    """Reformer: rounds of hashing."""
    image_models: tuple[str, ...] = ("softmax", "linear", "lstm")
    """Models of "images"."""
    image_depth: int = 2
    """Layers."""
    image_batch: int = 16
    """Images an update."""
    image_updates: int = 300
    """Optimiser steps."""
    image_rate: float = 4e-3
    """Peak of the learning rate's schedule."""
    components: int = 10
    """Logistics in the mixture of a pixel."""
    image_test: int = 1000
    """Test images that are scored, the first ones; None of them is trained on."""
    samples: int = 16
    """Images that the first seed draws."""
    completions: int = 8
    """Test images whose lower half the first seed draws."""

    def __post_init__(self) -> None:
        sizes = (
            "seeds dim num_heads copy_length copy_depth copy_batch copy_updates "
            "copy_test chunk_size num_rounds image_depth image_batch image_updates "
            "components image_test samples completions"
        )
        checks = [
            (name, getattr(self, name) >= 1, "at least 1") for name in sizes.split()
        ]
        known = f"some of {', '.join(MODELS)}"
        for name in ("copy_models", "image_models"):
            given = getattr(self, name)
            checks.append((name, bool(given) and set(given) <= set(MODELS), known))
        checks += [
            ("dim", self.dim % self.num_heads == 0, "a multiple of num_heads"),
            ("dim", self.dim % 4 == 0, "a multiple of 4"),
            ("copy_length", self.copy_length >= 8, "at least 8"),
        ]
        for name, ok, expected in checks:
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )


QUICK = Experiment(
    seeds=1,
    dim=16,
    num_heads=2,
    copy_models=("softmax", "lstm"),
    copy_length=32,
    copy_depth=1,
    copy_batch=8,
    copy_updates=40,
    copy_test=64,
    chunk_size=16,
    image_models=("linear",),
    image_depth=1,
    image_batch=4,
    image_updates=6,
    components=5,
    image_test=16,
    samples=1,
    completions=1,
)

CPU = Experiment()

ACCELERATOR = Experiment(
    dim=256,
    num_heads=8,
    copy_depth=4,
    copy_batch=64,
    copy_updates=6_000,
    copy_rate=1e-3,
    num_rounds=4,
    image_depth=8,
    image_batch=32,
    image_updates=40_000,
    image_rate=4e-4,
    image_test=10_000,
)

PRESETS: Mapping[str, Experiment] = {
    "quick": QUICK,
    "cpu": CPU,
    "accelerator": ACCELERATOR,
}
