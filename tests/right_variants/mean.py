"""The mean of the real values: as little as can be."""

import jax.numpy as jnp


def attend(query, key, value, *, key_mask=None):
    """Averages the values."""
    real = jnp.ones(len(value), bool) if key_mask is None else key_mask
    count = jnp.maximum(real.sum(), 1).astype(value.dtype)
    row = jnp.where(real[:, None], value, 0).sum(axis=0) / count
    return jnp.broadcast_to(row[None, :], (len(query), value.shape[1]))
