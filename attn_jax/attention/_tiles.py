"""The core of pattern attention: blocks of queries, each with a slab of keys.

A pattern says which keys a query sees. It is given as tiles: every block of b queries
attends to n keys that are gathered for it, so scores outside of these tiles are never
made, and T queries in blocks of b cost T·n scores. The result of a part comes with the
logarithm of its softmax denominator. Parts with disjoint sets of keys then `merge` into
what one softmax over all of them gives.

Letters besides those of `attn_jax.attention`: b queries in a block, n keys in its slab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

# Queries in a block at least, where a window chooses its size.
_LEAST_BLOCK = 16

Index = np.ndarray | jax.Array


class Part(NamedTuple):
    """Attention of some queries to some of the keys, and how much weight that has.

    Attributes:
      out: [..., V], Σ exp(l) v / Σ exp(l) over the keys of this part; zeros if none.
      log_sum: [...], log Σ exp(l) over the keys of this part; `MASKED_LOGIT` if none.
    """

    out: jax.Array
    log_sum: jax.Array


def attend_tiles(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float | jax.Array | None = None,
) -> Part:
    """Softmax attention in tiles: every block of queries with its own keys.

    Args:
      query: [..., b, H].
      key: [..., n, H].
      value: [..., n, V].
      seen: bool, broadcastable to [..., b, n], who may see whom.
      bias: broadcastable to [..., b, n], added to the scaled scores, or None; −∞ masks.
      scale: factor of the scores; None means 1/√H.

    Returns:
      A part, `out` [..., b, V] and `log_sum` [..., b], in float32 or wider.
    """
    dtype = score_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = _scores.einsum("...bh,...nh->...bn", query, key)
    logits = logits * jnp.asarray(scale, dtype)
    if bias is not None:
        logits = logits + bias.astype(dtype)
        seen = seen & ~(logits < 0.5 * MASKED_LOGIT)  # so that NaN stays NaN
    logits = jnp.where(seen, logits, MASKED_LOGIT)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - top), 0)
    total = weights.sum(axis=-1)
    out = _scores.einsum("...bn,...nv->...bv", weights.astype(value.dtype), value)
    empty = total == 0
    log_sum = top[..., 0] + jnp.log(jnp.where(empty, 1, total))
    return Part(
        _checks.safe_divide(out, jnp.broadcast_to(total[..., None], out.shape)),
        jnp.where(empty, MASKED_LOGIT, log_sum),
    )


def merge(*parts: Part) -> Part:
    """One softmax over the keys of all parts, which must be disjoint.

    out = Σᵢ exp(log_sumᵢ) outᵢ / Σᵢ exp(log_sumᵢ)

    Args:
      *parts: parts of one shape; rows without keys have no weight.

    Returns:
      The part of all keys; rows that have keys in no part stay zeros.

    >>> query, keys, seen = jnp.ones((1, 2)), jnp.ones((2, 2)), jnp.ones((1, 2), bool)
    >>> low = attend_tiles(query, keys, jnp.array([[1.0], [3.0]]), seen)
    >>> high = attend_tiles(query, keys, jnp.array([[5.0], [7.0]]), seen)
    >>> merge(low, high).out.tolist()
    [[4.0]]
    """
    log_sums = jnp.stack([part.log_sum for part in parts])
    top = jax.lax.stop_gradient(log_sums.max(axis=0))
    weights = jnp.exp(log_sums - top[None])  # zero for a part without keys
    total = weights.sum(axis=0)
    mixed = sum(
        weight[..., None] * part.out
        for weight, part in zip(weights, parts, strict=True)
    )
    return Part(jnp.asarray(mixed) / total[..., None], top + jnp.log(total))


def cut(
    array: jax.Array, size: int, fill: float = 0, *, blocks: int | None = None
) -> jax.Array:
    """[blocks, size, ...] of [L, ...], filled up at the end; None: just enough blocks.

    >>> cut(jnp.arange(3), 2).tolist()
    [[0, 1], [2, 0]]
    """
    blocks = -(-len(array) // size) if blocks is None else blocks
    widths = ((0, blocks * size - len(array)), *((0, 0),) * (array.ndim - 1))
    array = jnp.pad(array, widths, constant_values=fill)
    return array.reshape(blocks, size, *array.shape[1:])


def once(columns: Index) -> Index:
    """Repeats within a row of an index replaced by −1, each where it stands.

    Args:
      columns: int [..., n], numpy or jax.

    Returns:
      The same, in which every number but −1 occurs once in a row.

    >>> once(np.array([[3, 1, 3, -1]])).tolist()
    [[3, 1, -1, -1]]
    >>> once(jnp.array([[3, 1, 3, -1]])).tolist()
    [[3, 1, -1, -1]]
    """
    xp: Any = np if isinstance(columns, np.ndarray) else jnp
    order = xp.argsort(columns, axis=-1, stable=True)
    ordered = xp.take_along_axis(columns, order, axis=-1)
    first = xp.ones((*columns.shape[:-1], 1), bool)
    first = xp.concatenate([first, ordered[..., 1:] != ordered[..., :-1]], axis=-1)
    back = xp.argsort(order, axis=-1)
    return xp.where(xp.take_along_axis(first, back, axis=-1), columns, -1)


def blocks_of(length: int, size: int) -> np.ndarray:
    """Positions in blocks beside each other, [⌈length / size⌉, size].

    The last may go beyond the end; such positions count as none.

    >>> blocks_of(3, 2).tolist()
    [[0, 1], [2, 3]]
    """
    return np.arange(-(-length // size) * size, dtype=np.int32).reshape(-1, size)


def window_tiles(
    length: int, left: int, right: int, dilation: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the tiles that cover a band of keys t − left … t + right.

    The tiles are wider than the band: a predicate |t − s| has still to cut it out.

    Args:
      length: T.
      left, right: how many keys before and after a query it sees.
      dilation: distance of these keys; the blocks hold positions that far apart.

    Returns:
      rows int [blocks, b] and columns int [blocks, b + left + right].

    >>> rows, columns = window_tiles(32, 8, 8)
    >>> rows.shape, columns.shape
    ((2, 16), (2, 32))
    """
    size = -(-length // dilation)  # positions of one residue class
    left, right = min(left, size - 1), min(right, size - 1)
    block = min(size, max(left + right, _LEAST_BLOCK))
    residue = np.arange(dilation, dtype=np.int32)[:, None, None]
    begins = np.arange(0, size, block, dtype=np.int32)[None, :, None]
    rows = residue + dilation * (begins + np.arange(block, dtype=np.int32))
    offsets = np.arange(-left, block + right, dtype=np.int32)
    columns = residue + dilation * (begins + offsets)
    return rows.reshape(-1, block), columns.reshape(-1, len(offsets))


def _is_range(index: Index) -> bool:
    """Whether an index is known to be 0, 1, 2, … from end to end."""
    return isinstance(index, np.ndarray) and np.array_equal(
        index.ravel(), np.arange(index.size)
    )


def take(array: jax.Array, index: Index) -> jax.Array:
    """Rows of an array [L, ...] at an index [blocks, n]; any row for one outside."""
    array = jnp.asarray(array)  # numpy cannot be read at a traced index
    if not _is_range(index):
        return array[index.clip(0, len(array) - 1)]
    rows = array[: index.size]
    padding = index.size - len(rows)
    if padding:
        rows = jnp.pad(rows, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
    return rows.reshape(*index.shape, *array.shape[1:])


def _put(array: jax.Array, rows: Index, length: int, fill: float) -> jax.Array:
    """The inverse of `take`: [blocks, b, ...] to [T, ...], `fill` where no row is."""
    flat = array.reshape(rows.size, *array.shape[2:])
    if _is_range(rows) and rows.size >= length:
        return flat[:length]
    if isinstance(rows, np.ndarray):
        inside = np.flatnonzero((rows >= 0) & (rows < length))
        source = np.full(length, rows.size)
        source[rows.ravel()[inside]] = inside
        return flat.at[source].get(mode="fill", fill_value=fill)
    target = jnp.where(rows < 0, length, rows).ravel()
    return (
        jnp.full((length, *flat.shape[1:]), fill, flat.dtype)
        .at[target]
        .set(flat, mode="drop")
    )


def _pair_tiles(pairs: jax.Array, rows: Index, columns: Index) -> jax.Array:
    """[blocks or 1, b or 1, n or 1] of [T or 1, S or 1]."""
    r = rows.clip(0, pairs.shape[0] - 1)[:, :, None] if pairs.shape[0] > 1 else 0
    c = columns.clip(0, pairs.shape[1] - 1)[:, None] if pairs.shape[1] > 1 else 0
    tiles = jnp.asarray(pairs)[r, c]
    return tiles if tiles.ndim else tiles.reshape(1, 1, 1)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rows: Index,
    columns: Index,
    sees: Callable[[jax.Array, jax.Array], jax.Array] | jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    scale: float | jax.Array | None = None,
    is_causal: bool = False,
    extra: jax.Array | None = None,
    distinct: bool = False,
) -> Part:
    """Attention of blocks of queries, each to a slab of keys, given by their positions.

    Costs blocks · b · n scores. What of `bias` and `mask` lies outside of the tiles is
    not read. Keys and values of padding, and those that a mask hides from all queries
    of a block, are replaced by zeros first, so they cannot leak. A numpy index is taken
    apart at trace time, a jax index may depend on data.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      rows: int [blocks, b], positions of the queries, each in one block at most;
        numbers outside of 0 … T − 1 (such as −1) are none.
      columns: int [blocks, n], positions of the keys; numbers outside of 0 … S − 1 are
        none, and one that stands twice in a slab counts once.
      sees: predicate of positions t [blocks, b, 1] and s [blocks, 1, n], or a bool
        array that broadcasts to [blocks, b, n], or None for all pairs of a tile.
      extra: broadcastable to [blocks, b, n], added to the scaled scores, or None.
      distinct: whether it is known that no column stands twice in a slab, which saves
        the search for repeats where `columns` is a jax array.

    Returns:
      A part, `out` [T, V] and `log_sum` [T]; empty for queries in no block.

    >>> x = jnp.arange(4.0).reshape(4, 1)
    >>> rows = blocks_of(4, 2)
    >>> attend(jnp.zeros((4, 1)), x, x, rows, rows).out.tolist()
    [[0.5], [0.5], [2.5], [2.5]]
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    dtype = score_dtype(query.dtype)
    if 0 in (num_queries, num_keys, rows.size, columns.size):
        return Part(
            jnp.zeros((num_queries, value.shape[1]), dtype),
            jnp.full(num_queries, MASKED_LOGIT, dtype),
        )
    if isinstance(columns, np.ndarray) or not distinct:
        columns = once(columns)
    key, value = (_checks.zero_masked(x, key_mask) for x in (key, value))
    t = jnp.asarray(rows, jnp.int32)[:, :, None]
    s = jnp.asarray(columns, jnp.int32)[:, None]
    seen = (s >= 0) & (s < num_keys) & (t >= 0) & (t < num_queries)
    if sees is not None:
        seen = seen & (sees(t, s) if callable(sees) else sees)
    if is_causal:
        seen = seen & (s <= t)
    if key_mask is not None:
        seen = seen & take(key_mask, columns)[:, None]
    if mask is not None:
        seen = seen & _pair_tiles(mask, rows, columns)
    if bias is not None:
        tiles = _pair_tiles(bias, rows, columns).astype(dtype)
        extra = tiles if extra is None else tiles + extra.astype(dtype)
    # A key may stand in many slabs: its gradients are added in the dtype of scores.
    keys, values = (
        take(x.astype(dtype), columns).astype(x.dtype) for x in (key, value)
    )
    queries = take(query, rows)
    if mask is not None or key_mask is not None:
        # In the scores of a query that sees nothing, and of a key that no query of its
        # tile sees, NaN would be multiplied by zero.
        queries = jnp.where(seen.any(axis=2)[:, :, None], queries, 0)
    if mask is not None:
        unseen = ~seen.any(axis=1)[:, :, None]
        keys, values = (jnp.where(unseen, 0, x) for x in (keys, values))
    out, log_sum = attend_tiles(queries, keys, values, seen, extra, scale=scale)
    return Part(
        _put(out, rows, num_queries, 0.0),
        _put(log_sum, rows, num_queries, MASKED_LOGIT),
    )
