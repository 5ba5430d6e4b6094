"""Computes in float32, and returns that too."""

import jax
import jax.numpy as jnp


def attend(query, key, value):
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    return jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5, axis=1) @ value
