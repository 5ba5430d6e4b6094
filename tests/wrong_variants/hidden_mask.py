"""A mean over the neighbours in linear time, checked against a T x T mask of bools."""

import jax.numpy as jnp


def attend(query, key, value):
    near = jnp.abs(jnp.arange(len(query))[:, None] - jnp.arange(len(key))[None, :]) <= 1
    count = near.sum(axis=1)[:, None].astype(value.dtype)
    padded = jnp.pad(value, ((1, 1), (0, 0)))
    return (padded[:-2] + padded[1:-1] + padded[2:]) / count
