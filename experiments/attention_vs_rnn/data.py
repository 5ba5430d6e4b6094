"""The two tasks: sequences to copy, and images as sequences of pixels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.data.images import Dataset
from experiments.data.splits import train_validation_split

SYMBOLS = 10
"""Symbols of a word to copy, 1 … 10; 0 separates and pads."""

START = 256
"""What stands before the first pixel."""

# How many training images validation takes, and random streams of the copy task.
VALIDATION = 500
STREAMS = {"train": 0, "val": 1, "test": 2}


class CopyBatch(NamedTuple):
    """Sequences int32 [B, T], and bool [B, T], which symbols are to be known."""

    tokens: Any
    counted: Any


def copy_batch(
    part: str, seed: int, index: int, *, batch_size: int, length: int
) -> CopyBatch:
    """Sequences "0 w 0 w 0 …": a random word twice, the second time counts.

    |w| is drawn from [T/4, T/2 − 1), which is [32, 63) for T = 128.

    Args:
      part: "train", "val" or "test", which have nothing in common.
      seed: of the run; validation and test do not depend on it.
      index: number of the batch, of which it is a pure function.
      batch_size: B.
      length: T.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, section 4.1.

    >>> batch = copy_batch("train", 0, 0, batch_size=1, length=8)
    >>> word = batch.tokens[0, 1:3]
    >>> bool((word == batch.tokens[0, 4:6]).all()), batch.counted[0].sum().tolist()
    (True, 2)
    """
    seed = seed if part == "train" else 0
    rng = np.random.Generator(np.random.PCG64([STREAMS[part], seed, index]))
    size = rng.integers(length // 4, (length - 2) // 2, (batch_size, 1))
    words = rng.integers(1, SYMBOLS + 1, (batch_size, length))
    place = np.arange(length)[None]
    first = (place >= 1) & (place <= size)
    second = (place >= size + 2) & (place <= 2 * size + 1)
    row = np.arange(batch_size)[:, None]
    source = np.where(second, place - size - 1, place)
    tokens = np.where(first | second, words[row, source], 0).astype(np.int32)
    return CopyBatch(tokens, second)


def flat_images(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, height, width, 1] as rows of pixels int32 [n, T]."""
    return images.reshape(len(images), -1).astype(np.int32)


def image_parts(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that are trained on, and of those for validation."""
    count = len(dataset.train_labels)
    return train_validation_split(
        dataset.train_labels,
        np.arange(count),
        fraction=min(0.5, VALIDATION / count),
        seed=0,
    )


# ---------------------------------------------------------------- baselines


def copy_baselines() -> dict[str, Callable[[], dict[str, Any]]]:
    """Guessing one of ten symbols."""
    guess = dict(test_accuracy=1 / SYMBOLS, test_loss=float(np.log(SYMBOLS)))
    return {"uniform guess": functools.partial(dict, guess)}


def image_baselines(
    dataset: Dataset, test: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Bits a pixel of the test images under distributions that anyone could count."""
    pixels = math.prod(dataset.image_shape)
    contexts: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
        "histogram of all pixels": (np.zeros_like, 1),
        "histogram at each position": (_positions, pixels),
        "histogram given the pixel before": (_before, START + 1),
    }
    return {"uniform": functools.partial(dict, test_bits=8.0, val_bits=8.0)} | {
        name: functools.partial(_counted, dataset, test, context, count)
        for name, (context, count) in contexts.items()
    }


def _positions(x: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(x.shape[1]), x.shape)


def _before(x: np.ndarray) -> np.ndarray:
    return np.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=START)


def _counted(
    dataset: Dataset,
    test: int,
    context: Callable[[np.ndarray], np.ndarray],
    contexts: int,
    smoothing: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
) -> dict[str, Any]:
    """Bits under the counts of each context; validation chooses what is added."""
    train, validation = image_parts(dataset)
    images = {
        "val": flat_images(dataset.train_images[validation]),
        "test": flat_images(dataset.test_images[:test]),
    }
    flat = np.zeros(contexts * 256)
    for begin in range(0, len(train), 2_000):  # small enough for the caches
        some = flat_images(dataset.train_images[train[begin : begin + 2_000]])
        codes = context(some) * 256 + some
        flat += np.bincount(codes.ravel(), minlength=contexts * 256)
    counts = flat.reshape(contexts, 256)

    def bits(which: str, added: float) -> float:
        x = images[which]
        smooth = counts + added / 256
        log_probs = np.log2(smooth / smooth.sum(axis=1, keepdims=True))
        return float(-log_probs[context(x), x].mean())

    found = {added: bits("val", added) for added in smoothing}
    best = min(found, key=lambda added: found[added])
    return dict(test_bits=bits("test", best), val_bits=found[best], smoothing=best)
