"""Pairs in memory: sources, and for each what is a right target, in three parts.

A pair is stored as rows of three symbols, one row a position, so that what batches
labelled sequences batches pairs too: source, target before, target.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from experiments.data.fetch import DataSet
from experiments.data.sequences import IGNORED, Part

PAD = 0  # of sources; of targets 0 is what begins one
START, END = 0, 1


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of one part.

    Attributes:
      texts: the sources as they are read.
      answers: of each the first of its targets as it is read.
      sources: int32 [S] each, numbers from 1 on.
      targets: of each source what is right, int32 [T] each, numbers from 2 on.
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    sources: tuple[np.ndarray, ...]
    targets: tuple[tuple[np.ndarray, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The longest of each source and its targets with their end, int64 [n]."""
        both = zip(self.sources, self.targets, strict=True)
        found = [max(len(x), *(len(y) + 1 for y in several)) for x, several in both]
        return np.array(found, np.int64)

    def take(self, indices: Sequence[int] | np.ndarray) -> Pairs:
        """Some of the sources, with their targets."""
        return Pairs(
            tuple(self.texts[i] for i in indices),
            tuple(self.answers[i] for i in indices),
            tuple(self.sources[i] for i in indices),
            tuple(self.targets[i] for i in indices),
        )

    def some(self, count: int | None) -> Pairs:
        """So many of the sources, evenly from all of them; None = all."""
        if count is None or count >= len(self):
            return self
        return self.take(np.linspace(0, len(self) - 1, count).astype(int))

    def labelled(self, longest: int | None = None) -> Part:
        """Every target of every source with it, in the sources' order.

        Args:
          longest: what is longer, source or target with its end, is left out.
        """
        found = [
            pair(source, target)
            for source, several in zip(self.sources, self.targets, strict=True)
            for target in several
            if longest is None or max(len(source), len(target) + 1) <= longest
        ]
        return Part([x for x, _ in found], [y for _, y in found])


def pair(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A source and a target: (source, target before) int32 [L, 2], target int32 [L].

    L is what is longer, the source or the target with its end.

    >>> pair(np.array([3, 4, 5]), np.array([7]))[0].tolist()
    [[3, 0], [4, 7], [5, 0]]
    >>> pair(np.array([3, 4, 5]), np.array([7]))[1].tolist()
    [7, 1, -1]
    """
    length = max(len(source), len(target) + 1)
    inputs = np.full((length, 2), PAD, np.int32)
    inputs[: len(source), 0] = source
    inputs[1 : len(target) + 1, 1] = target
    labels = np.full(length, IGNORED, np.int32)
    labels[: len(target)] = target
    labels[len(target)] = END
    return inputs, labels


@dataclasses.dataclass(frozen=True, eq=False)
class PairData(DataSet):
    """Pairs in three parts that share no source.

    Attributes:
      train, validation, test: the parts.
    """

    train: Pairs
    validation: Pairs
    test: Pairs

    # Whether sources and targets are of the same symbols.
    shared = False

    @property
    def num_source(self) -> int:
        """Symbols of a source, padding among them."""
        raise NotImplementedError

    @property
    def num_target(self) -> int:
        """Symbols of a target, its beginning and its end among them."""
        raise NotImplementedError

    def said(self, target: Sequence[int] | np.ndarray) -> str:
        """A target as it is read."""
        raise NotImplementedError

    def symbols(
        self, source: np.ndarray, target: Sequence[int]
    ) -> tuple[list[str], list[str]]:
        """Each symbol of a source and of a target as a figure shows it."""
        raise NotImplementedError

    @property
    def longest(self) -> int:
        """The longest source, or target with its end, of all parts."""
        parts = (self.train, self.validation, self.test)
        return int(max(part.lengths.max() for part in parts))

    def counts(self, items: str) -> str:
        """How many there are in each part."""
        found = [
            f"{len(getattr(self, name)):,} {name}"
            for name in ("train", "validation", "test")
        ]
        return f"{' + '.join(found)} {items}"
