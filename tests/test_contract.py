"""Every variant in the table, as `multi_head` and Flax's layers call it.

What a variant claims of itself is tried by the conformance kit; see
`tests/test_conformance.py`. A new row is tested here without a line of its own.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.multihead import multi_head, multi_head_init
from attn_jax.variant import CAPABILITIES, VARIANTS, Variant, variants_with

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
        takes = inspect.signature(variant.init).parameters
        sizes = {"value_dim": V} if "value_dim" in takes and variant.value_dim else {}
        extras["params"] = multi_head_init(
            variant, jax.random.key(1), num_heads, H, **sizes
        )
    if variant.stochastic:
        extras["rng"] = jax.random.key(2)
    return extras


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
    able = getattr(variant, capability)
    # Where it can, the inputs are of such sizes already.
    sizes = capability in ("cross", "value_dim")
    asked = {} if able and sizes else _ask(capability, inputs)
    arguments = {**inputs, **extras, **asked}
    options = {
        "is_causal": arguments.pop("is_causal", False),
        "dropout_rate": arguments.pop("dropout_rate", 0.0),
    }
    attend = functools.partial(multi_head(variant), **options)
    # What takes any mask gets a causal one written as such.
    if able or (capability == "causal" and variant.mask):
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

    rich = Variant(name="plain", fn=plain)
    bare = dataclasses.replace(rich, cross=False, value_dim=False)
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


def _mean_of_values(
    query, key, value, bias=None, mask=None, *, key_mask=None, is_causal=False, **_
):
    """The mean of the values that a query may attend to."""
    pairs = np.ones((len(query), len(key)), bool)
    pairs &= True if mask is None else np.asarray(mask)
    pairs &= True if key_mask is None else np.asarray(key_mask)
    pairs &= np.tri(*pairs.shape, dtype=bool) if is_causal else True
    count = np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return jnp.asarray(pairs @ np.asarray(value) / count, value.dtype)


@ALL
def test_a_doctest_shows_what_a_mean_of_the_values_does_not(name):
    fn = VARIANTS[name].base
    names = {**fn.__globals__, fn.__name__: _mean_of_values}
    example = doctest.DocTestParser().get_doctest(fn.__doc__, names, name, None, 0)
    said = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert failed and "Error" not in "".join(said), said


@ALL
def test_no_tokens_give_no_rows(name):
    variant = VARIANTS[name]
    inputs, extras = _inputs(variant), _extras(variant)
    for begin, keys in ((0, 0), (0, S), (T, 0)) if variant.cross else ((0, 0),):
        sizes = {"query": begin, "key": keys, "value": keys}
        empty = {k: x[:, : sizes[k]] for k, x in inputs.items()}
        for arrays in (empty, {k: x[:0] for k, x in inputs.items()}):
            for is_causal in (False, True)[: 1 + variant.causal]:
                options = {"is_causal": True} if is_causal else {}

                def loss(arrays, options=options):
                    out = multi_head(variant)(**arrays, **extras, **options)
                    return out.sum(), out

                grads, out = jax.eval_shape(jax.grad(loss, has_aux=True), arrays)
                assert out.shape[:2] == arrays["query"].shape[:2]
                assert grads["key"].shape == arrays["key"].shape
