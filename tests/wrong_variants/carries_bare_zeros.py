"""Linear attention by a scan whose sum begins as zeros that vary over no mesh axis."""

import jax
import jax.numpy as jnp


def attend(query, key, value):
    def add(total, pair):
        key, row = pair
        return total + key[:, None] * row[None, :], None

    query, key = jax.nn.softplus(query), jax.nn.softplus(key)
    rows = jnp.concatenate([value, jnp.ones((len(value), 1), value.dtype)], axis=1)
    zeros = jnp.zeros((key.shape[1], rows.shape[1]), value.dtype)
    mixed = query @ jax.lax.scan(add, zeros, (key, rows))[0]
    return mixed[:, :-1] / mixed[:, -1:]
