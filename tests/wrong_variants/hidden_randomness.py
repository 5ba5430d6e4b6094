"""Draws random features outside of its arguments."""

import jax
import jax.numpy as jnp
import numpy as np


def attend(query, key, value):
    draw = np.random.standard_normal((query.shape[1], 16)).astype(np.float32)
    features = lambda x: jax.nn.softmax(x.astype(jnp.float32) @ draw, axis=1)  # noqa: E731
    weights = features(query) @ features(key).T
    out = weights @ value.astype(jnp.float32) / weights.sum(axis=1, keepdims=True)
    return out.astype(value.dtype)
