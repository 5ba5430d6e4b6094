"""Relative attention: scores that know how far apart query and key are.

A term that depends on the offset s − t alone is first made once per query and offset,
[T, offsets], and then shifted so that each pair of query and key meets its own offset.
Nothing of size T·S·H is built, and neither is anything gathered or scattered: the
shift is a reshape, so its gradient is one too.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import masks
from attn_jax.attention import _checks, _scores

__all__ = [
    "relative_shift",
    "shaw",
    "shaw_init",
    "transformer_xl",
    "transformer_xl_init",
]


def relative_shift(by_offset: jax.Array) -> jax.Array:
    """From one number per query and offset to one number per query and key.

    out[t, s] = by_offset[t, s − t + T − 1]

    Args:
      by_offset: [T, T + S − 1]; its columns are the offsets 1 − T … S − 1.

    Returns:
      [T, S].

    Reference: Dai et al., 2019, arXiv:1901.02860, appendix B.

    >>> relative_shift(jnp.array([[-1, 0, 1], [-1, 0, 1]])).tolist()
    [[0, 1], [-1, 0]]
    """
    rows, offsets = by_offset.shape
    # Row t must move t places to the left. With one more column, and read again in
    # rows that are one shorter, it has.
    flat = jnp.pad(by_offset, ((0, 0), (0, 1))).reshape(-1)
    moved = flat[rows - 1 : rows - 1 + rows * offsets].reshape(rows, offsets)
    return moved[:, : offsets - rows + 1]


def _shift_back(by_key: jax.Array) -> jax.Array:
    """[T, T + S − 1] per offset of [T, S] per key, the transpose of the shift."""
    rows, keys = by_key.shape
    offsets = rows + keys - 1
    flat = jnp.pad(by_key, ((0, 0), (0, rows - 1))).reshape(-1)
    flat = jnp.pad(flat, (rows - 1, 1))
    return flat.reshape(rows, offsets + 1)[:, :offsets]


def _unclipped(num_queries: int, num_keys: int, clip: int) -> tuple[int, int, int]:
    """How far a table reaches to the left and right, and how many offsets lie before.

    Of the offsets 1 − T … S − 1 those in −left … right are not clipped.
    """
    left, right = min(clip, num_queries - 1), min(clip, num_keys - 1)
    return left, right, num_queries - 1 - left


def _spread(by_clipped: jax.Array, num_keys: int) -> jax.Array:
    """[T, T + S − 1] per offset of [T, 2·clip + 1] per clipped offset."""
    rows, size = by_clipped.shape
    clip = size // 2
    left, right, before = _unclipped(rows, num_keys, clip)
    near = by_clipped[:, clip - left : clip + right + 1]
    return jnp.pad(near, ((0, 0), (before, num_keys - 1 - right)), mode="edge")


def _collect(by_offset: jax.Array, num_keys: int, clip: int) -> jax.Array:
    """[T, 2·clip + 1] sums over [T, T + S − 1], the transpose of the spreading."""
    rows = by_offset.shape[0]
    left, right, before = _unclipped(rows, num_keys, clip)
    after = before + left + 1 + right
    near = by_offset[:, before:after]
    near = near.at[:, 0].add(by_offset[:, :before].sum(axis=1))
    near = near.at[:, -1].add(by_offset[:, after:].sum(axis=1))
    return jnp.pad(near, ((0, 0), (clip - left, clip - right)))


def shaw_init(
    rng: jax.Array,
    head_dim: int,
    *,
    clip: int = 16,
    value_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Tables of relative positions for one head, drawn with a variance of 1/size.

    Args:
      clip: the largest offset that has a row of its own.

    Returns:
      {"key": [2·clip + 1, H], "value": [2·clip + 1, V]}; row clip + o is offset o.

    Raises:
      ValueError: if a size is not positive or `clip` is negative.

    >>> shaw_init(jax.random.key(0), 4, clip=2)["key"].shape
    (5, 4)
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = _checks.check_sizes(head_dim=head_dim, value_dim=value_dim)
    rows = 2 * _checks.check_int("clip", clip, 0) + 1
    return {
        name: size**-0.5 * jax.random.normal(one, (rows, size), dtype)
        for name, size, one in zip(
            ("key", "value"), sizes, jax.random.split(rng), strict=True
        )
    }


def shaw(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Attention with a learned vector per clipped offset, added to keys and values.

    o_t = Σ_s w[t, s] (v_s + a^V_{c(s−t)}),
    w[t, ·] = softmax_s(scale · q_t · (k_s + a^K_{c(s−t)}) + bias[t, s]),
    c(o) = max(−clip, min(clip, o))

    Equal to `dot_product` where both tables are zero. Offsets beyond `clip` share a
    vector, so it takes sequences of any length.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      params: {"key": [2·clip + 1, H], "value": [2·clip + 1, V]}, by `shaw_init`.

    Reference: Shaw et al., 2018, arXiv:1803.02155, equations 3 to 5.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> params = {"key": jnp.zeros((3, 2)), "value": jnp.eye(3, 2)}
    >>> shaw(x, x, 0.0 * x, params=params, scale=0.0).tolist()
    [[0.0, 0.5], [0.5, 0.5]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    layout, dims = {"key": "rH", "value": "rV"}, (key.shape[1], value.shape[1])
    sizes = _checks.check_params("shaw", params, layout, H=dims[0], V=dims[1])
    if sizes["r"] % 2 == 0:
        raise ValueError(
            "`params['key']` and `params['value']` must both have 2·clip + 1 rows, but "
            f"have {sizes['r']}; `shaw_init(rng, head_dim, clip=...)` makes them."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype, num_keys, clip = query.dtype, key.shape[0], sizes["r"] // 2
    if 0 in (query.shape[0], num_keys):
        return jnp.zeros((query.shape[0], value.shape[1]), dtype)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    by_clipped = _scores.product(query, params["key"].astype(dtype))
    logits = _scores.product(query, key) + relative_shift(_spread(by_clipped, num_keys))
    weights = _scores.weights_of(logits * scale, bias, *pairs)
    of_clipped = _collect(_shift_back(weights), num_keys, clip)
    # One product, so that both sums are rounded once.
    mixed = jnp.concatenate([weights, of_clipped], axis=1).astype(dtype)
    table = params["value"].astype(dtype)
    return mixed @ jnp.concatenate([value, table], axis=0)


def transformer_xl_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Parameters of `transformer_xl` for one head, drawn with a variance of 1/H.

    Returns:
      {"content_bias": [H], "position_bias": [H], "position": [H, H]}: u, v and W_r.

    >>> transformer_xl_init(jax.random.key(0), 4)["position"].shape
    (4, 4)
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    std = head_dim**-0.5
    shapes = {
        "content_bias": (head_dim,),
        "position_bias": (head_dim,),
        "position": (head_dim, head_dim),
    }
    rngs = jax.random.split(rng, len(shapes))
    return {
        name: std * jax.random.normal(one, shape, dtype)
        for one, (name, shape) in zip(rngs, shapes.items(), strict=True)
    }


def _sinusoids(distances: np.ndarray, dim: int) -> np.ndarray:
    """Sines and cosines of distances, in turn: [len(distances), dim], in float64."""
    frequency = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    angle = distances[:, None] * frequency[None, :]
    code = np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    return code.reshape(len(distances), -1)[:, :dim]


def transformer_xl(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    memory_length: int = 0,
) -> jax.Array:
    """Attention with sinusoidal relative positions and a memory of the last segment.

    o_t = Σ_s softmax_s(scale · [(q_t + u) · k_s + (q_t + v) · (W_r r_d)] + bias[t, s])
    v_s, where d = t + M − s is how far key s lies behind query t, r_d is the
    sinusoidal code of d, and M = `memory_length`

    The first M keys and values are those of the segment before: they lie before query
    0, and all queries may see them. Two segments of which the second keeps the first
    as memory are one long causal pass. Equal to `dot_product` where all parameters are
    zero.

    In the paper no gradient goes into the segment before, and W_k and W_v learn from
    it all the same: k, v = W_k h̃, W_v h̃ with h̃ = [SG(h_memory); h]. The caller has h:
    stop its gradient there, with `jax.lax.stop_gradient(h_memory)` before the
    projections. What is passed here is projected, and has its gradients.

    Args:
      query: [T, H].
      key: [S, H], of which the first M are the memory.
      value: [S, V], likewise.
      mask: bool [T or 1, S or 1], True = attend, or None; it holds for the memory too.
      params: {"content_bias": [H], "position_bias": [H], "position": [H, H]}: u, v,
        W_r.
      is_causal: whether query t attends only to keys s ≤ t + M.
      memory_length: M.

    Raises:
      ValueError: on wrong shapes or parameters, or a `memory_length` beyond 0 … S.

    Reference: Dai et al., 2019, arXiv:1901.02860, sections 3.2 and 3.3.

    >>> params = transformer_xl_init(jax.random.key(0), 4)
    >>> x = jax.random.normal(jax.random.key(1), (6, 4))
    >>> whole = transformer_xl(x, x, x, params=params, is_causal=True)
    >>> later = transformer_xl(
    ...     x[3:], x, x, params=params, is_causal=True, memory_length=3
    ... )
    >>> bool(jnp.allclose(whole[3:], later, atol=1e-5))
    True
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    num_queries, dim = query.shape
    num_keys = key.shape[0]
    layout = {"content_bias": "H", "position_bias": "H", "position": "HH"}
    _checks.check_params("transformer_xl", params, layout, H=dim)
    memory = _checks.check_int("memory_length", memory_length, 0)
    if memory > num_keys:
        raise ValueError(
            f"`memory_length` must be at most S={num_keys}, the number of keys, of "
            f"which the memory is the first part, but is {memory}."
        )
    scale = dim**-0.5 if scale is None else scale
    dtype = query.dtype
    content_bias, position_bias, position = (params[n].astype(dtype) for n in layout)
    if 0 in (num_queries, num_keys):
        return jnp.zeros((num_queries, value.shape[1]), dtype)
    if is_causal:
        seen = masks.causal(num_queries + memory, num_keys)[memory:]
        mask = seen if mask is None else mask & seen
    pairs: _scores.Pairs = (mask, key_mask, False)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    distances = memory - np.arange(1 - num_queries, num_keys)
    codes = jnp.asarray(_sinusoids(distances, dim), dtype)
    content = _scores.product(query + content_bias[None, :], key)
    by_offset = _scores.product(query + position_bias[None, :], codes @ position.T)
    logits = (content + relative_shift(by_offset)) * scale
    return _scores.attend(logits, value, bias, pairs)
