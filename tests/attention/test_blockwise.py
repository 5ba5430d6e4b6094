"""Blockwise attention: equal to the reference, in memory that is linear in T."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.blockwise_attention import blockwise
from attn_jax.attention.softmax import dot_product
from tests import helpers

T, S, H, V = 13, 17, 8, 5


@pytest.fixture(scope="module")
def arrays(draw):
    return draw({"query": (T, H), "key": (S, H), "value": (S, V), "bias": (T, S)})


# T=13 and S=17 are divisible by no block size here; 6 and 5 give three and four blocks.
@pytest.mark.parametrize(
    "block_size, masked, causal",
    [(6, False, False), (5, True, False), (5, False, True), (6, True, True)]
    + [(64, True, True)],
)
def test_equals_reference_forward_and_gradient(
    block_size, masked, causal, arrays, draw
):
    options = {"is_causal": causal, "scale": 0.7}
    arrays = dict(arrays)
    if masked:
        mask = np.random.default_rng(1).random((T, S)) < 0.5
        mask[3] = False
        options |= {"mask": mask, "key_mask": np.arange(S) % 5 != 0}
    else:
        del arrays["bias"]
    cotangent = jnp.asarray(draw({"g": (T, V)}, seed=2)["g"])
    ours = helpers.same(
        functools.partial(blockwise, **options, block_size=block_size),
        functools.partial(dot_product, **options),
        arrays,
        cotangent,
        atol=1e-5,
    )
    if masked:
        assert not np.any(ours["out"][3])


def test_bfloat16_equals_reference(arrays, draw):
    narrow = {name: jnp.asarray(a, jnp.bfloat16) for name, a in arrays.items()}
    cotangent = jnp.asarray(draw({"g": (T, V)}, seed=2)["g"], jnp.bfloat16)
    ours = helpers.value_and_grads(
        lambda **given: blockwise(**given, block_size=6), narrow, cotangent
    )
    theirs = helpers.value_and_grads(dot_product, narrow, cotangent)
    for name in ours:
        assert ours[name].dtype == jnp.bfloat16
        scale = max(1.0, float(jnp.abs(theirs[name]).max()))
        np.testing.assert_allclose(
            np.asarray(ours[name], np.float64) / scale,
            np.asarray(theirs[name], np.float64) / scale,
            atol=1e-2,
            err_msg=name,
        )


def _compiled(fn, length, *, grad):
    shape = jax.ShapeDtypeStruct((length, 32), jnp.float32)
    if grad:
        forward = fn
        fn = jax.grad(lambda *x: (forward(*x) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(fn).lower(shape, shape, shape).compile()


def _temporary_bytes(fn, length, *, grad):
    return _compiled(fn, length, grad=grad).memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("grad", [False, True])
def test_temporary_memory_grows_linearly(grad):
    def blocks(*arrays):
        return blockwise(*arrays, is_causal=True, block_size=128)

    short, middle, long = (
        _temporary_bytes(blocks, length, grad=grad) for length in (512, 1024, 2048)
    )
    # Linear: twice the length adds twice the bytes. A quadratic part would add four
    # times as much; even one byte a score would show beside the T·H floats here.
    assert long - middle <= 2.2 * (middle - short) + 4096
    assert long <= 4.4 * short
    assert long < 2048 * 2048  # far less than one score matrix of 4 bytes each
    # The measure tells the two apart: the reference holds at least one score matrix.
    assert _temporary_bytes(dot_product, 2048, grad=grad) >= 4 * 2048 * 2048


@pytest.mark.usefixtures("optimized")
def test_gradient_of_bias_is_made_only_if_asked_for():
    length = 1024
    x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((length, length), jnp.float32)

    def loss(x, bias):
        return (blockwise(x, x, x, bias, block_size=128) ** 2).sum()

    def total_bytes(argnums):
        analysis = (
            jax.jit(jax.grad(loss, argnums=argnums)).lower(x, bias).compile()
        ).memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    assert total_bytes(0) < 4 * length * length <= total_bytes((0, 1))


@pytest.mark.usefixtures("optimized")
def test_a_cotangent_that_a_batch_shares_gives_the_gradients_of_one_for_each():
    """XLA:CPU fused the backward pass to wrong numbers where G alone has no batch."""
    *inputs, given = (
        jnp.asarray(x, jnp.float32)
        for x in np.random.default_rng(0).normal(size=(4, 2, 256, 32))
    )

    def pull(query, key, value, given):
        return jax.vjp(blockwise, query, key, value)[1](given)

    shared = jax.jit(jax.vmap(pull, in_axes=(0, 0, 0, None)))(*inputs, given[0])
    one_by_one = [pull(*each, given[0]) for each in zip(*inputs, strict=True)]
    for ours, wanted in zip(shared, zip(*one_by_one, strict=True), strict=True):
        np.testing.assert_allclose(ours, jnp.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, S), (T, 1)])
def test_shared_axes_of_bias_and_mask(shape, arrays, draw):
    options = {"mask": np.random.default_rng(1).random((1, S)) < 0.5, "is_causal": True}
    arrays = {**arrays, **draw({"bias": shape}, seed=5)}
    cotangent = jnp.asarray(draw({"g": (T, V)}, seed=2)["g"])
    ours = functools.partial(blockwise, block_size=6, **options)
    theirs = functools.partial(dot_product, **options)
    helpers.same(ours, theirs, arrays, cotangent, atol=1e-5)


def test_wholly_masked_blocks_are_skipped(arrays):
    key = arrays["key"].copy()
    value = arrays["value"].copy()
    # NaN in a block that is read would reach every query, since 0 · NaN is NaN.
    key[12:], value[12:] = np.nan, np.nan
    run = jax.jit(functools.partial(blockwise, is_causal=True, block_size=6))
    out = run(arrays["query"], key, value)
    clean = dot_product(arrays["query"], arrays["key"], arrays["value"], is_causal=True)
    # Blocks of 5 queries (13 in 3) and 6 keys: queries 0-9 need keys 0-11 alone.
    np.testing.assert_allclose(out[:10], clean[:10], atol=1e-5)


def test_under_vmap_and_loop_with_shared_bias(arrays, draw):
    many = draw({"query": (3, T, H), "key": (3, S, H), "value": (3, S, V)}, seed=7)
    bias = arrays["bias"]

    def loss(fn, bias, lift):
        def one(query, key, value):
            return fn(query, key, value, bias)

        return (lift(one, many) ** 2).sum()

    def with_vmap(one, many):
        return jax.vmap(one)(many["query"], many["key"], many["value"])

    def with_loop(one, many):
        return jax.lax.map(lambda x: one(x["query"], x["key"], x["value"]), many)

    def blocks(*args):
        return blockwise(*args, block_size=6)

    grads = [
        jax.jit(jax.grad(lambda b, f=fn, how=how: loss(f, b, how)))(bias)
        for fn, how in (
            (dot_product, with_vmap),
            (blocks, with_vmap),
            (blocks, with_loop),
        )
    ]
    np.testing.assert_allclose(grads[1], grads[0], atol=2e-5)
    np.testing.assert_allclose(grads[2], grads[0], atol=2e-5)


def test_scale_may_be_learned(arrays):
    plain = [arrays[name] for name in ("query", "key", "value")]

    def slope_of(fn):
        return jax.jit(jax.grad(lambda scale: (fn(*plain, scale=scale) ** 2).sum()))(
            0.3
        )

    np.testing.assert_allclose(slope_of(blockwise), slope_of(dot_product), rtol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_lowers_for_accelerators(grad):
    def fn(x):
        return blockwise(x, x, x, is_causal=True, block_size=128)

    if grad:
        fn = jax.grad(lambda x, forward=fn: forward(x).astype(jnp.float32).sum())
    x = jax.ShapeDtypeStruct((300, 16), jnp.bfloat16)
    exported = jax.export.export(jax.jit(fn), platforms=("cuda", "tpu"))(x)
    assert exported.platforms == ("cuda", "tpu")


def test_no_queries_or_no_keys():
    some, none = jnp.ones((3, H)), jnp.ones((0, H))
    assert blockwise(none, some, some).shape == (0, H)
    assert not np.any(blockwise(some, none, none))


def test_bad_options_are_named(arrays):
    with pytest.raises(ValueError, match="`block_size` must be at least 1, but is 0"):
        blockwise(**arrays, block_size=0)
    with pytest.raises(TypeError, match="`mask` must be bool"):
        blockwise(**arrays, mask=np.ones((T, S), np.float32))


@pytest.mark.parametrize(
    "fn, block_size", [(dot_product, None), (blockwise, 5), (blockwise, 64)]
)
def test_a_bias_of_minus_infinity_masks(fn, block_size, arrays):
    mask = np.random.default_rng(3).random((T, S)) < 0.5
    mask[3] = False
    biased = jnp.where(mask, arrays["bias"], -jnp.inf)
    if fn is blockwise:
        fn = functools.partial(blockwise, block_size=block_size)

    def run(**given):
        return helpers.value_and_grads(
            lambda **given: fn(**given), {**arrays, **given}, jnp.ones((T, V))
        )

    ours, theirs = (
        run(bias=biased),
        helpers.value_and_grads(
            lambda **given: dot_product(**given, mask=mask), arrays, jnp.ones((T, V))
        ),
    )
    assert not ours["out"][3].any()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=2e-5, err_msg=name)
    # What is wrong stays visible.
    bias = jnp.asarray(arrays["bias"]).at[2].set(jnp.nan)
    out = jax.jit(fn)(**{**arrays, "bias": bias})
    assert np.isnan(out[2]).all() and np.isfinite(out[3]).all()


def test_a_loop_of_several_blocks_runs_under_x64():
    # Loop counters are int64 there.
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 4)), jnp.float32)

        @functools.partial(jax.jit, static_argnums=1)
        @functools.partial(jax.grad, has_aux=True)
        def slopes(x, fn):
            out = fn(x, x, x, is_causal=True)
            return out.sum(), out

        ours = slopes(x, functools.partial(blockwise, block_size=4))
        theirs = slopes(x, dot_product)
        for found, expected in zip(ours, theirs, strict=True):
            assert found.dtype == expected.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, atol=1e-5)
