"""Truncated attention: equal to a band mask, in time and memory linear in T."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import masks
from attn_jax.attention.local import truncated
from attn_jax.attention.softmax import dot_product
from attn_jax.multihead import multi_head
from attn_jax.tools.cost import count_flops
from tests import helpers

H, V = 8, 5


def _draw_arrays(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _by_equation(query, key, value, bias, allowed, scale):
    """Output and gradients for the cotangent Σ cos, row by row in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    length = len(query)
    g = np.cos(np.arange(length * value.shape[1])).reshape(length, -1)
    out = np.zeros_like(value)
    grads = [np.zeros_like(x) for x in (query, key, value)]
    grad_bias = np.zeros((length, length))
    for t in range(length):
        near = np.flatnonzero(allowed[t])
        if near.size == 0:
            continue
        logits = np.array([scale * query[t] @ key[s] + bias[t, s] for s in near])
        w = np.exp(logits - logits.max())
        w /= w.sum()
        out[t] = w @ value[near]
        slope = np.array([g[t] @ value[s] for s in near])
        of_logits = w * (slope - w @ slope)
        for s, weight, d in zip(near, w, of_logits, strict=True):
            grads[0][t] += scale * d * key[s]
            grads[1][s] += scale * d * query[t]
            grads[2][s] += weight * g[t]
            grad_bias[t, s] = d
    return out, [*grads, grad_bias], g


def _shares(array, shape):
    """Sums a [T, T] gradient over the axes that are shared."""
    axes = tuple(a for a, n in enumerate(shape) if n == 1 and array.shape[a] > 1)
    return array.sum(axis=axes, keepdims=True)


def _cases():
    """Every length with every window, the other options taken in turn."""
    others = itertools.cycle(
        [
            {},
            {"causal": True},
            {"key_mask": True, "bias": "full"},
            {"mask": "full", "bias": "keys", "map_blocks": "vmap"},
            {"mask": "queries", "causal": True, "bias": "one"},
            {"bias": "queries", "key_mask": True, "mask": "keys"},
            {"map_blocks": "vmap", "key_mask": True, "mask": "full"},
        ]
    )
    windows = ((0, 0), (3, 0), (0, 3), (3, 64), (64, 3), (64, 64), (None, 3))
    for length in (1, 2, 7, 64, 130, 300):
        for left, right in windows:
            if length > 7 or (left, right) in ((0, 0), (3, 64), (None, 3)):
                yield length, length if left is None else left, right, next(others)


@pytest.mark.parametrize("length, left, right, options", list(_cases()))
def test_equals_the_equation(length, left, right, options, draw):
    shapes = {
        "full": (length, length),
        "keys": (1, length),
        "queries": (length, 1),
        "one": (1, 1),
    }
    rng = np.random.default_rng(length)
    arrays = _draw_arrays(draw, length)
    allowed = np.asarray(masks.window(length, left, right))
    given = {"left": left, "right": right}
    given["map_blocks"] = options.get("map_blocks", "loop")
    # With blocks of 9, 130 and 300 take several groups, and the last block is padded.
    given["block_size"] = 9 if length in (130, 300) and left + right < 8 else None
    if options.get("causal"):
        given["is_causal"] = True
        allowed = allowed & np.tri(length, dtype=bool)
    if options.get("key_mask"):
        given["key_mask"] = np.arange(length) % 5 != 1
        allowed = allowed & given["key_mask"][None, :]
    if "mask" in options:
        given["mask"] = rng.random(shapes[options["mask"]]) < 0.7
        allowed = allowed & given["mask"]
    bias = np.zeros((length, length))
    if "bias" in options:
        arrays |= draw({"bias": shapes[options["bias"]]}, seed=4)
        bias = np.broadcast_to(arrays["bias"], (length, length))
    plain = (arrays["query"], arrays["key"], arrays["value"])
    out, grads, g = _by_equation(*plain, bias, allowed, H**-0.5)
    ours = helpers.value_and_grads(
        functools.partial(truncated, **given), arrays, jnp.asarray(g, jnp.float32)
    )
    theirs = dict(zip(("query", "key", "value", "bias"), grads, strict=True))
    theirs["out"] = out
    if "bias" in arrays:
        theirs["bias"] = _shares(theirs["bias"], arrays["bias"].shape)
    for name, found in ours.items():
        np.testing.assert_allclose(
            found, theirs[name], atol=3e-5, rtol=1e-5, err_msg=name
        )
    empty = ~allowed.any(axis=1)
    assert not ours["out"][empty].any() and not ours["query"][empty].any()


@pytest.mark.parametrize("map_blocks", ["loop", "vmap"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_equals_a_band_mask(map_blocks, bias, draw):
    length = 130
    arrays = _draw_arrays(draw, length)
    if bias:
        arrays |= draw({"bias": (length, length)}, seed=4)
    arrays = {name: jnp.asarray(a, jnp.bfloat16) for name, a in arrays.items()}
    cotangent = jnp.asarray(draw({"g": (length, V)}, seed=2)["g"], jnp.bfloat16)
    near = functools.partial(
        truncated, left=5, right=2, block_size=9, map_blocks=map_blocks
    )
    ours = helpers.value_and_grads(near, arrays, cotangent)
    band = functools.partial(dot_product, mask=masks.window(length, 5, 2))
    theirs = helpers.value_and_grads(band, arrays, cotangent)
    assert set(ours) == set(theirs)
    for name, found in ours.items():
        assert found.dtype == jnp.bfloat16
        top = max(1.0, float(jnp.abs(theirs[name]).max()))
        np.testing.assert_allclose(
            np.asarray(found, np.float64) / top,
            np.asarray(theirs[name], np.float64) / top,
            atol=1e-2,
            err_msg=name,
        )


@pytest.mark.parametrize("length, window", [(7, 6), (64, 64), (64, 10**6)])
def test_a_window_of_the_whole_sequence_is_dot_product(length, window, draw):
    arrays = _draw_arrays(draw, length)
    cotangent = jnp.ones((length, V))
    near = functools.partial(truncated, left=window, right=window)
    ours = helpers.value_and_grads(near, arrays, cotangent)
    theirs = helpers.value_and_grads(dot_product, arrays, cotangent)
    for name, found in ours.items():
        np.testing.assert_allclose(found, theirs[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("map_blocks", ["loop", "vmap"])
@pytest.mark.parametrize("causal", [False, True])
def test_no_gradient_beyond_the_window(map_blocks, causal, draw):
    length, t, left, right = 130, 71, 6, 3
    arrays = _draw_arrays(draw, length)
    cotangent = jnp.zeros((length, V)).at[t].set(1.0)
    near = functools.partial(
        truncated,
        left=left,
        right=right,
        is_causal=causal,
        block_size=9,
        map_blocks=map_blocks,
    )
    grads = helpers.value_and_grads(near, arrays, cotangent)
    seen = np.zeros(length, bool)
    seen[t - left : t + (0 if causal else right) + 1] = True
    for name in ("key", "value"):
        np.testing.assert_array_equal(grads[name].any(axis=1), seen)
    assert np.flatnonzero(grads["query"].any(axis=1)).tolist() == [t]


@pytest.mark.parametrize("map_blocks", ["loop", "vmap"])
def test_masked_keys_do_not_leak(map_blocks, draw):
    length = 130
    arrays = _draw_arrays(draw, length)
    key_mask = np.ones(length, bool)
    key_mask[[0, 17, 50, 51, 52, 53, 54, 55, 129]] = False
    poison = {name: arrays[name].copy() for name in ("key", "value")}
    for array in poison.values():
        array[~key_mask] = 1e9
    near = functools.partial(
        truncated,
        key_mask=key_mask,
        left=3,
        right=1,
        block_size=9,
        map_blocks=map_blocks,
    )
    clean, dirty = (
        helpers.value_and_grads(near, given, jnp.ones((length, V)))
        for given in (arrays, {**arrays, **poison})
    )
    for name in clean:
        np.testing.assert_array_equal(clean[name], dirty[name], err_msg=name)
    assert not clean["key"][~key_mask].any() and not clean["value"][~key_mask].any()
    # Queries 53 and 54 see keys 50-55 alone, all of them masked.
    assert not clean["out"][53:55].any() and not clean["query"][53:55].any()
    assert clean["out"][52].any() and clean["out"][55].any()


def test_a_bias_of_minus_infinity_masks(draw):
    length = 64
    mask = np.random.default_rng(3).random((length, length)) < 0.5
    mask[3] = False
    arrays = _draw_arrays(draw, length) | draw({"bias": (length, length)}, seed=4)
    biased = {**arrays, "bias": np.where(mask, arrays["bias"], -np.inf)}
    near = functools.partial(truncated, left=4, right=4, block_size=9)
    ours = helpers.value_and_grads(near, biased, jnp.ones((length, V)))
    theirs = helpers.value_and_grads(
        functools.partial(near, mask=mask), arrays, jnp.ones((length, V))
    )
    assert not ours["out"][3].any()
    for name, found in ours.items():
        np.testing.assert_allclose(found, theirs[name], atol=2e-5, err_msg=name)
    # What is wrong stays visible.
    bias = arrays["bias"].copy()
    bias[2] = np.nan
    out = near(**{**arrays, "bias": bias})
    assert np.isnan(out[2]).all() and np.isfinite(out[3]).all()


def _compiled(fn, length, *, grad):
    shape = jax.ShapeDtypeStruct((length, 32), jnp.float32)
    if grad:
        forward = fn
        fn = jax.grad(lambda *x: (forward(*x) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(fn).lower(shape, shape, shape).compile()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("map_blocks", ["loop", "vmap"])
@pytest.mark.parametrize("grad", [False, True])
def test_cost_is_linear_in_length(grad, map_blocks):
    near = functools.partial(truncated, left=15, right=16, map_blocks=map_blocks)
    short, long = (_compiled(near, length, grad=grad) for length in (1024, 2048))
    sizes = [x.memory_analysis().temp_size_in_bytes for x in (short, long)]
    assert sizes[1] < 2.2 * sizes[0]
    assert sizes[1] < 2 * 2048 * 2048  # less than half of one score matrix
    if map_blocks == "vmap":  # of a loop's body the count is taken once
        flops = [x.cost_analysis()["flops"] for x in (short, long)]
        assert flops[0] < flops[1] < 2.2 * flops[0]
        # Two products in the forward pass and seven in the backward pass.
        assert flops[1] < (9 if grad else 2) * 1.5 * 2 * 2048 * (32 + 31) * 32
    # The measure sees a score matrix where there is one.
    dense = _compiled(dot_product, 2048, grad=grad).memory_analysis()
    assert dense.temp_size_in_bytes >= 4 * 2048 * 2048


@pytest.mark.parametrize("gradient", [False, True])
def test_a_loop_costs_in_proportion_to_the_length(gradient):
    # Counted with loops entered, unlike XLA's own analysis.
    def flops(length):
        x = jax.ShapeDtypeStruct((length, H), jnp.float32)

        def near(x):
            return truncated(x, x, x, left=8, right=8, map_blocks="loop").sum()

        return count_flops(jax.grad(near) if gradient else near, x)

    few, many, dense = flops(2048), flops(4096), 4 * 4096**2 * H
    assert few.exact and many.exact
    assert many.total < 2.2 * few.total and many.total < dense / 2


@pytest.mark.usefixtures("optimized")
def test_gradient_of_bias_is_made_only_if_asked_for():
    length = 1024
    x = jax.ShapeDtypeStruct((length, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((length, length), jnp.float32)

    def loss(x, bias):
        return (truncated(x, x, x, bias, left=16, right=16) ** 2).sum()

    def total_bytes(argnums):
        analysis = (
            jax.jit(jax.grad(loss, argnums=argnums)).lower(x, bias).compile()
        ).memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    assert total_bytes(0) < 4 * length * length <= total_bytes((0, 1))


def test_under_multi_head_with_a_shared_bias(draw):
    length, heads = 40, 4
    arrays = draw({n: (2, length, heads, H) for n in ("query", "key", "value")}, 7)
    arrays |= draw({"bias": (1, heads, 1, length)}, seed=8)
    options = {"left": 5, "right": 9, "block_size": 4}
    cotangent = jnp.ones((2, length, heads, H))
    band = masks.window(length, 5, 9)[None, None]
    theirs = helpers.value_and_grads(
        functools.partial(multi_head("dot_product"), mask=band), arrays, cotangent
    )
    for heads_by, blocks_by in itertools.product(("vmap", "loop"), repeat=2):
        near = functools.partial(
            multi_head("truncated", map_heads=heads_by),
            **options,
            map_blocks=blocks_by,
        )
        ours = helpers.value_and_grads(near, arrays, cotangent)
        for name, found in ours.items():
            np.testing.assert_allclose(found, theirs[name], atol=5e-5, err_msg=name)


def test_scale_may_be_learned(draw):
    arrays = _draw_arrays(draw, 30)
    band = masks.window(30, 64, 64)

    def slope_of(fn):
        return jax.jit(jax.grad(lambda s: (fn(**arrays, scale=s) ** 2).sum()))(0.3)

    theirs = slope_of(functools.partial(dot_product, mask=band))
    np.testing.assert_allclose(slope_of(truncated), theirs, rtol=1e-4)


@pytest.mark.parametrize("map_blocks", ["loop", "vmap"])
@pytest.mark.parametrize("grad", [False, True])
def test_lowers_for_accelerators(grad, map_blocks):
    def fn(x):
        return truncated(x, x, x, left=20, right=5, map_blocks=map_blocks)

    if grad:
        fn = jax.grad(lambda x, forward=fn: forward(x).astype(jnp.float32).sum())
    x = jax.ShapeDtypeStruct((1000, 16), jnp.bfloat16)
    exported = jax.export.export(jax.jit(fn), platforms=("cuda", "tpu"))(x)
    assert exported.platforms == ("cuda", "tpu")


def test_no_queries():
    none = jnp.ones((0, H))
    assert truncated(none, none, jnp.ones((0, V))).shape == (0, V)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"left": -1}, ValueError, "`left` must be at least 0, but is -1"),
        ({"right": -2}, ValueError, "`right` must be at least 0, but is -2"),
        ({"left": 2.0}, TypeError, "`left` must be an int .* but is float: 2.0"),
        ({"right": True}, TypeError, "`right` must be an int .* bool: True"),
        ({"left": None}, TypeError, "`left` must be an int .* NoneType"),
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1, but is 0"),
        ({"map_blocks": "scan"}, ValueError, "`map_blocks` must be .* but is 'scan'"),
        ({"mask": np.ones((6, 6))}, TypeError, "`mask` must be bool"),
        ({"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6; use `dot_product`"),
    ],
)
def test_bad_arguments_are_named(options, error, message, draw):
    with pytest.raises(error, match=message):
        truncated(**{**_draw_arrays(draw, 6), **options})
