"""What needs no network: the most frequent label, and logistic regression."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.data import pathfinder
from experiments.data.sequences import IGNORED
from experiments.data.symbols import Fold, SymbolData
from experiments.tasks.baselines import fit_baseline

# Most labels that logistic regression is fitted to.
MOST = 5_000


def majority(data: SymbolData) -> dict[str, Any]:
    """The most frequent label of the training part, always."""
    train, test = (y[y != IGNORED] for y in (data.train.labels, data.test.labels))
    best = int(np.bincount(train).argmax())
    return {"test_accuracy": float((test == best).mean())}


def linear(data: SymbolData) -> dict[str, Any]:
    """Logistic regression on `features`; its penalty is chosen in the training part."""
    x, y = features(data, data.train, MOST)
    return fit_baseline("logistic_regression", x, y, *features(data, data.test), seed=0)


def flood(data: SymbolData) -> dict[str, Any]:
    """Pathfinder without learning: does ink join the discs? See `pathfinder.joined`."""
    assert data.grid is not None
    found = pathfinder.joined(data.test.inputs.reshape(-1, *data.grid))
    return {"test_accuracy": float((found == data.test.labels).mean())}


def features(
    data: SymbolData, part: Fold, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What a linear model reads, float32 [m, F], and the labels [m].

    Of images, the grey level of each pixel, in 0 … 1; else how often each symbol
    occurs, as a share of the sequence, its square root. Of pairs h₁ and h₂ it is
    [h₁, h₂, h₁ · h₂, |h₁ − h₂|]; where labels stand at positions, the symbol there
    stands beside, one-hot.

    Args:
      data: the task.
      part: of it.
      most: labels to take at most, those of the first sequences.
    """
    part = part if most is None else part.take(slice(most))
    if data.grid is not None:
        return part.inputs.astype(np.float32) / (data.symbols - 1), part.labels
    shares = counts(part.inputs, part.lengths, data.symbols)
    if data.pairs:
        one, two = shares[:, 0], shares[:, 1]
        both = np.concatenate([one, two, one * two, np.abs(one - two)], axis=-1)
        return both, part.labels
    if not data.each:
        return shares, part.labels
    rows, places = (x[:most] for x in np.nonzero(part.labels != IGNORED))
    own = np.eye(data.symbols, dtype=np.float32)[part.inputs[rows, places]]
    return np.concatenate([shares[rows], own], axis=1), part.labels[rows, places]


def counts(inputs: np.ndarray, lengths: np.ndarray, symbols: int) -> np.ndarray:
    """The root of each symbol's share of the real ones, float32 [..., K].

    >>> counts(np.array([[1, 0, 1, 1, 2]]), np.array([4]), 3).tolist()
    [[0.5, 0.8660253882408142, 0.0]]
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).astype(np.int64)
    real = np.arange(flat.shape[1]) < lengths.reshape(-1, 1)
    places = np.arange(len(flat))[:, None] * symbols + flat
    found = np.bincount(places[real], minlength=len(flat) * symbols)
    found = found.reshape(*inputs.shape[:-1], symbols)
    return np.sqrt(found / np.maximum(lengths, 1)[..., None]).astype(np.float32)
