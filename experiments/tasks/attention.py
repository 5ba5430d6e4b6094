"""Who attends to whom: the weights of a trained encoder."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.nn.encoder import Encoder


def weights_of(
    encoder: Encoder, x: jax.Array, key_mask: jax.Array | None = None
) -> list[np.ndarray]:
    """Attention weights of every block on some sequences.

    Args:
      encoder: any `Encoder` whose variant can give weights.
      x: [B, T, D], what the encoder gets.
      key_mask: bool [B, T], True = a real token; None where all are.

    Returns:
      For each block [B, N, T, T], rows are queries and sum to one.
    """
    return [np.asarray(weights) for weights in traced_weights(encoder, x, key_mask)]


def traced_weights(
    encoder: Encoder, x: jax.Array, key_mask: jax.Array | None = None
) -> list[jax.Array]:
    """The same for use under `jax.jit`."""
    h, mask = x, None if key_mask is None else key_mask[:, None, None]
    if encoder.positions is not None:
        h = encoder.positions.embed(h)
    found = []
    for block in encoder.blocks:
        normed = block.attention_norm(h)
        call = nnx.capture(
            lambda layer, normed=normed: layer(normed, mask=mask, sow_weights=True),
            nnx.Intermediate,
        )
        _, sown = call(block.attention)
        (weights,) = jax.tree.leaves(sown)
        found.append(weights)
        h = block(h, mask)
    return found


def mean_distances(weights: jax.Array, key_mask: jax.Array) -> jax.Array:
    """How far each head looks: the mean of |query − key| by its weights, [N].

    Args:
      weights: [B, N, T, T].
      key_mask: bool [B, T]; queries that are padding do not count.

    >>> mean_distances(jnp.full((1, 1, 3, 3), 1 / 3), jnp.ones((1, 3), bool)).tolist()
    [0.8888888955116272]
    """
    places = jnp.arange(weights.shape[-1])
    away = jnp.abs(places[:, None] - places[None]).astype(jnp.float32)
    distances = jnp.einsum("bnts,ts->bnt", weights.astype(jnp.float32), away)
    real = key_mask[:, None].astype(jnp.float32)
    return (distances * real).sum(axis=(0, 2)) / real.sum(axis=(0, 2))
