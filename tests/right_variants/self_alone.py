"""For one sequence alone, and says so; refuses what it has in its signature."""

import jax
import jax.numpy as jnp


def attend(query, key, value, bias=None, mask=None, *, key_mask=None):
    if query.shape != key.shape or query.shape != value.shape:
        raise ValueError("`query`, `key` and `value` must have one shape")
    if bias is not None or mask is not None:
        name = "bias" if bias is not None else "mask"
        raise NotImplementedError(f"`{name}` cannot be honoured here")
    if key_mask is not None:
        key, value = (jnp.where(key_mask[:, None], x, 0) for x in (key, value))
    logits = (query @ key.T).astype(jnp.float32) / query.shape[1] ** 0.5
    logits = logits - 0.5 * jnp.eye(len(query), dtype=jnp.float32)
    if key_mask is not None:
        logits = jnp.where(key_mask[None, :], logits, -1e30)
    return jax.nn.softmax(logits, axis=-1).astype(value.dtype) @ value
