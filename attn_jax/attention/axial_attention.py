"""Axial attention: each token of a grid sees its own row and its own column.

A sequence is read as a grid in row-major order. Scores are made within rows and within
columns, two batched products of small matrices, and never between all pairs. Two layers
reach every token from every other.

Letters besides those of `attn_jax.attention`: w width of the grid.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles
from attn_jax.attention._scores import normalize_softmax, score_dtype

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
      is_causal: whether query t attends only to keys s ≤ t, in raster order.
      width: w, the number of columns; that of the image, where there is one.
      axis: "both", "row" or "column".

    Raises:
      ValueError: on wrong shapes, T ≠ S, a width below 1 or an unknown `axis`.

    Reference: Ho et al., 2019, arXiv:1912.12180, section 3.1 (one axis); Huang et
    al., 2018, arXiv:1811.11721, section 3.2 (both).

    >>> value = jnp.arange(4.0).reshape(4, 1)
    >>> axial(jnp.ones((4, 2)), jnp.ones((4, 2)), value, width=2).tolist()
    [[1.0], [1.3333333730697632], [1.6666667461395264], [2.0]]
    """
    one = "axial", "both are cells of one grid"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    width = _checks.check_int("width", width, 1)
    _checks.check_choice("axis", axis, get_args(Axis))
    length, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    wide = score_dtype(query.dtype)
    width = max(1, min(width, length))
    height = -(-length // width)

    real = jnp.ones(length, bool) if key_mask is None else key_mask
    key, value = (_checks.zero_masked(x, key_mask) for x in (key, value))
    # [height, w, ...] of [T, ...], with zeros in the cells beyond the end.
    real, query, key, value = (_tiles.cut(x, width) for x in (real, query, key, value))

    # r, s are rows of query and key; c, d are their columns.
    logits, allowed = [], []
    if axis != "column":
        before = np.tri(width, dtype=bool) if is_causal else np.ones((1, 1), bool)
        allowed.append(real[:, None, :] & before[None])
        logits.append(_scores.einsum("rch,rdh->rcd", query, key))
    if axis != "row":
        before = np.tri(height, dtype=bool) if is_causal else np.ones((1, 1), bool)
        if axis == "both":
            before = before & ~np.eye(height, dtype=bool)
        allowed.append(real.T[None, :, :] & before[:, None, :])
        logits.append(_scores.einsum("rch,sch->rcs", query, key))
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
        own_row = weights[:, :, :width].astype(value.dtype)
        out += _scores.einsum("rcd,rdv->rcv", own_row, value)
    if axis != "row":
        own_column = weights[:, :, -height:].astype(value.dtype)
        out += _scores.einsum("rcs,scv->rcv", own_column, value)
    out = out.reshape(height * width, value.shape[2])
    return out[:length].astype(value.dtype)
