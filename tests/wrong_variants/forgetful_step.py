"""A causal mean whose step forgets all but the last two tokens."""

import jax.numpy as jnp


def attend(query, key, value, *, is_causal=False):
    count = jnp.arange(1, len(value) + 1, dtype=value.dtype)[:, None]
    mean = jnp.cumsum(value, axis=0) / count
    return mean if is_causal else jnp.broadcast_to(mean[-1:], value.shape)


def attend_init_state(value_dim, dtype):
    return jnp.zeros((2, value_dim), dtype)


def attend_step(state, query, key, value, position):
    state = jnp.stack([state[1], value])
    return state, state.sum(axis=0) / jnp.minimum(position + 1, 2).astype(value.dtype)
