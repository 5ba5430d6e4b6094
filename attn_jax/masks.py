"""Boolean attention masks `[T, S]`, where True means attend.

Rows are queries, columns are keys: `mask[t, s]` says whether query t may look
at key s. A mask made here is a plain array; `all_of`, `any_of` and `~` combine
them. Something additive is not a mask but a bias, and float masks are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def _check_count(name: str, value: int, *, minimum: int = 1) -> int:
    """A count as an int of Python, with which no arithmetic wraps around."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def _check_bool(name: str, value: jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    if value.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be boolean with True = attend, got dtype {value.dtype}; "
            f"write `{name} != 0` if 1 means attend, and pass anything additive as bias"
        )
    return value


def _offsets(length: int, key_length: int | None) -> jax.Array:
    """Key index minus query index, `[T, S]`: 0 on the diagonal, < 0 in the past."""
    length = _check_count("length", length)
    if key_length is None:
        key_length = length
    key_length = _check_count("key_length", key_length)
    return jnp.arange(key_length)[None, :] - jnp.arange(length)[:, None]


def causal(length: int, key_length: int | None = None) -> jax.Array:
    """No query looks into the future: mask[t, s] = (s ≤ t).

    Aligned at the top left as `is_causal` of `jax.nn.dot_product_attention`:
    with S > T the last S − T keys are seen by nobody.

    Args:
      length: number of queries T.
      key_length: number of keys S; T if not given.

    Returns:
      `[T, S]` bool.

    Raises:
      ValueError: if a length is not positive.

    >>> causal(3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    return _offsets(length, key_length) <= 0


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
      length: number of queries T.
      left: how many keys before the query it sees; None for all of them.
      right: how many keys after the query it sees; None for all of them.
      key_length: number of keys S; T if not given.

    Returns:
      `[T, S]` bool.

    Raises:
      ValueError: if a length is not positive, or `left` or `right` is negative.

    Reference:
      Beltagy et al., "Longformer", section 3.1. https://arxiv.org/abs/2004.05150

    >>> window(4, 1, 0).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    offsets = _offsets(length, key_length)
    mask = jnp.ones(offsets.shape, jnp.bool_)
    if left is not None:
        left = _check_count("left", left, minimum=0)
        mask &= offsets >= -left
    if right is not None:
        right = _check_count("right", right, minimum=0)
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
      length: number of queries T.
      stride: distance between the keys that a query sees.
      is_causal: if True, only those with s ≤ t.
      key_length: number of keys S; T if not given.

    Returns:
      `[T, S]` bool.

    Raises:
      ValueError: if a length or the stride is not positive.

    Reference:
      Child et al., "Generating Long Sequences with Sparse Transformers",
      section 4.2. https://arxiv.org/abs/1904.10509

    >>> strided(4, 2).astype(int).tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    stride = _check_count("stride", stride)
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
    size = _check_count("size", size)
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

    Returns:
      `[T, S]` bool.

    Raises:
      TypeError: if a mask is not bool.
      ValueError: if a mask is not a vector, or `length` contradicts `query_mask`.

    >>> padding(jnp.array([True, False]), length=3).astype(int).tolist()
    [[1, 0], [1, 0], [1, 0]]
    """
    key_mask = _check_bool("key_mask", key_mask)
    if query_mask is None:
        length = key_mask.shape[-1] if length is None else length
        query_mask = jnp.ones(_check_count("length", length), bool)
    elif length is not None and length != jnp.shape(query_mask)[0]:
        raise ValueError(
            f"length is {length} but query_mask has shape {jnp.shape(query_mask)}; "
            "give one of the two"
        )
    query_mask = _check_bool("query_mask", query_mask)
    for name, value in (("key_mask", key_mask), ("query_mask", query_mask)):
        if value.ndim != 1:
            raise ValueError(
                f"{name} must be a vector, got shape {value.shape}; "
                "use jax.vmap for a batch"
            )
    return query_mask[:, None] & key_mask[None, :]


def from_adjacency(adjacency: jax.Array, *, self_loops: bool = False) -> jax.Array:
    """Graph attention as a mask: node t attends to s where adjacency[t, s] ≠ 0.

    Args:
      adjacency: `[T, S]`, bool or integer; row t lists the neighbours that t sees.
        Transpose it if a row lists the nodes that t sends to.
      self_loops: if True, every node also attends to itself.

    Returns:
      `[T, S]` bool.

    Raises:
      TypeError: if `adjacency` is of a float dtype: edge weights are a bias or a
        choice of threshold, not a mask.
      ValueError: if it is not a matrix, or not square where `self_loops` is set.

    Reference:
      Veličković et al., "Graph Attention Networks". https://arxiv.org/abs/1710.10903

    >>> edges = jnp.array([[0, 1], [0, 0]])
    >>> from_adjacency(edges, self_loops=True).astype(int).tolist()
    [[1, 1], [0, 1]]
    """
    adjacency = jnp.asarray(adjacency)
    if adjacency.ndim != 2:
        raise ValueError(f"adjacency must be [T, S], got shape {adjacency.shape}")
    if not (
        adjacency.dtype == jnp.bool_ or jnp.issubdtype(adjacency.dtype, jnp.integer)
    ):
        raise TypeError(
            f"adjacency must be bool or integer, got dtype {adjacency.dtype}; "
            "compare edge weights with a threshold first, or pass them as bias"
        )
    mask = adjacency != 0
    if self_loops:
        if mask.shape[0] != mask.shape[1]:
            raise ValueError(
                f"self_loops needs a square adjacency, got shape {mask.shape}"
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

    Reference:
      Veličković et al., "Graph Attention Networks". https://arxiv.org/abs/1710.10903

    >>> from_edges(jnp.array([0, 1]), jnp.array([1, 2]), 3).astype(int).tolist()
    [[0, 0, 0], [1, 0, 0], [0, 1, 0]]
    """
    num_nodes = _check_count("num_nodes", num_nodes)
    nodes = {}
    for name, index in (("senders", senders), ("receivers", receivers)):
        if np.ndim(index) != 1:
            raise ValueError(
                f"`{name}` must be a vector [E], but has shape {np.shape(index)}"
            )
        nodes[name] = _checks.check_ids(name, index, num_nodes)
    senders, receivers = nodes.values()
    if senders.shape != receivers.shape:
        raise ValueError(
            "`senders` and `receivers` must have one length, but have "
            f"{senders.shape[0]} and {receivers.shape[0]}"
        )
    # Negative indices would wrap around; send them out of range, where they drop.
    exists = (senders >= 0) & (receivers >= 0)
    rows = jnp.where(exists, receivers, num_nodes)
    mask = jnp.zeros((num_nodes, num_nodes), bool)
    mask = mask.at[rows, senders].set(True, mode="drop")
    return mask | jnp.eye(num_nodes, dtype=bool) if self_loops else mask


def _same_rank(name: str, masks: Sequence[jax.Array]) -> list[jax.Array]:
    checked = [_check_bool(f"{name}() argument {i}", m) for i, m in enumerate(masks)]
    shapes = [m.shape for m in checked]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"{name}() needs masks of one rank, got shapes {shapes}")
    try:
        jnp.broadcast_shapes(*shapes)
    except ValueError as error:
        raise ValueError(
            f"{name}() cannot broadcast masks of shapes {shapes}"
        ) from error
    return checked


def all_of(mask: jax.Array, *masks: jax.Array) -> jax.Array:
    """Attend where every mask allows it, m₁ ∧ m₂ ∧ …

    Args:
      mask: `[..., T, S]` bool.
      *masks: more of the same rank; axes of size 1 broadcast.

    Returns:
      `[..., T, S]` bool.

    Raises:
      TypeError: if a mask is not bool.
      ValueError: if the shapes do not fit.

    >>> all_of(causal(3), window(3, 1, 1)).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    first, *rest = _same_rank("all_of", [mask, *masks])
    for other in rest:
        first = first & other
    return first


def any_of(mask: jax.Array, *masks: jax.Array) -> jax.Array:
    """Attend where at least one mask allows it, m₁ ∨ m₂ ∨ …

    Args:
      mask: `[..., T, S]` bool.
      *masks: more of the same rank; axes of size 1 broadcast.

    Returns:
      `[..., T, S]` bool.

    Raises:
      TypeError: if a mask is not bool.
      ValueError: if the shapes do not fit.

    >>> any_of(window(3, 0, 0), strided(3, 2)).astype(int).tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    first, *rest = _same_rank("any_of", [mask, *masks])
    for other in rest:
        first = first | other
    return first


def combine(*masks: jax.Array | None) -> jax.Array | None:
    """Like `all_of`, but masks may be None (no restriction), as callers hold them.

    Args:
      *masks: `[..., T, S]` bool of one rank, or None.

    Returns:
      `[..., T, S]` bool, or None if nothing was given.

    Raises:
      TypeError: if a mask is not bool.
      ValueError: if the shapes do not fit.

    >>> combine(None, causal(2), None).astype(int).tolist()
    [[1, 0], [1, 1]]
    >>> combine(None, None) is None
    True
    """
    given = [mask for mask in masks if mask is not None]
    return all_of(*given) if given else None
