"""Gives padding a weight of zero, which does not hide a value that is NaN."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, key_mask=None):
    if key_mask is not None:
        key = jnp.where(key_mask[:, None], key, 0.0)
    logits = query @ key.T * query.shape[1] ** -0.5
    if key_mask is None:
        return jax.nn.softmax(logits, axis=1) @ value
    weights = jax.nn.softmax(jnp.where(key_mask[None], logits, -1e30), axis=1)
    return jnp.where(key_mask[None], weights, 0.0) @ value
