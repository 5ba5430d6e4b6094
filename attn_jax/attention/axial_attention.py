"""Axial attention: each token of a grid sees its own row and its own column.

A sequence is read as a grid in row-major order. Scores are made within rows and within
columns, two batched products of small matrices, and never between all pairs. Two layers
reach every token from every other.

Letters: T queries and keys, H size of query and key, V size of a value, w width of the
grid.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks
from attn_jax.attention.softmax import normalize_softmax, score_dtype

__all__ = ["axial"]

Axis = Literal["both", "row", "column"]


def axial(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    width: int = 32,
    axis: Axis = "both",
) -> jax.Array:
    """Attention to the own row and column of a grid, in O(T·w·H + T²·H/w).

    o_t = Σ_s w[t, s] v_s over the s with ⌊s/w⌋ = ⌊t/w⌋ or s mod w = t mod w, and
    w[t, s] = exp(l[t, s]) / Σ_s' exp(l[t, s']) with l = scale · Q Kᵀ

    One softmax runs over both, and a token's own cell counts once: the criss-cross
    form. With `axis` "row" or "column" it runs over one of them, as in the layers of
    the Axial Transformer. Equal to `dot_product` under the mask of those pairs, and
    alone for w ≥ T, where there is one row. A width near √T costs least, O(T·√T·H).

    Args:
      query: [T, H], the grid in row-major order; the last row may be short.
      key: [T, H].
      value: [T, V].
      key_mask: bool [T], True = a real token, or None.
      scale: factor of the scores; None means 1/√H.
      is_causal: whether query t attends only to keys s ≤ t, in raster order.
      width: w, the number of columns; that of the image, where there is one.
      axis: "both", "row" or "column".

    Returns:
      [T, V], in the dtype of the inputs; zeros for a query that may attend to nothing.

    Raises:
      ValueError: on wrong shapes, T ≠ S, a width below 1 or an unknown `axis`.
      TypeError: on wrong dtypes or a width that is no int.

    Reference: Ho et al., 2019, arXiv:1912.12180, section 3.1 (one axis); Huang et
    al., 2018, arXiv:1811.11721, section 3.2 (both).

    >>> value = jnp.arange(4.0).reshape(4, 1)
    >>> axial(jnp.ones((4, 2)), jnp.ones((4, 2)), value, width=2).tolist()
    [[1.0], [1.3333333730697632], [1.6666667461395264], [2.0]]
    """
    _checks.check_inputs(query, key, value, None, None, key_mask)
    width = _checks.check_int("width", width, 1)
    if axis not in get_args(Axis):
        raise ValueError(f"`axis` must be 'both', 'row' or 'column', but is {axis!r}.")
    length, dim = query.shape
    _checks.check_same_length(
        "axial", length, key.shape[0], "both are cells of one grid"
    )
    scale = dim**-0.5 if scale is None else scale
    wide = score_dtype(query.dtype)
    width = max(1, min(width, length))
    height = -(-length // width)

    def grid(x: jax.Array) -> jax.Array:
        """[height, w, ...] of [T, ...], with zeros in the cells beyond the end."""
        beyond = height * width - length
        x = jnp.pad(x, ((0, beyond), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(height, width, *x.shape[1:])

    real = jnp.ones(length, bool) if key_mask is None else key_mask
    real = grid(real)
    query = grid(query)
    key = grid(_checks.zero_masked(key, key_mask))
    value = grid(_checks.zero_masked(value, key_mask))

    # r, s are rows of query and key; c, d are their columns.
    logits, allowed = [], []
    if axis != "column":
        before = np.tri(width, dtype=bool) if is_causal else np.ones((1, 1), bool)
        allowed.append(real[:, None, :] & before[None])
        logits.append(
            jnp.einsum("rch,rdh->rcd", query, key, preferred_element_type=wide)
        )
    if axis != "row":
        before = np.tri(height, dtype=bool) if is_causal else np.ones((1, 1), bool)
        if axis == "both":
            before = before & ~np.eye(height, dtype=bool)
        allowed.append(real.T[None, :, :] & before[:, None, :])
        logits.append(
            jnp.einsum("rch,sch->rcs", query, key, preferred_element_type=wide)
        )
    weights = normalize_softmax(
        jnp.concatenate(logits, axis=2) * scale,
        jnp.concatenate(
            [
                jnp.broadcast_to(pairs, part.shape)
                for pairs, part in zip(allowed, logits, strict=True)
            ],
            axis=2,
        ),
    )
    out = jnp.zeros((height, width, value.shape[2]), wide)
    if axis != "column":
        out += jnp.einsum(
            "rcd,rdv->rcv",
            weights[:, :, :width].astype(value.dtype),
            value,
            preferred_element_type=wide,
        )
    if axis != "row":
        out += jnp.einsum(
            "rcs,scv->rcv",
            weights[:, :, -height:].astype(value.dtype),
            value,
            preferred_element_type=wide,
        )
    out = out.reshape(height * width, value.shape[2])
    return out[:length].astype(value.dtype)
