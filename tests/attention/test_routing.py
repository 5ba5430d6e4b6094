"""Routing attention: each centroid takes its top queries and keys."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.routing_attention import (
    routing,
    routing_exact,
    routing_init,
    routing_update,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V, T = 6, 3, 26
PARAMS = routing_init(jax.random.key(1), H, num_clusters=4)


def _draw_arrays(draw, length=T, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _normalize(x):
    x = x - x.mean(axis=1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-6)


def _by_loops(query, key, value, centroid, real):
    """The paper's algorithm, cluster by cluster."""
    query, key = _normalize(query), _normalize(key)
    size = -(-int(real.sum()) // len(centroid))
    out, times = np.zeros((len(query), value.shape[1])), np.zeros(len(query))
    for mu in centroid:
        queries, keys = (
            sorted(np.flatnonzero(real), key=lambda t, x=x: -float(mu @ x[t]))[:size]
            for x in (query, key)
        )
        for t in queries:
            logits = key[keys] @ query[t] / np.sqrt(H)
            weights = np.exp(logits - logits.max())
            out[t] += weights @ value[keys] / weights.sum()
            times[t] += 1
    return out / np.maximum(times, 1)[:, None], times


@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_equation(padded, draw, slope):
    arrays = _draw_arrays(draw)
    real = np.ones(T, bool)
    if padded:
        real[[0, 7, 8, 22, 25]] = False
    centroid = np.asarray(PARAMS["centroid"], np.float64)

    def theirs(**wide):
        return _by_loops(**wide, centroid=centroid, real=real)[0]

    wide = {k: a.astype(np.float64) for k, a in arrays.items()}
    times = _by_loops(**wide, centroid=centroid, real=real)[1]
    assert times.max() > 1 and (times[real] == 0).any()  # means, and some left out
    ours = functools.partial(
        routing, params=PARAMS, key_mask=jnp.asarray(real) if padded else None
    )
    found = helpers.agree(ours, theirs, arrays)
    assert not np.any(found["out"][times == 0])


def test_one_cluster_is_attention_on_normalised_vectors(draw):
    arrays = _draw_arrays(draw)
    one = {"centroid": PARAMS["centroid"][:1]}
    fn = functools.partial(routing, params=one)
    ours = helpers.same(fn, routing_exact, arrays, atol=2e-5)
    plain = dot_product(
        _normalize(arrays["query"]), _normalize(arrays["key"]), arrays["value"]
    )
    np.testing.assert_allclose(ours["out"], plain, atol=1e-5)


@pytest.mark.parametrize("length", [21, 2])
def test_padding_is_invisible(length, draw):
    arrays = _draw_arrays(draw)
    see = jax.jit(functools.partial(routing, params=PARAMS))
    alone = see(**{k: a[:length] for k, a in arrays.items()})
    for array in arrays.values():
        array[length:] = 1e9
    padded = see(**arrays, key_mask=jnp.arange(T) < length)
    np.testing.assert_allclose(padded[:length], alone, atol=1e-6)
    assert not padded[length:].any()


def test_centroids_have_no_gradient(draw):
    arrays = _draw_arrays(draw)
    grads = jax.jit(jax.grad(lambda p: routing(**arrays, params=p).sum()))(PARAMS)
    assert not grads["centroid"].any()


def test_update_is_a_moving_average(draw):
    arrays = _draw_arrays(draw)
    del arrays["value"]
    real = np.arange(T) % 5 > 0
    # Nothing is nearest to the short one: of the others, opposites, one is nearer.
    some = np.asarray(PARAMS["centroid"])
    centroid = np.concatenate([some, -some, 1e-3 * some[:1]])
    moved = centroid * 0.9
    for x in map(_normalize, arrays.values()):
        for t in np.flatnonzero(real):
            moved[(centroid @ x[t]).argmax()] += 0.05 * x[t] / np.sqrt(H)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    new = jax.jit(functools.partial(routing_update, decay=0.9))(
        {"centroid": centroid}, **arrays, key_mask=jnp.asarray(real)
    )
    np.testing.assert_allclose(new["centroid"], moved, atol=1e-5)
    # A centroid without tokens keeps its direction.
    np.testing.assert_allclose(new["centroid"][-1], centroid[0], atol=1e-6)
    assert np.abs(new["centroid"][0] - centroid[0]).max() > 1e-3


def test_number_of_clusters_follows_the_length():
    for length, clusters in ((1, 1), (512, 23), (1024, 32)):
        made = routing_init(jax.random.key(0), H, max_length=length)["centroid"]
        assert made.shape == (clusters, H)
        np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-6)


def test_bad_arguments_are_named(draw):
    arrays = _draw_arrays(draw)
    with pytest.raises(ValueError, match="T=4 and S=26"):
        routing(**{**arrays, "query": arrays["query"][:4]}, params=PARAMS)
    with pytest.raises(ValueError, match="centroid.* must have shape"):
        routing(**arrays, params={"centroid": np.ones((4, H + 1))})
    with pytest.raises(ValueError, match="`decay` must be in .* but is 2"):
        routing_update(PARAMS, arrays["query"], arrays["key"], decay=2.0)
    with pytest.raises(ValueError, match="`num_clusters` must be at least 1"):
        routing_init(jax.random.key(0), H, num_clusters=0)


@pytest.mark.parametrize("clusters", [1, 3])
def test_causal_sees_the_past_of_the_nearest_centroid(clusters, draw):
    length = 21
    arrays = draw({"query": (length, 8), "key": (length, 8), "value": (length, 5)})
    params = routing_init(jax.random.key(0), 8, num_clusters=clusters)
    see = jax.jit(functools.partial(routing, is_causal=True, chunk_size=length))
    out = see(**arrays, params=params)

    def normal(x):
        x = np.float64(x) - np.float64(x).mean(axis=1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)

    q, k = normal(arrays["query"]), normal(arrays["key"])
    nearest = ((q + k) @ np.float64(params["centroid"]).T).argmax(axis=1)
    assert len(set(nearest)) == clusters
    want = np.zeros((length, 5))
    for t in range(length):
        near = [s for s in range(t + 1) if nearest[s] == nearest[t]]
        weights = np.exp(q[t] @ k[near].T / np.sqrt(8))
        want[t] = weights @ arrays["value"][near] / weights.sum()
    np.testing.assert_allclose(out, want, atol=1e-5)
