"""Adds weighted values up one key after the other, in the dtype of the inputs."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def mix(weights, value):
    def add(total, one):
        weight, row = one
        return total + weight[:, None] * row[None], None

    total = jnp.zeros((weights.shape[0], value.shape[1]), value.dtype)
    return jax.lax.scan(add, total, (weights.T, value))[0]


def forward(weights, value):
    return mix(weights, value), (weights, value)


def backward(kept, given):
    weights, value = kept
    return given @ value.T, weights.T @ given


mix.defvjp(forward, backward)


def attend(query, key, value):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    return mix(jax.nn.softmax(logits, axis=1).astype(value.dtype), value)
