"""Linear in T, but for the causal form, which builds the T x T matrix."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, is_causal=False):
    q, k = jax.nn.elu(query) + 1.0, jax.nn.elu(key) + 1.0
    if is_causal:
        weights = jnp.tril(q @ k.T)
        return weights @ value / weights.sum(axis=1, keepdims=True)
    return q @ (k.T @ value) / (q @ k.sum(axis=0))[:, None]
