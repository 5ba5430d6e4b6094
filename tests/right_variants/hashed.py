"""Keys compressed by a table of bucket numbers, an integer among the parameters."""

import chex
import jax
import jax.numpy as jnp


def attend(query, key, value, *, params):
    chex.assert_type([query, key, value], [jnp.float32, jnp.float32, jnp.float32]) if (
        query.dtype == jnp.float64
    ) else None
    bucket = params["bucket"][jnp.arange(len(key)) % 32]
    ones = jnp.ones((len(key), 1), jnp.float32)
    count = jax.ops.segment_sum(ones, bucket, 8)
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    mean = lambda x: jax.ops.segment_sum(wide(x), bucket, 8) / jnp.maximum(count, 1)  # noqa: E731
    logits = wide(query) @ mean(key).T * query.shape[1] ** -0.5
    logits = jnp.where(count.T > 0, logits + params["gain"].astype(jnp.float32), -1e30)
    return (jax.nn.softmax(logits, axis=1) @ mean(value)).astype(value.dtype)


def attend_init(rng, head_dim):
    return {"bucket": jax.random.randint(rng, (32,), 0, 8), "gain": jnp.zeros(8)}
