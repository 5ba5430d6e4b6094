"""Drops weights and does not make up for it."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, dropout_rate=0.0, rng=None):
    weights = jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1)
    if dropout_rate:
        kept = jax.random.bernoulli(rng, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights, 0.0)
    return weights @ value
