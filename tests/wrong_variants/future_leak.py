"""Causal weights, normalised by a sum that counts the future."""

import jax.numpy as jnp


def attend(query, key, value, *, is_causal=False):
    logits = query @ key.T * query.shape[1] ** -0.5
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    total = weights.sum(axis=1, keepdims=True)
    if is_causal:
        weights = jnp.tril(weights)
    return (weights / total) @ value
