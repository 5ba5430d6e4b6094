"""Graph networks: edges in every shape, masks, biases, and what they reduce to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import inputs, masks
from attn_jax.nn.encoder import Encoder
from experiments.graphs.model import (
    EdgeAttention,
    Edges,
    GraphBlock,
    GraphEncoder,
    GraphLabeller,
    GraphRegressor,
    PairBias,
)

SCORES = ("dot_product", "gat", "gatv2")


def edges_of(senders, receivers, kinds=None, mask=None):
    def ints(x):
        return jnp.asarray(np.asarray(x, np.int32).reshape(-1))

    return Edges(
        ints(senders), ints(receivers), None if kinds is None else ints(kinds), mask
    )


@pytest.fixture(scope="module")
def nodes(draw):
    return jnp.asarray(draw({"x": (5, 8)})["x"])


def layer(score, **options):
    options = dict(num_heads=2, rngs=nnx.Rngs(0)) | options
    return EdgeAttention(8, score=score, **options)


@pytest.mark.parametrize("score", SCORES)
def test_isolated_nodes_loops_duplicates_and_no_edges(nodes, score):
    attend = layer(score)
    alone = attend(nodes, edges_of([], []))
    # No edge: nothing comes in but the bias of the last map, the same for all nodes.
    np.testing.assert_allclose(alone, jnp.broadcast_to(attend.out.bias[...], (5, 8)))
    # Nodes 2 … 4 have no edge that enters; 0 sees 1, 1 sees itself.
    some = attend(nodes, edges_of([1, 1], [0, 1]))
    np.testing.assert_allclose(some[2:], alone[2:])
    np.testing.assert_allclose(some[0], some[1], rtol=1e-5, atol=1e-6)
    assert not np.allclose(some[0], alone[0])
    # Every copy of all edges of a node leaves the mean as it is.
    doubled = attend(nodes, edges_of([1, 1, 1, 1], [0, 0, 1, 1]))
    np.testing.assert_allclose(doubled, some, rtol=1e-5, atol=1e-6)
    # One copy more of one of two edges pulls towards its sender.
    two = attend(nodes, edges_of([1, 2], [0, 0]))
    pulled = attend(nodes, edges_of([1, 2, 2, 2, 2], [0] * 5))
    only = attend(nodes, edges_of([2], [0]))
    assert np.linalg.norm(pulled[0] - only[0]) < np.linalg.norm(two[0] - only[0])
    # A masked edge is none.
    mask = jnp.array([True, True, False])
    masked = attend(nodes, edges_of([1, 1, 4], [0, 1, 3], mask=mask))
    np.testing.assert_allclose(masked, some, rtol=1e-5, atol=1e-6)
    # A graph without nodes.
    assert attend(jnp.zeros((0, 8)), edges_of([], [])).shape == (0, 8)


@pytest.mark.parametrize("score", SCORES)
def test_order_of_edges_and_names_of_nodes_do_not_matter(nodes, score, draw):
    rng = np.random.default_rng(1)
    senders, receivers = rng.integers(5, size=(2, 9))
    encoder = GraphEncoder(2, 8, num_heads=2, mlp_dim=8, score=score, rngs=nnx.Rngs(0))
    once = encoder(nodes, edges_of(senders, receivers))
    order = rng.permutation(9)
    again = encoder(nodes, edges_of(senders[order], receivers[order]))
    np.testing.assert_allclose(again, once, rtol=1e-4, atol=1e-5)
    names = rng.permutation(5)
    place = np.argsort(names)
    moved = encoder(nodes[names], edges_of(place[senders], place[receivers]))
    np.testing.assert_allclose(moved, once[names], rtol=1e-4, atol=1e-5)


def test_depth_is_how_far_a_node_sees(nodes):
    chain = edges_of([0, 1, 2, 3], [1, 2, 3, 4])
    encoder = GraphEncoder(2, 8, num_heads=2, mlp_dim=0, rngs=nnx.Rngs(0))
    seen = jax.jacobian(lambda x: encoder(x, chain)[4].sum())(nodes)
    reached = np.abs(np.asarray(seen)).sum(axis=1) > 0
    assert reached.tolist() == [False, False, True, True, True]


def test_dot_product_on_the_complete_graph_is_the_encoder(nodes):
    """The same weights: edges from all to all are self-attention without a mask."""
    graph = GraphEncoder(
        2, 8, num_heads=2, mlp_dim=16, score="dot_product", rngs=nnx.Rngs(0)
    )
    plain = Encoder(2, 8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(1))
    for ours, theirs in zip(graph.blocks, plain.blocks, strict=True):
        kernel, bias = (p[...] for p in _project(ours.attention))
        for i, name in enumerate(("query", "key", "value")):
            linear = getattr(theirs.attention, name)
            linear.kernel[...] = kernel[:, i]
            linear.bias[...] = bias[i]
        out = ours.attention.out
        theirs.attention.out.kernel[...] = out.kernel[...].reshape(2, 4, 8)
        theirs.attention.out.bias[...] = out.bias[...]
        for name in ("expand", "contract"):
            for leaf in ("kernel", "bias"):
                source = getattr(getattr(ours.mlp, name), leaf)
                getattr(getattr(theirs.mlp, name), leaf)[...] = source[...]
    grid = np.indices((5, 5)).reshape(2, -1)
    ours = graph(nodes, edges_of(grid[0], grid[1]))
    np.testing.assert_allclose(ours, plain(nodes[None])[0], rtol=1e-4, atol=1e-5)


def _project(attention):
    """Kernel [8, 3, 2, 4] and bias [3, 2, 4] of the three maps of two heads."""
    kernel, bias = attention.project.kernel[...], attention.project.bias[...]
    return nnx.Param(kernel.reshape(8, 3, 2, 4)), nnx.Param(bias.reshape(3, 2, 4))


def test_kinds_of_edges(nodes):
    attend = layer("gatv2", num_kinds=2)
    edges = edges_of([1, 2], [0, 0], kinds=[0, 1])
    plain = edges_of([1, 2], [0, 0], kinds=[0, 0])
    np.testing.assert_allclose(attend(nodes, edges), attend(nodes, plain))  # zero
    attend.of_kinds[...] = jnp.array([[0.0, -1e9], [0.0, -1e9]])
    only = edges_of([1], [0], kinds=[0])
    np.testing.assert_allclose(
        attend(nodes, edges), attend(nodes, only), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="edges.kinds must be given: .* 2 kinds"):
        attend(nodes, edges_of([1], [0]))


def test_a_million_edges(optimized):
    """Memory grows with the edges: all pairs would take 40 GB."""
    count, number = 100_000, 1_000_000
    rng = np.random.default_rng(0)
    edges = edges_of(*rng.integers(count, size=(2, number)))
    attend = EdgeAttention(2, num_heads=1, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(attend)

    def loss(params, x, edges):
        return (nnx.merge(graphdef, params)(x, edges) ** 2).sum()

    x = jnp.asarray(rng.standard_normal((count, 2), np.float32))
    program = jax.jit(jax.value_and_grad(loss)).lower(params, x, edges).compile()
    assert program.memory_analysis().temp_size_in_bytes < 500e6
    value, grads = program(params, x, edges)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_memory_of_an_encoder_does_not_grow_with_its_depth(optimized):
    def bytes_of(depth):
        encoder = GraphEncoder(depth, 8, num_heads=1, mlp_dim=0, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(encoder)

        def loss(params, x, edges):
            return nnx.merge(graphdef, params)(x, edges).sum()

        edges = edges_of(np.arange(20_000) % 1_000, np.arange(20_000) // 20)
        x = jnp.zeros((1_000, 8))
        program = jax.jit(jax.grad(loss)).lower(params, x, edges).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert bytes_of(6) < 1.5 * bytes_of(2)


def test_labels_that_are_known(nodes):
    model = GraphLabeller(
        8,
        3,
        dim=8,
        depth=1,
        num_heads=2,
        mlp_dim=0,
        reads_labels=True,
        rngs=nnx.Rngs(0),
    )
    edges = edges_of([1], [0])
    hidden = jnp.full(5, -1, jnp.int32)
    base = model(nodes, edges, hidden)
    told = model(nodes, edges, hidden.at[1].set(2))
    changed = np.abs(np.asarray(told - base)).max(axis=1) > 1e-6
    assert changed.tolist() == [True, True, False, False, False]
    two = model(nodes, edges, hidden, jnp.array([3, 0]))
    np.testing.assert_allclose(two, base[jnp.array([3, 0])], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="known must be given"):
        model(nodes, edges)


def test_ids_are_one_hot_vectors_side_by_side():
    model = GraphLabeller(
        (3, 2), 2, dim=8, depth=1, num_heads=2, mlp_dim=4, rngs=nnx.Rngs(0)
    )
    ids = jnp.array([[0, 1], [2, 0]], jnp.int32)
    hot = [inputs.one_hot(ids[:, i], size) for i, size in enumerate((3, 2))]
    expected = jnp.concatenate(hot, axis=1) @ model.input.embed.embedding[...]
    np.testing.assert_allclose(model.input(ids[None])[0], expected, rtol=1e-6)


def test_dropout_is_random_in_training_alone(nodes):
    block = GraphEncoder(
        2, 8, num_heads=2, mlp_dim=8, dropout_rate=0.5, rngs=nnx.Rngs(0)
    )
    edges = edges_of([1, 2], [0, 0])
    one, two = (
        block(nodes, edges, deterministic=False, rngs=nnx.Rngs(dropout=i))
        for i in range(2)
    )
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(block(nodes, edges), block(nodes, edges))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: EdgeAttention(8, num_heads=3, rngs=rngs), "multiple of num_h"),
        (
            lambda rngs: EdgeAttention(8, num_heads=2, score="sum", rngs=rngs),
            "score must be one of dot_product, gat, gatv2, got 'sum'",
        ),
        (
            lambda rngs: GraphBlock(8, num_heads=2, mlp_dim=0, score=None, rngs=rngs),
            "must not both be left out",
        ),
        (
            lambda rngs: GraphEncoder(0, 8, num_heads=2, mlp_dim=0, rngs=rngs),
            "depth must be at least 1, got 0",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(nnx.Rngs(0))


# --- Many small graphs -------------------------------------------------------------


def regressor(**options):
    options = dict(dim=8, depth=2, num_heads=2, mlp_dim=8) | options
    return GraphRegressor((4, 3), rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def graphs():
    """Two graphs of 4 and 3 nodes, padded to 5."""
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(3, size=(2, 5, 2)), jnp.int32)
    real = jnp.arange(5)[None] < jnp.array([[4], [3]])
    senders, receivers = np.array([0, 1, 1, 2]), np.array([1, 0, 2, 1])
    one = masks.from_edges(jnp.asarray(senders), jnp.asarray(receivers), 5)
    pairs = jnp.asarray(rng.integers(3, size=(2, 5, 5, 2)), jnp.int32)
    return ids, real, jnp.stack([one, one]), pairs


def test_padding_changes_nothing(graphs):
    ids, real, adjacency, pairs = graphs
    model = regressor(sees="edges", pair_sizes=(3, 3))
    model.encoder.positions.table[...] = jax.random.normal(
        jax.random.key(0), model.encoder.positions.table.shape
    )
    found = model(ids, real, adjacency, pairs)
    other = jnp.where(real[..., None], ids, 2)
    noise = jnp.where((real[:, :, None] & real[:, None])[..., None], pairs, 1)
    np.testing.assert_allclose(
        model(other, real, adjacency, noise), found, rtol=1e-5, atol=1e-6
    )
    cut = model(ids[:1, :4], real[:1, :4], adjacency[:1, :4, :4], pairs[:1, :4, :4])
    np.testing.assert_allclose(cut, found[:1], rtol=1e-4, atol=1e-5)


def test_what_a_model_sees(graphs):
    ids, real, adjacency, pairs = graphs
    edges, every = regressor(sees="edges", depth=1), regressor(sees="all", depth=1)
    more = adjacency.at[:, 0, 2].set(True)
    assert not np.allclose(edges(ids, real, adjacency), edges(ids, real, more))
    # With all nodes joined, edges are no mask.
    complete = jnp.ones_like(adjacency)
    np.testing.assert_allclose(
        edges(ids, real, complete), every(ids, real), rtol=1e-4, atol=1e-5
    )
    biased = regressor(sees="all", depth=1, pair_sizes=(3, 3))
    base = biased(ids, real, None, pairs)
    np.testing.assert_allclose(base, every(ids, real), rtol=1e-4, atol=1e-5)  # zero
    # A bias of −∞ for pairs without an edge is the mask of the edges.
    joined = adjacency | jnp.eye(5, dtype=bool)[None]
    kinds = jnp.stack([joined, jnp.zeros_like(joined)], -1).astype(jnp.int32)
    biased.encoder.positions.table[...] = jnp.zeros((1, 6, 2)).at[:, 0].set(-1e9)
    np.testing.assert_allclose(
        biased(ids, real, None, kinds),
        edges(ids, real, adjacency),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_bias_by_hand():
    bias = PairBias((2, 3), dim=8, num_heads=2, depth=2, rngs=nnx.Rngs(0))
    table = jax.random.normal(jax.random.key(0), (2, 5, 2))
    bias.table[...] = table
    pairs = jnp.array([[[[0, 2], [1, 0]], [[1, 1], [0, 0]]]], jnp.int32)
    x = jnp.zeros((1, 2, 2, 4))
    found = bias.operands(bias.of_pairs(pairs), 1, x, x, x)["bias"]
    for t in range(2):
        for s in range(2):
            first, second = (int(i) for i in pairs[0, t, s])
            expected = table[1, first] + table[1, 2 + second]
            np.testing.assert_allclose(found[0, :, t, s], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="must be made by `bias.of_pairs"):
        bias.tables(2)


def test_inputs_that_do_not_fit_the_model_are_refused(graphs):
    ids, real, adjacency, pairs = graphs
    with pytest.raises(ValueError, match="adjacency must be given: .*sees='edges'"):
        regressor(sees="edges")(ids, real)
    with pytest.raises(ValueError, match="pairs must be left out: .*no bias of pairs"):
        regressor()(ids, real, None, pairs)
    with pytest.raises(ValueError, match="sees must be 'edges' or 'all', got 'far'"):
        regressor(sees="far")
