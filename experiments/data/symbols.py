"""Sequences of symbols in three parts: each has one label, or labels at some positions.

Bytes, grey levels, digits and brackets are all symbols 0 … K − 1 of one byte, or two.
Every sequence of a task is stored at one length; how much of it is real is told beside.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.data.fetch import DataSet, seal
from experiments.data.sequences import IGNORED

PARTS = ("train", "validation", "test")


class Fold(NamedTuple):
    """One part of the sequences; n of them, of length T.

    Attributes:
      inputs: symbols uint8 or uint16 [n, T], or of pairs of sequences [n, 2, T].
      lengths: int32 [n] or [n, 2], how many of the T are real; the others are padding.
      labels: int32 [n], or [n, T] with `IGNORED` where nothing is asked.
      groups: int32 [n], what accuracy is told for each value of; see `SymbolData`.
    """

    inputs: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @classmethod
    def of(
        cls,
        inputs: np.ndarray,
        labels: np.ndarray,
        lengths: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> Fold:
        """A part; by default everything is real, and of one group.

        >>> Fold.of(np.zeros((2, 3), np.uint8), np.array([0, 1])).lengths.tolist()
        [3, 3]
        """
        if lengths is None:
            lengths = np.full(inputs.shape[:-1], inputs.shape[-1])
        if groups is None:
            groups = np.zeros(len(inputs))
        return cls(inputs, *(x.astype(np.int32) for x in (lengths, labels, groups)))

    def take(self, rows: np.ndarray | slice) -> Fold:
        """Some of the sequences."""
        return Fold(*(x[rows] for x in self))


@dataclasses.dataclass(frozen=True, eq=False)
class SymbolData(DataSet):
    """A task on sequences of symbols.

    Attributes:
      symbols: number K of different ones.
      classes: number of labels.
      train, validation, test: the parts.
      group: what ``groups`` of a part number, such as "pairs"; "" = nothing.
      grid: (rows, columns) where a sequence is an image read row by row, else None.
    """

    symbols: int
    classes: int
    train: Fold
    validation: Fold
    test: Fold
    group: str = ""
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in PARTS:
            part: Fold = getattr(self, name)
            if not len(part.inputs):
                raise ValueError(f"{name} must hold a sequence, but is empty.")
            most = int(part.inputs.max())
            if most >= self.symbols:
                raise ValueError(
                    f"{name}.inputs must be below symbols={self.symbols}, but has "
                    f"{most}."
                )
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < (IGNORED if self.each else 0) or not 0 <= high < self.classes:
                raise ValueError(
                    f"{name}.labels must be in 0 … {self.classes - 1}, but has {low} "
                    f"to {high}."
                )

    @classmethod
    def drawn(
        cls,
        name: str,
        seed: int,
        parts: list[Fold],
        symbols: int,
        classes: int,
        **more: Any,
    ) -> SymbolData:
        """A task whose parts were drawn here."""
        train, validation, test = parts
        return cls(
            name,
            f"drawn here, seed {seed} (synthetic)",
            seal(*(x for part in parts for x in part)),
            symbols,
            classes,
            train,
            validation,
            test,
            **more,
        )

    @property
    def length(self) -> int:
        """T, with padding."""
        return self.train.inputs.shape[-1]

    @property
    def pairs(self) -> bool:
        """Whether an example is two sequences."""
        return self.train.inputs.ndim == 3

    @property
    def each(self) -> bool:
        """Whether labels stand at positions, and not for the whole."""
        return self.train.labels.ndim == 2

    def contents(self) -> str:
        """How many sequences, of which length, symbols and classes."""
        counts = " + ".join(f"{len(getattr(self, p).labels):,} {p}" for p in PARTS)
        kind = "pairs of sequences" if self.pairs else "sequences"
        return (
            f"{counts} {kind} of {self.length} symbols, {self.symbols} different ones, "
            f"{self.classes} classes"
        )
