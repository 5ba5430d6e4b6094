"""What the experiment runs: its settings, and the named presets."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from experiments.data.sequence_tasks import TASKS

BODIES = ("window", "cnn", "gru", "lstm", "transformer")


def traits_of(name: str) -> dict[str, Any]:
    """What the name of a model says of its cells.

    Raises:
      ValueError: there is no such model.

    >>> traits_of("window:5"), traits_of("gru")
    ({'model': 'window', 'window': 5}, {'model': 'gru'})
    >>> traits_of("transformer:32+4")["left"]
    32
    """
    body, _, size = name.partition(":")
    if body in BODIES and not size and body != "window":
        return {"model": body}
    if body == "window" and re.fullmatch(r"\d+", size):
        return {"model": body, "window": int(size)}
    if body == "transformer" and (sides := re.fullmatch(r"(\d+)\+(\d+)", size)):
        left, right = map(int, sides.groups())
        truncated = {"attention": "truncated", "left": left, "right": right}
        return {"model": body} | truncated
    raise ValueError(
        "models must be window:W, cnn, gru, lstm, transformer or transformer:L+R, got "
        f"{name!r}."
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Accuracy of labels by models that see one vector, a window, or everything."""

    task: str = "pos"
    """pos, pos_fine (Brown), phones (recorded Russian), or toy_pos, toy_phones."""
    models: tuple[str, ...] = (
        "window:0",
        "window:5",
        "cnn",
        "gru",
        "lstm",
        "transformer",
    )
    """Compared on the whole training part: "window:W" (fully connected over W vectors
    on either side; 0 = each by itself), cnn, gru, lstm, transformer, and
    "transformer:L+R" (self-attention truncated to L vectors before and R after)."""
    windows: tuple[int, ...] = ()
    """Windows whose accuracy, parameters and overfitting are drawn as a curve."""
    heads: tuple[int, ...] = ()
    """Numbers of heads compared."""
    depths: tuple[int, ...] = ()
    """Numbers of layers of the transformer compared."""
    scores: tuple[str, ...] = ()
    """Attention variants compared, such as dot_product and additive."""
    positions: tuple[str, ...] = ()
    """Position encodings compared, such as sinusoidal and none."""
    contexts: tuple[tuple[int, int], ...] = ()
    """(left, right) windows of truncated self-attention, in vectors a layer."""
    ns: tuple[int, ...] = ()
    """Numbers of training sequences that every model is trained on besides, and all of
    them, with SWEEP-UPDATES each."""
    seeds: int = 3
    """Seeds of each: initial parameters, order, and which sequences a smaller N has."""
    updates: int = 2_000
    """Optimiser steps on the whole training part."""
    sweep_n: int | None = None
    """Training sequences of what is compared or drawn besides the models."""
    sweep_updates: int = 500
    """Optimiser steps of those, and of smaller N."""
    tune_updates: int = 250
    """Optimiser steps of a tuning cell."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peaks of the schedule, chosen for each model on the validation part."""
    tokens: int = 2_048
    """Labels a batch, with padding."""
    dim: int = 96
    """Width of every model."""
    depth: int = 2
    """Layers of every model."""
    num_heads: int = 4
    """Heads of the transformer."""
    attention: str = "dot_product"
    """Attention variant of the transformer: a name or path/file.py:function."""
    encoding: str = "rope"
    """Position encoding of the transformer."""
    kernel: int = 5
    """Width of the convolutions."""
    id_dropout: float = 0.1
    """How often training hides which word it is, and leaves endings and shape."""
    dropout_rate: float = 0.0
    """Dropout of every model."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("task", self.task in TASKS, f"one of {', '.join(TASKS)}"),
            ("models", bool(self.models), "at least one"),
            ("models", len(set(self.models)) == len(self.models), "names once each"),
            ("seeds", self.seeds >= 1, "at least 1"),
            ("num_heads", self.num_heads >= 1, "at least 1"),
            ("updates", self.updates >= 1, "at least 1"),
            ("sweep_updates", self.sweep_updates >= 1, "at least 1"),
            ("tune_updates", self.tune_updates >= 1, "at least 1"),
            ("learning_rates", bool(self.learning_rates), "at least one number"),
            ("windows", min(self.windows, default=0) >= 0, "numbers >= 0"),
            ("heads", min(self.heads, default=1) >= 1, "numbers >= 1"),
            ("depths", min(self.depths, default=1) >= 1, "numbers >= 1"),
            (
                "contexts",
                all(min(pair) >= 0 for pair in self.contexts),
                "pairs of numbers >= 0",
            ),
            ("ns", min(self.ns, default=1) >= 1, "numbers >= 1"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )
        for model in self.models:
            traits_of(model)
        for heads in (*self.heads, self.num_heads):
            if self.dim % heads:
                raise ValueError(
                    f"dim must be a multiple of the heads, got dim={self.dim} and "
                    f"{heads} heads."
                )


SMOKE = Experiment(
    task="toy_pos",
    models=("window:1", "cnn", "gru", "transformer"),
    learning_rates=(3e-3,),
    seeds=1,
    updates=4,
    sweep_updates=2,
    tokens=256,
    dim=16,
    depth=1,
    num_heads=2,
)

SMOKE_PHONES = dataclasses.replace(
    SMOKE,
    task="toy_phones",
    models=("window:1", "transformer", "transformer:4+2"),
    contexts=((4, 2),),
    tokens=1024,
)

QUICK = Experiment(
    models=("window:0", "window:2", "gru", "transformer"),
    seeds=3,
    updates=150,
    learning_rates=(3e-3,),
    dim=64,
)

POS = Experiment(
    models=("transformer", "gru", "window:2", "window:0"),
    windows=(0, 1, 2, 4, 16, 63),
    heads=(1, 2, 4, 8),
    scores=("dot_product", "additive"),
    positions=("rope", "sinusoidal", "none"),
    ns=(500, 5_000),
    updates=900,
    sweep_n=5_000,
    sweep_updates=200,
    tune_updates=150,
)

POS_FINE = dataclasses.replace(
    POS,
    task="pos_fine",
    models=("transformer", "gru", "window:2"),
    windows=(),
    heads=(),
    scores=(),
    positions=(),
    ns=(),
    updates=600,
    learning_rates=(3e-3,),
)

PHONES = Experiment(
    task="phones",
    models=("transformer", "window:5", "gru", "cnn", "window:0", "transformer:32+32"),
    contexts=((8, 0), (8, 4), (32, 4), (64, 64)),
    scores=("dot_product",),
    positions=("rope", "none"),
    updates=800,
    sweep_updates=300,
    tune_updates=100,
    depth=3,
    id_dropout=0.0,
)

PRESETS: Mapping[str, Experiment] = {
    "smoke": SMOKE,
    "smoke_phones": SMOKE_PHONES,
    "quick": QUICK,
    "pos": POS,
    "pos_fine": POS_FINE,
    "phones": PHONES,
}
