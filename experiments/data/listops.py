"""ListOps: nested lists of digits under MIN, MAX, MED and SM, to be worked out.

``[MAX 4 [SM 3 9 ] 1 ]`` is 4. A tree is grown level by level and worked out from its
leaves, many trees at once.

Source: Nangia & Bowman, 2018, arXiv:1804.06028; the grammar and the sampling are those
of Long Range Arena (Tay et al., 2020, arXiv:2011.04006), whose code has no MEAN, though
the paper names one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.data.symbols import Fold, SymbolData

OPERATORS = ("MIN", "MAX", "MED", "SM")
"""Least, largest, median (of two in the middle their mean, cut), and sum modulo 10."""
TOKENS = (*map(str, range(10)), *(f"[{name}" for name in OPERATORS), "]")
"""Symbols by number: a list begins with its operator."""
FIRST, END = 10, 14

OPERATOR_SHARE = 0.25  # how often an argument is a list, above the deepest level
MAX_DEPTH, MAX_ARGS = 10, 10
TRIES = 4_096  # trees that grow at once


@dataclasses.dataclass
class Level:
    """Nodes of one depth; those of one parent stand together, parents in their order.

    Attributes:
      tree: int [m], which tree each belongs to.
      value: int [m], a digit, or the operator's number from `FIRST` on.
      args: int [m], how many arguments follow it; 0 for a digit.
    """

    tree: np.ndarray
    value: np.ndarray
    args: np.ndarray

    def of(self, kept: np.ndarray) -> Level:
        """The nodes of some trees, which are numbered anew."""
        rows = kept[self.tree]
        number = np.cumsum(kept) - 1
        return Level(number[self.tree[rows]], self.value[rows], self.args[rows])


def grow(
    random: np.random.Generator, count: int, most: int
) -> tuple[list[Level], np.ndarray]:
    """Draws trees whose root is a list.

    Below the root each argument is a list with a probability of a quarter, until the
    deepest level, of 2 to 10 arguments and any of the operators, else a digit.

    Args:
      random: draws.
      count: how many trees.
      most: symbols from which on a tree stops growing: it is too long anyway.

    Returns:
      The levels, and how many symbols each tree has, int [count].
    """
    levels, sizes = [], np.zeros(count, np.int64)
    tree = np.arange(count)
    lists = np.ones(count, bool)
    for depth in range(1, MAX_DEPTH + 1):
        m = len(tree)
        value = np.where(
            lists, FIRST + random.integers(0, 4, m), random.integers(0, 10, m)
        )
        args = np.where(lists, random.integers(2, MAX_ARGS + 1, m), 0)
        sizes += np.bincount(tree, np.where(lists, 2, 1), count).astype(np.int64)
        args[sizes[tree] >= most] = 0
        levels.append(Level(tree, value, args))
        tree = np.repeat(tree, args)
        lists = random.random(len(tree)) < OPERATOR_SHARE
        lists &= depth + 1 < MAX_DEPTH
    return levels, sizes


def _work_out(operator: np.ndarray, args: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values of lists: operators [m], numbers of arguments [m], arguments [Σ args]."""
    start = np.cumsum(args) - args
    order = np.lexsort((x, np.repeat(np.arange(len(args)), args)))
    low, high = (x[order[start + at]] for at in ((args - 1) // 2, args // 2))
    sums = np.add.reduceat(x, start) % 10
    found = (x[order[start]], x[order[start + args - 1]], (low + high) // 2, sums)
    return np.choose(operator, found)


def write(
    levels: Sequence[Level], count: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Trees as symbols, and what they come to.

    Args:
      levels: of `grow`; every list has its arguments.
      count: how many trees.
      length: T, at least the symbols of any of them.

    Returns:
      Symbols uint8 [count, T], zeros behind the end, and values int [count].
    """
    values, spans = np.zeros(0, np.int64), np.zeros(0, np.int64)  # of the level below
    every = []
    for level in reversed(levels):
        lists = level.args > 0
        value, span = level.value.copy(), np.ones(len(level.value), np.int64)
        if lists.any():
            args = level.args[lists]
            value[lists] = _work_out(value[lists] - FIRST, args, values)
            span[lists] = 2 + np.add.reduceat(spans, np.cumsum(args) - args)
        values, spans = value, span
        every.append(span)
    symbols = np.zeros((count, length), np.uint8)
    place = np.zeros(count, np.int64)
    below = [*every[-2::-1], np.zeros(0, np.int64)]
    for level, span, spans in zip(levels, reversed(every), below, strict=True):
        lists = level.args > 0
        symbols[level.tree, place] = level.value
        symbols[level.tree[lists], (place + span)[lists] - 1] = END
        # A list's first argument stands behind it, each other one behind the last.
        before = np.cumsum(spans) - spans
        first = np.repeat((np.cumsum(level.args) - level.args), level.args)
        place = np.repeat(place + 1, level.args) + before - before[first]
    return symbols, values


def draw(
    random: np.random.Generator, count: int, least: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different lists of more than ``least`` and fewer than ``most`` symbols.

    Returns:
      Symbols uint8 [count, most − 1], lengths int [count], values int [count].
    """
    seen: set[bytes] = set()
    found: list[tuple[np.ndarray, int, int]] = []
    while len(found) < count:
        levels, sizes = grow(random, TRIES, most)
        kept = (sizes > least) & (sizes < most)
        if not kept.any():
            continue
        levels = [level.of(kept) for level in levels]
        symbols, values = write(levels, int(kept.sum()), most - 1)
        for row, size, value in zip(symbols, sizes[kept], values, strict=True):
            key = row.tobytes()
            if key not in seen:
                seen.add(key)
                found.append((row, size, value))
    rows, lengths, values = zip(*found[:count], strict=True)
    return np.stack(rows), np.array(lengths), np.array(values)


def listops(
    least: int = 100,
    most: int = 500,
    *,
    sizes: Sequence[int] = (20_000, 1_000, 2_000),
    seed: int = 0,
) -> SymbolData:
    """ListOps: one of ten labels, what a list comes to.

    Args:
      least, most: lists have more symbols than the one and fewer than the other; the
        paper's are 500 and 2,000, with 96,000, 2,000 and 2,000 lists.
      sizes: of the three parts, which share no list.
      seed: of the draw.

    Raises:
      ValueError: no list has such a length.

    >>> data = listops(4, 20, sizes=(3, 1, 1))
    >>> length = data.train.lengths[0]
    >>> [TOKENS[x] for x in data.train.inputs[0, [0, length - 1]]][1]
    ']'
    """
    if not 3 <= least < most - 1:
        raise ValueError(
            f"least and most must be 3 or more and at least 2 apart, got {least} and "
            f"{most}."
        )
    random = np.random.Generator(np.random.PCG64([seed, 23]))
    symbols, lengths, values = draw(random, sum(sizes), least, most)
    ends = np.cumsum(sizes)
    parts = [
        Fold.of(symbols[end - n : end], values[end - n : end], lengths[end - n : end])
        for n, end in zip(sizes, ends, strict=True)
    ]
    return SymbolData.drawn(f"listops_{most}", seed, parts, len(TOKENS), 10)
