"""What models are called in tables and figures, and how they are drawn."""

from __future__ import annotations

import pathlib

from experiments.core.plots import Styles
from experiments.core.report import Group, Row

NAMES = {
    "softmax": "softmax attention",
    "linear": "linear attention",
    "reformer": "Reformer",
    "lstm": "LSTM",
    "softmax, uncached": "softmax attention, uncached",
    "softmax, copied": "softmax attention, cache copied for every token",
    "linear, token by token": "linear attention, token by token",
}
SCALING_NAMES = {
    "dot_product": "softmax attention",
    "blockwise": "softmax attention, blockwise",
    "linear": "linear attention",
    "reformer": "Reformer",
}
# How the lead of linear attention was measured.
LEAD = ("whole images drawn", "from the time of a token")


def model(row: Row) -> str:
    """What a row's model is called; one's own by its file and what was in it."""
    name, digest = row.config["model"], row.config.get("attention_sha256")
    name = NAMES.get(name, pathlib.PurePath(name).name)
    return f"{name} {digest[:6]}" if digest else name


def with_heads(row: Row) -> str:
    """The same, and how large its heads are."""
    size = row.config["dim"] // row.config.get("num_heads", 1)
    return model(row) + ("" if row.config["model"] == "lstm" else f", heads of {size}")


def styles(group: Group) -> Styles:
    """Of all figures; attention with a cache is softmax attention."""
    every = [show(row) for show in (model, with_heads) for row in group.every]
    return Styles([*NAMES.values(), *SCALING_NAMES.values(), *LEAD, *every])
