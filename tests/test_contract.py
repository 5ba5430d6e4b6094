"""The contract, tried on every variant in the table.

A new row in `VARIANTS` is tested here without a line of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.multihead import multi_head, multi_head_init
from attn_jax.variants import CAPABILITIES, VARIANTS, Variant, variants_with

pytestmark = pytest.mark.usefixtures("quick_compile")

B, T, S, N, K, H, V = 2, 6, 9, 4, 2, 8, 5

ALL = pytest.mark.parametrize("name", VARIANTS)


def _able(*capabilities):
    able = [n for n in VARIANTS if all(getattr(VARIANTS[n], c) for c in capabilities)]
    return pytest.mark.parametrize("name", able)


def _inputs(variant: Variant, dtype="float32", num_heads=N, num_kv_heads=K, batch=B):
    """Whole arrays of sizes that the variant can take."""
    num_keys = S if variant.cross else T
    value_dim = V if variant.value_dim else H
    rngs = jax.random.split(jax.random.key(7), 3)
    return {
        "query": jax.random.normal(rngs[0], (batch, T, num_heads, H), dtype),
        "key": jax.random.normal(rngs[1], (batch, num_keys, num_kv_heads, H), dtype),
        "value": jax.random.normal(
            rngs[2], (batch, num_keys, num_kv_heads, value_dim), dtype
        ),
    }


def _extras(variant: Variant, num_heads=N):
    """Parameters and random key, where the variant has any."""
    extras = {}
    if variant.init is not None:
        extras["params"] = multi_head_init(variant, jax.random.key(1), num_heads, H)
    if variant.stochastic:
        extras["rng"] = jax.random.key(2)
    return extras


@ALL
def test_shape_dtype_and_finite_gradients(name, dtype="bfloat16"):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant, dtype), _extras(variant)

    @jax.jit
    def run(inputs):
        out, pullback = jax.vjp(
            lambda inputs: multi_head(variant)(**inputs, **extras), inputs
        )
        return out, pullback(jnp.ones_like(out))[0]

    out, grads = run(inputs)
    assert out.shape == (B, T, N, inputs["value"].shape[-1])
    assert out.dtype == dtype
    for argument, grad in grads.items():
        assert grad.dtype == dtype
        assert np.isfinite(np.asarray(grad, np.float32)).all()
        assert np.any(grad), f"no gradient reaches {argument}"


@ALL
def test_jit_equals_eager_and_vmap_equals_loop(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    eager = multi_head(variant, map_heads="vmap")(**inputs, **extras)
    for how in ("vmap", "loop"):
        jitted = jax.jit(multi_head(variant, map_heads=how))(**inputs, **extras)
        np.testing.assert_allclose(jitted, eager, atol=1e-6, err_msg=how)


@_able("key_mask")
def test_masked_keys_do_not_leak_and_equal_a_shorter_sequence(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    num_keys = inputs["key"].shape[1]
    real = num_keys - 3
    key_mask = jnp.broadcast_to(jnp.arange(num_keys) < real, (B, num_keys))
    poison = {k: inputs[k].at[:, real:].set(1e9) for k in ("key", "value")}

    @jax.jit
    def run(inputs):
        out, pullback = jax.vjp(
            lambda x: multi_head(variant)(**x, key_mask=key_mask, **extras), inputs
        )
        return out, pullback(jnp.ones_like(out))[0]

    (clean, clean_grads), (dirty, dirty_grads) = run(inputs), run({**inputs, **poison})
    np.testing.assert_array_equal(clean, dirty)
    jax.tree.map(np.testing.assert_array_equal, clean_grads, dirty_grads)
    for argument in ("key", "value"):
        assert not np.any(dirty_grads[argument][:, real:])
    if variant.cross and not variant.stochastic:
        shorter = {k: inputs[k][:, :real] for k in ("key", "value")}
        short = jax.jit(multi_head(variant))(**{**inputs, **shorter}, **extras)
        np.testing.assert_allclose(clean, short, atol=1e-5)


@_able("mask")
def test_masked_pairs_do_not_leak_and_empty_rows_are_zero(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    num_keys = inputs["key"].shape[1]
    mask = np.random.default_rng(3).random((1, 1, T, num_keys)) < 0.6
    mask[..., 2, :] = False  # query 2 may attend to nothing
    mask[..., :, 4] = False  # key 4 is seen by nobody
    poison = {k: inputs[k].at[:, 4].set(1e9) for k in ("key", "value")}

    @jax.jit
    def run(inputs, cotangent):
        out, pullback = jax.vjp(
            lambda x: multi_head(variant)(**x, mask=jnp.asarray(mask), **extras), inputs
        )
        return out, pullback(jnp.broadcast_to(cotangent, out.shape))[0]

    everywhere = jnp.ones((1, T, 1, 1))
    clean, clean_grads = run(inputs, everywhere)
    dirty, dirty_grads = run({**inputs, **poison}, everywhere)
    np.testing.assert_array_equal(clean, dirty)
    jax.tree.map(np.testing.assert_array_equal, clean_grads, dirty_grads)
    assert not np.any(clean[:, 2])
    assert np.any(clean[:, 1])
    _, grads = run(inputs, everywhere.at[:, jnp.arange(T) != 2].set(0.0))
    jax.tree.map(lambda grad: np.testing.assert_array_equal(grad, 0.0), grads)


@_able("causal")
def test_causal_has_no_gradient_to_the_future(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    t = 3

    @jax.jit
    def grads_of_one_query(inputs):
        def at_t(inputs):
            out = multi_head(variant)(**inputs, is_causal=True, **extras)
            return (out[:, t] ** 2).sum()

        return jax.grad(at_t)(inputs)

    grads = grads_of_one_query(inputs)
    for argument in ("key", "value"):
        assert not np.any(grads[argument][:, t + 1 :])
        assert np.any(grads[argument][:, : t + 1])
    assert not np.any(grads["query"][:, t + 1 :])


@_able("bias")
def test_bias_counts_and_has_a_gradient_of_its_shape(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    num_keys = inputs["key"].shape[1]
    bias = np.random.default_rng(5).standard_normal((1, N, 1, num_keys), np.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(bias):
        return (multi_head(variant)(**inputs, bias=bias, **extras) ** 2).sum()

    grad = np.asarray(loss(bias)[1])
    assert grad.shape == bias.shape
    length = np.linalg.norm(grad)
    step = 1e-2 * grad / length
    slope = (loss(bias + step)[0] - loss(bias - step)[0]) / 2e-2
    np.testing.assert_allclose(slope, length, rtol=2e-2)


@_able("dropout")
def test_dropout_follows_its_key(name):
    variant = VARIANTS[name]
    inputs = _inputs(variant)
    extras = {k: x for k, x in _extras(variant).items() if k != "rng"}
    drop = jax.jit(
        lambda rng, rate: multi_head(variant)(
            **inputs, **extras, rng=rng, dropout_rate=rate
        ),
        static_argnums=1,
    )
    one, again, other = (drop(jax.random.key(seed), 0.5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match="needs `rng`"):
        multi_head(variant)(**inputs, **extras, dropout_rate=0.5)


@ALL
def test_one_query_and_one_head(name):
    variant = VARIANTS[name]
    inputs = _inputs(variant, num_heads=1, num_kv_heads=1, batch=1)
    if variant.cross:
        inputs["query"] = inputs["query"][:, :1]
    else:
        inputs = {k: x[:, :1] for k, x in inputs.items()}
    out = jax.jit(multi_head(variant))(**inputs, **_extras(variant, num_heads=1))
    assert out.shape[:3] == (1, 1, 1)
    assert np.isfinite(out).all()


def _ask(capability: str, inputs: dict) -> dict:
    """Arguments that ask for one capability."""
    pairs = (1, 1, inputs["query"].shape[1], inputs["key"].shape[1])
    return {
        "bias": {"bias": jnp.zeros(pairs)},
        "mask": {"mask": jnp.ones(pairs, bool)},
        "key_mask": {"key_mask": jnp.ones((B, pairs[3]), bool)},
        "causal": {"is_causal": True},
        "cross": {"query": inputs["query"][:, :-1]},
        "value_dim": {"value": inputs["value"][..., :-1]},
        "dropout": {"dropout_rate": 0.1, "rng": jax.random.key(0)},
    }[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
@ALL
def test_a_capability_is_honoured_or_refused_with_advice(name, capability):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    arguments = {**inputs, **extras, **_ask(capability, inputs)}
    options = {
        "is_causal": arguments.pop("is_causal", False),
        "dropout_rate": arguments.pop("dropout_rate", 0.0),
    }
    attend = functools.partial(multi_head(variant), **options)
    if getattr(variant, capability):
        out = jax.eval_shape(attend, **arguments)
        assert out.shape[:3] == arguments["query"].shape[:3]
        return
    with pytest.raises(ValueError, match="cannot honour") as raised:
        jax.eval_shape(attend, **arguments)
    message = str(raised.value)
    assert repr(name) in message
    assert all(other in message for other in variants_with(capability))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_variant_without_a_capability_refuses_it(capability):
    # Two arguments may stand in for another: with `mask` at hand multi_head can write
    # causality and padding as a mask, so the variant made here takes nothing at all.
    def plain(query, key, value):
        return jnp.zeros((query.shape[0], value.shape[1]), value.dtype)

    bare = Variant(name="plain", fn=plain)
    rich = dataclasses.replace(bare, **{c: True for c in ("cross", "value_dim")})
    inputs = _inputs(bare)
    assert multi_head(bare)(**inputs).shape == (B, T, N, H)
    variant = bare if capability in ("cross", "value_dim") else rich
    arguments = {**inputs, **_ask(capability, inputs)}
    with pytest.raises(ValueError, match="'plain' cannot honour.*variants that can:"):
        multi_head(variant)(**arguments)


@ALL
def test_bad_arrays_are_named(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    attend = functools.partial(multi_head(variant), **extras)
    with pytest.raises(ValueError, match=r"`query` must have shape \[B, T, N, H\]"):
        attend(**{**inputs, "query": inputs["query"][0]})
    if variant.mask:
        pairs = (1, 1, T, inputs["key"].shape[1])
        with pytest.raises(TypeError, match="`mask` must be bool with True = attend"):
            attend(**inputs, mask=jnp.ones(pairs, jnp.float32))
    with pytest.raises(TypeError, match=f"{name!r} takes no option `tempo`; it takes"):
        attend(**inputs, tempo=3)


@ALL
def test_lowers_for_accelerators(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant, "bfloat16"), _extras(variant)

    def loss(inputs):
        out = multi_head(variant, map_heads="vmap")(**inputs, **extras)
        return out.astype(jnp.float32).sum()

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=("cuda", "tpu"))
    assert exported(inputs).platforms == ("cuda", "tpu")


@ALL
def test_record_agrees_with_the_signature(name):
    variant = VARIANTS[name]
    takes = inspect.signature(variant.fn).parameters
    assert variant.name == name
    assert list(takes)[:3] == ["query", "key", "value"]
    for capability, argument in (
        ("bias", "bias"),
        ("mask", "mask"),
        ("key_mask", "key_mask"),
        ("causal", "is_causal"),
        ("dropout", "rng"),
    ):
        if getattr(variant, capability):
            assert argument in takes
    assert ("params" in takes) == (variant.init is not None)
    for field in ("time", "memory", "paper", "summary"):
        assert getattr(variant, field), field
