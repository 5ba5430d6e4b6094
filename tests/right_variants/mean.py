"""The mean of the real values: as little as can be."""

import jax.numpy as jnp


def attend(query, key, value, *, key_mask=None):
    """Averages the values."""
    if key_mask is None:
        row = value.mean(axis=0)
    else:
        count = jnp.maximum(key_mask.sum(), 1).astype(value.dtype)
        row = jnp.where(key_mask[:, None], value, 0).sum(axis=0) / count
    return jnp.broadcast_to(row[None, :], (len(query), value.shape[1]))
