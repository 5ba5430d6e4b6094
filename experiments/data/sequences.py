"""Labelled sequences in memory, and batches of them of a few fixed lengths.

Sequences are grouped by length into buckets; a batch holds sequences of one bucket,
padded to its length, about as many tokens whatever the bucket. So few programs are
compiled, little is padding, and every update weighs as many labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.fetch import DataSet

IGNORED = -1  # the label of padding

# Rows of a batch are a multiple of this: so many devices can share it evenly, and no
# result depends on how many there are.
ROWS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Sequences with a label for each vector.

    Attributes:
      inputs: for each sequence ids int32 [T, K] or vectors float32 [T, F].
      labels: for each sequence int32 [T].
      groups: name -> for each sequence bool [T], vectors that are scored by
        themselves too, such as unknown words.
    """

    inputs: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    groups: Mapping[str, Sequence[np.ndarray]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise ValueError(
                f"labels must be one array a sequence, got {len(self.labels)} for "
                f"{len(self.inputs)} sequences."
            )
        for i, (x, y) in enumerate(zip(self.inputs, self.labels, strict=True)):
            if x.ndim != 2 or y.shape != x.shape[:1]:
                raise ValueError(
                    f"inputs[{i}] must be [T, K] and labels[{i}] [T], got shapes "
                    f"{x.shape} and {y.shape}."
                )
            if not len(x):
                raise ValueError(
                    f"inputs[{i}] is an empty sequence: leave it out, there is nothing "
                    "to label."
                )

    def __len__(self) -> int:
        return len(self.inputs)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Length T of every sequence, int64 [n]."""
        return np.array([len(x) for x in self.inputs], np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> Part:
        """Some of the sequences, in the order asked for."""
        return Part(
            [self.inputs[i] for i in indices],
            [self.labels[i] for i in indices],
            {k: [v[i] for i in indices] for k, v in self.groups.items()},
        )

    def cut(self, length: int) -> Part:
        """The first ``length`` vectors of every sequence."""
        return Part(
            [x[:length] for x in self.inputs],
            [y[:length] for y in self.labels],
            {k: [m[:length] for m in v] for k, v in self.groups.items()},
        )


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceData(DataSet):
    """A sequence labelling task: three parts that share nothing.

    Attributes:
      inputs: rows of the tables of ids, or the size F of the vectors: what
        `attn_jax.models.Labeller` takes.
      class_names: one name a label.
      train, validation, test: the parts.
      lengths: padded lengths that batches of this task have, ascending.
      has_unknown: whether the first id of a vector is a word, and 1 an unknown one.
      whole_test: the sequences of ``test`` uncut, where that part holds pieces of
        them; else None.
      one_label: whether a sequence has one label, which then stands at each of its
        vectors.
    """

    inputs: int | tuple[int, ...]
    class_names: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    lengths: tuple[int, ...]
    has_unknown: bool = False
    whole_test: Part | None = None
    one_label: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "whole_test"):
            part = getattr(self, name)
            for i, y in enumerate(part.labels if part else ()):
                if y.min() < 0 or y.max() >= len(self.class_names):
                    raise ValueError(
                        f"{name}.labels[{i}] must be in "
                        f"0..{len(self.class_names) - 1}, got {y.min()}..{y.max()}."
                    )

    @property
    def max_length(self) -> int:
        """The longest sequence that a batch holds."""
        return self.lengths[-1]

    @property
    def whole_lengths(self) -> tuple[int, ...]:
        """Padded lengths for ``whole_test``: one for its shorter half, one for all."""
        if self.whole_test is None:
            return ()
        found = self.whole_test.lengths
        sizes = {int(np.median(found)), int(found.max())}
        return tuple(
            sorted({-(-n // self.max_length) * self.max_length for n in sizes})
        )

    def contents(self) -> str:
        """How many sequences and labels in each part, of how many classes."""
        counts = " + ".join(
            f"{len(part):,} {name} ({part.lengths.sum():,} labels)"
            for name in ("train", "validation", "test")
            for part in (getattr(self, name),)
        )
        return f"{counts}, {len(self.class_names)} classes"


def known_from(part: Part, training: Part) -> Part:
    """The part as one who has seen a training part alone knows it.

    Words, the first ids, that do not occur in the training part become 1, unknown.

    >>> one, two = (Part([np.array([[i]])], [np.zeros(1, int)]) for i in (5, 6))
    >>> known_from(one, two).inputs[0].tolist(), known_from(two, two).inputs[0].tolist()
    ([[1]], [[6]])
    """
    seen = np.unique(np.concatenate([x[:, 0] for x in training.inputs]))
    ids = np.concatenate([x[:, 0] for x in part.inputs])
    ids = np.where(np.isin(ids, seen), ids, 1)
    inputs = []
    for x, first in zip(
        part.inputs, np.split(ids, np.cumsum(part.lengths)[:-1]), strict=True
    ):
        changed = x.copy()
        changed[:, 0] = first
        inputs.append(changed)
    return dataclasses.replace(part, inputs=inputs)


class Batch(NamedTuple):
    """Sequences padded to one length: inputs [B, T, K or F], labels int32 [B, T]."""

    inputs: Any
    labels: Any


def rows_of(length: int, tokens: int) -> int:
    """Number of sequences of a batch, a multiple of `ROWS`, with about ``tokens``.

    >>> rows_of(16, 2048), rows_of(500, 2048)
    (128, 8)
    """
    return max(ROWS, tokens // length // ROWS * ROWS)


def bucket_of(part_lengths: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Index of the shortest padded length that holds each sequence.

    Raises:
      ValueError: a sequence is longer than the longest padded length.

    >>> bucket_of(np.array([3, 8, 9]), (8, 16)).tolist()
    [0, 0, 1]
    """
    found = np.searchsorted(np.asarray(lengths), part_lengths)
    if len(found) and found.max() >= len(lengths):
        at = int(np.argmax(part_lengths))
        raise ValueError(
            f"sequence {at} has {part_lengths[at]} vectors, but a batch holds at most "
            f"{lengths[-1]}: cut it, or use a longer max_length."
        )
    return found


def padded(
    part: Part, indices: Sequence[int] | np.ndarray, rows: int, length: int
) -> Batch:
    """The sequences at ``indices`` as one batch of ``rows``; further rows are padding.

    >>> part = Part([np.ones((2, 1), np.int32)], [np.array([4, 5], np.int32)])
    >>> padded(part, [0], 2, 3).labels.tolist()
    [[4, 5, -1], [-1, -1, -1]]
    """
    first = part.inputs[0]
    inputs = np.zeros((rows, length, first.shape[1]), first.dtype)
    labels = np.full((rows, length), IGNORED, np.int32)
    for row, index in enumerate(indices):
        size = len(part.labels[index])
        inputs[row, :size] = part.inputs[index]
        labels[row, :size] = part.labels[index]
    return Batch(inputs, labels)


class Batches:
    """All batches of a part, in an order that depends on seed and step alone.

    An epoch takes every sequence once: sequences of a bucket are shuffled and cut into
    batches, and the batches of all buckets are shuffled.

    Args:
      part: the sequences.
      lengths: padded lengths, ascending.
      tokens: labels, with padding, that a batch holds about.
      seed: of the order.
    """

    def __init__(self, part: Part, lengths: Sequence[int], tokens: int, seed: int):
        self.part, self.lengths, self.tokens, self.seed = part, lengths, tokens, seed
        self._buckets = bucket_of(part.lengths, lengths)
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] | None = None
        self.per_epoch = len(self._plan(0))

    def _plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """(padded length, indices) of every batch of an epoch."""
        if self._epoch is not None and self._epoch[0] == epoch:
            return self._epoch[1]
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        batches = []
        for bucket, length in enumerate(self.lengths):
            members = random.permutation(np.flatnonzero(self._buckets == bucket))
            rows = rows_of(length, self.tokens)
            for start in range(0, len(members), rows):
                batches.append((length, members[start : start + rows]))
        order = random.permutation(len(batches))
        plan = [batches[i] for i in order]
        self._epoch = epoch, plan
        return plan

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted over all epochs."""
        epoch, at = divmod(step, self.per_epoch)
        length, indices = self._plan(epoch)[at]
        return padded(self.part, indices, rows_of(length, self.tokens), length)


def in_order(
    part: Part, lengths: Sequence[int], tokens: int
) -> list[tuple[np.ndarray, Batch]]:
    """Every sequence once, as (indices, batch), for evaluation."""
    buckets = bucket_of(part.lengths, lengths)
    found = []
    for bucket, length in enumerate(lengths):
        members = np.flatnonzero(buckets == bucket)
        rows = rows_of(length, tokens)
        for start in range(0, len(members), rows):
            indices = members[start : start + rows]
            found.append((indices, padded(part, indices, rows, length)))
    return found


def crops(part: Part, length: int) -> Part:
    """Every sequence cut into pieces of at most ``length``, one after another.

    >>> part = Part([np.zeros((5, 1), np.float32)], [np.zeros(5, np.int32)])
    >>> crops(part, 2).lengths.tolist()
    [2, 2, 1]
    """
    inputs, labels = [], []
    groups: dict[str, list[np.ndarray]] = {name: [] for name in part.groups}
    for i, (x, y) in enumerate(zip(part.inputs, part.labels, strict=True)):
        for start in range(0, len(y), length):
            piece = slice(start, start + length)
            inputs.append(x[piece])
            labels.append(y[piece])
            for name, found in groups.items():
                found.append(part.groups[name][i][piece])
    return Part(inputs, labels, groups)
