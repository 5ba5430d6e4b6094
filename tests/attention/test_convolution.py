"""A convolution is an attention layer: the theorem, executed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import convolution


def _draw_arrays(draw, size, image, channels=(3, 4)):
    shapes = {"kernel": (*size, *channels), "image": (*image, channels[0])}
    return draw({**shapes, "bias": channels[1:]})


def _convolution(kernel, image, bias, padding):
    out = jax.lax.conv_general_dilated(
        image[None],
        kernel,
        (1, 1),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )[0]
    return out if bias is None else out + bias[None, None, :]


def _attention(kernel, image, bias, padding, alpha):
    params = convolution.convolution_as_attention(kernel, bias, alpha=alpha)
    return convolution.attention_convolution(params, image, padding)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    "size, image",
    [
        ((3, 3), (5, 6)),
        ((2, 2), (4, 5)),
        ((5, 2), (2, 7)),
        ((3, 3), (1, 1)),
    ],
)
def test_equals_the_convolution_at_every_pixel(size, image, padding, draw):
    arrays = _draw_arrays(draw, size, image)
    if size == (2, 2):
        arrays["bias"] = None
    theirs = _convolution(**arrays, padding=padding)
    ours = jax.jit(functools.partial(_attention, padding=padding, alpha=64.0))(**arrays)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_error_falls_to_rounding_as_alpha_grows(padding, draw):
    arrays = _draw_arrays(draw, (3, 4), (7, 6))
    theirs = _convolution(**arrays, padding=padding)
    run = jax.jit(functools.partial(_attention, padding=padding))
    errors = {
        alpha: float(jnp.abs(run(**arrays, alpha=alpha) - theirs).max())
        for alpha in (0.25, 1.0, 4.0, 16.0, 64.0, 1e3, 1e6, 1e12, 1e30)
    }
    # A head misses what its centre lacks of weight 1, and Σ e^(−α d²) bounds it.
    weights = np.abs(arrays["kernel"]).sum(axis=(0, 1, 2)).max()
    for alpha, error in errors.items():
        missed = (1 + 2 * sum(np.exp(-alpha * d * d) for d in range(1, 9))) ** 2 - 1
        assert error < 2 * missed * weights * np.abs(arrays["image"]).max() + 2e-5
    assert errors[0.25] > errors[1.0] > errors[4.0] > 1e-2 > errors[16.0]


def test_gradients_are_those_of_the_convolution(draw):
    arrays = _draw_arrays(draw, (3, 2), (4, 4))

    def loss(arrays, fn):
        return jnp.cos(fn(**arrays, padding="SAME")).sum()

    ours = jax.jit(
        jax.grad(functools.partial(loss, fn=functools.partial(_attention, alpha=40.0)))
    )(arrays)
    theirs = jax.grad(functools.partial(loss, fn=_convolution))(arrays)
    for name, grad in ours.items():
        np.testing.assert_allclose(grad, theirs[name], atol=2e-5, err_msg=name)


def test_each_head_is_at_its_own_offset(draw):
    """Moving the centre of one head moves what that head copies."""
    image = draw({"image": (5, 6, 2)})["image"]
    kernel = np.zeros((3, 3, 2, 2), "f")
    kernel[1, 1] = np.eye(2)
    params = convolution.convolution_as_attention(kernel, alpha=40.0)
    run = jax.jit(convolution.attention_convolution)
    np.testing.assert_allclose(run(params, image), image, atol=1e-6)
    params["centre"] = params["centre"].at[1, 1].set(jnp.array([1.0, -1.0]))
    shifted = np.zeros_like(image)
    shifted[:-1, 1:] = image[1:, :-1]
    np.testing.assert_allclose(run(params, image), shifted, atol=1e-6)


def test_bfloat16_and_empty_output(draw):
    arrays = _draw_arrays(draw, (3, 3), (4, 5))
    half = {n: jnp.bfloat16(x) for n, x in arrays.items()}
    ours = _attention(**half, padding="SAME", alpha=40.0)
    theirs = _convolution(
        **{n: x.astype(jnp.float32) for n, x in half.items()}, padding="SAME"
    )
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(ours), theirs, atol=0.1, rtol=0.02)
    arrays["image"] = arrays["image"][:2]
    small = _attention(**arrays, padding="VALID", alpha=1.0)
    assert small.shape == _convolution(**arrays, padding="VALID").shape == (0, 3, 4)


@pytest.mark.parametrize("matrix", [False, True])
def test_quadratic_is_the_equation(matrix, draw):
    arrays = draw({"query": (3, 2), "key": (4, 2), "centre": (2,), "root": (2, 2)})
    precision = arrays["root"] @ arrays["root"].T if matrix else np.float32(0.7)
    found = convolution.quadratic(
        arrays["query"], arrays["key"], arrays["centre"], precision
    )
    p = np.float64(precision) if matrix else 0.7 * np.eye(2)
    centre = np.float64(arrays["centre"])
    for t in range(3):
        for s in range(4):
            off = np.float64(arrays["key"][s]) - arrays["query"][t] - centre
            expected = -off @ p @ off + centre @ p @ centre
            assert float(found[t, s]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda k, x: convolution.convolution_as_attention(k[0], alpha=1.0),
            ValueError,
            r"`kernel` must have shape \[kh, kw, C_in, C_out\]",
        ),
        (
            lambda k, x: convolution.convolution_as_attention(k[:0], alpha=1.0),
            ValueError,
            "`kernel` must not be empty",
        ),
        (
            lambda k, x: convolution.convolution_as_attention(k, x[0, 0], alpha=1.0),
            ValueError,
            "`bias` must have shape .* C_out=3",
        ),
        (
            lambda k, x: _attention(k, x, None, "CIRCULAR", 1.0),
            ValueError,
            "`padding` must be 'SAME' or 'VALID', but is 'CIRCULAR'",
        ),
        (
            lambda k, x: _attention(k, x[..., :1], None, "SAME", 1.0),
            ValueError,
            "`image` must have shape .* C_in=2",
        ),
        (
            lambda k, x: convolution.attention_convolution({"kernel": k}, x),
            ValueError,
            "`params` must be a mapping with .* but is .'kernel'.",
        ),
        (
            lambda k, x: convolution.attention_convolution(
                {
                    **convolution.convolution_as_attention(k, alpha=1.0),
                    "alpha": jnp.ones((2, 3)),
                },
                x,
            ),
            ValueError,
            r"`params\['alpha'\]` must have shape \[2, 2\]",
        ),
        (
            lambda k, x: convolution.quadratic(x[0], x[0], jnp.ones(3), 1.0),
            ValueError,
            "`query_positions` .* D=3",
        ),
        (
            lambda k, x: convolution.quadratic(x[0], x[0], jnp.ones(2), jnp.ones(2)),
            ValueError,
            "`precision` must be a scalar or",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((2, 2, 2, 3)), jnp.ones((4, 4, 2)))
