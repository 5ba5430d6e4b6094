"""The key-value cache: one token of causal softmax attention after the other.

Letters: H size of query and key, V size of a value, L longest sequence, C blocks of a
cache, c positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

__all__ = ["KeyValueCache", "cache_state", "cache_step", "in_room"]


def _mapped(rows_at: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Has `jax.vmap` keep one place for all, where there is one.

    Of its own it makes a scatter of an update, and a gather of a slice, which cost
    several times as much. `rows_at(place, *arrays)` must take leading axes.
    """
    function = jax.custom_batching.custom_vmap(rows_at)

    def rule(size: int, batched: list[bool], place: Any, *arrays: jax.Array) -> Any:
        if batched[0]:
            axes = tuple(0 if is_batched else None for is_batched in batched)
            return jax.vmap(rows_at, axes)(place, *arrays), True
        full = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched[1:], strict=True)
        ]
        return function(place, *full), True

    function.def_vmap(rule)
    return function


@_mapped
def _put(place: jax.Array, rows: jax.Array, row: jax.Array) -> jax.Array:
    """Rows [..., L, H] with a row [..., H] at a place."""
    return jax.lax.dynamic_update_slice_in_dim(rows, row[..., None, :], place, -2)


@_mapped
def _block(index: jax.Array, blocks: jax.Array) -> jax.Array:
    """One block [..., c, H] of [..., C, c, H]."""
    return jax.lax.dynamic_index_in_dim(blocks, index, blocks.ndim - 3, keepdims=False)


class KeyValueCache(NamedTuple):
    """What softmax attention remembers: every key and value so far.

    Room for C · c positions from the beginning, in blocks, so that a step reads those
    that are filled and no other.

    Attributes:
      key: [C, c, H].
      value: [C, c, V].
    """

    key: jax.Array
    value: jax.Array


def cache_state(
    length: int,
    head_dim: int,
    value_dim: int,
    *,
    block_size: int = 112,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KeyValueCache:
    """The state of `cache_step` before the first token.

    Args:
      length: positions there must be room for, L.
      head_dim: H.
      value_dim: V.
      block_size: c at most; blocks are as even as can be.
      dtype: of keys and values.

    Returns:
      Zeros, of C = ⌈L / c⌉ blocks.

    Raises:
      ValueError: on a size below 1.
      TypeError: on a size that is no int.

    >>> cache_state(100, 4, 3, block_size=64).value.shape
    (2, 50, 3)
    """
    length = _checks.check_int("length", length, 1)
    block_size = _checks.check_int("block_size", block_size, 1)
    blocks = -(-length // block_size)
    size = -(-length // blocks)
    return KeyValueCache(
        jnp.zeros((blocks, size, head_dim), dtype),
        jnp.zeros((blocks, size, value_dim), dtype),
    )


def in_room(
    position: jax.Array, room: int, *arrays: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """A position as int32 in 0 … room − 1, and arrays that are NaN if it was not."""
    why = ", the room of the state: make it with a larger `length`"
    position = _checks.check_ids("position", position, room, why=why)
    exists = position >= 0
    return jnp.maximum(position, 0), [
        jnp.where(exists, x, jnp.asarray(jnp.nan, x.dtype)) for x in arrays
    ]


def cache_step(
    cache: KeyValueCache,
    position: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
) -> tuple[KeyValueCache, jax.Array]:
    """One token of causal softmax attention with a key-value cache: O(t) in time.

    o_t = Σ_{s ≤ t} exp(scale · q·k_s) v_s / Σ_{s ≤ t} exp(scale · q·k_s)

    Equal to row t of `attn_jax.dot_product` with `is_causal=True`. The sums go over
    the blocks that hold anything, under a running maximum. Not to be differentiated in
    reverse mode: for training use the parallel form.

    Args:
      cache: keys and values of the positions before; `cache_state` makes the first.
      position: int [], t, below C · c.
      query: [H].
      key: [H].
      value: [V].
      scale: factor of the scores; None means 1/√H.

    Returns:
      The cache with this key and value in it, and the output [V] in the dtype of
      the value.

    Raises:
      ValueError: if the shapes do not belong together, or a known position is beyond
        the room of the cache; a traced one gives NaN from then on.
      TypeError: if the position is no integer.

    >>> cache = cache_state(2, 4, 1)
    >>> x = jnp.ones(4)
    >>> cache, out = cache_step(cache, jnp.int32(0), x, x, jnp.array([3.0]))
    >>> cache, out = cache_step(cache, jnp.int32(1), x, x, jnp.array([5.0]))
    >>> out.tolist()
    [4.0]
    """
    blocks, size, head_dim = cache.key.shape
    sizes = {"H": head_dim, "V": cache.value.shape[-1]}
    _checks.check_shape("query", query, ("H",), sizes)
    _checks.check_shape("key", key, ("H",), sizes)
    _checks.check_shape("value", value, ("V",), sizes)
    dtype = score_dtype(query.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    position, (key, value) = in_room(position, blocks * size, key, value)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        rows = old.reshape(blocks * size, -1)
        return _put(position, rows, new.astype(old.dtype)).reshape(old.shape)

    cache = KeyValueCache(put(cache.key, key), put(cache.value, value))
    scaled = query.astype(dtype) * jnp.asarray(scale, dtype)
    places = jnp.arange(size, dtype=jnp.int32)

    def read(
        index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, mixed = sums
        keys, values = _block(index, cache.key), _block(index, cache.value)
        scores = jnp.einsum("h,sh->s", scaled, keys.astype(dtype))
        scores = jnp.where(index * size + places <= position, scores, MASKED_LOGIT)
        higher = jnp.maximum(top, scores.max())
        weights = jnp.exp(scores - higher)
        kept = jnp.exp(top - higher)
        new = jnp.einsum("s,sv->v", weights, values.astype(dtype))
        return higher, kept * total + weights.sum(), kept * mixed + new

    sums = (
        jnp.full((), MASKED_LOGIT, dtype),
        jnp.zeros((), dtype),
        jnp.zeros(value.shape, dtype),
    )
    sums = _checks.varying(sums, scaled, cache, position)
    _, total, mixed = jax.lax.fori_loop(0, position // size + 1, read, sums)
    return cache, (mixed / total).astype(value.dtype)
