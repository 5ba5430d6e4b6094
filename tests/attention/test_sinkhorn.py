"""Sinkhorn attention: own block of keys, and one brought by a soft permutation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.sinkhorn_attention import (
    sinkhorn,
    sinkhorn_init,
    sinkhorn_normalize,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

normalize = jax.jit(sinkhorn_normalize, static_argnames=("iterations", "is_causal"))

H, V, T, B = 6, 3, 22, 5
# Large enough for a sort that is not uniform.
PARAMS = jax.tree.map(
    lambda x: 2 * x, sinkhorn_init(jax.random.key(1), H, max_length=40, block_size=B)
)


def _draw_arrays(draw, length=T, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _balance(scores, allowed, iterations, causal):
    """Sinkhorn's iteration on positive numbers, entry by entry."""
    p = np.where(allowed, np.exp(scores), 0.0)

    def divide(p, by):
        return np.divide(p, by, out=np.zeros_like(p), where=by > 0)

    p = divide(p, p.sum(axis=1, keepdims=True))
    for _ in range(iterations):
        p = divide(p, np.cumsum(p, axis=0) if causal else p.sum(axis=0)[None, :])
        p = divide(p, p.sum(axis=1, keepdims=True))
    return p


def _by_loops(query, key, value, causal, real, iterations=4, temperature=0.7):
    """The paper's equations, query by query."""
    length = len(query)
    blocks = -(-length // B)
    places = [
        [t for t in range(i * B, min((i + 1) * B, length)) if real[t]]
        for i in range(blocks)
    ]
    rows = np.zeros((blocks, H))
    for i in range(blocks):
        pooled = places[i]
        if causal:
            pooled = [t for t in range(i * B + 1) if real[t]]
        if pooled:
            rows[i] = key[pooled].mean(axis=0)
    hidden = np.maximum(rows @ np.asarray(PARAMS["hidden"], np.float64), 0)
    scores = hidden @ np.asarray(PARAMS["out"], np.float64)[:, :blocks] / temperature
    some = np.array([bool(p) for p in places])
    allowed = some[:, None] & some[None, :]
    if causal:
        allowed &= np.tri(blocks, k=-1, dtype=bool)
    sort = _balance(scores, allowed, iterations, causal)
    out = np.zeros((length, value.shape[1]))
    for t in np.flatnonzero(real):
        i = t // B
        seen = [s for s in places[i] if not causal or s <= t]
        keys, values = [key[s] for s in seen], [value[s] for s in seen]
        counts = [1.0] * len(seen)
        for u in range(B):
            at = [(sort[i, j], j * B + u) for j in range(blocks)]
            at = [(r, s) for r, s in at if s < length and real[s] and r > 0]
            share = sum(r for r, _ in at)
            if share > 0:
                keys.append(sum(r * key[s] for r, s in at) / share)
                values.append(sum(r * value[s] for r, s in at) / share)
                counts.append(share)
        logits = np.array(keys) @ query[t] / np.sqrt(H)
        weights = counts * np.exp(logits - logits.max())
        out[t] = weights @ np.array(values) / weights.sum()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_equation(causal, padded, draw, slope):
    arrays = _draw_arrays(draw)
    real = np.ones(T, bool)
    if padded:  # single tokens, and the whole of block 2
        real[[0, 7, 10, 11, 12, 13, 14, 21]] = False
    theirs = functools.partial(_by_loops, causal=causal, real=real)
    ours = functools.partial(
        sinkhorn,
        params=PARAMS,
        key_mask=jnp.asarray(real) if padded else None,
        is_causal=causal,
        block_size=B,
        iterations=4,
        temperature=0.7,
    )
    helpers.agree(ours, theirs, arrays, slopes=5e-4)


def test_normalised_is_doubly_stochastic(draw):
    logits = 3 * draw({"x": (7, 7)})["x"]
    doubly = normalize(logits, 100)
    np.testing.assert_allclose(doubly.sum(axis=0), 1, atol=1e-4)
    np.testing.assert_allclose(doubly.sum(axis=1), 1, atol=1e-5)
    assert (doubly > 0).all()
    # It scales rows and columns alone.
    left = np.log(doubly) - logits
    np.testing.assert_allclose(
        left, left[:1] + left[:, :1] - left[0, 0], atol=1e-3, rtol=0
    )
    # A permutation survives, however large the numbers.
    order = np.random.default_rng(0).permutation(7)
    hard = normalize(1e4 * np.eye(7, dtype="f")[order], 5)
    np.testing.assert_allclose(hard, np.eye(7)[order], atol=1e-6)


def test_normalised_leaves_masked_blocks_out(draw):
    logits = draw({"x": (6, 6)})["x"]
    some = np.array([True, True, False, True, True, False])
    part = normalize(logits, 5, some[:, None] & some[None, :])
    alone = normalize(logits[some][:, some], 5)
    np.testing.assert_allclose(part[some][:, some], alone, atol=1e-6)
    assert not part[~some].any() and not part[:, ~some].any()


def test_causal_balance_does_not_see_later_rows(draw):
    logits = draw({"x": (6, 6)})["x"]
    tri = np.tri(6, dtype=bool)
    first = normalize(logits, 4, tri, is_causal=True)
    later = logits.copy()  # in place, the first call might still be reading it
    later[4:] = 50.0
    second = normalize(later, 4, tri, is_causal=True)
    np.testing.assert_array_equal(first[:4], second[:4])
    assert np.any(first[4:] != second[4:]) and not np.triu(first, 1).any()


@pytest.mark.parametrize("causal", [False, True])
def test_one_block_is_dot_product(causal, draw):
    arrays = _draw_arrays(draw)
    ours = functools.partial(
        sinkhorn, params=PARAMS, block_size=T + 3, is_causal=causal
    )
    theirs = functools.partial(dot_product, is_causal=causal)
    helpers.same(ours, theirs, arrays, atol=2e-5)


def test_a_hard_sort_brings_one_block(draw):
    # Keys whose mean in block i is along axis i, and a network that swaps 0 and 1.
    arrays = _draw_arrays(draw, 10)
    arrays["key"][:5] += 9 * np.eye(H, dtype="f")[0]
    arrays["key"][5:] += 9 * np.eye(H, dtype="f")[1]
    params = {"hidden": jnp.eye(H), "out": jnp.eye(H)[:, [1, 0]] * 100}
    see = jax.jit(functools.partial(sinkhorn, block_size=5))
    ours = see(**arrays, params=params)
    # Own and brought block together are all keys.
    np.testing.assert_allclose(ours, dot_product(**arrays), atol=1e-5)
    stay = {"hidden": jnp.eye(H), "out": jnp.eye(H)[:, [0, 1]] * 100}
    ours = see(**arrays, params=stay)
    own = np.kron(np.eye(2), np.ones((5, 5))) > 0
    np.testing.assert_allclose(ours, dot_product(**arrays, mask=own), atol=1e-5)


def test_noise_follows_its_key(draw):
    arrays = _draw_arrays(draw)
    see = jax.jit(functools.partial(sinkhorn, params=PARAMS, block_size=B))
    none, one, again, other = (
        see(**arrays, rng=rng)
        for rng in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - none).max() > 1e-3


def test_parameters_learn(draw):
    arrays = _draw_arrays(draw)
    grads = jax.jit(
        jax.grad(lambda p: (sinkhorn(**arrays, params=p, block_size=B) ** 2).sum())
    )(PARAMS)
    assert all(jnp.abs(g).max() > 1e-4 for g in grads.values())
    assert not grads["out"][:, -(-T // B) :].any()  # blocks that are not there


def test_bad_arguments_are_named(draw):
    arrays = _draw_arrays(draw)
    see = functools.partial(sinkhorn, **arrays, params=PARAMS)
    with pytest.raises(ValueError, match="sort at most 8 .* T=22 .* max_length=22"):
        see(block_size=2)
    with pytest.raises(ValueError, match="`block_size` must be at least 1"):
        see(block_size=0)
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        see(temperature=0.0)
    with pytest.raises(ValueError, match="`iterations` must be at least 0"):
        see(iterations=-1)
    with pytest.raises(ValueError, match="T=4 and S=22"):
        sinkhorn(**{**arrays, "query": arrays["query"][:4]}, params=PARAMS)
    with pytest.raises(ValueError, match="hidden.* must have shape"):
        sinkhorn(**arrays, params={**PARAMS, "hidden": np.ones((H, 2))})
