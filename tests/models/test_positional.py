from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import as_attention_fn
from attn_jax.nn.encoder import Encoder, EncoderBlock
from attn_jax.nn.positional import (
    POSITIONS,
    make_positions,
    num_parameters,
    shared_tables,
)
from attn_jax.positions import alibi_slopes, t5_buckets

PLAIN = as_attention_fn("dot_product")
SIZES = dict(dim=8, num_heads=2, depth=1)
LENGTH, SHORT = 6, 4
RELATIVE = ("shaw", "rope", "alibi", "t5")
AT_INPUT = ("sinusoidal", "learned", "floater_input", "rotation_flow")
OPTIONS = {"shaw": {"clip": 2}, "t5": {"num_buckets": 8, "max_distance": 8}}
PARAMETERS = {
    "learned": LENGTH * 8,
    "shaw": 2 * 5 * 8,
    "floater": 6 * 8 * 8 + 2 * 8 + 3 * 8 + 3 * 8,
    "floater_input": 2 * 8 * 8 + 2 * 8 + 2 * 8,
    "sinusoidal_floater": 2 * 8 * 8 + 2 * 8 + 2 * 8 + 3 * 8,
    "rotation_flow": 2 * 8 * 8 + 8 + 2 * 8 + 4,
    "t5": 2 * 8,
}


def make(name, **more):
    options = OPTIONS.get(name, {}) | SIZES | {"max_length": LENGTH} | more
    return make_positions(name, rngs=nnx.Rngs(0), **options)


def encoder(positions, depth=1, **more):
    return Encoder(
        depth,
        8,
        num_heads=2,
        mlp_dim=8,
        positions=positions,
        rngs=nnx.Rngs(1),
        **more,
    )


def is_of_positions(path):
    names = [key.key for key in path]
    return "positions" in names or "attention_fn" in names


class Layer(nnx.Module):
    """What positions have to do with an encoder of one block, and no more."""

    def __init__(self, positions):
        self.positions = positions
        self.attention = nnx.MultiHeadAttention(
            2,
            8,
            attention_fn=positions.attention_fn(0, PLAIN),
            decode=False,
            rngs=nnx.Rngs(1),
        )

    def __call__(self, x, key_mask):
        with shared_tables(self.positions.tables(LENGTH)):
            mask = key_mask[:, None, None, :]
            return self.attention(self.positions.embed(x), mask=mask)


class Run:
    """A layer as a pure function, with its gradients, compiled once."""

    def __init__(self, name):
        graphdef, params, rest = nnx.split(Layer(make(name)), nnx.Param, ...)
        self.params = nnx.to_pure_dict(params)
        noise = np.random.default_rng(2)
        self.moved = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                leaf + 0.5 * noise.standard_normal(leaf.shape, np.float32)
                if is_of_positions(path)
                else leaf
            ),
            jax.tree.map(np.asarray, self.params),
        )

        def apply(params, x, key_mask):
            params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
            return nnx.merge(graphdef, params, rest)(x, key_mask)

        def loss(params, x, key_mask):
            out = apply(params, x, key_mask)
            return jnp.sum(jnp.sin(out), where=key_mask[:, :, None]), out

        treedef = jax.tree.structure(params)
        self.compiled = jax.jit(jax.grad(loss, has_aux=True))

    def out(self, params, x, key_mask):
        return np.asarray(self.compiled(params, x, key_mask)[1])


@pytest.fixture(scope="module")
def runs():
    return functools.cache(Run)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((1, LENGTH, 8), np.float32)


ALL = np.ones((1, LENGTH), bool)
FIRST = np.arange(LENGTH)[None] < SHORT


@pytest.mark.parametrize("name", POSITIONS)
def test_every_kind_trains_ignores_padding_and_knows_the_order(name, runs, x):
    run = runs(name)
    grads, at_start = run.compiled(run.params, x, ALL)
    own = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
        if is_of_positions(path)
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert sum(leaf.size for leaf in own.values()) == PARAMETERS.get(name, 0)
    assert num_parameters(make(name)) == PARAMETERS.get(name, 0)
    # A flow that stands still shields what lies before its last layer.
    still = name in ("floater", "floater_input", "rotation_flow")
    shielded = ("'state'", "'time'", "'bias'") if still else ()
    for path, leaf in own.items():
        if not any(part in path for part in shielded):
            assert np.abs(leaf).max() > 1e-3, path
    lower = jax.tree.map(lambda p, g: np.asarray(p - 1e-3 * g), run.params, grads)
    later = np.sin(run.out(lower, x, ALL)).sum()
    assert later < np.sin(at_start).sum()
    if name.startswith("floater"):  # the compatible form
        plain = runs("none")
        np.testing.assert_array_equal(at_start, plain.out(plain.params, x, ALL))

    params = run.moved
    noisy, loud = x.copy(), x.copy()
    noisy[:, SHORT:], loud[:, SHORT:] = 1.0, 1e3
    short = run.out(params, noisy, FIRST)[:, :SHORT]
    np.testing.assert_array_equal(run.out(params, loud, FIRST)[:, :SHORT], short)

    moved_right = run.out(params, np.roll(noisy, 2, axis=1), np.roll(FIRST, 2, 1))
    same = np.abs(moved_right[:, 2:] - short).max() < 1e-4
    assert same == (name in (*RELATIVE, "none"))

    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled = run.out(params, x[:, order], ALL)
    difference = np.abs(shuffled - run.out(params, x, ALL)[:, order]).max()
    assert difference < 1e-5 if name == "none" else difference > 1e-2


@pytest.fixture(scope="module")
def heads(draw):
    """Query, key and value, [2, T, N, H]."""
    arrays = draw({name: (2, LENGTH, 2, 4) for name in ("query", "key", "value")})
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def attend(positions, heads, block=0, **more):
    layer = positions.attention_fn(block, PLAIN)
    return np.asarray(
        jax.jit(functools.partial(layer, deterministic=True))(**heads, **more)
    )


def by_hand(query, key, value, bias=0.0):
    """Softmax attention in float64, bias [N, T, S]."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    scores = np.einsum("btnh,bsnh->bnts", query, key) / 2.0 + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, value)


def test_rope_is_attention_of_turned_queries_and_keys(heads):
    angle = np.arange(LENGTH)[:, None] * 10_000.0 ** -np.array([0.0, 0.5])[None]
    turn = np.exp(1j * angle)[None, :, None, :]

    def turned(array):
        pairs = np.asarray(array, np.float64).reshape(2, LENGTH, 2, 2, 2)
        return ((pairs[..., 0] + 1j * pairs[..., 1]) * turn).view(np.float64)

    out = attend(make("rope"), heads)
    expected = by_hand(turned(heads["query"]), turned(heads["key"]), heads["value"])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_alibi_and_t5_are_attention_with_a_bias(heads):
    offset = np.arange(LENGTH)[None, :] - np.arange(LENGTH)[:, None]
    slopes = np.asarray(alibi_slopes(2))[:, None, None]
    out = attend(make("alibi"), heads)
    np.testing.assert_allclose(
        out, by_hand(**heads, bias=-slopes * abs(offset)[None]), atol=1e-5
    )

    positions = make("t5", depth=2)
    buckets = np.asarray(t5_buckets(LENGTH, num_buckets=8, max_distance=8))
    bias = np.asarray(positions.table[...])[:, buckets]
    expected = by_hand(**heads, bias=bias)
    for block in range(2):  # one table for all
        np.testing.assert_allclose(attend(positions, heads, block), expected, atol=1e-5)
    positions.table[...] = jnp.zeros_like(positions.table[...])
    np.testing.assert_allclose(attend(positions, heads), by_hand(**heads), atol=1e-5)


def test_shaw_has_tables_for_every_block(heads):
    positions = make("shaw", depth=2)
    first, second = (attend(positions, heads, block) for block in range(2))
    assert np.abs(first - second).max() > 0.1
    for table in positions.layers[0].params.values():
        table[...] = jnp.zeros_like(table[...])
    np.testing.assert_allclose(attend(positions, heads), by_hand(**heads), atol=1e-5)


def test_floater_offsets_queries_keys_and_values_of_each_block(heads):
    positions = make("floater", depth=2, scale=1.0)
    start = np.random.default_rng(3).standard_normal((2, 24), np.float32)
    positions.start[...] = jnp.asarray(start)
    offsets = np.asarray(jax.jit(positions.tables, static_argnums=0)(LENGTH))
    np.testing.assert_allclose(offsets[:, 0], start, rtol=1e-6)
    assert np.abs(offsets[:, -1] - offsets[:, 0]).min(axis=1).max() > 1e-4
    for block in range(2):
        of_heads = offsets[block].reshape(LENGTH, 3, 2, 4)
        expected = by_hand(
            *(
                np.asarray(heads[name]) + of_heads[None, :, index]
                for index, name in enumerate(("query", "key", "value"))
            )
        )
        # As an encoder calls it, where all blocks share what was made once.
        with shared_tables(offsets):
            out = attend(positions, heads, block)
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_the_official_floater_is_a_sinusoid_and_one_flow_for_all_offsets(heads, x):
    positions = make("sinusoidal_floater", depth=2)
    np.testing.assert_array_equal(positions.embed(x), make("sinusoidal").embed(x))
    start, few = np.asarray(positions.start[...]), positions.tables(LENGTH)
    assert start.shape == (2, 3, 8) and few.shape == (2, 3, LENGTH, 8)
    # The steps of the authors' code, five a position, give the same.
    many = make("sinusoidal_floater", depth=2, steps_per_position=5).tables(LENGTH)
    np.testing.assert_allclose(few, many, atol=1e-6)
    # Whatever starts at the same place goes the same way.
    positions.start[...] = jnp.broadcast_to(start[1, 2], start.shape)
    moved = np.asarray(positions.tables(LENGTH))
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0, 0], moved.shape))
    assert np.abs(moved[0, 0, -1] - start[1, 2]).max() > 1e-3
    offsets = np.asarray(few)
    for block in range(2):
        expected = by_hand(
            *(
                np.asarray(heads[name]) + offsets[block, at].reshape(1, LENGTH, 2, 4)
                for at, name in enumerate(("query", "key", "value"))
            )
        )
        with shared_tables(few):
            out = attend(positions, heads, block)
        np.testing.assert_allclose(out, expected, atol=1e-5)
    at_rest = make("sinusoidal_floater", scale=0.0).tables(LENGTH)
    np.testing.assert_array_equal(at_rest, 0.0)


def test_a_rotation_flow_begins_as_the_sinusoid_and_is_autonomous(x):
    positions = make("rotation_flow")
    zeros = jnp.zeros((1, 64, 8))
    start = make("sinusoidal").embed(zeros)
    np.testing.assert_allclose(positions.embed(zeros), start, atol=3e-3)
    rng = np.random.default_rng(1)
    out = positions.flow["out"]
    out[...] = jnp.asarray(0.1 * rng.standard_normal(out.shape), jnp.float32)
    codes = np.asarray(positions.embed(zeros))[0]
    assert np.abs(codes - start[0]).max() > 0.1
    # From where it is after five positions it goes on as if it had begun there.
    positions.flow["start"][...] = jnp.asarray(codes[5])
    later = np.asarray(positions.embed(zeros))[0]
    np.testing.assert_allclose(later[:-5], codes[5:], atol=1e-4)


def test_encoder(x):
    """A block alone, an encoder, a mask of pairs, of keys, of both; a shorter batch."""
    whole, plain = encoder(make("t5")), encoder(None)
    learned = make("learned")
    pairs = np.tril(np.ones((LENGTH, LENGTH), bool))[None, None]
    keys = FIRST[:, None, None, :]

    @jax.jit
    def outs(x, pairs, keys):
        alone = whole.norm(whole.blocks[0](x, pairs & keys))
        both = whole(x, pairs, key_mask=keys[:, 0, 0])
        of_keys = whole(x, key_mask=keys[:, 0, 0])
        return alone, both, of_keys, whole(x[:, :SHORT])

    alone, both, of_keys, short = (np.asarray(out) for out in outs(x, pairs, keys))
    # What comes out for padding means nothing: an encoder takes it in as zeros.
    real = np.broadcast_to(FIRST, x.shape[:2])
    np.testing.assert_allclose(alone[real], both[real], atol=1e-6)
    np.testing.assert_allclose(of_keys[:, :SHORT], short, atol=1e-5)
    assert np.abs(of_keys - both).max() > 1e-3

    added = np.asarray(learned.add.table[...])[None]
    run = jax.jit(lambda x: (encoder(learned)(x), plain(x + added)))
    np.testing.assert_allclose(*run(x), atol=1e-6)


@pytest.mark.parametrize("name", ["sinusoidal", "learned", "alibi", "t5"])
def test_a_position_is_the_same_in_sequences_of_all_lengths(name):
    """What is added and what blocks share; `test_floater` has it for the flows."""
    positions = make(name)
    x = np.zeros((1, LENGTH, 8), np.float32)
    (short, tables), (long, longer) = jax.jit(
        lambda x: [(positions.embed(y), positions.tables(y.shape[1])) for y in x]
    )([x[:, :SHORT], x])
    np.testing.assert_array_equal(short, long[:, :SHORT])
    if tables is not None:
        np.testing.assert_array_equal(tables, longer[:, :, :SHORT, :SHORT])


@pytest.mark.parametrize("name", POSITIONS)
def test_shared_parameters_count_once_and_low_precision_passes(name):
    """Nothing is computed: shapes, dtypes and the strict promotion tell."""

    def attend_all(x):
        positions = make(name, depth=3)
        layers = [positions.attention_fn(block, PLAIN) for block in range(3)]
        outs = [layer(x, x, x, deterministic=True) for layer in layers]
        modules = nnx.List([f for f in layers if isinstance(f, nnx.Module)])
        return modules, positions, outs

    x = jax.ShapeDtypeStruct((2, 5, 2, 4), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    layers, positions, outs = nnx.eval_shape(attend_all, x)
    assert num_parameters(layers) == (
        0 if name in AT_INPUT else num_parameters(positions)
    )
    for out in outs:
        assert (out.shape, out.dtype) == (x.shape, jnp.bfloat16)
    embedded = nnx.eval_shape(lambda module, x: module.embed(x), positions, tokens)
    assert (embedded.shape, embedded.dtype) == (tokens.shape, jnp.bfloat16)


def test_other_variants():
    """A rotation goes with all of them, a bias with those that take one."""

    def block(positions):
        sizes = dict(num_heads=2, mlp_dim=8)
        return EncoderBlock(
            8, attention="linear", positions=positions, rngs=nnx.Rngs(0), **sizes
        )

    tokens = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    for name in ("rope", "floater", "learned"):
        out = nnx.eval_shape(lambda x, name=name: block(make(name))(x), tokens)
        assert out.shape == tokens.shape
    for name in ("alibi", "t5"):
        with pytest.raises(ValueError, match=rf"{name}.*'linear' cannot honour `bias`"):
            block(positions=make(name))
    with pytest.raises(ValueError, match=r"shaw.*'dot_product' alone, but .*'linear'"):
        block(positions=make("shaw"))


def test_wrong_input_is_refused(heads, x):
    with pytest.raises(ValueError, match=r"one of none, .*, but is 'rotary'"):
        make("rotary")
    with pytest.raises(TypeError, match="'t5' take no option `clip`; they take: num_"):
        make("t5", clip=3)
    with pytest.raises(ValueError, match=r"even head size .* 6 / 2 = 3"):
        make("rope", dim=6)
    with pytest.raises(ValueError, match="even `dim`, but it is 3"):
        make("sinusoidal", dim=3, num_heads=1)
    with pytest.raises(ValueError, match="`dim` must be a multiple of `num_heads`"):
        make("none", num_heads=3)
    with pytest.raises(ValueError, match="need `max_length`"):
        make("learned", max_length=None)
    with pytest.raises(ValueError, match="length 6, but .* max_length=5"):
        make("learned", max_length=5).embed(x)
    with pytest.raises(ValueError, match="`num_buckets` must be an even number"):
        make("t5", num_buckets=5)
    with pytest.raises(ValueError, match="`solver` must be 'heun'"):
        make("floater", solver="euler")
    with pytest.raises(TypeError, match=r"make_positions\(name.* but is str: 'rope'"):
        encoder("rope")
    with pytest.raises(ValueError, match="made with depth=2, but the encoder has dep"):
        encoder(make("none", depth=2))
    with pytest.raises(ValueError, match="`block_index` must be 0 … 0.*but is 1"):
        make("rope").attention_fn(1, PLAIN)
    few = {name: array[:, :4] for name, array in heads.items()}
    with pytest.raises(ValueError, match="6 queries and 4 keys"):
        attend(make("rope"), few | {"query": heads["query"]})
    with pytest.raises(ValueError, match=r"`key_mask` must be bool \[B, T\] = \(1"):
        encoder(None)(x, key_mask=jnp.ones((1, 5), bool))
