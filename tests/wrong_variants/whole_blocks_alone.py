"""Reshapes into blocks, which lengths that are no multiple of 16 do not allow."""

import jax
import jax.numpy as jnp


def attend(query, key, value):
    blocks = lambda x: x.reshape(-1, min(16, len(x)), x.shape[1])  # noqa: E731
    q, k, v = blocks(query), blocks(key), blocks(value)
    logits = jnp.einsum("ctd,csd->cts", q, k) * query.shape[1] ** -0.5
    out = jnp.einsum("cts,csv->ctv", jax.nn.softmax(logits, axis=-1), v)
    return out.reshape(len(query), -1)
