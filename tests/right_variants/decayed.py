"""A sum that forgets: causal by itself, with a learned rate and a step."""

import jax
import jax.numpy as jnp


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def attend(query, key, value, *, params):
    wide = _wide(value.dtype)
    keep = jax.nn.sigmoid(params["rate"]).astype(wide)
    before = jnp.arange(len(query))[:, None] - jnp.arange(len(value))[None, :]
    weights = keep ** jnp.maximum(before, 0).astype(wide)
    weights = jnp.where(before >= 0, weights, 0)
    return (weights @ value.astype(wide)).astype(value.dtype)


def attend_init(rng, head_dim):
    return {"rate": jnp.zeros(())}


def attend_init_state(value_dim, dtype):
    return jnp.zeros(value_dim, _wide(dtype))


def attend_step(state, query, key, value, params):
    keep = jax.nn.sigmoid(params["rate"]).astype(state.dtype)
    state = keep * state + value.astype(state.dtype)
    return state, state.astype(value.dtype)
