"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from attn_jax.nn.positional import POSITIONS

TASKS = ("pos", "order", "toy_pos")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Encoders that differ in their position encoding alone, scored by length."""

    tasks: tuple[str, ...] = ("pos", "order")
    """pos: tags of the Brown corpus; order: each label is the symbol two places before,
    which only the order tells (synthetic); toy_pos: a synthetic stand-in."""
    encodings: tuple[str, ...] = POSITIONS
    """Position encodings, see `attn_jax.nn.positional`."""
    clip: int = 16
    """Shaw: the farthest offset with a vector of its own."""
    train_length: int = 20
    """Longest sentence of the training part; longer ones are only scored. (In "order",
    training sequences have up to 32 symbols.)"""
    edges: tuple[int, ...] = (0, 20, 30, 40, 64)
    """Ends of the bins of sentence length that are scored by themselves."""
    seeds: int = 3
    """Seeds of each encoding: initial parameters and order of the batches."""
    updates: int = 300
    """Optimiser steps on sentences."""
    order_updates: int = 200
    """Optimiser steps on "order"."""
    tune_updates: int = 120
    """Optimiser steps of a tuning cell."""
    learning_rates: tuple[float, ...] = (3e-3,)
    """Peaks of the schedule; of several, the validation part chooses one for all
    encodings, with the first of them."""
    tokens: int = 2_048
    """Labels a batch, with padding."""
    dim: int = 64
    """Width."""
    depth: int = 2
    """Layers."""
    num_heads: int = 4
    """Heads."""
    id_dropout: float = 0.1
    """How often training hides which word it is, on sentences."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            (
                "tasks",
                bool(self.tasks) and set(self.tasks) <= set(TASKS),
                f"some of {', '.join(TASKS)}",
            ),
            (
                "encodings",
                bool(self.encodings) and set(self.encodings) <= set(POSITIONS),
                f"some of {', '.join(POSITIONS)}",
            ),
            ("clip", self.clip >= 0, "0 or more"),
            ("train_length", self.train_length >= 1, "at least 1"),
            (
                "edges",
                len(self.edges) >= 2 and list(self.edges) == sorted(set(self.edges)),
                "two ascending numbers or more",
            ),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("num_heads", self.num_heads >= 1, "at least 1"),
            ("updates", self.updates >= 1, "at least 1"),
            ("order_updates", self.order_updates >= 1, "at least 1"),
            ("tune_updates", self.tune_updates >= 1, "at least 1"),
            ("learning_rates", bool(self.learning_rates), "at least one number"),
            (
                "dim",
                self.dim % max(1, self.num_heads) == 0,
                f"a multiple of num_heads={self.num_heads}",
            ),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )


SMOKE = Experiment(
    tasks=("toy_pos",),
    encodings=("none", "floater", "rope", "learned"),
    edges=(0, 8, 64),
    train_length=8,
    seeds=1,
    updates=3,
    learning_rates=(3e-3,),
    tokens=256,
    dim=16,
    depth=1,
    num_heads=2,
)

QUICK = Experiment(
    tasks=("order",),
    encodings=("none", "sinusoidal", "learned", "rope", "shaw", "t5"),
    order_updates=150,
    learning_rates=(3e-3,),
    dim=48,
)

CPU = Experiment()

PRESETS: Mapping[str, Experiment] = {"smoke": SMOKE, "quick": QUICK, "cpu": CPU}
