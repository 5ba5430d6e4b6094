"""Takes exponentials without subtracting a maximum."""

import jax.numpy as jnp


def attend(query, key, value):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    weights = jnp.exp(logits)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights.astype(value.dtype) @ value
