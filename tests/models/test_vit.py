from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import Hybrid, ViT, default_patch, patchify
from attn_jax.nn.encoder import EncoderBlock

TINY = dict(dim=8, depth=2, num_heads=2, mlp_dim=16)


def vit(**more):
    model = ViT((8, 12, 2), 3, patch=4, rngs=nnx.Rngs(0), **(TINY | more))
    kernel = model.head.kernel[...]  # zero at first, which would hide everything
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return model


call = nnx.jit(lambda model, *args: model(*args))


@nnx.jit
def train(model, images, seed):
    rng = jax.random.key(seed)
    return model(images, deterministic=False, rngs=nnx.Rngs(dropout=rng))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (2, 8, 12, 2))


def test_patchify_is_a_loop_over_patches(images):
    tokens = patchify(images, 4)
    assert tokens.shape == (2, 6, 32)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                top, left = 4 * row, 4 * column
                patch = images[b, top : top + 4, left : left + 4]
                np.testing.assert_array_equal(
                    tokens[b, 3 * row + column], patch.reshape(-1)
                )
    with pytest.raises(ValueError, match=r"is 5 for images of 8 x 12"):
        patchify(images, 5)


@pytest.mark.parametrize(
    ("shape", "preferred", "expected"),
    [((28, 28, 1), 7, 7), ((8, 8, 1), 7, 2), ((42, 42, 1), 4, 7), ((5, 7, 1), 7, 1)],
)
def test_default_patch(shape, preferred, expected):
    assert default_patch(shape, preferred) == expected


def test_images_too_small_for_patches_are_refused():
    with pytest.raises(ValueError, match="3 x 8 pixels are too small"):
        default_patch((3, 8, 1), 7)


def _permuted(images, order):
    """The same patches at other places."""
    patches = images.reshape(2, 2, 4, 3, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(2, 6, 4, 4, 2)[:, order]
    patches = patches.reshape(2, 2, 3, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(2, 8, 12, 2)


@pytest.mark.parametrize("positions", ["none", "sincos2d", "learned"])
def test_only_positions_tell_where_a_patch_is(images, positions):
    model = vit(positions=positions)
    moved = _permuted(images, jnp.array([3, 0, 5, 1, 4, 2]))
    difference = float(jnp.abs(call(model, images) - call(model, moved)).max())
    if positions == "none":
        assert difference < 1e-5
    else:
        assert difference > 1e-3


def test_the_encoder_block_is_its_equation(images):
    block = EncoderBlock(8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def norm(x):
        x = np.asarray(x, np.float64)
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def project(layer, x):
        kernel = np.asarray(layer.kernel[...], np.float64)
        return np.tensordot(x, kernel, [[-1], [0]]) + np.asarray(layer.bias[...])

    layer = block.attention
    h = norm(x)
    query, key, value = (
        project(part, h) for part in (layer.query, layer.key, layer.value)
    )
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(4)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bnts,bsnh->btnh", weights, value)
    kernel = np.asarray(layer.out.kernel[...], np.float64)
    middle = np.asarray(x) + np.einsum("btnh,nhd->btd", mixed, kernel)
    hidden = project(block.mlp.expand, norm(middle))
    gelu = (
        0.5
        * hidden
        * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    )
    expected = middle + project(block.mlp.contract, gelu)
    np.testing.assert_allclose(call(block, x), expected, atol=1e-5)


def test_a_mask_reaches_the_attention():
    block = EncoderBlock(8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 5, 8))
    causal = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(block(x, causal)[:, 2])))(x)
    assert bool((gradient[:, 3:] == 0).all()) and bool((gradient[:, :3] != 0).any())


def test_any_variant_serves_and_exact_ones_agree(images):
    expected = call(vit(), images)
    exact = call(vit(attention="blockwise"), images)
    np.testing.assert_allclose(exact, expected, atol=1e-5)

    def mean_attention(query, key, value):
        """Every key counts the same."""
        return jnp.broadcast_to(jnp.mean(value, axis=0), value.shape)

    mean = call(vit(attention=mean_attention), images)
    assert mean.shape == (2, 3) and not np.allclose(mean, expected, atol=1e-3)
    with_params = vit(attention="additive")
    state = nnx.state(with_params, nnx.Param)
    assert any("score" in str(path) for path, _ in nnx.to_flat_state(state))
    assert call(with_params, images).shape == (2, 3)


def test_dropout_needs_a_variant_that_can(images):
    model = vit(dropout_rate=0.5)
    evaluated = call(model, images)
    np.testing.assert_array_equal(call(model, images), evaluated)
    first, again, other = (train(model, images, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, evaluated)
    unable = vit(dropout_rate=0.5, attention="blockwise")
    with pytest.raises(ValueError, match="'blockwise' cannot honour dropout"):
        train(unable, images, 0)
    assert call(unable, images).shape == (2, 3)


def test_the_hybrid_halves_odd_images_rounding_up():
    model = Hybrid((7, 5, 1), 3, stem_widths=(4, 8), rngs=nnx.Rngs(0), **TINY)
    assert model.grid == (2, 2)
    assert jax.eval_shape(model, jnp.zeros((1, 7, 5, 1))).shape == (1, 3)
    with pytest.raises(ValueError, match="stem_widths"):
        Hybrid((8, 8, 1), 3, stem_widths=(), rngs=nnx.Rngs(0), **TINY)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(patch=5), "`patch` must divide.* is 5"),
        (dict(num_heads=3), "`dim` must be a multiple of `num_heads`.* and 3"),
        (dict(positions="rope"), "`positions` must be.*'rope'"),
        (dict(attention="dotproduct"), "Did you mean 'dot_product'"),
    ],
)
def test_wrong_arguments_say_so(more, message):
    with pytest.raises(ValueError, match=message):
        ViT((8, 12, 2), 3, rngs=nnx.Rngs(0), **(TINY | dict(patch=4) | more))


def test_images_of_another_size_are_refused(images):
    with pytest.raises(ValueError, match="the size that the model was built for"):
        vit()(images[:, :4])
    with pytest.raises(ValueError, match=r"`images` must be \[B, height, width, 2\]"):
        vit()(images[..., :1])
