from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.models import SIZES, GroupNorm, ResidualBlock, ResNet, StdConv, resnet
from attn_jax.models.resnet import standardize_kernel


def group_norm_float64(x, scale, bias, groups, epsilon):
    """From the equation, one example and one group at a time."""
    x = np.asarray(x, np.float64)
    out = np.empty_like(x)
    size = x.shape[-1] // groups
    for b in range(x.shape[0]):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            group = x[b, :, :, part]
            out[b, :, :, part] = (group - group.mean()) / np.sqrt(group.var() + epsilon)
    return out * scale + bias


@pytest.fixture(scope="module")
def norms():
    """Ours and Flax's with the same parameters, and those."""
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    ours = GroupNorm(8, num_groups=2)
    flax = nnx.GroupNorm(8, num_groups=2, epsilon=1e-5, rngs=nnx.Rngs(0))
    for norm in ours, flax:
        norm.scale[...] = scale
        norm.bias[...] = bias
    return ours, flax, scale, bias


# E[x²] − E[x]² in float32 loses mean²/var of 2^-24: the second case loses 1e-4.
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 2e-6), (30.0, 1e-3)])
def test_group_norm_is_that_of_flax_and_of_the_equation(norms, slope, mean, tolerance):
    ours, flax, scale, bias = norms
    rng = np.random.default_rng(1)
    x = (mean + rng.normal(size=(2, 5, 4, 8))).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)

    def run(norm):
        graphdef, params = nnx.split(norm)

        def call(params, x):
            return nnx.merge(graphdef, params)(x)

        out, pullback = jax.vjp(jax.jit(call), params, jnp.asarray(x))
        grads, x_grad = pullback(jnp.asarray(cotangent))
        return out, grads["scale"][...], grads["bias"][...], x_grad

    mine, theirs = run(ours), run(flax)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=10 * tolerance)

    def reference(x, scale, bias):
        return group_norm_float64(x, scale, bias, 2, 1e-5)

    np.testing.assert_allclose(
        mine[0], reference(x, scale, bias), rtol=tolerance, atol=10 * tolerance
    )
    arrays = dict(x=x.astype(np.float64), scale=scale, bias=bias)
    directions = {k: rng.normal(size=v.shape) for k, v in arrays.items()}
    expected = slope(reference, arrays, directions, cotangent.astype(np.float64))
    for name, gradient in zip(("scale", "bias", "x"), mine[1:], strict=True):
        found = float(np.sum(np.asarray(gradient, np.float64) * directions[name]))
        assert found == pytest.approx(
            expected[name], rel=tolerance, abs=1e2 * tolerance
        )


def test_group_norm_of_a_constant_image_and_in_bfloat16():
    norm = GroupNorm(4, num_groups=1, dtype=jnp.bfloat16)
    constant = jnp.full((1, 3, 3, 4), 1000.0)
    out, gradient = jax.jit(
        jax.value_and_grad(lambda x: jnp.sum(norm(x).astype(jnp.float32)))
    )(constant)
    assert abs(out) < 0.1 and bool(jnp.isfinite(gradient).all())
    assert norm(constant.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"num_groups.*3 and 4"):
        GroupNorm(4, num_groups=3)


def test_standardized_kernels_against_float64(slope):
    rng = np.random.default_rng(0)
    kernel = (5.0 + rng.normal(size=(3, 3, 4, 6))).astype(np.float32)

    def reference(kernel):
        out = np.empty(kernel.shape)
        for o in range(kernel.shape[-1]):
            w = np.asarray(kernel[..., o], np.float64)
            out[..., o] = (w - w.mean()) / np.sqrt(w.size * w.var() + 1e-8)
        return out

    out, pullback = jax.vjp(standardize_kernel, jnp.asarray(kernel))
    np.testing.assert_allclose(out, reference(kernel), atol=1e-6)
    assert np.allclose(np.sum(np.square(out), (0, 1, 2)), 1, atol=1e-5)
    cotangent = rng.normal(size=kernel.shape)
    direction = dict(kernel=rng.normal(size=kernel.shape))
    wide = dict(kernel=kernel.astype(np.float64))
    expected = slope(reference, wide, direction, cotangent)["kernel"]
    (gradient,) = pullback(jnp.asarray(cotangent, jnp.float32))
    found = np.sum(np.asarray(gradient, np.float64) * direction["kernel"])
    assert found == pytest.approx(expected, rel=1e-4)
    # A constant kernel has no direction; it stays finite, its gradient too.
    value, gradient = jax.value_and_grad(lambda k: jnp.sum(standardize_kernel(k)))(
        jnp.ones((3, 3, 1, 1))
    )
    assert value == 0 and bool(jnp.isfinite(gradient).all())


def test_the_convolution_is_a_loop_over_pixels():
    conv = StdConv(2, 3, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).normal(size=(5, 5, 2)).astype(np.float32)
    kernel = np.asarray(standardize_kernel(conv.kernel[...]))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    expected = [
        [
            np.einsum("hwi,hwio->o", padded[y : y + 3, x : x + 3], kernel)
            for x in range(0, 5, 2)
        ]
        for y in range(0, 5, 2)
    ]
    np.testing.assert_allclose(conv(jnp.asarray(image)[None])[0], expected, atol=1e-5)


MU = SIZES["resnet"]["mu"]


@pytest.mark.parametrize(
    "config",
    [
        dict(MU, widths=(4, 4, 4)),
        dict(widths=(4, 4), depths=(2, 1), bottleneck=True),
        dict(widths=(4,), depths=(1,), stem_kernel=7, stem_stride=2, max_pool=True),
    ],
    ids=["mu", "bottleneck", "large-stem"],
)
def test_the_receptive_field_is_where_the_gradient_is_not_zero(monkeypatch, config):
    # Positive weights and no normalisation: nothing cancels, and what normalisation
    # shares over the whole image is left out.
    monkeypatch.setattr(resnet, "standardize_kernel", lambda k: jnp.abs(k) + 0.01)
    monkeypatch.setattr(GroupNorm, "__call__", lambda self, x: x)
    monkeypatch.setattr(nnx.Linear, "__call__", lambda self, x: x)
    side = 64
    model = ResNet((side, side, 1), 1, rngs=nnx.Rngs(0), **config)

    def centre(image):
        positions = []
        mean = jnp.mean
        monkeypatch.setattr(
            resnet.jnp, "mean", lambda x, axis: positions.append(x) or mean(x, axis)
        )
        model(image)
        (x,) = positions
        return jnp.sum(x[:, x.shape[1] // 2, x.shape[2] // 2])

    # Distinct, so that max-pooling has one winner; summed over shifts, all win.
    gradient = jax.jit(jax.grad(centre))
    total = np.zeros((side, side))
    rng = np.random.default_rng(0)
    for _ in range(20 if config.get("max_pool") else 1):
        image = jnp.asarray(rng.uniform(1, 2, (1, side, side, 1)), jnp.float32)
        total += np.abs(np.asarray(gradient(image)))[0, :, :, 0]
    rows, columns = np.nonzero(total)
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == model.receptive_field() < side


def test_a_block_is_the_identity_plus_its_branch():
    block = ResidualBlock(4, 4, rngs=nnx.Rngs(0))
    assert not block.project
    block.convs[-1].kernel[...] = jnp.zeros_like(block.convs[-1].kernel[...])
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    np.testing.assert_array_equal(block(x), x)


def test_wrong_arguments_say_so():
    with pytest.raises(ValueError, match="one entry a stage.* and \\(1,\\)"):
        ResNet((8, 8, 1), 2, widths=(4, 8), depths=(1,), rngs=nnx.Rngs(0))
    model = ResNet((8, 8, 1), 2, widths=(4,), depths=(1,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"`images` must be \[B, height, width, 1\]"):
        model(jnp.zeros((8, 8, 1)))
