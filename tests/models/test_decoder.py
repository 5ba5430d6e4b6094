"""A decoder has two forms, and they are one model."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import resolve, sample_symbols, variants_with
from attn_jax.nn.causal_attention import CausalAttention
from attn_jax.nn.decoder import Decoder, decoder_functions
from attn_jax.nn.recurrent import LstmLayer

LENGTH = 24
OPTIONS = {
    "reformer": dict(num_buckets=4, num_rounds=2, chunk_size=16),
    "linear": dict(chunk_size=8),
    "blockwise": dict(block_size=8),
    "compressive": dict(segment=8, memory=4, compressed=3),
}
# Somebody's own, with parameters and a step beside it.
MINE = f"{pathlib.Path(__file__).parents[1]}/right_variants/decayed.py:attend"
greedy = functools.partial(sample_symbols, temperature=0.0)


def _make(mixer, **options):
    if mixer in OPTIONS:
        mixer = resolve(mixer).bind(**OPTIONS[mixer])
    decoder = Decoder(
        11,
        10,
        mixer=mixer,
        dim=16,
        depth=2,
        num_heads=2,
        max_length=LENGTH,
        rngs=nnx.Rngs(3),
        **options,
    )
    functions, params = decoder_functions(decoder)
    # Larger weights, so that tokens matter.
    return functions, jax.tree.map(lambda x: 2.0 * x, params)


@pytest.fixture(scope="module", params=[*variants_with("step"), "lstm", MINE])
def made(request):
    return _make(request.param)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, LENGTH), 0, 10)


def test_one_token_at_a_time_equals_all_at_once(made, tokens):
    functions, params = made
    whole = jax.jit(functions.apply)(params, tokens)
    assert whole.shape == (3, LENGTH, 10)
    assert float(jnp.abs(whole - whole[:, :1]).max()) > 0.1
    state = functions.init(3, LENGTH)
    step = jax.jit(functions.step)
    for t in range(LENGTH):
        state, output = step(params, state, tokens[:, t])
        np.testing.assert_allclose(output, whole[:, t], atol=1e-5, rtol=1e-5)
    assert int(state.position) == LENGTH
    small = functions.init(3, 5)  # room for fewer tokens changes nothing
    for t in range(5):
        small, output = step(params, small, tokens[:, t])
        np.testing.assert_allclose(output, whole[:, t], atol=1e-5, rtol=1e-5)
    changed = tokens.at[:, 10:].set((tokens[:, 10:] + 1) % 10)  # the future
    after = jax.jit(functions.apply)(params, changed)
    np.testing.assert_allclose(whole[:, :10], after[:, :10], atol=1e-6)
    assert float(jnp.abs(whole[:, 10] - after[:, 10]).max()) > 1e-3


@pytest.mark.parametrize(("given", "sample"), [(1, sample_symbols), (7, greedy)])
def test_with_and_without_a_state_the_same_tokens_are_drawn(
    made, tokens, given, sample
):
    functions, params = made
    prompt, steps, rng = tokens[:, :given], LENGTH - given, jax.random.key(4)
    cached = functions.generate(params, prompt, steps, rng, sample)
    whole = functions.generate_uncached(params, prompt, steps, rng, sample)
    np.testing.assert_array_equal(cached, whole)
    assert len(np.unique(np.asarray(cached))) > 1


def test_every_parameter_has_a_gradient(made, tokens):
    functions, params = made
    grads = jax.jit(jax.grad(lambda p: jnp.square(functions.apply(p, tokens)).sum()))(
        params
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(leaf).all()), path
        assert float(jnp.abs(leaf).max()) > 0, path


def test_both_softmaxes_are_one_model(tokens):
    (one, params), (other, same) = _make("dot_product"), _make("blockwise")
    assert jax.tree.structure(params) == jax.tree.structure(same)
    found = jax.jit(lambda p, x: (one.apply(p, x), other.apply(p, x)))(params, tokens)
    np.testing.assert_allclose(*found, atol=1e-5)


def test_rotations_are_redrawn_in_training_alone(tokens):
    functions, params = _make("reformer")
    apply = jax.jit(functions.apply)
    fixed = jax.jit(lambda p, x: functions.apply(p, x))(params, tokens)
    first, second = (apply(params, tokens, jax.random.key(n)) for n in (0, 1))
    np.testing.assert_allclose(first, fixed, atol=1e-5)  # what `step` uses
    assert float(jnp.abs(first - second).max()) > 1e-4


def test_an_lstm_block_has_the_parameters_of_an_attention_block():
    sizes = {}
    for mixer in ("linear", "lstm"):
        decoder = Decoder(
            2, 2, mixer=mixer, dim=64, depth=1, num_heads=4, max_length=4,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        leaves = jax.tree.leaves(nnx.state(decoder.blocks, nnx.Param))
        sizes[mixer] = sum(leaf.size for leaf in leaves)
    assert abs(sizes["lstm"] / sizes["linear"] - 1) < 0.05


def test_lstm_is_the_textbooks():
    layer = LstmLayer(3, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 6, 3))
    into, recur, out = (
        np.asarray(part.kernel[...], np.float64)
        for part in (layer.into, layer.recur, layer.out)
    )
    bias, last = (np.asarray(p.bias[...], np.float64) for p in (layer.into, layer.out))
    assert bias.tolist() == [0] * 4 + [1] * 4 + [0] * 8

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    hidden, cell = np.zeros((2, 4)), np.zeros((2, 4))
    wanted = []
    for t in range(6):
        i, f, g, o = np.split(x[:, t] @ into + bias + hidden @ recur, 4, axis=1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        wanted.append(hidden @ out + last)
    found = layer(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, np.stack(wanted, 1), atol=1e-5)


def test_positions_and_the_first_bias_are_what_was_given(tokens):
    table = np.random.default_rng(0).standard_normal((LENGTH, 16)).astype(np.float32)
    bias = np.arange(10, dtype=np.float32)
    functions, params = _make("lstm", positions=table, head_bias=bias)
    np.testing.assert_allclose(params["head"]["bias"], 2 * bias)
    assert "positions" not in params
    _, learned = _make("lstm", positions="learned")
    assert learned["positions"].shape == (LENGTH, 16)
    other, _ = _make("lstm")
    both = jax.jit(lambda p, x: (functions.apply(p, x), other.apply(p, x)))
    assert not np.allclose(*both(params, tokens))


def test_bad_arguments_are_named(tokens):
    with pytest.raises(ValueError, match="'gat' cannot honour one token at a time"):
        _make("gat")
    with pytest.raises(ValueError, match="unknown attention variant 'gru'"):
        _make("gru")
    with pytest.raises(ValueError, match="`positions` must be"):
        _make("linear", positions="alibi")
    with pytest.raises(ValueError, match=r"`positions` must be \[max_length"):
        _make("linear", positions=np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="`head_bias` must be"):
        _make("linear", head_bias=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="multiple of `num_heads`"):
        CausalAttention(9, num_heads=2, variant="linear", rngs=nnx.Rngs(0))
    functions, params = _make("linear")
    with pytest.raises(ValueError, match="`tokens` must be"):
        functions.apply(params, jnp.zeros((1, LENGTH + 1), jnp.int32))
    with pytest.raises(ValueError, match="`length` must be 1 to max_length"):
        functions.init(1, LENGTH + 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_state_follows_the_parameters(made, dtype):
    functions, params = made
    shape = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Flax's norms
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        token, prompt = np.zeros(2, np.uint8), np.zeros((2, 3), np.int64)
        state = functions.init(2, 5, dtype)
        after, output = jax.eval_shape(functions.step, params, state, token)
        assert output.dtype == dtype
        assert shape(state) == shape(after)
        wide = {
            leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype.kind not in "ib"
        }
        assert wide <= {jnp.dtype(dtype), jnp.promote_types(dtype, jnp.float32)}
        # And that of `generate`, whose scan would not take another.
        new = jax.eval_shape(
            lambda *given: functions.generate(*given, 4, jax.random.key(0)),
            params,
            prompt,
        )
        assert (new.shape, new.dtype) == ((2, 4), jnp.int32)


def test_a_decoder_in_another_dtype_begins_in_it():
    decoder = Decoder(
        5, 5, mixer="dot_product", dim=4, depth=1, max_length=3, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(decoder, nnx.Param, ...)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    state = nnx.merge(graph, half, rest).init_state(2)
    assert {leaf.dtype for leaf in state.layers[0]} == {jnp.dtype(jnp.bfloat16)}


def test_what_there_is_no_room_for_is_refused():
    decoder = Decoder(
        5, 5, mixer="linear", dim=4, depth=1, max_length=3, rngs=nnx.Rngs(0)
    )
    functions, params = decoder_functions(decoder)
    with pytest.raises(ValueError, match="must be 1 to max_length=3, but is 4"):
        functions.generate(params, np.zeros((1, 2), int), 3, jax.random.key(0))
    state = decoder.init_state(1)._replace(position=jnp.int32(3))
    with pytest.raises(ValueError, match="`state.position` .* 0 … 2, .* to 3: the dec"):
        decoder.step(state, jnp.zeros(1, int))
