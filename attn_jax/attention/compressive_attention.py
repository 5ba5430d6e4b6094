"""Compressive attention: what is near as it is, what is older made c times fewer.

A sequence is read in segments. A query attends in one softmax to its own segment, to
the m positions before that as they are, and to windows of c positions before those, of
which a convolution has made one key and one value each. So much of the past for so
little memory is what a step keeps, and returns.

Letters besides those of `attn_jax.attention`: n positions of a segment, m of the
memory, c positions of a window, k windows that a query sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _tiles
from attn_jax.attention.low_rank import Scheme, compress, memory_compressed_init
from attn_jax.attention.softmax import dot_product

__all__ = [
    "CompressiveState",
    "compressive",
    "compressive_init",
    "compressive_init_state",
    "compressive_step",
]

Params = Mapping[str, jax.Array]

_LAYOUT = {"key": "cHH", "value": "cVV"}


def compressive_init(
    rng: jax.Array,
    head_dim: int,
    *,
    compression: int = 4,
    value_dim: int | None = None,
    scheme: Scheme = "normal",
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Kernels that make one key, and one value, of c, for one head.

    Args:
      rng: random key; "pool" does not use it.
      compression: c.
      scheme: "normal" draws with LeCun's variance 1/(c·H); "pool" takes the mean.

    Returns:
      {"key": [c, H, H], "value": [c, V, V]}, as of `memory_compressed_init`.

    >>> compressive_init(jax.random.key(0), 4, value_dim=2)["value"].shape
    (4, 2, 2)
    """
    return memory_compressed_init(
        rng,
        head_dim,
        compression=compression,
        value_dim=value_dim,
        scheme=scheme,
        dtype=dtype,
    )


def _sizes(width: int, segment: int, memory: int, compressed: int) -> tuple[int, ...]:
    """Segment, memory and how many windows, all checked."""
    segment = _checks.check_int("segment", segment, width, multiple_of=width)
    memory = _checks.check_int("memory", memory, 0, multiple_of=width)
    return segment, memory, _checks.check_int("compressed", compressed, 0)


def compressive(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    segment: int = 128,
    memory: int = 128,
    compressed: int = 128,
) -> jax.Array:
    """Compressive Transformer: a segment, a memory, and an older, compressed memory.

    k'_j = Σ_i W_iᵀ k_{jc+i},  v'_j = Σ_i U_iᵀ v_{jc+i},  i = 0 … c − 1
    o_t = softmax over s and j of scale · q_tᵀ [k_s, k'_j], times [v_s; v'_j]

    The segment of t begins at b = n ⌊t/n⌋. Query t sees the positions s of its segment
    (causal: s ≤ t), the m before it, b − m ≤ s < b, and of the windows that end before
    those, (j + 1) c ≤ b − m, the last k. What is older than that is forgotten.

    Causal it is `dot_product` where no position is older than the memory, and wherever
    k is large enough for "pool" with c = 1. It costs O(T·(n + m + k)·H).

    In the paper what is compressed are the inputs of a layer, from which keys and
    values are then made; here each head compresses its keys and its values. The paper's
    convolution is trained by losses of its own; here the loss of the task trains it.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"key": [c, H, H], "value": [c, V, V]}: W and U, from `compressive_init`.
      key_mask: bool [T], True = a real token, or None. In a window padding counts as
        zeros, and a window of nothing else is not seen.
      is_causal: whether query t depends only on keys s ≤ t; else it sees all of its
        segment.
      segment: n, a multiple of c.
      memory: m, a multiple of c; 0 for none.
      compressed: k; 0 for none.

    Reference: Rae et al., 2019, arXiv:1911.05507, section 3.

    >>> params = compressive_init(jax.random.key(0), 1, compression=2, scheme="pool")
    >>> x, value = jnp.ones((6, 1)), jnp.array([[1.0], [3.0], [4.0], [4.0], [8.0], [8]])
    >>> sizes = dict(segment=2, memory=2, compressed=1)
    >>> out = compressive(x, x, value, params=params, is_causal=True, **sizes)
    >>> [f"{x:.2f}" for x in out[:, 0]]
    ['1.00', '2.00', '2.67', '3.00', '4.50', '5.20']
    """
    one = "compressive", "a query sees the segment in which it stands"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    (length, head_dim), value_dim = query.shape, value.shape[1]
    sizes = dict(H=head_dim, V=value_dim)
    width = _checks.check_params("compressive", params, _LAYOUT, **sizes)["c"]
    segment, memory, compressed = _sizes(width, segment, memory, compressed)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    dtype = query.dtype
    key, value = (_checks.zero_masked(x, key_mask) for x in (key, value))

    block = min(segment, length)
    rows = _tiles.blocks_of(length, block)
    begins = rows[:, :1]
    before = np.arange(-min(memory, int(begins[-1, 0])), block, dtype=np.int32)
    near = _tiles.attend(
        query,
        key,
        value,
        rows,
        begins + before,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
    )
    ends = (begins - memory) // width  # of the windows that a block sees
    count = min(compressed, int(ends[-1, 0]))
    if count <= 0:
        return near.out.astype(dtype)
    used = int(ends[-1, 0]) * width
    short: dict[str, Any] = {
        name: compress(x[:used], params[name].astype(dtype))
        for name, x in (("key", key), ("value", value))
    }
    real = None if key_mask is None else _tiles.cut(key_mask[:used], width).any(axis=1)
    far = _tiles.attend(
        query,
        **short,
        rows=rows,
        columns=ends + np.arange(-count, 0, dtype=np.int32),
        key_mask=real,
        scale=scale,
    )
    return _tiles.merge(near, far).out.astype(dtype)


class CompressiveState(NamedTuple):
    """What `compressive_step` remembers, each in a ring: slot = number modulo size.

    Attributes:
      key, value: [n + m, H], [n + m, V], the last positions as they are.
      real: bool [n + m], which of them are.
      short_key, short_value: [k + (n + m)/c, H or V], the last windows.
      short_real: bool [k + (n + m)/c], which of them have a real position.
    """

    key: jax.Array
    value: jax.Array
    real: jax.Array
    short_key: jax.Array
    short_value: jax.Array
    short_real: jax.Array


def compressive_init_state(
    head_dim: int,
    value_dim: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    compression: int = 4,
    segment: int = 128,
    memory: int = 128,
    compressed: int = 128,
) -> CompressiveState:
    """The state of `compressive_step` before the first token; sizes as there.

    >>> compressive_init_state(4, 3).short_value.shape
    (192, 3)
    """
    compression = _checks.check_int("compression", compression, 1)
    segment, memory, compressed = _sizes(compression, segment, memory, compressed)
    room = segment + memory
    windows = compressed + room // compression
    return CompressiveState(
        jnp.zeros((room, head_dim), dtype),
        jnp.zeros((room, value_dim), dtype),
        jnp.zeros(room, bool),
        jnp.zeros((windows, head_dim), dtype),
        jnp.zeros((windows, value_dim), dtype),
        jnp.zeros(windows, bool),
    )


def compressive_step(
    state: CompressiveState,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    position: jax.Array,
    params: Params,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    segment: int = 128,
    memory: int = 128,
    compressed: int = 128,
) -> tuple[CompressiveState, jax.Array]:
    """One token of causal `compressive`, in time and memory O(n + m + k).

    Args:
      state: of all tokens before; `compressive_init_state` makes the first.
      query, key, value: [H], [H], [V].
      position: int [], how many tokens were before.
      params, scale, segment, memory, compressed: as there.
      key_mask: bool [], whether the token is real, or None.

    Returns:
      The new state, and the output [V].

    Raises:
      ValueError: if the state is of other sizes.

    >>> params = compressive_init(jax.random.key(0), 1, compression=2, scheme="pool")
    >>> sizes = dict(segment=2, memory=0, compressed=1)
    >>> state = compressive_init_state(1, 1, compression=2, **sizes)
    >>> for position, value in enumerate((1.0, 3.0, 8.0)):
    ...     state, out = compressive_step(
    ...         state, jnp.ones(1), jnp.ones(1), jnp.array([value]), params=params,
    ...         position=jnp.int32(position), **sizes)
    >>> out.tolist()
    [5.0]
    """
    sizes = dict(H=query.shape[0], V=value.shape[0])
    width = _checks.check_params("compressive", params, _LAYOUT, **sizes)["c"]
    segment, memory, compressed = _sizes(width, segment, memory, compressed)
    room = segment + memory
    windows = compressed + room // width
    if (len(state.key), len(state.short_key)) != (room, windows):
        raise ValueError(
            f"`state` must hold {room} positions and {windows} windows, but holds "
            f"{len(state.key)} and {len(state.short_key)}: make it with the same "
            "compression, segment, memory and compressed."
        )
    position = _checks.as_int32("position", position)
    real = jnp.ones((), bool) if key_mask is None else key_mask
    place = position % room
    key, value = (jnp.where(real, x, jnp.zeros((), x.dtype)) for x in (key, value))
    state = state._replace(
        key=state.key.at[place].set(key.astype(state.key.dtype)),
        value=state.value.at[place].set(value.astype(state.value.dtype)),
        real=state.real.at[place].set(real),
    )
    # The window in which the position stands; nobody sees it before it is full.
    window = position // width
    slot, start = window % windows, window * width % room

    def made(rows: jax.Array, name: str) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(rows, start, width)
        return compress(part, params[name].astype(rows.dtype))[0]

    inside = jax.lax.dynamic_slice_in_dim(state.real, start, width)
    state = state._replace(
        short_key=state.short_key.at[slot].set(made(state.key, "key")),
        short_value=state.short_value.at[slot].set(made(state.value, "value")),
        short_real=state.short_real.at[slot].set(inside.any()),
    )
    begin = position // segment * segment - memory
    end = begin // width

    def number(last: jax.Array, size: int) -> Any:
        """Of each slot of a ring, the number that it holds."""
        return last - (last - jnp.arange(size, dtype=jnp.int32)) % size

    held, short = number(position, room), number(window, windows)
    seen = (held >= jnp.maximum(begin, 0)) & state.real
    far = (short >= jnp.maximum(end - compressed, 0)) & (short < end)
    out = dot_product(
        query[None].astype(state.key.dtype),
        jnp.concatenate([state.key, state.short_key]),
        jnp.concatenate([state.value, state.short_value]),
        key_mask=jnp.concatenate([seen, far & state.short_real]),
        scale=scale,
    )
    return state, out[0].astype(value.dtype)
