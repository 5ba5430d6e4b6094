"""Generation: with a state and without are equal, and memory is what it must be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import (
    dot_product,
    generate,
    generate_uncached,
    multi_head,
    multi_head_state,
    multi_head_step,
    resolve,
    sample_symbols,
)
from attn_jax.attention import (
    cache_state,
    cache_step,
    reformer,
    reformer_init_state,
    reformer_step,
)
from attn_jax.generation import _generate
from attn_jax.nn.decoder import Decoder, decoder_functions

SYMBOLS = 7


def _step(params, state, token):
    """The sum of all tokens so far, modulo the number of symbols, tells the next."""
    total = state + token
    return total, params[total % SYMBOLS]


def _init(batch, length):
    return jnp.zeros(batch, jnp.int32)


def _apply(params, tokens):
    return params[jnp.cumsum(tokens, axis=1) % SYMBOLS]


@pytest.fixture(scope="module")
def params():
    return jax.random.normal(jax.random.key(5), (SYMBOLS, SYMBOLS))


def test_generate_is_the_loop_it_says_it_is(params):
    prompt = jnp.array([[1, 2, 3], [4, 5, 6]])
    rng = jax.random.key(0)
    found = generate(params, prompt, 5, rng, step=_step, init=_init)
    tokens = prompt
    for index in range(5):
        logits = _apply(params, tokens)[:, -1]
        new = sample_symbols(jax.random.fold_in(rng, index), logits)
        tokens = jnp.concatenate([tokens, new[:, None]], axis=1)
    np.testing.assert_array_equal(found, tokens[:, 3:])
    other = generate(params, prompt, 5, jax.random.key(1), step=_step, init=_init)
    assert (other != found).any()


@pytest.mark.parametrize("given", [1, 4])
def test_cached_and_uncached_draw_the_same_tokens(params, given):
    prompt = jax.random.randint(jax.random.key(2), (3, given), 0, SYMBOLS)
    for seed in range(3):
        rng = jax.random.key(seed)
        cached = generate(params, prompt, 9, rng, step=_step, init=_init)
        whole = generate_uncached(params, prompt, 9, rng, apply=_apply)
        np.testing.assert_array_equal(cached, whole)


def test_the_program_is_compiled_once(params):
    prompt = jnp.zeros((2, 2), jnp.int32)
    before = _generate._cache_size()
    for seed in range(3):
        generate(params, prompt, 3, jax.random.key(seed), step=_step, init=_init)
    assert _generate._cache_size() == before + 1


def test_sample_symbols():
    logits = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    wide = jnp.broadcast_to(logits, (20_000, 3))
    drawn = np.asarray(sample_symbols(jax.random.key(0), wide))
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, [0.2, 0.5, 0.3], atol=0.02)
    cold = np.asarray(sample_symbols(jax.random.key(0), wide, temperature=0.5))
    square = np.array([0.2, 0.5, 0.3]) ** 2
    np.testing.assert_allclose(
        np.bincount(cold) / 20_000, square / square.sum(), atol=0.02
    )
    greedy = sample_symbols(jax.random.key(0), wide, temperature=0.0)
    assert set(np.asarray(greedy)) == {1}
    with pytest.raises(ValueError, match="temperature"):
        sample_symbols(jax.random.key(0), wide, temperature=-1.0)


def test_prompts_of_any_integers_give_the_same(params):
    rng, prompt = jax.random.key(0), np.array([[1, 2], [0, 3]], np.int32)
    how = dict(step=_step, init=_init)
    want = generate(params, prompt, 4, rng, **how)
    assert want.dtype == jnp.int32
    for dtype in (np.uint8, np.int16):
        np.testing.assert_array_equal(
            generate(params, prompt.astype(dtype), 4, rng, **how), want
        )
    with jax.enable_x64(True):
        for sample in (sample_symbols, lambda rng, x: jnp.argmax(x, -1)):  # int64
            now = generate(params, prompt.astype(int), 4, rng, **how, sample=sample)
            assert now.dtype == jnp.int32
            cached = functools.partial(generate_uncached, apply=_apply, sample=sample)
            np.testing.assert_array_equal(
                cached(params, prompt.astype(int), 4, rng), now
            )


def test_a_state_begins_in_the_dtype_that_the_step_gives_it():
    def step(params, state, token):
        return state + params, jax.nn.one_hot(token + 1, 9) + state

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        new = generate(
            np.float64(0.0),
            np.array([[2]]),
            2,
            jax.random.key(0),
            step=step,
            init=lambda batch, length: jnp.zeros((), jnp.float32),
            sample=functools.partial(sample_symbols, temperature=0.0),
        )
    assert new.tolist() == [[3, 4]]


def test_no_symbol_is_drawn_from_nan():
    logits = jnp.array([[0.0, jnp.nan], [9.0, 0.0]])
    for temperature in (0.0, 0.1):
        drawn = sample_symbols(jax.random.key(0), logits, temperature=temperature)
        assert drawn.tolist() == [-1, 0]


def test_bad_arguments_are_named(params):
    rng, prompt = jax.random.key(0), jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(ValueError, match="`prompt` must be"):
        generate(params, prompt[:, :0], 3, rng, step=_step, init=_init)
    with pytest.raises(ValueError, match="`steps`"):
        generate_uncached(params, prompt, 0, rng, apply=_apply)
    with pytest.raises(TypeError, match="`sample` must return tokens int32"):
        generate(
            params,
            prompt,
            3,
            rng,
            step=_step,
            init=_init,
            sample=lambda rng, logits: logits,
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)]
)
def test_a_cache_computes_the_rows_of_softmax_attention(dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (3 * jax.random.normal(key, (2, 11, 3, 4)) for key in keys)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    whole = multi_head(dot_product)(q, k, v, is_causal=True)
    assert cache_state(11, 4, 4, block_size=4).key.shape == (3, 4, 4)
    variant = resolve("dot_product").bind(scale=0.5)
    cache = multi_head_state(variant, 2, 3, length=11, head_dim=4, dtype=dtype)
    step = jax.jit(multi_head_step(variant))
    for t in range(11):
        cache, out = step(cache, jnp.int32(t), q[:, t], k[:, t], v[:, t])
        assert out.dtype == dtype
        np.testing.assert_allclose(
            out.astype(jnp.float32),
            whole[:, t].astype(jnp.float32),
            atol=tolerance,
            rtol=tolerance,
        )


def test_what_is_beyond_the_position_is_not_read():
    cache = cache_state(6, 4, 4, block_size=3)
    x = jnp.ones(4)
    clean = cache_step(cache, jnp.int32(1), x, x, x)[1]
    poisoned = jax.tree.map(lambda leaf: leaf.at[0, 2].set(1e9), cache)
    poisoned = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), poisoned)
    np.testing.assert_array_equal(cache_step(poisoned, jnp.int32(1), x, x, x)[1], clean)
    with pytest.raises(ValueError, match="`value` must have shape"):
        cache_step(cache, jnp.int32(0), x, x, jnp.ones(5))


def test_a_hash_cache_computes_the_rows_of_reformer():
    length = 40
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (2 * jax.random.normal(key, (length, 4)) for key in keys)
    options = dict(rng=jax.random.key(7), chunk_size=16)
    sizes = dict(num_buckets=4, num_rounds=2)
    whole = jax.jit(
        lambda q, k, v: reformer(q, k, v, is_causal=True, **options, **sizes)
    )(q, k, v)
    cache = reformer_init_state(length, 4, 4, **sizes)

    @jax.jit
    def step(cache, t, q, k, v):
        return reformer_step(cache, t, q, k, v, **options)

    for t in range(length):
        cache, out = step(cache, jnp.int32(t), q[t], k[t], v[t])
        np.testing.assert_allclose(out, whole[t], atol=1e-5)


def _decoder(mixer, length):
    model = Decoder(
        9, 9, mixer=mixer, dim=8, depth=1, num_heads=2, max_length=length,
        positions="learned", rngs=nnx.Rngs(0),
    )  # fmt: skip
    return decoder_functions(model)


def _memory(mixer, steps, length=2048):
    functions, params = _decoder(mixer, length)
    prompt = jnp.zeros((2, 1), jnp.int32)
    compiled = _generate.lower(
        params,
        prompt,
        jax.random.key(0),
        steps=steps,
        step=functions.step,
        init=functions.init,
        draw=sample_symbols,
    ).compile()
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


@pytest.mark.usefixtures("optimized")
def test_memory_of_a_recurrent_program_does_not_grow():
    few, many = _memory("linear", 64), _memory("linear", 2048)
    output = 2 * (2048 - 64) * 4
    assert many[1] - few[1] == output
    # The scan collects the tokens and turns them over: what is drawn, and no state.
    assert many[0] - few[0] <= 3 * output


@pytest.mark.usefixtures("optimized")
def test_memory_of_a_cache_grows_and_that_can_be_seen():
    few, many = _memory("blockwise", 64), _memory("blockwise", 2048)
    cache = 2 * 2 * (2048 - 64) * 8 * 4  # keys and values; batch; width; bytes
    assert many[0] - few[0] >= cache


def test_the_state_of_linear_attention_has_one_size():
    sizes = {}
    for mixer in ("linear", "lstm", "blockwise", "reformer"):
        functions, _ = _decoder(mixer, 64)
        sizes[mixer] = [
            sum(x.size for x in jax.tree.leaves(functions.init(2, n))) for n in (8, 64)
        ]
    assert sizes["linear"][0] == sizes["linear"][1]
    assert sizes["lstm"][0] == sizes["lstm"][1]
    assert sizes["blockwise"][0] * 7 < sizes["blockwise"][1]
    assert sizes["reformer"][0] < sizes["reformer"][1]


def test_generation_lowers_for_accelerators():
    functions, params = _decoder("blockwise", 16)

    def run(params, prompt, rng):
        return functions.generate(params, prompt, 8, rng)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    prompt = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    exported = jax.export.export(jax.jit(run), platforms=("cuda", "tpu"))(
        shapes, prompt, jax.eval_shape(lambda: jax.random.key(0))
    )
    assert exported.out_avals[0].shape == (2, 8)
