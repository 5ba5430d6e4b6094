"""Which layer knows the tags? A linear probe of what every layer makes of a word."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.models import Labeller
from experiments.core import devices
from experiments.data.sequences import IGNORED, Part, SequenceData, in_order

SENTENCES = (2_000, 400, 1_000)  # of the training, validation and test part
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the features' mean square
TOKENS = 2_048  # of a batch


def layers_of(tower: Labeller, ids: jax.Array, real: jax.Array) -> jax.Array:
    """What goes into the first block, and what comes out of each.

    Args:
      tower: a labeller with a transformer.
      ids: int [B, T, K].
      real: bool [B, T].

    Returns:
      [L + 1, B, T, D]; the last is what the tower's last normalisation gets.
    """
    x = tower.input(jnp.where(real[..., None], ids, 0))
    x = jnp.where(real[..., None], x, jnp.zeros((), x.dtype))
    encoder: Any = tower.body.encoder  # type: ignore[attr-defined]
    if encoder.positions is not None:
        x = encoder.positions.embed(x)
    found = [x]
    for block in encoder.blocks:
        found.append(block(found[-1], real[:, None, None]))
    return jnp.stack(found)


class Layers(nnx.Module):
    """`layers_of` as a module, for `optim.split_model`."""

    def __init__(self, tower: Labeller):
        self.tower = tower

    def __call__(
        self, ids: jax.Array, real: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        return layers_of(self.tower, ids, real)


def probe(
    layers: Callable[[Any, Any], jax.Array], params: Any, data: SequenceData
) -> list[float]:
    """Test accuracy of tags that are read off each layer linearly, L + 1 numbers.

    Args:
      layers: ``layers(params, (ids, real))``, `layers_of`.
      params: of the model.
      data: a tagging task.
    """
    found = []
    for count, part in zip(
        SENTENCES, (data.train, data.validation, data.test), strict=True
    ):
        rows = np.linspace(0, len(part) - 1, min(count, len(part))).astype(int)
        found.append(_features(layers, params, part.take(rows), data.lengths))
    depth = found[0][0].shape[0]
    classes = len(data.class_names)
    return [ridge([(x[layer], y) for x, y in found], classes) for layer in range(depth)]


@functools.lru_cache(maxsize=8)
def _by_row(
    layers: Callable[[Any, Any], jax.Array],
) -> Callable[[Any, Any], jax.Array]:
    """`layers` with the rows of the batch first, compiled once a shape."""
    return jax.jit(lambda params, batch: jnp.moveaxis(layers(params, batch), 0, 1))


def _features(
    layers: Callable[[Any, Any], jax.Array],
    params: Any,
    part: Part,
    lengths: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Features [L + 1, m, D] of all words of a part, and their tags [m]."""
    by_row = _by_row(layers)
    xs, ys = [], []
    for _, batch in in_order(part, lengths, TOKENS):
        real = batch.labels != IGNORED
        rows = devices.call(by_row, params, (batch.inputs, real))  # [B, L + 1, T, D]
        xs.append(np.moveaxis(np.asarray(rows, np.float32), 1, 0)[:, real])
        ys.append(batch.labels[real])
    return np.concatenate(xs, axis=1), np.concatenate(ys)


def ridge(parts: list[tuple[np.ndarray, np.ndarray]], classes: int) -> float:
    """Test accuracy of the linear map nearest to the classes' unit vectors.

    Least squares with a penalty that the validation part chooses.

    Args:
      parts: features [m, D] and classes [m] of the training, validation and test part.
      classes: how many there are.

    >>> x = np.eye(4, dtype=np.float32)[np.arange(40) % 4]
    >>> ridge([(x, np.arange(40) % 4 % 2)] * 3, 2)
    1.0
    """
    (x, y), validation, test = parts
    mean = x.mean(axis=0, dtype=np.float64)
    z = x.astype(np.float64) - mean
    targets = np.eye(classes)[y]
    share = targets.mean(axis=0)
    gram, moments = z.T @ z / len(z), z.T @ (targets - share) / len(z)
    scale = max(float(np.trace(gram)) / len(gram), 1e-12)

    def accuracy(weights: np.ndarray, part: tuple[np.ndarray, np.ndarray]) -> float:
        guess = ((part[0] - mean) @ weights + share).argmax(axis=1)
        return float((guess == part[1]).mean())

    fits = [
        np.linalg.solve(gram + penalty * scale * np.eye(len(gram)), moments)
        for penalty in PENALTIES
    ]
    return accuracy(max(fits, key=lambda w: accuracy(w, validation)), test)
