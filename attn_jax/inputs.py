"""Inputs: whatever comes, words, sound or a graph, becomes a set of vectors `[T, F]`.

Attention takes vectors and gives vectors. Here are the usual ways to get them: a word
or a node is a one-hot vector or a row of a table, and sound is cut into short frames.
A linear layer from F to the model's size comes next, and then positions, see
`attn_jax.positions`.

All functions are pure and take one example; `jax.vmap` makes a batch.

Letters: T vectors, F their size, V rows of a table, D their size, N nodes, E edges,
n samples of a signal.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from attn_jax.attention import _checks

__all__ = [
    "embed",
    "frames",
    "graph_nodes",
    "num_frames",
    "one_hot",
]


def _check_ids(name: str, ids: ArrayLike, size: int, shape: str = "[T]") -> jax.Array:
    """int32 of the given shape in 0 … size − 1, or −1 where they are traced and not."""
    given, axes = np.shape(ids), shape.strip("[]").split(", ")
    if len(given) != len(axes) or (len(given) == 2 and given[1] != int(axes[1])):
        raise ValueError(
            f"`{name}` must have shape {shape}, but has shape {given}; use "
            "`jax.vmap` for a batch."
        )
    return _checks.check_ids(name, ids, size)


def one_hot(ids: ArrayLike, size: int, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """One-hot vectors: x[t, i] = 1 if i = ids[t] and 0 otherwise.

    A linear layer on them is a table of embeddings: `one_hot(ids, V) @ table` equals
    `embed(table, ids)`.

    Args:
      ids: [T] int, each in 0 … size − 1. Concrete ids out of range raise; traced ones
        (in `jax.jit` and `jax.vmap`), whose values are unknown, give zeros, which is
        how padding such as −1 is made.
      size: number of words, F.
      dtype: dtype of the result.

    Returns:
      [T, size].

    Raises:
      ValueError: if `ids` is no vector or out of range, or `size` is not positive.
      TypeError: if `ids` are no integers.

    >>> one_hot([2, 0], 3).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    size = _checks.check_int("size", size, 1)
    ids = _check_ids("ids", ids, size)
    return (ids[:, None] == jnp.arange(size, dtype=jnp.int32)[None, :]).astype(dtype)


def embed(table: jax.Array, ids: ArrayLike) -> jax.Array:
    """Embeddings: x_t is row ids[t] of a table.

    Equal to `one_hot(ids, V) @ table`, without the multiplication.

    Args:
      table: [V, D], such as a learned parameter.
      ids: [T] int, each in 0 … V − 1. Concrete ids out of range raise; traced ones (in
        `jax.jit` and `jax.vmap`), whose values are unknown, give zeros, as in
        `one_hot`. In particular, −1 is not the last row.

    Returns:
      [T, D], in the dtype of `table`.

    Raises:
      ValueError: if shapes are wrong or `ids` out of range.
      TypeError: if `table` is not floating-point or `ids` are no integers.

    >>> embed(jnp.array([[1.0, 2.0], [3.0, 4.0]]), [1, 1, 0]).tolist()
    [[3.0, 4.0], [3.0, 4.0], [1.0, 2.0]]
    """
    table = jnp.asarray(table)
    _checks.check_shape("table", table, ("V", "D"), {})
    _checks.check_float("table", table)
    ids = _check_ids("ids", ids, table.shape[0])
    return table.at[ids].get(mode="fill", fill_value=0, wrap_negative_indices=False)


@functools.partial(jax.jit, static_argnames="num_nodes")
def _degrees(edges: jax.Array, num_nodes: int) -> jax.Array:
    """How many edges enter each node, `[N]`; those of other nodes do not count."""
    exists = jnp.all(edges >= 0, axis=1)
    degrees = jnp.zeros(num_nodes, jnp.int32)
    return degrees.at[edges[:, 1]].add(exists.astype(jnp.int32), mode="drop")


def graph_nodes(
    node_types: ArrayLike,
    num_types: int,
    edges: ArrayLike | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Nodes of a graph as vectors: one-hot types, and the degree if edges are given.

    x_i = [ one-hot of the type of i ; number of edges that enter i ]

    The edges themselves go to attention, as a mask (`attn_jax.masks.from_edges`) or as
    a list (`attn_jax.attention.graph_attention`).

    Args:
      node_types: [N] int, such as elements of atoms, each in 0 … num_types − 1; see
        `one_hot` for others.
      num_types: number of types.
      edges: [E, 2] int or None, rows (sender, receiver). In an undirected graph each
        edge stands in both directions. An edge listed twice counts twice. Concrete
        edges of other nodes than 0 … N − 1 raise; traced ones are not counted.
      dtype: dtype of the result.

    Returns:
      [N, num_types], or [N, num_types + 1] with edges.

    Raises:
      ValueError: on wrong shapes, types or nodes out of range.
      TypeError: if `node_types` or `edges` are no integers.

    >>> graph_nodes([1, 0, 0], 2, [[0, 1], [2, 1]]).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [1.0, 0.0, 0.0]]
    """
    num_types = _checks.check_int("num_types", num_types, 1)
    _check_ids("node_types", node_types, num_types, "[N]")
    nodes = one_hot(node_types, num_types, dtype=dtype)
    if edges is None:
        return nodes
    edges = _check_ids("edges", edges, len(nodes), "[E, 2]")
    degrees = _degrees(edges, len(nodes)).astype(dtype)
    return jnp.concatenate([nodes, degrees[:, None]], axis=1)


def num_frames(n: int, window: int, hop: int) -> int:
    """How many whole frames a signal has: T = 1 + ⌊(n − window) / hop⌋.

    Args:
      n: number of samples.
      window: length of a frame in samples.
      hop: distance between the starts of two frames in samples.

    Returns:
      T, which is 0 if the signal is shorter than one frame.

    Raises:
      ValueError: if `n` is negative, or `window` or `hop` is not positive.
      TypeError: if one of them is no int.

    >>> num_frames(16_000, window=400, hop=160)
    98
    """
    n = _checks.check_int("n", n, 0)
    window = _checks.check_int("window", window, 1)
    hop = _checks.check_int("hop", hop, 1)
    return max(0, 1 + (n - window) // hop)


@functools.partial(jax.jit, static_argnames=("count", "window", "hop"))
def _frames(signal: jax.Array, count: int, window: int, hop: int) -> jax.Array:
    # Copies pieces: an index for each sample would be as large as the result.
    starts = jnp.arange(count) * hop
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=window)
    return jax.vmap(cut, in_axes=(None, 0))(signal, starts)


def frames(signal: ArrayLike, window: int, hop: int) -> jax.Array:
    """Overlapping pieces of a signal: x[t, i] = signal[t · hop + i].

    Only whole frames: what remains at the end is left out, as by Kaldi's snip_edges.

    Args:
      signal: [n], of any dtype.
      window: length of a frame in samples.
      hop: distance between the starts of two frames in samples.

    Returns:
      [T, window] with T = 1 + ⌊(n − window) / hop⌋, in the dtype of `signal`.

    Raises:
      ValueError: if `signal` is no vector or shorter than one frame, or `window` or
        `hop` is not positive.
      TypeError: if `window` or `hop` is no int.

    >>> frames(jnp.arange(6), window=3, hop=2).tolist()
    [[0, 1, 2], [2, 3, 4]]
    """
    signal = jnp.asarray(signal)
    _checks.check_shape("signal", signal, ("n",), {})
    window = _checks.check_int("window", window, 1)
    hop = _checks.check_int("hop", hop, 1)
    count = num_frames(signal.shape[0], window, hop)
    if count == 0:
        raise ValueError(
            f"`signal` must have at least one frame of {window} samples, but has "
            f"{signal.shape[0]}; pad it."
        )
    return _frames(signal, count, window, hop)
