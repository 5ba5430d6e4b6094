"""Graph attention: against its equations, and edge lists against masks."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import masks
from attn_jax.attention import graph
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 6, 5
SCORES = ["dot_product", "gat", "gatv2"]
# Compiled, so that nodes are traced; where they are to be concrete it says so.
_attend = jax.jit(graph.graph_attention, static_argnames="score")
_dot_product = jax.jit(dot_product)


def _leaky(x):
    return np.where(x > 0, x, 0.2 * x)


def _draw_arrays(draw, queries, keys, seed=0):
    shapes = {"query": (queries, H), "key": (keys, H), "value": (keys, V)}
    return draw(shapes, seed)


def _params(score, draw):
    shapes = {
        "dot_product": {},
        "gat": {"query": (H,), "key": (H,)},
        "gatv2": {"score": (H,)},
    }
    return draw(shapes[score], 4) or None


def _dense(score, params):
    if score == "dot_product":
        return dot_product
    return functools.partial(getattr(graph, score), params=params)


def _random_edges(nodes, edges, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, nodes, (2, edges))
    return graph.unique_edges(*drawn, nodes)


@pytest.mark.parametrize("score", ["gat", "gatv2"])
@pytest.mark.parametrize("queries, keys", [(1, 1), (6, 9), (9, 6)])
def test_dense_forms_are_the_equations(score, queries, keys, draw, slope, by_loops):
    arrays = _draw_arrays(draw, queries, keys)
    params = _params(score, draw)
    arrays |= {f"param_{n}": leaf for n, leaf in params.items()}
    options = {}
    if queries > 2:
        mask = np.random.default_rng(1).random((queries, keys)) < 0.6
        mask[3] = False
        options = {"mask": mask, "key_mask": np.arange(keys) != 4}
        options |= {"is_causal": queries > keys}
        arrays |= draw({"bias": (queries, keys)}, 6)

    def split(arrays):
        plain = {n: x for n, x in arrays.items() if not n.startswith("param_")}
        return plain, {n: arrays[f"param_{n}"] for n in params}

    def theirs(**arrays):
        plain, given = split(arrays)
        if score == "gat":
            pair = lambda q, k: float(  # noqa: E731
                _leaky(given["query"] @ q + given["key"] @ k)
            )
        else:
            pair = lambda q, k: float(given["score"] @ _leaky(q + k))  # noqa: E731
        return by_loops(pair, **plain, **options)

    def ours(**arrays):
        plain, given = split(arrays)
        return getattr(graph, score)(**plain, params=given, **options)

    helpers.agree(ours, theirs, arrays, atol=2e-5)


def test_gat_ranks_keys_alike_and_gatv2_does_not(draw):
    """The difference that GATv2 is about: the best key of each of many queries."""
    arrays = _draw_arrays(draw, 40, 8)
    best = {}
    for score in ("gat", "gatv2"):
        fn = jax.jit(getattr(graph, score))
        weights = fn(
            arrays["query"],
            arrays["key"],
            jnp.eye(8),
            params=_params(score, draw),
        )
        best[score] = len(set(np.argmax(weights, axis=1).tolist()))
    assert best["gat"] == 1 < best["gatv2"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("edges", [3, 40])
def test_edge_list_equals_a_mask(score, edges, draw):
    nodes = 9
    senders, receivers = _random_edges(nodes, edges)
    arrays = _draw_arrays(draw, nodes, nodes)
    params = _params(score, draw)
    bias = draw({"bias": (nodes, nodes)}, 8)["bias"]
    mask = masks.from_edges(senders, receivers, nodes)
    assert edges < 40 or bool(jnp.diagonal(mask).any()), "no self-loop is tried"

    def listed(arrays, bias):
        return graph.graph_attention(
            **arrays,
            senders=senders,
            receivers=receivers,
            bias=bias[receivers, senders],
            params=params,
            score=score,
        )

    def masked(arrays, bias):
        return _dense(score, params)(**arrays, bias=bias, mask=mask)

    found = {}
    for fn in (listed, masked):

        def run(arrays, bias, fn=fn):
            out, pullback = jax.vjp(fn, arrays, bias)
            return out, pullback(jnp.cos(out))

        found[fn.__name__] = jax.jit(run)(arrays, bias)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        found["listed"],
        found["masked"],
    )
    isolated = ~np.asarray(mask).any(axis=1)
    assert edges == 40 or isolated.any()
    assert not found["listed"][0][isolated].any()


@pytest.mark.parametrize("score", SCORES)
def test_complete_graph_is_plain_attention(score, draw):
    queries, keys = 5, 7
    arrays = _draw_arrays(draw, queries, keys)
    params = _params(score, draw)
    receivers, senders = (x.ravel() for x in np.indices((queries, keys)))
    order = np.random.default_rng(0).permutation(senders.size)  # in any order
    listed = _attend(
        **arrays,
        senders=senders[order],
        receivers=receivers[order],
        params=params,
        score=score,
    )
    np.testing.assert_allclose(
        listed, jax.jit(_dense(score, params))(**arrays), atol=1e-5
    )


def test_a_repeated_edge_counts_each_time(draw):
    arrays = _draw_arrays(draw, 4, 4)
    senders, receivers = np.array([0, 1, 1, 2]), np.array([3, 3, 3, 0])
    attend = functools.partial(_attend, **arrays)
    twice = attend(senders=senders, receivers=receivers)
    kept = [0, 1, 3]
    weighted = attend(
        senders=senders[kept],
        receivers=receivers[kept],
        bias=jnp.log(jnp.array([1.0, 2.0, 1.0])),
    )
    np.testing.assert_allclose(twice, weighted, atol=1e-6)
    once = attend(
        **dict(
            zip(
                ("senders", "receivers"),
                graph.unique_edges(senders, receivers, 4),
                strict=True,
            )
        )
    )
    mask = masks.from_edges(senders, receivers, 4)
    np.testing.assert_allclose(once, _dot_product(**arrays, mask=mask), atol=1e-6)
    assert not np.allclose(once, twice, atol=1e-3)


def test_unique_edges_lists_each_once_in_order():
    senders, receivers = graph.unique_edges(
        np.array([5, 0, 5, 2, 0], np.int16), np.array([1, 4, 1, 1, 0]), 6
    )
    assert list(zip(receivers.tolist(), senders.tolist(), strict=True)) == [
        (0, 0),
        (1, 2),
        (1, 5),
        (4, 0),
    ]
    assert senders.dtype == np.int16
    none = np.zeros(0, int)
    assert graph.unique_edges(none, none, 6)[0].shape == (0,)


@pytest.mark.parametrize("score", SCORES)
def test_traced_edges_out_of_range_and_masked_edges_are_dropped(score, draw):
    arrays = _draw_arrays(draw, 6, 8)
    arrays["key"][7] = arrays["value"][7] = np.nan  # only the masked edge reads it
    senders = np.array([0, 3, 9, -1, 2, 7, 1])
    receivers = np.array([0, 0, 1, 0, -2, 1, 6])
    edge_mask = np.array([True] * 5 + [False, True])
    params = _params(score, draw)

    @jax.jit
    def run(arrays, senders, receivers, bias, edge_mask):
        def loss(arrays, bias):
            out = graph.graph_attention(
                **arrays,
                senders=senders,
                receivers=receivers,
                bias=bias,
                edge_mask=edge_mask,
                params=params,
                score=score,
            )
            return (jnp.cos(out) * out).sum(), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, bias)

    bias = np.ones(7, np.float32)
    bias[2:] = np.nan  # of edges that do not count
    grads, out = run(arrays, senders, receivers, bias, edge_mask)
    kept = _attend(
        **arrays,
        senders=senders[:2],
        receivers=receivers[:2],
        params=params,
        score=score,
    )
    np.testing.assert_allclose(out, kept, atol=1e-6)
    assert out[0].any() and not out[1:].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not grads[0]["key"][4:].any() and not grads[1][2:].any()


def test_a_bias_of_minus_infinity_cuts_an_edge(draw):
    arrays = _draw_arrays(draw, 3, 3)
    senders, receivers = np.array([0, 1, 2]), np.array([0, 0, 1])
    attend = functools.partial(_attend, **arrays)
    cut = attend(
        senders=senders, receivers=receivers, bias=jnp.array([0.0, -jnp.inf, -jnp.inf])
    )
    kept = attend(senders=senders[:1], receivers=receivers[:1])
    np.testing.assert_array_equal(cut, kept)


@pytest.mark.parametrize("score", SCORES)
def test_no_edges(score, draw):
    arrays = _draw_arrays(draw, 3, 4)
    none = jnp.zeros(0, int)
    params = _params(score, draw)

    def total(arrays):
        return graph.graph_attention(
            **arrays, senders=none, receivers=none, params=params, score=score
        ).sum()

    value, grads = jax.value_and_grad(total)(arrays)
    assert value == 0.0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_heads_and_graphs_by_vmap(draw):
    arrays = draw({n: (2, 3, 6, H) for n in ("query", "key", "value")})
    edges = [_random_edges(6, 9, seed) for seed in (0, 1)]
    size = max(len(senders) for senders, _ in edges)
    padded = np.full((2, 2, size), 6)  # padding is out of range
    for i, both in enumerate(edges):
        padded[i, :, : len(both[0])] = both
    heads = jax.vmap(graph.graph_attention, (0, 0, 0, None, None))
    out = jax.jit(jax.vmap(heads))(*arrays.values(), padded[:, 0], padded[:, 1])
    for i, h in itertools.product(range(2), range(3)):
        one = {n: x[i, h] for n, x in arrays.items()}
        mask = masks.from_edges(*edges[i], 6)
        np.testing.assert_allclose(out[i, h], _dot_product(**one, mask=mask), atol=1e-5)


def test_bfloat16_scores_in_float32(draw):
    senders, receivers = _random_edges(9, 60)
    half = {n: jnp.bfloat16(x) for n, x in _draw_arrays(draw, 9, 9).items()}
    half["query"] *= 8
    whole = {n: x.astype(jnp.float32) for n, x in half.items()}
    for score in SCORES:
        params = _params(score, draw)
        out = [
            _attend(
                **arrays,
                senders=senders,
                receivers=receivers,
                params=params and jax.tree.map(jnp.bfloat16, params),
                score=score,
            )
            for arrays in (half, whole)
        ]
        assert out[0].dtype == jnp.bfloat16
        # Inputs are the same, and parameters nearly: one rounding of the output.
        np.testing.assert_allclose(np.float32(out[0]), out[1], atol=2e-2, rtol=2e-2)


def test_a_million_edges_cost_memory_per_edge():
    nodes, edges, dim = 20_000, 1_000_000, 4
    rng = np.random.default_rng(0)
    senders, receivers = rng.integers(0, nodes, (2, edges)).astype(np.int32)
    x = jax.random.normal(jax.random.key(0), (nodes, dim))

    def run(x, senders, receivers):
        return graph.graph_attention(x, x, jnp.ones((nodes, 1)), senders, receivers)

    compiled = jax.jit(run).lower(x, senders, receivers).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * edges * 8 * dim < 4 * nodes * nodes / 10
    out = compiled(x, senders, receivers)
    entered = np.isin(np.arange(nodes), receivers)
    np.testing.assert_allclose(out[:, 0], entered, atol=1e-4)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"senders": [0, 4]}, ValueError, "`senders` must lie in 0 … 3, but .* to 4"),
        ({"receivers": [-1, 0]}, ValueError, "`receivers` .* 0 … 2, .* from -1 to 0"),
        ({"senders": [0.0, 1.0]}, TypeError, "`senders` must be integers"),
        ({"senders": [[0, 1]]}, ValueError, "`senders` must be a vector"),
        ({"receivers": [1]}, ValueError, "`receivers` .* with E=2"),
        ({"bias": np.ones(3, "f")}, ValueError, "`bias` .* with E=2"),
        ({"bias": np.ones(2, int)}, TypeError, "`bias` must be a floating"),
        ({"edge_mask": np.ones(2)}, TypeError, "`edge_mask` must be bool"),
        ({"edge_mask": np.ones(1, bool)}, ValueError, "`edge_mask` .* with E=2"),
        ({"score": "cosine"}, ValueError, "`score` must be .* but is 'cosine'"),
        ({"score": "gat"}, ValueError, "`params` must be a mapping"),
        ({"params": {}}, ValueError, "`params` is of no use"),
        (
            {"score": "gatv2", "params": {"score": np.ones(H)}, "scale": 1.0},
            ValueError,
            "`scale` is of no use",
        ),
    ],
)
def test_bad_arguments_are_named(options, error, message, draw):
    edges = {"senders": np.array([0, 3]), "receivers": np.array([2, 0])}
    given = {n: np.asarray(x) if n in edges else x for n, x in options.items()}
    with pytest.raises(error, match=message):
        graph.graph_attention(**_draw_arrays(draw, 3, 4), **{**edges, **given})


@pytest.mark.parametrize("score", ["dot_product", "gat", "gatv2"])
def test_a_node_without_edges_may_hold_nan(score, draw):
    # Node 0 too, which edges of padding read.
    arrays = draw({name: (4, 3) for name in ("query", "key", "value")})
    given = {
        "senders": jnp.array([1, 2, 3]),
        "receivers": jnp.array([2, 1, 3]),
        "edge_mask": jnp.array([True, True, False]),
    }
    params = {
        "dot_product": None,
        "gat": graph.gat_init(jax.random.key(0), 3),
        "gatv2": graph.gatv2_init(jax.random.key(0), 3),
    }[score]

    def loss(arrays, params):
        out = graph.graph_attention(**arrays, **given, params=params, score=score)
        return (out**3).sum()

    edgeless = np.array([[True], [False], [False], [True]])
    dirty = {name: np.where(edgeless, np.nan, x) for name, x in arrays.items()}
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for found, want in zip(
        jax.tree.leaves(both(dirty, params)),
        jax.tree.leaves(both(arrays, params)),
        strict=True,
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5)
