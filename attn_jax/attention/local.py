"""Local attention: each query sees the keys near it, in time and memory O(T·w).

Near is a window around each query, or the query's own block and its neighbours. The
queries are taken in blocks. A block of b queries needs one slab of b + w keys
beside each other, where w is the window, so scores outside of these tiles are never
made. Where blocks come one after another, `blockwise` makes them.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _tiles
from attn_jax.attention.blockwise_attention import blockwise, blockwise_arrays
from attn_jax.attention.softmax import dot_product

__all__ = ["block_local", "truncated", "truncated_arrays"]

MapBlocks = Literal["auto", "vmap", "loop"]

# Queries in a block at least, where blocks are side by side.
_LEAST_BLOCK = 16


def _check_window(left: int, right: int, is_causal: bool) -> tuple[int, int]:
    """How far a query sees before and after its own position."""
    left = _checks.check_int("left", left, 0)
    right = _checks.check_int("right", right, 0)
    return left, 0 if is_causal else right


def _check_lengths(num_queries: int, num_keys: int) -> None:
    if num_queries != num_keys:
        raise ValueError(
            "`truncated` needs as many keys as queries, since its window is around "
            f"each query's own position, but T={num_queries} and S={num_keys}; use "
            "`dot_product` with a mask that says who sees whom."
        )


def _side_by_side(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
    scale: float | None,
    left: int,
    right: int,
    block: int,
) -> jax.Array:
    """`dot_product` of every block of queries with its own slab of keys, batched."""
    length = query.shape[0]
    begins = np.arange(0, length, block)[:, None]
    rows = begins + np.arange(block)  # [blocks, b]
    columns = begins + np.arange(-left, block + right)  # [blocks, b + w]
    offset = columns[:1] - rows[0][:, None]
    inside = (columns >= 0) & (columns < length)
    allowed = ((offset >= -left) & (offset <= right))[None] & inside[:, None]
    rows, columns = rows.clip(0, length - 1), columns.clip(0, length - 1)

    def tiles(pairs: jax.Array) -> jax.Array:
        """[blocks, b, b + w] of [T or 1, T or 1]."""
        r = rows[:, :, None] if pairs.shape[0] > 1 else 0
        c = columns[:, None] if pairs.shape[1] > 1 else 0
        return jnp.broadcast_to(pairs[r, c], allowed.shape)

    seen = jnp.asarray(allowed)
    if mask is not None:
        seen &= tiles(mask)
    if key_mask is not None:
        seen &= key_mask[columns][:, None]
    operands: dict[str, Any] = dict(
        query=query[rows], key=key[columns], value=value[columns], mask=seen
    )
    if bias is not None:
        operands["bias"] = tiles(bias)
    out = jax.vmap(lambda tile: dot_product(**tile, scale=scale))(operands)
    return out.reshape(-1, value.shape[1])[:length]


def truncated(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    left: int = 64,
    right: int = 64,
    block_size: int | None = None,
    map_blocks: MapBlocks = "auto",
) -> jax.Array:
    """Dot-product attention to the keys within a window, in O(T · (left + right)).

    o_t = Σ_s w[t, s] v_s over t − left ≤ s ≤ t + right, with
    w[t, s] = exp(l[t, s]) / Σ_s' exp(l[t, s']) and l = scale · Q Kᵀ + bias.

    Equal to `dot_product` under `masks.window(T, left, right)`, and to `dot_product`
    alone once left, right ≥ T − 1. With `map_blocks="loop"` the gradient is a custom
    rule for reverse mode, once: for forward mode or second derivatives use "vmap".

    Queries and keys are of one sequence: where T ≠ S it is unknown which query stands
    beside which key, so that raises.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      bias: [T or 1, T or 1] or None; −∞ masks. What lies outside the band is not read.
        Its gradient, of the same shape, is made only if asked for.
      mask: bool [T or 1, T or 1], True = attend, or None; it narrows the band.
      scale: factor of the scores; None means 1/√H. An array is multiplied into the
        query, in its dtype.
      is_causal: whether query t attends only to keys s ≤ t, whatever `right` is.
      left: how many keys before its own position a query sees. The default of 64 on
        both sides keeps a layer local at the lengths (T of several hundred) where
        truncation begins to pay; set it to what the data asks for.
      right: how many keys after its own position a query sees.
      block_size: number of queries in a block at most; None chooses by the window.
      map_blocks: "vmap" computes all blocks side by side, each as `dot_product` on its
        own keys; "loop" is `blockwise` with this window, one block after another in
        less memory; "auto" loops on CPU, where plain products are faster than
        batched ones. Equal up to the order of sums.

    Raises:
      ValueError: on wrong shapes, T ≠ S, a negative `left` or `right`, a block size
        below 1, or an unknown `map_blocks`.

    Reference: Yeh et al., 2019, arXiv:1910.12977, section 3.2 (truncated
    self-attention); Beltagy et al., 2020, arXiv:2004.05150, section 3.1 (sliding
    window).

    >>> value = jnp.arange(5.0).reshape(5, 1)
    >>> truncated(jnp.ones((5, 4)), jnp.ones((5, 4)), value, left=1, right=0).tolist()
    [[0.0], [0.5], [1.5], [2.5], [3.5]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    left, right = _check_window(left, right, is_causal)
    if block_size is not None:
        block_size = _checks.check_int("block_size", block_size, 1)
    _checks.check_choice("map_blocks", map_blocks, get_args(MapBlocks))
    length = query.shape[0]
    _check_lengths(length, key.shape[0])
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    if map_blocks == "auto":
        map_blocks = "loop" if jax.default_backend() == "cpu" else "vmap"
    if map_blocks == "loop":
        return blockwise(
            query,
            key,
            value,
            bias,
            mask,
            key_mask=key_mask,
            scale=scale,
            local_window_size=(left, right),
            block_size=block_size,
        )
    left, right = min(left, length - 1), min(right, length - 1)
    block = min(length, block_size or max(left + right, _LEAST_BLOCK))
    return _side_by_side(
        query, key, value, bias, mask, key_mask, scale, left, right, block
    )


def truncated_arrays(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    left: int = 64,
    right: int = 64,
    block_size: int | None = None,
) -> jax.Array:
    """`truncated` on whole arrays, in a loop over heads and blocks: for CPU.

    Args:
      query, key, value, bias, mask, key_mask: whole arrays, as for `blockwise_arrays`.
      scale, is_causal, left, right, block_size: as for `truncated`.

    Returns:
      [B, T, N, V], in the dtype of the inputs.

    Raises:
      ValueError: if T ≠ S, or on a bad window or block size.

    >>> x = jnp.ones((1, 5, 2, 4))
    >>> truncated_arrays(x, x, x, left=1, right=0).shape
    (1, 5, 2, 4)
    """
    left, right = _check_window(left, right, is_causal)
    if block_size is not None:
        block_size = _checks.check_int("block_size", block_size, 1)
    _check_lengths(query.shape[1], key.shape[1])
    return blockwise_arrays(
        query,
        key,
        value,
        bias,
        mask,
        key_mask=key_mask,
        scale=scale,
        local_window_size=(left, right),
        block_size=block_size,
    )


def block_local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    block_size: int = 128,
    look_back: int = 0,
    look_ahead: int = 0,
) -> jax.Array:
    """Dot-product attention within blocks of the sequence and to blocks beside them.

    o_t = Σ_s w[t, s] v_s over the keys with
    ⌊t/b⌋ − look_back ≤ ⌊s/b⌋ ≤ ⌊t/b⌋ + look_ahead, b = `block_size`, with
    w[t, s] = exp(l[t, s]) / Σ_s' exp(l[t, s']) and l = scale · Q Kᵀ + bias.

    Equal to `dot_product` once `block_size` ≥ T. Unlike the window of `truncated`, what
    a query sees depends on where it stands in its block.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      is_causal: whether query t attends only to keys s ≤ t, whatever `look_ahead` is.
      block_size: number of positions in a block.
      look_back: how many blocks before its own a query sees. 0 is "Local Attention" of
        the Long Range Arena; 1 with `is_causal` is near the Image Transformer's.
      look_ahead: how many blocks after its own a query sees.

    Reference: Parmar et al., 2018, arXiv:1802.05751, section 3.3 (1D local attention);
    Tay et al., 2020, arXiv:2011.04006 (local attention).

    >>> x = jnp.zeros((4, 2))
    >>> block_local(x, x, jnp.arange(4.0).reshape(4, 1), block_size=2).tolist()
    [[0.5], [0.5], [2.5], [2.5]]
    """
    one = "block_local", "a query sees the keys of its own block"
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    block_size = _checks.check_int("block_size", block_size, 1)
    look_back = _checks.check_int("look_back", look_back, 0)
    look_ahead = _checks.check_int("look_ahead", look_ahead, 0)
    length = query.shape[0]
    block = max(1, min(block_size, length))
    rows = _tiles.blocks_of(length, block)
    before = min(look_back, len(rows)) * block
    after = 0 if is_causal else min(look_ahead, len(rows)) * block
    columns = rows[:, :1] + np.arange(-before, block + after, dtype=np.int32)
    part = _tiles.attend(
        query,
        key,
        value,
        rows,
        columns,
        bias=bias,
        mask=mask,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
    )
    return part.out.astype(value.dtype)
