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

    pairs = (len(query), len(key))
    allowed = jnp.ones(pairs, bool) if mask is None else mask
    if key_mask is not None:
        allowed = allowed & key_mask[None, :]
    if is_causal:
        allowed = allowed & jnp.tri(*pairs, dtype=bool)
    # What nobody sees may be anything, also NaN, which a weight of zero keeps.
    seen = allowed.any(axis=0)[:, None]
    key, value = (jnp.where(seen, x, 0) for x in (key, value))
    logits = unit(query) @ unit(key).T
    logits = logits * jnp.exp(params["log_temperature"]).astype(logits.dtype)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    logits = jnp.where(allowed, logits, -1e30)
    weights = jnp.where(allowed, jax.nn.softmax(logits, axis=1), 0.0)
    return weights.astype(value.dtype) @ value


def attend_init(rng, head_dim):
    return {"log_temperature": jnp.asarray(1.5)}
