"""Boolean attention masks `[T, S]`, where True means attend.

Rows are queries, columns are keys: `mask[t, s]` says whether query t may look
at key s. A mask made here is a plain array; `all_of`, `any_of` and `~` combine
them. Something additive is not a mask but a bias, and float masks are refused.

Masks of pairs are `[T, S]`; `length` is T, `key_length` is S, and T if not given. What
is negative or of a wrong shape raises ValueError, a wrong dtype TypeError.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attn_jax.attention import _checks

__all__ = [
    "all_of",
    "any_of",
    "causal",
    "combine",
    "from_adjacency",
    "from_edges",
    "from_lengths",
    "padding",
    "strided",
    "window",
]


def _lengths(length: int, key_length: int | None) -> tuple[int, int]:
    """T and S as ints of Python, with which no arithmetic wraps around."""
    length = _checks.check_int("length", length, 0)
    if key_length is None:
        return length, length
    return length, _checks.check_int("key_length", key_length, 0)


def _offsets(length: int, key_length: int | None) -> jax.Array:
    """Key index minus query index, `[T, S]`: 0 on the diagonal, < 0 in the past."""
    length, key_length = _lengths(length, key_length)
    return jnp.arange(key_length)[None, :] - jnp.arange(length)[:, None]


def causal(length: int, key_length: int | None = None) -> jax.Array:
    """No query looks into the future: mask[t, s] = (s ≤ t).

    Aligned at the top left as `is_causal` of `jax.nn.dot_product_attention`:
    with S > T the last S − T keys are seen by nobody.

    >>> causal(3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    length, key_length = _lengths(length, key_length)
    return jnp.arange(length)[:, None] >= jnp.arange(key_length)[None, :]


def window(
    length: int,
    left: int | None,
    right: int | None,
    *,
    key_length: int | None = None,
) -> jax.Array:
    """A band around the diagonal: mask[t, s] = (t − left ≤ s ≤ t + right).

    `left = right = None` is full attention, `left = None, right = 0` is causal,
    `left = right = 0` is the identity.

    Args:
      left: how many keys before the query it sees; None for all of them.
      right: how many keys after the query it sees; None for all of them.

    Raises:
      ValueError: if a length is negative, or `left` or `right` is negative.

    Reference: Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    >>> window(4, 1, 0).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    offsets = _offsets(length, key_length)
    mask = jnp.ones(offsets.shape, jnp.bool_)
    if left is not None:
        left = _checks.check_int("left", left, 0)
        mask &= offsets >= -left
    if right is not None:
        right = _checks.check_int("right", right, 0)
        mask &= offsets <= right
    return mask


def strided(
    length: int,
    stride: int,
    *,
    is_causal: bool = False,
    key_length: int | None = None,
) -> jax.Array:
    """Every stride-th key counted from the query: mask[t, s] = (stride | t − s).

    `stride = 1` is full (or causal) attention. The strided pattern of the Sparse
    Transformer is `any_of(window(T, stride, 0), strided(T, stride, is_causal=True))`.

    Args:
      stride: distance between the keys that a query sees.
      is_causal: if True, only those with s ≤ t.

    Raises:
      ValueError: if a length is negative or the stride not positive.

    Reference: Child et al., 2019, arXiv:1904.10509, section 4.2.

    >>> strided(4, 2).astype(int).tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    stride = _checks.check_int("stride", stride, 1)
    offsets = _offsets(length, key_length)
    mask = offsets % stride == 0
    return mask & (offsets <= 0) if is_causal else mask


def from_lengths(lengths: ArrayLike, size: int) -> jax.Array:
    """Key masks of padded sequences: key_mask[…, s] = (s < lengths[…]).

    This is what variants take as `key_mask`, which more of them can honour than
    a full `[T, S]` mask.

    Args:
      lengths: `[...]`, int of any width, number of real tokens of each sequence. A
        length above `size` keeps all tokens and a negative one keeps none.
      size: padded length S.

    Returns:
      `[..., S]` bool, True = a real token.

    Raises:
      TypeError: if `lengths` is not of an integer dtype.
      ValueError: if `size` is not positive.

    >>> from_lengths(jnp.array([1, 3]), 3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    size = _checks.check_int("size", size, 1)
    lengths = _checks.as_int32("lengths", lengths)
    index = jnp.arange(size, dtype=jnp.int32)
    return index.reshape((1,) * lengths.ndim + (size,)) < lengths[..., None]


def padding(
    key_mask: jax.Array,
    query_mask: jax.Array | None = None,
    *,
    length: int | None = None,
) -> jax.Array:
    """Attention between real tokens alone: mask[t, s] = query_mask[t] ∧ key_mask[s].

    Args:
      key_mask: `[S]` bool, True = a real token.
      query_mask: `[T]` bool; rows of padding then attend to nothing (and give
        zeros). If None, every query attends.
      length: number of queries T where `query_mask` is None; S if not given.

    Raises:
      TypeError: if a mask is not bool.
      ValueError: if a mask is not a vector, or `length` contradicts `query_mask`.

    >>> padding(jnp.array([True, False]), length=3).astype(int).tolist()
    [[1, 0], [1, 0], [1, 0]]
    """
    key_mask = _as_mask("key_mask", key_mask)
    if query_mask is None:
        length = key_mask.shape[-1] if length is None else length
        query_mask = jnp.ones(_checks.check_int("length", length, 0), bool)
    elif length is not None and length != jnp.shape(query_mask)[0]:
        raise ValueError(
            f"`length` must be that of `query_mask`, but is {length} where that has "
            f"shape {jnp.shape(query_mask)}; give one of the two."
        )
    query_mask = _as_mask("query_mask", query_mask)
    for name, given in (("key_mask", key_mask), ("query_mask", query_mask)):
        if given.ndim != 1:
            raise ValueError(
                f"`{name}` must be a vector, but has shape {given.shape}; use "
                "`jax.vmap` for a batch."
            )
    return query_mask[:, None] & key_mask[None, :]


def from_adjacency(adjacency: jax.Array, *, self_loops: bool = False) -> jax.Array:
    """Graph attention as a mask: node t attends to s where adjacency[t, s] ≠ 0.

    Args:
      adjacency: `[T, S]`, bool or integer; row t lists the neighbours that t sees.
        Transpose it if a row lists the nodes that t sends to.
      self_loops: if True, every node also attends to itself.

    Raises:
      TypeError: if `adjacency` is of a float dtype: edge weights are a bias or a
        choice of threshold, not a mask.
      ValueError: if it is not a matrix, or not square where `self_loops` is set.

    Reference: Veličković et al., 2017, arXiv:1710.10903.

    >>> edges = jnp.array([[0, 1], [0, 0]])
    >>> from_adjacency(edges, self_loops=True).astype(int).tolist()
    [[1, 1], [0, 1]]
    """
    adjacency = jnp.asarray(adjacency)
    if adjacency.ndim != 2:
        raise ValueError(
            f"`adjacency` must be [T, S], but has shape {adjacency.shape}."
        )
    if not (
        adjacency.dtype == jnp.bool_ or jnp.issubdtype(adjacency.dtype, jnp.integer)
    ):
        raise TypeError(
            f"`adjacency` must be bool or integers, but has dtype {adjacency.dtype}; "
            "compare edge weights with a threshold first, or pass them as bias."
        )
    mask = adjacency != 0
    if self_loops:
        if mask.shape[0] != mask.shape[1]:
            raise ValueError(
                "`adjacency` must be square where `self_loops` is set, but has shape "
                f"{mask.shape}."
            )
        mask = mask | jnp.eye(mask.shape[0], dtype=bool)
    return mask


def from_edges(
    senders: ArrayLike,
    receivers: ArrayLike,
    num_nodes: int,
    *,
    self_loops: bool = False,
) -> jax.Array:
    """Graph attention from an edge list: mask[receivers[e], senders[e]] = True.

    A receiver is the query and a sender the key, so information flows along the
    edges. Repeated edges count once.

    Args:
      senders: `[E]` int, the node that each edge leaves.
      receivers: `[E]` int, the node that each edge enters.
      num_nodes: number of nodes T = S. Concrete edges beyond it raise; traced ones,
        whose values are unknown, are dropped, which is how padding edges are made.
      self_loops: if True, every node also attends to itself.

    Returns:
      `[num_nodes, num_nodes]` bool.

    Raises:
      TypeError: if an index is not of an integer dtype.
      ValueError: if the lists differ in length, are not vectors, or name a node
        that does not exist.

    Reference: Veličković et al., 2017, arXiv:1710.10903.

    >>> from_edges(jnp.array([0, 1]), jnp.array([1, 2]), 3).astype(int).tolist()
    [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    """
    num_nodes = _checks.check_int("num_nodes", num_nodes, 1)
    nodes = {}
    for name, index in (("senders", senders), ("receivers", receivers)):
        if np.ndim(index) != 1:
            raise ValueError(
                f"`{name}` must be a vector [E], but has shape {np.shape(index)}."
            )
        nodes[name] = _checks.check_ids(name, index, num_nodes)
    senders, receivers = nodes.values()
    if senders.shape != receivers.shape:
        raise ValueError(
            "`senders` and `receivers` must have one length, but have "
            f"{senders.shape[0]} and {receivers.shape[0]}."
        )
    # Negative indices would wrap around; send them out of range, where they drop.
    exists = (senders >= 0) & (receivers >= 0)
    rows = jnp.where(exists, receivers, num_nodes)
    mask = jnp.zeros((num_nodes, num_nodes), bool)
    mask = mask.at[rows, senders].set(True, mode="drop")
    return mask | jnp.eye(num_nodes, dtype=bool) if self_loops else mask


def _as_mask(name: str, given: ArrayLike) -> jax.Array:
    """An array of JAX, checked to be bool."""
    mask = jnp.asarray(given)
    _checks.check_bool(name, mask)
    return mask


def _joined(how: Callable[..., jax.Array], masks: Sequence[ArrayLike]) -> jax.Array:
    """All masks by & or |, checked to be bool, of one rank and of fitting shapes."""
    checked = [_as_mask(f"masks[{i}]", mask) for i, mask in enumerate(masks)]
    shapes = [mask.shape for mask in checked]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"masks must have one rank, but have shapes {shapes}.")
    try:
        jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ValueError(
            f"masks must have shapes that broadcast, but have shapes {shapes}."
        ) from error
    return functools.reduce(how, checked)


def all_of(mask: jax.Array, *masks: jax.Array) -> jax.Array:
    """Attend where every mask allows it, m₁ ∧ m₂ ∧ …

    Args:
      mask: `[..., T, S]` bool.
      *masks: more of the same rank; axes of size 1 broadcast.

    >>> all_of(causal(3), window(3, 1, 1)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    return _joined(operator.and_, [mask, *masks])


def any_of(mask: jax.Array, *masks: jax.Array) -> jax.Array:
    """Attend where at least one mask allows it, m₁ ∨ m₂ ∨ …

    Arguments, result and errors as of `all_of`.

    >>> any_of(window(3, 0, 0), strided(3, 2)).astype(int).tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    return _joined(operator.or_, [mask, *masks])


def combine(*masks: jax.Array | None) -> jax.Array | None:
    """Like `all_of`, but masks may be None (no restriction), as callers hold them.

    The result is None if nothing was given.

    >>> combine(None, causal(2), None).astype(int).tolist()
    [[1, 0], [1, 1]]
    >>> combine(None, None) is None
    True
    """
    given = [mask for mask in masks if mask is not None]
    return all_of(*given) if given else None


def allowed_pairs(
    num_queries: int,
    num_keys: int,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array | None:
    """Combines all masks into one: which query may attend to which key.

    `mask`, `key_mask` and `is_causal` are those of `attn_jax.attention`. The result is
    broadcastable to [T, S], or None if every pair is allowed.

    >>> allowed_pairs(2, 3, is_causal=True).tolist()
    [[True, False, False], [True, True, False]]
    """
    allowed = mask
    if key_mask is not None:
        keys = key_mask[None, :]
        allowed = keys if allowed is None else allowed & keys
    if is_causal:
        past = causal(num_queries, num_keys)
        allowed = past if allowed is None else allowed & past
    return allowed


def seen_ends(
    num_queries: int,
    num_keys: int,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which queries see any key, and which keys any query sees.

    All else is to be replaced by zeros before it is read, as `_checks.zero_masked`
    does: a weight of zero does not hide NaN, as 0 · NaN is NaN, and neither does a
    gradient of zero.

    Arguments as of `allowed_pairs`; the results, bool [T or 1] and bool [S or 1], are
    None where no mask says anything.

    >>> rows, keys = seen_ends(2, 3, key_mask=jnp.array([True, False, True]))
    >>> rows.tolist(), keys.tolist()
    ([True], [True, False, True])
    """
    if mask is not None:
        pairs = allowed_pairs(num_queries, num_keys, mask, key_mask, is_causal)
        assert pairs is not None
        # Else XLA works a constant mask out while it compiles, which takes seconds.
        pairs = jax.lax.optimization_barrier(pairs)
        return pairs.any(axis=1), pairs.any(axis=0)
    if not is_causal:
        return None if key_mask is None else key_mask.any(keepdims=True), key_mask
    # Not by pairs, of which there are T · S.
    keys = None
    if num_keys > num_queries:
        keys = jnp.arange(num_keys) < num_queries
    if key_mask is None:
        return None, keys
    places = jnp.where(key_mask, jnp.arange(num_keys), num_keys)
    first = jnp.min(places, initial=num_keys)
    rows = jnp.arange(num_queries) >= first
    return rows, key_mask if keys is None else key_mask & keys


def window_sides(
    local_window_size: int | tuple[int, int] | None, is_causal: bool
) -> tuple[int | None, int | None]:
    """How many keys a query sees before and after its own position; None for all.

    Args:
      local_window_size: (left, right), one number for both, or None for all.
      is_causal: whether no key after the query is seen.

    Returns:
      (left, right).

    Raises:
      ValueError: if `local_window_size` is not one or two numbers that are at least 0.

    >>> window_sides(3, is_causal=True)
    (3, 0)
    """
    if local_window_size is None:
        return None, 0 if is_causal else None
    sides = local_window_size
    if not isinstance(sides, tuple):
        sides = (sides, sides)
    if len(sides) != 2 or not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0
        for n in sides
    ):
        raise ValueError(
            "`local_window_size` must be None, one int or a pair (left, right) of ints "
            f"that are at least 0, but is {local_window_size!r}."
        )
    return int(sides[0]), 0 if is_causal else int(sides[1])
