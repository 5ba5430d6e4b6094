"""One maximum for the whole batch, which small examples then vanish under."""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@custom_vmap
def _largest(logits):
    return logits.max()


@_largest.def_vmap
def _(axis_size, in_batched, logits):
    return jnp.full((axis_size,), logits.max()), True


def attend(query, key, value):
    logits = query @ key.T * query.shape[1] ** -0.5
    weights = jax.nn.relu(logits / jax.lax.stop_gradient(_largest(logits)))
    return weights @ value
