"""Adds weighted values up one key after the other, in the dtype of the inputs."""

import jax
import jax.numpy as jnp


def attend(query, key, value):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    weights = jax.nn.softmax(logits, axis=1).astype(value.dtype)

    def add(total, one):
        weight, row = one
        return total + weight[:, None] * row[None], None

    total = jnp.zeros((query.shape[0], value.shape[1]), value.dtype)
    return jax.lax.scan(add, total, (weights.T, value))[0]
