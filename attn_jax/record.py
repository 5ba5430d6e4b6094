"""The record of an attention variant, and the names of what it may claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["ARGUMENTS", "CAPABILITIES", "Variant"]

CAPABILITIES: tuple[str, ...] = (
    "bias",
    "mask",
    "key_mask",
    "causal",
    "cross",
    "value_dim",
    "dropout",
)
"""What a variant may or may not be able to do, as named in `Variant`."""

ARGUMENTS: dict[str, str] = {
    "bias": "bias",
    "mask": "mask",
    "key_mask": "key_mask",
    "causal": "is_causal",
    "dropout": "dropout_rate",
}
"""The argument of a function that shows a capability, where one does."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the machinery needs to know about one attention function.

    Attributes:
      name: key in `VARIANTS`, or how a user's function was named.
      fn: `fn(query[T, H], key[S, H], value[S, V], bias, mask, *, ...) -> [T, V]`.
      init: `init(rng, head_dim, ...) -> params` for one head, or None if `fn` has no
        parameters.
      bias: whether it takes an additive bias [T, S].
      mask: whether it takes an arbitrary bool mask [T, S].
      key_mask: whether it takes a bool mask of the keys [S].
      causal: whether it takes `is_causal`.
      cross: whether T may differ from S.
      value_dim: whether V may differ from H.
      dropout: whether it takes `dropout_rate` (with `rng`).
      exact: whether it computes softmax(scale · Q Kᵀ + bias) V exactly.
      time: cost in time, as O(...).
      memory: additional memory, as O(...).
      paper: arXiv number or other reference.
      summary: one line on what it does.
      stochastic: whether it needs `rng` even without dropout.
      arrays: the same function on whole arrays [B, T, N, H], with the same options, or
        None; `multi_head` takes it on CPU, where its own loop over heads and blocks is
        faster than one around `fn`, for calls without `params`, `rng` and dropout.
      shared_axes: whether axes of size 1 in bias and mask may reach `fn` as they are;
        else `multi_head` broadcasts them to [T, S].
      equivariant: whether it knows nothing of order: permuting keys with their values
        changes nothing, and permuting queries permutes the output.
      approximates: the exact function that it comes near to, called with those of
        query, key, value, masks, bias, `is_causal`, `params` and `rng` that it takes
        by name; None if it is no approximation.
      knob: options of `fn` or `init`, from coarse to fine, along which the distance to
        `approximates` must fall.
      trial: options of `fn` or `init` that make short sequences show all that it does,
        such as a small block; `attn_jax.testing` tries it with them, and measures its
        cost without.

    An `init` may take `max_length` (the longest sequence) and `value_dim` (V): whoever
    makes parameters for known shapes supplies them.
    """

    name: str
    fn: Callable[..., jax.Array]
    init: Callable[..., Any] | None = None
    bias: bool = False
    mask: bool = False
    key_mask: bool = False
    causal: bool = False
    cross: bool = False
    value_dim: bool = False
    dropout: bool = False
    exact: bool = False
    time: str = "unknown"
    memory: str = "unknown"
    paper: str = ""
    summary: str = ""
    stochastic: bool = False
    shared_axes: bool = False
    arrays: Callable[..., jax.Array] | None = None
    equivariant: bool = False
    approximates: Callable[..., jax.Array] | None = None
    knob: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)
    trial: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def capabilities(self) -> dict[str, bool]:
        """What the variant can do, by the names in `CAPABILITIES`."""
        return {name: getattr(self, name) for name in CAPABILITIES}
