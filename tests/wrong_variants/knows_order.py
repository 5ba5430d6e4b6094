"""Claims to know nothing of order, and prefers near keys."""

import jax
import jax.numpy as jnp


def attend(query, key, value):
    t, s = jnp.arange(query.shape[0])[:, None], jnp.arange(key.shape[0])[None, :]
    near = -0.1 * jnp.abs(t - s).astype(query.dtype)
    return jax.nn.softmax(query @ key.T * query.shape[1] ** -0.5 + near, axis=1) @ value
