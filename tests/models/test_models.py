from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import MODELS, SIZES, ResNet, build
from attn_jax.nn.encoder import Encoder
from attn_jax.tools.cost import model_cost

SHAPES = {"mu": (28, 28, 1), "ti": (32, 32, 3), "s": (32, 32, 3), "b": (32, 32, 3)}


def abstract(model, size, **more):
    """A model whose parameters are shapes alone: no size is too large for it."""
    return nnx.eval_shape(
        lambda: build(
            model,
            size,
            image_shape=SHAPES[size],
            num_classes=10,
            rngs=nnx.Rngs(0),
            **more,
        )
    )


def split(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, images):
        return nnx.merge(graphdef, params, rest)(images)

    return forward, params


def count(params):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def test_the_cost_of_a_linear_map_is_known():
    class Linear(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(12, 5, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, images):
            return self.layer(images.reshape(images.shape[0], -1))

    assert model_cost(Linear(), (2, 2, 3)) == (60, 120)


def test_a_loop_over_heads_costs_what_its_heads_do():
    # At 784 tokens heads are large enough to be looped over, in blocks; XLA's own
    # count would take one turn of either loop.
    found = {}
    for heads in (2, 8):
        model = abstract("vit", "mu", overrides=dict(patch=1, depth=1, num_heads=heads))
        found[heads] = model_cost(model, SHAPES["mu"]).flops
    tokens, dim, mlp_dim = 784, 64, 256
    products = tokens * 2 * (4 * dim**2 + 2 * dim * mlp_dim) + 4 * tokens**2 * dim
    for heads, flops in found.items():
        assert products < flops < products * 1.3, (heads, flops, products)


def test_mu_is_as_far_apart_in_flops_as_is_said():
    found = {model: model_cost(abstract(model, "mu"), SHAPES["mu"]) for model in MODELS}
    flops = {model: found[model].flops for model in found}
    networks = [flops[model] for model in ("vit", "resnet", "hybrid")]
    assert 1.3 < max(networks) / min(networks) < 1.34, flops
    assert 0.9 < flops["mlp"] / flops["vit"] < 1.1, flops
    assert found["vit"].params == 204_938


@pytest.mark.parametrize("size", ["ti", "s", "b"])
def test_larger_sizes_are_near_in_flops(size):
    flops = {
        model: model_cost(abstract(model, size), SHAPES[size]).flops
        for model in ("vit", "resnet", "hybrid")
    }
    assert max(flops.values()) / min(flops.values()) < 1.15, flops


@pytest.mark.parametrize(("size", "millions"), [("ti", 5.4), ("s", 21.3), ("b", 85.1)])
def test_vit_sizes_have_the_published_width_and_depth(size, millions):
    # arXiv:2012.12877, Table 1: 5, 22 and 86 million at 224 pixels, patch 16, 1000
    # classes; here patches and head are smaller.
    assert count(split(abstract("vit", size))[1]) / 1e6 == pytest.approx(
        millions, abs=0.1
    )


def test_resnet_s_is_resnet_50():
    model = abstract("resnet", "s")
    assert isinstance(model, ResNet)
    # 25.6 million with 1000 classes; 10 classes have 2048 · 990 fewer.
    assert count(split(model)[1]) / 1e6 == pytest.approx(23.5, abs=0.1)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(model):
    size = dict(SIZES[model]["mu"])
    small = {
        "vit": dict(depth=1),
        "resnet": dict(widths=(8, 8), depths=(1, 1)),
        "hybrid": dict(depth=1, stem_widths=(8, 8)),
        "mlp": dict(hidden_dims=(16,)),
    }[model]
    assert set(small) <= set(size)
    outputs = {}
    for dtype in (None, jnp.bfloat16):
        built = build(
            model,
            "mu",
            image_shape=(14, 14, 1),
            num_classes=4,
            overrides=small,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        kernel = built.head.kernel
        kernel[...] = 0.1 * jax.random.normal(jax.random.key(1), kernel[...].shape)
        forward, params = split(built)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
            jnp.dtype("float32")
        }
        images = jax.random.normal(jax.random.key(0), (2, 14, 14, 1))

        def loss(params, images, forward=forward):
            out = forward(params, images)
            return jnp.sum(out.astype(jnp.float32)), out

        with jax.numpy_dtype_promotion("standard"):  # Flax's norms take bfloat16 so
            call = jax.jit(jax.grad(loss, has_aux=True))
            grads, outputs[dtype] = call(params, images)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert outputs[None].dtype == jnp.float32
    assert outputs[jnp.bfloat16].dtype == jnp.bfloat16
    rough = outputs[jnp.bfloat16].astype(jnp.float32)
    scale = float(jnp.abs(outputs[None]).max())
    np.testing.assert_allclose(rough, outputs[None], atol=0.05 * scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bit", "mu"), "`model` must be one of vit, resnet.*'bit'"),
        (("vit", "xl"), "`size` must be one of mu, ti, s, b for model 'vit'.*'xl'"),
        (("resnet", "mu", dict(attention="dot_product")), "'resnet' has no attention"),
        (("resnet", "mu", dict(dropout_rate=0.1)), "'resnet' has no dropout"),
        (("vit", "mu", dict(overrides=dict(width=3))), "no argument 'width'; it has"),
        (("vit", "mu", dict(overrides=dict(rngs=3))), "no argument 'rngs'"),
        (("vit", "mu", dict(attention="dot")), "unknown attention variant 'dot'"),
    ],
)
def test_wrong_arguments_say_so(arguments, message):
    model, size, *more = arguments
    with pytest.raises(ValueError, match=message):
        build(
            model,
            size,
            image_shape=(28, 28, 1),
            num_classes=10,
            rngs=nnx.Rngs(0),
            **(more[0] if more else {}),
        )


def test_a_mask_of_an_encoder_has_all_its_axes():
    encoder = Encoder(1, 8, num_heads=2, mlp_dim=8, rngs=nnx.Rngs(0))
    x, real = jnp.ones((5, 5, 8)), jnp.tri(5, dtype=bool)
    for call in (encoder, encoder.blocks[0]):
        for mask in (real, real[None], real[:, None, None, :3], real[:3, None, None]):
            with pytest.raises(ValueError, match=r"`mask` .* T=5, .*\[B, T\], is `key"):
                call(x, mask=mask)
    numbers = jnp.where(real, 0.0, -jnp.inf)[None, None]
    with pytest.raises(TypeError, match="`mask` must be bool with True = attend"):
        encoder(x, mask=numbers, key_mask=real)
    encoder(x, mask=real[:, None, None])


def test_padding_of_an_encoder_may_hold_nan(draw):
    encoder = Encoder(1, 8, num_heads=2, mlp_dim=8, rngs=nnx.Rngs(0))
    real = np.arange(6)[None, :] < np.array([[6], [4]])
    tokens = draw({"tokens": (2, 6, 8)})["tokens"]

    def loss(encoder, tokens):
        out = encoder(tokens, key_mask=jnp.asarray(real))
        return jnp.where(real[:, :, None], out**3, 0).sum(), out

    both = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    dirty = np.where(real[:, :, None], tokens, np.nan)
    (_, out), grads = both(encoder, jnp.asarray(dirty))
    (_, want), want_grads = both(encoder, jnp.asarray(tokens))
    np.testing.assert_allclose(out[real], want[real], atol=1e-5)
    for found, expected in zip(
        jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)
