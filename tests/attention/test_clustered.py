"""Clustered attention: queries that share a result, tokens that meet in clusters."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.clustered_attention import (
    clustered,
    clusterformer,
    clusterformer_init,
    clusterformer_update,
    improved_clustered,
    kmeans,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V, T = 6, 3, 26
RNG = jax.random.key(2)


def _draw_arrays(draw, length=T, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _lloyd(x, labels_of_start, iterations):
    """k-means by loops, from given rows."""
    centres = x[labels_of_start]
    for i in range(iterations + 1):
        labels = np.array([((row - centres) ** 2).sum(axis=1).argmin() for row in x])
        if i < iterations:
            for j in set(labels):
                centres[j] = x[labels == j].mean(axis=0)
    return labels


def test_kmeans_is_lloyds_algorithm(draw):
    x = draw({"x": (40, H)})["x"].astype(np.float64)
    # The first centres are the rows of the largest lots.
    assign = jax.jit(
        functools.partial(kmeans, num_clusters=5), static_argnames="iterations"
    )
    start = np.asarray(assign(x.astype("f"), RNG, iterations=0))
    lots = np.asarray(jax.random.uniform(RNG, (40,)))
    chosen = np.argsort(-lots, kind="stable")[:5]
    np.testing.assert_array_equal(start, _lloyd(x, chosen, 0))
    moved = np.asarray(assign(x.astype("f"), RNG, iterations=4))
    np.testing.assert_array_equal(moved, _lloyd(x, chosen, 4))
    assert (moved != start).any()


def test_kmeans_leaves_padding_out(draw):
    x = draw({"x": (20, H)})["x"]
    real = np.arange(20) < 13
    group = jax.jit(functools.partial(kmeans, rng=RNG, num_clusters=4))
    alone = group(x[:13])
    x[13:] = 1e9
    padded = group(x, key_mask=real)
    np.testing.assert_array_equal(padded[:13], alone)
    assert (padded[13:] == 4).all()


def _clustered_by_loops(query, key, value, labels, top_k=None):
    """The paper's equations, query by query."""
    out = np.zeros((len(query), value.shape[1]))
    for t in range(len(query)):
        centroid = query[labels == labels[t]].mean(axis=0)
        weights = _softmax(key @ centroid / np.sqrt(H))
        if top_k is not None:
            best = np.argsort(-weights)[:top_k]
            mass = weights[best].sum()
            weights[best] = mass * _softmax(key[best] @ query[t] / np.sqrt(H))
        out[t] = weights @ value
    return out


@pytest.mark.parametrize("top_k", [None, 7])
def test_equals_the_equation(top_k, draw, slope):
    arrays = _draw_arrays(draw)
    labels = np.asarray(kmeans(arrays["query"], RNG, num_clusters=4))
    assert len(set(labels.tolist())) == 4
    fn = functools.partial(clustered, rng=RNG, num_clusters=4)
    if top_k:
        fn = functools.partial(improved_clustered, rng=RNG, num_clusters=4, top_k=top_k)
    theirs = functools.partial(_clustered_by_loops, labels=labels, top_k=top_k)
    helpers.agree(fn, theirs, arrays)


@pytest.mark.parametrize(
    "fn, options",
    [
        (clustered, {"num_clusters": T}),
        (clustered, {"num_clusters": 40}),
        (improved_clustered, {"num_clusters": 40, "top_k": 2}),
        (improved_clustered, {"num_clusters": 2, "top_k": 99}),
    ],
)
def test_exact_at_the_limit(fn, options, draw):
    arrays = _draw_arrays(draw)
    arrays["query"][3] = arrays["query"][9]  # twins share a cluster
    ours = helpers.value_and_grads(functools.partial(fn, rng=RNG, **options), arrays)
    theirs = helpers.value_and_grads(dot_product, arrays)
    for name in ("out", "key", "value"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)


def _clusters(arrays, centroid):
    x = (arrays["query"] + arrays["key"]) / 2
    return (x @ centroid.T / np.linalg.norm(centroid, axis=1)).argmax(axis=1)


@pytest.mark.parametrize("causal", [False, True])
def test_clusterformer_is_dense_attention_within_clusters(causal, draw):
    arrays = _draw_arrays(draw)
    params = clusterformer_init(RNG, H, num_clusters=3)
    params = {"centroid": params["centroid"] * jnp.array([[1.0], [5.0], [0.2]])}
    labels = _clusters(arrays, np.asarray(params["centroid"]))
    pairs = labels[:, None] == labels[None, :]
    assert len(set(labels.tolist())) == 3
    if causal:
        pairs &= np.tri(T, dtype=bool)
    ours = functools.partial(clusterformer, params=params, is_causal=causal)
    theirs = functools.partial(dot_product, mask=pairs)
    helpers.same(ours, theirs, arrays, atol=2e-5)
    # Small chunks leave pairs out.
    small = jax.jit(functools.partial(ours, chunk_size=2))(**arrays)
    assert np.abs(small - theirs(**arrays)).max() > 0.1


def test_clusterformer_update_finds_clusters(draw):
    centres = np.eye(3, H, dtype="f")
    noise = draw({"query": (60, H), "key": (60, H)})
    arrays = {k: 3 * np.repeat(centres, 20, axis=0) + 0.1 * a for k, a in noise.items()}
    start = {"centroid": jnp.asarray(centres + 0.4)}
    real = np.arange(60) % 2 == 0
    moved = jax.jit(clusterformer_update)(start, **arrays, key_mask=jnp.asarray(real))
    x = (arrays["query"] + arrays["key"]) / 2
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for j in range(3):
        mean = x[20 * j : 20 * (j + 1)][real[:20]].mean(axis=0)
        expected = mean / np.linalg.norm(mean)
        np.testing.assert_allclose(moved["centroid"][j], expected, atol=1e-5)


@pytest.mark.parametrize(
    "fn, options, error, message",
    [
        (clustered, {"num_clusters": 0}, ValueError, "`num_clusters` must be at least"),
        (clustered, {"iterations": 1.5}, TypeError, "`iterations` must be an int"),
        (improved_clustered, {"top_k": 0}, ValueError, "`top_k` must be at least 1"),
        (clustered, {"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=26"),
    ],
)
def test_bad_arguments_are_named(fn, options, error, message, draw):
    with pytest.raises(error, match=message):
        fn(**{**_draw_arrays(draw), "rng": RNG, **options})


def test_wrong_centroids_are_named(draw):
    with pytest.raises(ValueError, match="centroid.* must have shape"):
        clusterformer(**_draw_arrays(draw), params={"centroid": np.ones((3, H + 1))})
