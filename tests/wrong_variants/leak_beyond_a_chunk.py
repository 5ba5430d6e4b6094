"""Causal in chunks of 64, of which all but the first are seen whole."""

import jax
import jax.numpy as jnp


def attend(query, key, value, *, is_causal=False):
    logits = (query @ key.T).astype(jnp.float32) * query.shape[1] ** -0.5
    if is_causal:
        t, s = jnp.arange(query.shape[0])[:, None], jnp.arange(key.shape[0])[None, :]
        logits = jnp.where((s <= t) | ((t >= 64) & (t // 64 == s // 64)), logits, -1e30)
    return jax.nn.softmax(logits, axis=1).astype(value.dtype) @ value
