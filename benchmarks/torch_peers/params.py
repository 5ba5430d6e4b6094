"""Parameters of ours as those of the peers: copied by name, in PyTorch's layout.

A peer's parts have the names of ours. What differs: kernels are transposed weights,
query, key and value of a Flax layer are one matrix, and recurrent layers are PyTorch's
own, whose second bias is held at zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

Flat = Mapping[str, np.ndarray]

_THIRDS = ("query", "key", "value")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_GRU = re.compile(r"(.+)\.(forward|backward)_rnn\.cell\.dense_([ih])\.(kernel|bias)")
_SHARED = ".blocks.0.attention.attention_fn.positions."  # where Flax finds them first
_LSTM = re.compile(r"(.+)\.(into|recur)\.(kernel|bias)")


def flat_params(params: Any) -> dict[str, np.ndarray]:
    """The arrays of an nnx module or of its parameters' dictionary, by dotted path."""
    if isinstance(params, nnx.Module):
        params = nnx.to_pure_dict(nnx.state(params, nnx.Param))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        ".".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in leaves
    }


def place(path: str, value: np.ndarray) -> tuple[str, int | None]:
    """Where a parameter of ours lies in the peer: (name, third of the fused qkv)."""
    path = path.replace(_SHARED, ".positions.")
    if found := _GRU.fullmatch(path):
        layer, way, which, leaf = found.groups()
        reverse = "_reverse" if way == "backward" else ""
        return f"{layer}.{_LEAVES.get(leaf, leaf)}_{which}h_l0{reverse}", None
    if found := _LSTM.fullmatch(path):
        layer, which, leaf = found.groups()
        kind = "ih" if which == "into" else "hh"
        return f"{layer}.recurrence.{_LEAVES.get(leaf, leaf)}_{kind}_l0", None
    *parents, leaf = path.split(".")
    third = None
    fused = value.ndim == (3 if leaf == "kernel" else 2)
    if parents and parents[-1] in _THIRDS and fused:
        third = _THIRDS.index(parents[-1])
        parents[-1] = "qkv"
    return ".".join([*parents, _LEAVES.get(leaf, leaf)]), third


def to_torch(path: str, value: np.ndarray) -> np.ndarray:
    """A parameter of ours in PyTorch's layout."""
    parent, leaf = ("", *path.split("."))[-2:]
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if leaf == "kernel":
        inputs = value.ndim - 1 if parent == "out" else 1
        return value.reshape(int(np.prod(value.shape[:inputs])), -1).T
    return value.reshape(-1) if leaf == "bias" else value


def fill(peer: nn.Module, flat: Flat) -> nn.Module:
    """Copies parameters of ours into a peer, all of them into all of its own.

    Raises:
      ValueError: if one of either side is left over, but for biases held at zero.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for path in sorted(flat, key=lambda path: (place(path, flat[path])[1] or 0, path)):
        name, _ = place(path, flat[path])
        parts.setdefault(name, []).append(to_torch(path, flat[path]))
    state = {
        name: torch.tensor(np.concatenate(values) if len(values) > 1 else values[0])
        for name, values in parts.items()
    }
    own = {name for name, p in peer.named_parameters() if p.requires_grad}
    if own != set(state):
        raise ValueError(
            f"flat must have the parameters of the peer, got {sorted(set(state) - own)}"
            f" besides and not {sorted(own - set(state))}."
        )
    peer.load_state_dict(state, strict=False)
    return peer


def without_second_bias(layer: nn.RNNBase) -> nn.RNNBase:
    """A recurrent layer of PyTorch with one bias, as Flax's have it."""
    for name, parameter in layer.named_parameters():
        if name.startswith("bias_hh"):
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
    return layer
