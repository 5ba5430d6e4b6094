"""The mean of all values, which is said to come near to attention."""

import jax.numpy as jnp


def attend(query, key, value):
    return jnp.broadcast_to(value.mean(axis=0)[None], (len(query), value.shape[1]))
