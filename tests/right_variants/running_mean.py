"""A causal mean in linear time with a step, as a record of its own."""

import jax
import jax.numpy as jnp

from attn_jax import Variant


def _attend(query, key, value, *, key_mask=None, is_causal=False):
    wide = jnp.promote_types(value.dtype, jnp.float32)
    real = jnp.ones(len(key), bool) if key_mask is None else key_mask
    kept = jnp.where(real[:, None], value.astype(wide), 0)
    count = real.astype(wide)
    if is_causal:
        total, number = jnp.cumsum(kept, axis=0), jnp.cumsum(count)
        if len(query) != len(key):
            raise ValueError("causal needs T = S")
    else:
        total = jnp.broadcast_to(kept.sum(0)[None], (len(query), value.shape[1]))
        number = jnp.broadcast_to(count.sum()[None], (len(query),))
    # The query opens or closes its own row.
    gate = jax.nn.sigmoid(query.astype(wide).sum(axis=1))
    out = gate[:, None] * total / jnp.maximum(number, 1)[:, None]
    return out.astype(value.dtype)


def _step(state, query, key, value, position):
    state = state + value.astype(state.dtype)
    gate = jax.nn.sigmoid(query.astype(state.dtype).sum())
    return state, (gate * state / (position + 1)).astype(value.dtype)


attend = Variant(
    name="running_mean",
    fn=_attend,
    step=_step,
    init_state=lambda value_dim, dtype: jnp.zeros(
        value_dim, jnp.promote_types(dtype, jnp.float32)
    ),
    time="O(T)",
    memory="O(T)",
)
