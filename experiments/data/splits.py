"""Subsets and splits that are the same for ever: stored results depend on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.data.fetch import first_few

Three = tuple[np.ndarray, np.ndarray, np.ndarray]

#: Shares for training, validation and test where nothing else is said.
SHARES = (0.8, 0.1, 0.1)


def check_int(name: str, value: int, least: int) -> None:
    """Raises unless the value is an integer of at least `least`.

    Raises:
      TypeError, ValueError: it is none, or less.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def random_bits(seed: int, stream: int) -> np.random.PCG64:
    """Generator whose raw output splits are drawn from.

    numpy keeps ``random_raw`` the same for ever, which it does not promise for
    ``permutation`` and its like.

    Args:
      seed: another seed gives another split.
      stream: one number a use, so that uses with the same seed are independent.

    Raises:
      ValueError: the seed is not an integer of 0 or more.

    >>> random_bits(0, 1).random_raw() == random_bits(0, 1).random_raw()
    True
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    return np.random.PCG64(np.random.SeedSequence([int(seed), stream]))


def in_three(
    keys: np.ndarray,
    fractions: Sequence[float] = SHARES,
    members: np.ndarray | None = None,
) -> Three:
    """Split n things, in the order of their keys, into training, validation and test.

    Args:
      keys: [n] numbers to sort by.
      fractions: three shares of n, of sum 1.
      members: integers [m], the thing that each of m examples belongs to; by default
        every thing is an example.

    Returns:
      ``(train, validation, test)``, each int64 indices of examples in order.

    Raises:
      ValueError: the fractions are not that, or a part would be empty.

    >>> [part.tolist() for part in in_three(np.array([3, 0, 2, 1]), (0.5, 0.25, 0.25))]
    [[1, 3], [2], [0]]
    """
    n = len(keys)
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"fractions must be three positive numbers of sum 1, got {fractions!r}"
        )
    ends = np.rint(np.cumsum(fractions) * n).astype(np.int64)
    if np.diff(ends, prepend=0).min() < 1:
        raise ValueError(
            f"fractions {fractions!r} of n={n} leave training, validation or test "
            "without any"
        )
    part = np.empty(n, int)
    part[np.argsort(keys, kind="stable")] = np.searchsorted(
        ends, np.arange(n), side="right"
    )
    part = part if members is None else part[members]
    train, validation, test = (np.flatnonzero(part == i) for i in range(3))
    return train, validation, test


def balanced_subset(
    labels: np.ndarray, n: int, *, seed: int, num_classes: int | None = None
) -> np.ndarray:
    """Choose n examples, as many of each class as of any other, nested in n.

    The result for a smaller n and the same seed is the beginning of the result for a
    larger one. Class counts differ by at most 1, until a class is used up whole.

    Args:
      labels: integers [m] in ``0..num_classes-1``.
      n: how many, ``1 <= n <= m``.
      seed: another seed gives another subset.
      num_classes: classes that must occur; by default those that do.

    Returns:
      int64 [n], distinct indices into ``labels``.

    Raises:
      ValueError: n is out of range, or a class is absent.

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> np.bincount(labels[balanced_subset(labels, 4, seed=0)]).tolist()
    [2, 2]
    """
    labels = _check_labels(labels)
    check_int("n", n, 1)
    if n > len(labels):
        raise ValueError(
            f"n={n} is out of range: there are {len(labels)} examples, so the largest "
            f"n is {len(labels)}"
        )
    if num_classes is not None:
        absent = sorted(set(range(num_classes)) - set(np.unique(labels).tolist()))
        if absent or labels.max() >= num_classes:
            raise ValueError(
                f"labels must hold all classes 0..{num_classes - 1} and no others; "
                f"absent: {first_few(absent) or 'none'}, largest: {labels.max()}"
            )
    rank, _, tie = _class_ranks(labels, seed, stream=0)
    return np.lexsort((tie, rank))[:n]


def train_validation_split(
    labels: np.ndarray,
    indices: np.ndarray,
    *,
    fraction: float,
    seed: int,
    maximum: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a validation set from a training subset, in proportion from every class.

    Args:
      labels: integers [m] of the whole training set.
      indices: distinct integers [n] into ``labels``: the subset to split.
      fraction: share that goes to validation, ``0 < fraction < 1``. It takes
        ``round(fraction * n)`` examples, at least 1; but each class keeps one
        training example at least, so very small subsets may give fewer.
      seed: another seed gives another split.
      maximum: most validation examples to take.

    Returns:
      ``(train, validation)``, disjoint, together ``indices``, each in its order.

    Raises:
      ValueError: an argument is out of range, or no class has two examples.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    >>> train, val = train_validation_split(
    ...     labels, np.arange(8), fraction=0.25, seed=0)
    >>> labels[train].tolist(), labels[val].tolist()
    ([0, 0, 0, 1, 1, 1], [0, 1])
    """
    labels = _check_labels(labels)
    indices = np.asarray(indices)
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(
            f"indices must be integers [n], got {indices.dtype} {indices.shape}"
        )
    if not len(indices) or indices.min() < 0 or indices.max() >= len(labels):
        raise ValueError(
            f"indices must be at least one index, each in 0..{len(labels) - 1}"
        )
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices must be distinct, some occur twice")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    wanted = max(1, round(fraction * len(indices)))
    if maximum is not None:
        check_int("maximum", maximum, 1)
        wanted = min(wanted, maximum)
    rank, size, tie = _class_ranks(labels[indices], seed, stream=1)
    # Taking the smallest (rank + u) / size draws all classes at their own pace.
    uniform = (tie >> np.uint64(11)).astype(np.float64) * 2.0**-53
    order = np.argsort((rank + uniform) / size, kind="stable")
    order = order[(rank < size - 1)[order]][:wanted]
    if not len(order):
        raise ValueError(
            f"the {len(indices)} examples have no class with two examples, so none can "
            "be spared for validation: use a larger subset"
        )
    chosen = np.zeros(len(indices), bool)
    chosen[order] = True
    return indices[~chosen], indices[chosen]


def _check_labels(labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [m], got {labels.dtype} {labels.shape}"
        )
    if not len(labels) or labels.min() < 0:
        raise ValueError("labels must be at least one, and none negative")
    return labels


def _class_ranks(labels: np.ndarray, seed: int, *, stream: int) -> Three:
    """Shuffle each class: place within it, its size, and a random tie-breaker."""
    bits = random_bits(seed, stream)
    shuffle, tie = bits.random_raw(2 * len(labels)).reshape(2, -1)
    order = np.lexsort((shuffle, labels))
    _, first, inverse, counts = np.unique(
        labels[order], return_index=True, return_inverse=True, return_counts=True
    )
    rank, size = np.empty(len(labels), np.int64), np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[inverse]
    size[order] = counts[inverse]
    return rank, size, tie
