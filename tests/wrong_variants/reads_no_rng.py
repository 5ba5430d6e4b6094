"""Needs an rng and draws nothing from it."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, rng):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    return jax.nn.softmax(logits, axis=1).astype(value.dtype) @ value
