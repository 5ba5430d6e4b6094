"""Pooling attention: a window, and a wider one over what the window saw, pooled.

Letters besides those of `attn_jax.attention`: w window, p positions of a pool, r reach
of the second window.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles
from attn_jax.attention._scores import score_dtype

__all__ = ["poolingformer", "poolingformer_init"]

_LAYOUT = {"query": "VH", "key": "VH", "value": "VV"}

# Queries of a block of the second window at least.
_LEAST_BLOCK = 16


def poolingformer_init(
    rng: jax.Array,
    head_dim: int,
    *,
    value_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Projections of the second level, for one head.

    Returns:
      {"query": [V, H], "key": [V, H], "value": [V, V]}, normal with variance 1/V.

    >>> poolingformer_init(jax.random.key(0), 4, value_dim=2)["key"].shape
    (2, 4)
    """
    head_dim, value_dim = _checks.check_sizes(
        head_dim=head_dim, value_dim=head_dim if value_dim is None else value_dim
    )
    widths = {"query": head_dim, "key": head_dim, "value": value_dim}
    streams = jax.random.split(rng, len(widths))
    std = jnp.asarray(value_dim**-0.5, dtype)
    return {
        name: std * jax.random.normal(stream, (value_dim, width), dtype)
        for (name, width), stream in zip(widths.items(), streams, strict=True)
    }


def poolingformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int = 64,
    pool: int = 4,
    reach: int = 256,
) -> jax.Array:
    """Poolingformer: a window, then a wider one of its outputs, pooled and projected.

    y_t = softmax(scale · q_tᵀ K_t) V_t, over the keys |s − t| ≤ w
    ȳ_j = mean of y_s over the real s of jp … jp + p − 1
    o_t = y_t + softmax(scale · (y_t A)ᵀ (Ȳ_t B)) Ȳ_t C, over the pools that have a
    position in t − r … t + r

    A, B and C are the projections of the second level, as a second layer has them. The
    first window is `truncated`; with p = 1 and r ≥ T the second part is `dot_product`
    of the projected outputs. It costs O(T·(w + r/p)·H).

    The paper also pools by maximum and by a convolution with weights made of the
    content; the mean is what it calls mean pooling. Its pools may overlap, these do
    not. Causal, which it is not in the paper, a query sees the pools that end at it or
    before.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"query": [V, H], "key": [V, H], "value": [V, V]}: A, B and C, from
        `poolingformer_init`.
      key_mask: bool [T], True = a real token, or None. Padding is in no window and in
        no pool.
      scale: of both levels.
      window: w, on either side.
      pool: p.
      reach: r, on either side.

    Reference: Zhang et al., 2021, arXiv:2105.04371, section 3.

    >>> x, value = jnp.zeros((4, 1)), jnp.array([[0.0], [2.0], [4.0], [6.0]])
    >>> params = dict.fromkeys(("query", "key", "value"), jnp.ones((1, 1)))
    >>> params["query"] = jnp.zeros((1, 1))  # so that all pools count the same
    >>> sizes = dict(window=0, pool=2, reach=9)
    >>> poolingformer(x, x, value, params=params, **sizes).tolist()
    [[3.0], [5.0], [7.0], [9.0]]
    """
    one = "poolingformer", "its windows are around each query's own position"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    (length, head_dim), value_dim = query.shape, value.shape[1]
    _checks.check_params("poolingformer", params, _LAYOUT, H=head_dim, V=value_dim)
    window = _checks.check_int("window", window, 0)
    pool = _checks.check_int("pool", pool, 1)
    reach = _checks.check_int("reach", reach, 0)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    dtype, wide = query.dtype, score_dtype(query.dtype)
    real = jnp.ones(length, bool) if key_mask is None else key_mask

    rows, columns = _tiles.window_tiles(length, window, 0 if is_causal else window)
    near = _tiles.attend(
        query,
        key,
        value,
        rows,
        columns,
        lambda t, s: abs(t - s) <= window,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
    ).out

    counts = _tiles.cut(real, pool).sum(axis=1).astype(wide)
    sums = _tiles.cut(_checks.zero_masked(near, real), pool).sum(axis=1)
    means = _checks.safe_divide(sums, jnp.broadcast_to(counts[:, None], sums.shape))

    def project(x: jax.Array, name: str) -> jax.Array:
        made: jax.Array = _scores.matmul(x.astype(dtype), params[name].astype(dtype))
        return made.astype(dtype)

    # Blocks of queries, and the pools that the first and the last of them reach.
    near_pools = -(-min(reach, length) // pool)
    block = max(2 * min(reach, length), _LEAST_BLOCK)
    block = min(-(-block // pool), -(-length // pool)) * pool
    rows = _tiles.blocks_of(length, block)
    ahead = 0 if is_causal else near_pools
    columns = rows[:, :1] // pool + np.arange(
        -near_pools, block // pool + ahead, dtype=np.int32
    )

    def reaches(t: jax.Array, j: jax.Array) -> jax.Array:
        first, last = j * pool, (j + 1) * pool - 1
        seen = last >= t - reach
        return seen & (last <= t if is_causal else first <= t + reach)

    far = _tiles.attend(
        project(near, "query"),
        project(means, "key"),
        project(means, "value"),
        rows,
        columns,
        reaches,
        key_mask=counts > 0,
        scale=scale,
    )
    return (near + far.out).astype(dtype)
