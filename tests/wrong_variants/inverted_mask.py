"""Reads True as masked."""

import jax
import jax.numpy as jnp


def attend(query, key, value, bias=None, mask=None):
    logits = query @ key.T * query.shape[1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, -1e30, logits)
    return jax.nn.softmax(logits, axis=1) @ value
