"""Long-short attention: a window for what is near, a few summaries for what is far.

Each query attends in one softmax to the keys around it as they are and to r projections
of all keys, whose mixing weights are computed from the keys themselves. Two layer
norms, one for each kind, bring the scales of both together.

Letters besides those of `attn_jax.attention`: w window, r number of projections, l
length of a segment in the causal form.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

__all__ = ["long_short", "long_short_init"]

# Added to the variance in the layer norms.
_EPSILON = 1e-5

_LAYOUT = {"projection": "Hr", "local_key": "nH", "local_value": "nV"}
_LAYOUT |= {"global_key": "nH", "global_value": "nV"}


def long_short_init(
    rng: jax.Array,
    head_dim: int,
    *,
    rank: int = 32,
    value_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Parameters of `long_short` for one head.

    Args:
      rank: r, how many projections; in the causal form so many a segment.

    Returns:
      {"projection": [H, r], normal with variance 1/H; "local_key", "global_key":
      [2, H] and "local_value", "global_value": [2, V], the scales (ones) and offsets
      (zeros) of the layer norms}.

    >>> long_short_init(jax.random.key(0), 8, rank=4)["projection"].shape
    (8, 4)
    """
    value_dim = head_dim if value_dim is None else value_dim
    head_dim, rank, value_dim = _checks.check_sizes(
        head_dim=head_dim, rank=rank, value_dim=value_dim
    )
    projection = jax.random.normal(rng, (head_dim, rank), dtype)

    def norm(size: int) -> jax.Array:
        return jnp.stack([jnp.ones(size, dtype), jnp.zeros(size, dtype)])

    return {
        "projection": projection * jnp.asarray(head_dim**-0.5, dtype),
        "local_key": norm(head_dim),
        "local_value": norm(value_dim),
        "global_key": norm(head_dim),
        "global_value": norm(value_dim),
    }


def _layer_norm(x: jax.Array, scale_and_offset: jax.Array) -> jax.Array:
    """Layer norm over the last axis, in float32 or wider."""
    dtype = score_dtype(x.dtype)
    scale, offset = scale_and_offset.astype(dtype)
    x = x.astype(dtype)
    x = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x).mean(axis=-1, keepdims=True)
    axes = (None,) * (x.ndim - 1)
    return x * jax.lax.rsqrt(variance + _EPSILON) * scale[axes] + offset[axes]


def _project(
    key: jax.Array, value: jax.Array, projection: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes l keys, and values, into r: [segments, l, ...] to [segments, r, ...]."""
    logits = _scores.einsum("mlh,hr->mlr", key, projection)
    logits = jnp.where(real[:, :, None], logits, MASKED_LOGIT)
    weights = jnp.where(real[:, :, None], jax.nn.softmax(logits, axis=1), 0)
    weights = weights.astype(key.dtype)
    mixed = (_scores.einsum("mlr,mlh->mrh", weights, x) for x in (key, value))
    return tuple(mixed)  # type: ignore[return-value]


def long_short(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int = 64,
    segment: int = 256,
) -> jax.Array:
    """Transformer-LS: windows of keys and a dynamic projection of all, in one softmax.

    P = softmax over s of K W_P, K̄ = Pᵀ K, V̄ = Pᵀ V
    o_t = softmax(scale · q_tᵀ [LN_L(K_t), LN_G(K̄)]) [LN_L(V_t); LN_G(V̄)]

    K_t are the keys near t: blocks of `window` positions are cut, and a query sees its
    own block and half a block on each side, as in the paper. LN_L and LN_G are the
    paper's DualLN, on keys and on values. P is made from the keys as they are given.

    Causal: the window ends at t, and the keys are projected segment by segment, each
    with a softmax of its own; query t sees the projections of those segments that end
    before t's own begins.

    With `window` ≥ T it is `dot_product` over all layer-normed keys and the r
    projections of them; causal and with `segment` ≥ T, over the keys alone.

    Costs O(T·(w + r)·H); the causal form O(T·(w + r·T/l)·H), so let l = `segment` grow
    with T or r be small.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"projection": [H, r], "local_key": [2, H], "local_value": [2, V],
        "global_key": [2, H], "global_value": [2, V]}, from `long_short_init`.
      key_mask: bool [T], True = a real token, or None. Padding gets no weight in P.
      is_causal: whether query t depends only on keys s ≤ t.
      window: w, the length of a block.
      segment: l, how many keys are projected together in the causal form.

    Reference: Zhu et al., 2021, arXiv:2107.02192, section 3.

    >>> x = jnp.zeros((4, 2))
    >>> value = jnp.array([[0.0, 9.0], [0.0, 9.0], [9.0, 0.0], [9.0, 0.0]])
    >>> params = long_short_init(jax.random.key(0), 2, rank=1)
    >>> out = long_short(x, x, value, params=params, window=1)
    >>> out.round(4).tolist()  # layer-normed to ±1; half is the mean of all, 0
    [[-0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, -0.5]]
    """
    one = "long_short", "its window is around each query's own position"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    (length, width), size = query.shape, value.shape[1]
    _checks.check_params("long_short", params, _LAYOUT, H=width, V=size, n=2)
    window, segment = _checks.check_sizes(window=window, segment=segment)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    dtype = query.dtype
    real = jnp.ones(length, bool) if key_mask is None else key_mask
    key, value = (_checks.zero_masked(x, key_mask) for x in (key, value))

    block = min(window, length)
    rows = _tiles.blocks_of(length, block)
    half = min(window, 2 * length) // 2
    ahead = 0 if is_causal else half
    near = _tiles.attend(
        query,
        _layer_norm(key, params["local_key"]).astype(dtype),
        _layer_norm(value, params["local_value"]).astype(dtype),
        rows,
        rows[:, :1] + np.arange(-half, block + ahead, dtype=np.int32),
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
    )

    if not is_causal:
        segment = length
    # The last segment of the causal form is in nobody's past.
    count = (length - 1) // segment if is_causal else 1
    if count == 0:
        return near.out.astype(dtype)
    rank = params["projection"].shape[1]
    used = count * segment
    real = real[:used].reshape(count, segment)
    far_key, far_value = _project(
        key[:used].reshape(count, segment, width),
        value[:used].reshape(count, segment, size),
        params["projection"].astype(dtype),
        real,
    )
    # In the dtype of scores: means of many keys are nearly equal, so the layer norm
    # makes roundings large, of what comes out and of the gradients that go in.
    far = _tiles.attend(
        query.astype(far_key.dtype),
        _layer_norm(far_key, params["global_key"]).reshape(-1, width),
        _layer_norm(far_value, params["global_value"]).reshape(-1, size),
        _tiles.blocks_of(length, length),
        _tiles.blocks_of(count * rank, count * rank),
        (lambda t, s: s // rank < t // segment) if is_causal else None,
        key_mask=jnp.repeat(real.any(axis=1), rank),
        scale=scale,
    )
    return _tiles.merge(near, far).out.astype(dtype)
