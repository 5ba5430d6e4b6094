"""Right but for the gradient of the values, a sum over queries in their dtype."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def mix(weights, value):
    return weights @ value


def forward(weights, value):
    return mix(weights, value), (weights, value)


def backward(kept, given):
    weights, value = kept

    def add(total, one):
        weight, row = one
        return total + weight[:, None] * row[None], None

    grad = jax.lax.scan(add, jnp.zeros_like(value), (weights, given))[0]
    return given @ value.T, grad


mix.defvjp(forward, backward)


def attend(query, key, value):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    return mix(jax.nn.softmax(logits, axis=1).astype(value.dtype), value)
