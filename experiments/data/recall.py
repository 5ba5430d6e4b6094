"""Recall: what stood beside a symbol when it came first? Three tasks, drawn here.

| task | a sequence is | asked |
|---|---|---|
| `recall` | pairs of key and value, then the keys again, shuffled | their values |
| `copying` | a few data symbols in noise, then marks | the data, in their order |
| `induction` | noise, one mark in it, and the mark at the end | what followed it |

Sequences tell everything by themselves: nothing but the skill can be learnt by heart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.data.sequences import IGNORED
from experiments.data.splits import check_int
from experiments.data.symbols import Fold, SymbolData

SIZES = (20_000, 1_000, 2_000)  # sequences for training, validation and test


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream]))


def recall(
    pairs: Sequence[int] = (4, 8, 16, 32),
    *,
    keys: int = 64,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> SymbolData:
    """Multi-query associative recall: the value that each key was paired with.

    A sequence is n pairs k₁ v₁ … kₙ vₙ, all keys different and values drawn evenly,
    then the n keys in another order, of each of which the value is the label. n is as
    often each of ``pairs``; a sequence of fewer than the most ends in padding. Keys are
    the symbols below ``keys``, values as many beyond them.

    Args:
      pairs: the numbers n.
      keys: how many keys there are, and how many values.
      sizes: of the three parts.
      seed: of the draw.

    Raises:
      ValueError: more pairs than keys, or none.

    Source: Arora et al., Zoology, 2023, arXiv:2312.04927, where the sequence is causal
    and the gap between a pair and its query varies.

    >>> data = recall((2,), keys=4, sizes=(3, 1, 1))
    >>> k1, v1, k2, v2, first, second = data.train.inputs[0].tolist()
    >>> bool({k1: v1 - 4, k2: v2 - 4}[second] == data.train.labels[0, 5])
    True
    """
    if not pairs or min(pairs) < 1 or max(pairs) > keys:
        raise ValueError(f"pairs must be 1 to keys={keys} each, got {tuple(pairs)}.")
    random, most = _random(seed, 20), max(pairs)

    def part(count: int) -> Fold:
        n = np.asarray(pairs)[np.arange(count) % len(pairs)]
        inputs = np.zeros((count, 3 * most), np.uint16)
        labels = np.full(inputs.shape, IGNORED, np.int32)
        every = np.tile(np.arange(keys), (count, 1))
        chosen = random.permuted(every, axis=1)[:, :most]
        values = random.integers(0, keys, (count, most))
        for size in sorted(set(pairs)):
            rows = np.flatnonzero(n == size)[:, None]
            key, value = chosen[rows, np.arange(size)], values[rows, np.arange(size)]
            order = random.permuted(np.tile(np.arange(size), (len(rows), 1)), axis=1)
            told, asked = np.arange(0, 2 * size, 2), np.arange(2 * size, 3 * size)
            inputs[rows, told], inputs[rows, told + 1] = key, keys + value
            inputs[rows, asked] = np.take_along_axis(key, order, axis=1)
            labels[rows, asked] = np.take_along_axis(value, order, axis=1)
        return Fold.of(inputs, labels, 3 * n, n)

    parts = [part(count) for count in sizes]
    return SymbolData.drawn(
        f"recall_{most}", seed, parts, 2 * keys, keys, group="pairs"
    )


def copying(
    length: int = 128,
    *,
    data: int = 8,
    kinds: int = 8,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> SymbolData:
    """Selective copying: data symbols in noise, to be told in their order at the end.

    The symbols below ``kinds`` are data, ``kinds`` is noise, the next the mark at the
    last ``data`` positions, where the labels are: the first data symbol, the second …

    Args:
      length: T, with the marks.
      data: data symbols of a sequence, at places drawn evenly.
      kinds: how many kinds of them there are.
      sizes: of the three parts.
      seed: of the draw.

    Raises:
      ValueError: the sequence has no room for them.

    Source: Gu & Dao, Mamba, 2023, arXiv:2312.00752, section 3.1; Arjovsky et al., 2016,
    arXiv:1511.06464, for copying from fixed places.

    >>> one = copying(8, data=2, sizes=(1, 1, 1)).train
    >>> x = one.inputs[0, :-2]
    >>> x[x < 8].tolist() == one.labels[0, -2:].tolist()
    True
    """
    check_int("data", data, 1)
    if length < 2 * data:
        raise ValueError(f"length must be at least 2 * data={2 * data}, got {length}.")
    random = _random(seed, 21)

    def part(count: int) -> Fold:
        inputs = np.full((count, length), kinds, np.uint8)
        labels = np.full((count, length), IGNORED, np.int32)
        free = np.tile(np.arange(length - data), (count, 1))
        places = np.sort(random.permuted(free, axis=1)[:, :data], axis=1)
        drawn = random.integers(0, kinds, (count, data))
        np.put_along_axis(inputs, places, drawn.astype(np.uint8), axis=1)
        inputs[:, -data:], labels[:, -data:] = kinds + 1, drawn
        return Fold.of(inputs, labels)

    parts = [part(count) for count in sizes]
    return SymbolData.drawn(f"copying_{length}", seed, parts, kinds + 2, kinds)


def induction(
    length: int = 128, *, kinds: int = 16, sizes: Sequence[int] = SIZES, seed: int = 0
) -> SymbolData:
    """Induction: the mark comes once, and at the end again; what followed it then?

    The symbols below ``kinds`` are noise, the next one is the mark. The only label
    stands at the last position.

    Args:
      length: T, with the mark at the end.
      kinds: kinds of noise.
      sizes: of the three parts.
      seed: of the draw.

    Raises:
      ValueError: fewer than three symbols.

    Source: Olsson et al., 2022, arXiv:2209.11895; in this form, Fu et al., H3, 2022,
    arXiv:2212.14052, section 3.1.

    >>> one = induction(9, sizes=(1, 1, 1)).train
    >>> x = one.inputs[0].tolist()
    >>> bool(x[x.index(16) + 1] == one.labels[0, -1]), x.count(16)
    (True, 2)
    """
    check_int("length", length, 3)
    random = _random(seed, 22)

    def part(count: int) -> Fold:
        inputs = random.integers(0, kinds, (count, length)).astype(np.uint8)
        labels = np.full((count, length), IGNORED, np.int32)
        at, rows = random.integers(0, length - 2, count), np.arange(count)
        labels[:, -1] = inputs[rows, at + 1]
        inputs[rows, at] = inputs[:, -1] = kinds
        return Fold.of(inputs, labels)

    parts = [part(count) for count in sizes]
    return SymbolData.drawn(f"induction_{length}", seed, parts, kinds + 1, kinds)
