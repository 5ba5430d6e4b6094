"""Boxes, how much they overlap, and which prediction stands for which item.

A box is (x, y, width, height), x and y of its centre, as shares of the picture.
Letters: Q predictions, M rows for items, K classes.

Reference: Carion et al., 2020, arXiv:2005.12872, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# What a match costs, and what a matched box adds to the loss.
CLASS, DISTANCE, OVERLAP = 1.0, 5.0, 2.0


def corners(boxes: jax.Array) -> jax.Array:
    """Boxes [..., 4] as (left, top, right, bottom).

    >>> corners(jnp.array([0.5, 0.5, 0.5, 1.0])).tolist()
    [0.25, 0.0, 0.75, 1.0]
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def _area(sides: jax.Array) -> jax.Array:
    return sides[..., 0] * sides[..., 1]


class Overlap(NamedTuple):
    """How boxes overlap.

    Attributes:
      iou: intersection over union.
      generalised: that less the share of the smallest box around both that neither
        covers, in (−1, 1] (Rezatofighi et al., 2019, arXiv:1902.09630).
    """

    iou: jax.Array
    generalised: jax.Array


def overlap(one: jax.Array, two: jax.Array) -> Overlap:
    """How boxes [..., 4] overlap others, axis by axis as arrays broadcast.

    Two empty boxes overlap by 0; nothing is NaN, nor its gradient.

    >>> left, right = jnp.array([0.25, 0.5, 0.5, 1.0]), jnp.array([0.5, 0.5, 1.0, 1.0])
    >>> [float(x) for x in overlap(left, right)]
    [0.5, 0.5]
    >>> [float(x) for x in overlap(left, jnp.array([0.875, 0.5, 0.25, 1.0]))]
    [0.0, -0.25]
    """
    first, second = corners(one), corners(two)
    low = jnp.maximum(first[..., :2], second[..., :2])
    high = jnp.minimum(first[..., 2:], second[..., 2:])
    shared = _area(jnp.maximum(high - low, 0.0))
    union = _area(one[..., 2:]) + _area(two[..., 2:]) - shared
    low = jnp.minimum(first[..., :2], second[..., :2])
    high = jnp.maximum(first[..., 2:], second[..., 2:])
    around = _area(high - low)
    iou = shared / jnp.where(union > 0, union, 1.0)
    empty = (around - union) / jnp.where(around > 0, around, 1.0)
    return Overlap(iou, iou - empty)


def costs(
    logits: jax.Array, boxes: jax.Array, labels: jax.Array, there: jax.Array
) -> jax.Array:
    """What it would cost each item to be told by each prediction, [..., M, Q].

    −p(class) + 5 · L1 + 2 · (−generalised overlap); 0 for rows without an item.

    Args:
      logits: [..., Q, K + 1], the last for "nothing".
      boxes: predictions [..., Q, 4].
      labels: int [..., M], below 0 for rows without an item.
      there: boxes of the items [..., M, 4].
    """
    shares = jax.nn.softmax(logits.astype(jnp.float32))
    real = labels >= 0
    kinds = jax.nn.one_hot(labels, logits.shape[-1], dtype=shares.dtype)
    of_class = jnp.einsum("...mk,...qk->...mq", kinds, shares)
    told, true = boxes[..., None, :, :], there[..., :, None, :]
    distance = jnp.abs(told - true).sum(axis=-1)
    found = (
        DISTANCE * distance
        - CLASS * of_class
        - OVERLAP * overlap(told, true).generalised
    )
    return jnp.where(real[..., None], found, 0.0)


def assign(cost: jax.Array) -> jax.Array:
    """Which prediction stands for which item, so that the sum of costs is the least.

    Args:
      cost: [..., M, Q] with M ≤ Q; a number that is not finite counts as very much.

    Returns:
      int32 [..., M], each of 0 … Q − 1 at most once.

    Raises:
      ValueError: if there are more rows than predictions.

    >>> assign(jnp.array([[1.0, 2.0, 9.0], [0.0, 9.0, 9.0]])).tolist()
    [1, 0]
    """
    rows, columns = cost.shape[-2:]
    if rows > columns:
        raise ValueError(
            f"cost must have as many predictions as items or more, got {columns} for "
            f"{rows} items."
        )
    finite = jnp.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)

    def one(matrix: jax.Array) -> jax.Array:
        # Square, with rows that cost nothing: of others Optax sorts, and a sort brings
        # a batch that lies on several devices together. So would a scatter.
        square = jnp.pad(matrix, ((0, columns - rows), (0, 0)))
        items, found = optax.assignment.hungarian_algorithm(square)
        mine = items[None] == jnp.arange(rows)[:, None]
        return jnp.where(mine, found[None], 0).sum(axis=1).astype(jnp.int32)

    for _ in range(cost.ndim - 2):
        one = jax.vmap(one)
    return one(finite)
