"""Poolingformer: the equation by loops, and its limits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import dot_product, truncated
from attn_jax.attention.pooling_attention import poolingformer, poolingformer_init
from tests import helpers

H, V = 4, 3
PARTS = ("query", "key", "value")


def _draw(draw, length, seed=0):
    arrays = draw(
        {"query": (length, H), "key": (length, H), "value": (length, V)}, seed
    )
    params = poolingformer_init(jax.random.key(seed), H, value_dim=V)
    return arrays | {f"to_{name}": np.asarray(p) for name, p in params.items()}


def _apply(query, key, value, *, options, **params):
    @jax.jit
    def run(query, key, value, params):
        named = {name: params[f"to_{name}"] for name in PARTS}
        return poolingformer(query, key, value, params=named, **options)

    return run(query, key, value, params)


def _softmax(query, pairs):
    w = np.exp([query @ k / np.sqrt(len(k)) for k, _ in pairs])
    w /= w.sum()
    return sum(weight * v for weight, (_, v) in zip(w, pairs, strict=True))


def _by_equation(
    query,
    key,
    value,
    to_query,
    to_key,
    to_value,
    *,
    window,
    pool,
    reach,
    is_causal,
    key_mask,
):
    """Both levels, position by position in float64."""
    length = len(query)
    near = np.zeros(value.shape)
    for t in range(length):
        last = t if is_causal else t + window
        seen = range(max(0, t - window), min(length - 1, last) + 1)
        pairs = [(key[s], value[s]) for s in seen if key_mask[s]]
        if pairs:
            near[t] = _softmax(query[t], pairs)
    pools = {}
    for j in range(-(-length // pool)):
        inside = range(j * pool, min((j + 1) * pool, length))
        real = [near[s] for s in inside if key_mask[s]]
        if real:
            pools[j] = np.mean(real, axis=0)
    out = near.copy()
    for t in range(length):
        pairs = []
        for j, mean in pools.items():
            first, last = j * pool, (j + 1) * pool - 1
            ahead = last <= t if is_causal else first <= t + reach
            if last >= t - reach and ahead:
                pairs.append((mean @ to_key, mean @ to_value))
        if pairs:
            out[t] = out[t] + _softmax(near[t] @ to_query, pairs)
    return out


@pytest.mark.parametrize(
    "length, window, pool, reach, causal, masked",
    [
        (1, 1, 2, 3, False, False),
        (19, 2, 3, 5, False, True),
        (19, 2, 3, 5, True, True),
        (41, 1, 4, 3, False, False),
        (12, 3, 5, 0, True, False),
    ],
)
def test_equals_the_equation(length, window, pool, reach, causal, masked, draw, slope):
    arrays = _draw(draw, length)
    keep = np.arange(length) % 5 != 1
    keep[6:9] = False  # a whole pool
    if not masked:
        keep[:] = True
    options = dict(window=window, pool=pool, reach=reach, is_causal=causal)
    given = {**options, "key_mask": keep if masked else None}
    ours = functools.partial(_apply, options=given)
    loops = functools.partial(_by_equation, **options, key_mask=keep)
    helpers.agree(ours, loops, arrays, slopes=5e-4)


def test_its_levels_are_a_window_and_at_most_dot_product(draw):
    arrays = _draw(draw, 21)
    q, k, v = (arrays[name] for name in PARTS)
    params = {name: arrays[f"to_{name}"] for name in PARTS}
    near = truncated(q, k, v, left=2, right=2)
    silent = params | {"value": jnp.zeros((V, V))}
    sizes = dict(window=2, pool=1, reach=21)
    found = poolingformer(q, k, v, params=silent, **sizes)
    np.testing.assert_allclose(found, near, atol=1e-6)
    far = dot_product(*(near @ params[name] for name in PARTS))
    found = poolingformer(q, k, v, params=params, **sizes)
    np.testing.assert_allclose(found, near + far, atol=1e-5)
