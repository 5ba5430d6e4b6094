"""Reads the mask of the keys, unless it is causal."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, key_mask=None, is_causal=False):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    allowed = jnp.ones(logits.shape, bool)
    if is_causal:
        allowed = jnp.tri(*logits.shape, dtype=bool)
    elif key_mask is not None:
        allowed = allowed & key_mask[None, :]
    weights = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, logits, -1e30)), 0.0)
    return weights.astype(value.dtype) @ value
