"""Axial attention: the mask of own row and own column, at less than its cost."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.axial_attention import axial
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 6, 5

_axial = jax.jit(axial, static_argnames=("is_causal", "width", "axis"))
_dense = jax.jit(dot_product)


def _draw_arrays(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _pairs(length, width, axis):
    """Which tokens share a row or a column, cell by cell."""
    allowed = np.zeros((length, length), bool)
    for t in range(length):
        for s in range(length):
            row, column = t // width == s // width, t % width == s % width
            allowed[t, s] = {"row": row, "column": column, "both": row or column}[axis]
    return allowed


@pytest.mark.parametrize("axis", ["both", "row", "column"])
@pytest.mark.parametrize(
    "length, width, causal, key_mask",
    [
        (1, 1, False, False),
        (2, 1, True, False),
        (2, 32, False, True),
        (12, 4, False, False),
        (23, 5, True, True),
        (23, 5, False, True),
        (23, 4, True, False),
        (7, 6, True, True),
    ],
)
def test_equals_the_mask_of_row_and_column(
    length, width, causal, key_mask, axis, draw, by_loops
):
    arrays = _draw_arrays(draw, length)
    mask = _pairs(length, width, axis)
    options = {"is_causal": causal}
    if key_mask:
        real = np.arange(length) % 5 != 1
        real[: length // 3] = False  # so that some queries see nothing
        options["key_mask"] = real
    pair = lambda q, k: 0.4 * float(q @ k)  # noqa: E731
    expected = by_loops(pair, **arrays, mask=mask, **options)
    ours, theirs = (
        functools.partial(fn, scale=0.4, **options, **more)
        for fn, more in (
            (axial, {"width": width, "axis": axis}),
            (dot_product, {"mask": mask}),
        )
    )
    found = helpers.same(ours, theirs, arrays, atol=1e-5)
    np.testing.assert_allclose(found["out"], expected, atol=1e-5)


def test_one_row_is_plain_attention(draw):
    arrays = _draw_arrays(draw, 9)
    plain = _dense(**arrays)
    for width in (9, 32):
        np.testing.assert_allclose(_axial(**arrays, width=width), plain, atol=1e-6)
    # And so is one column.
    column = _axial(**arrays, width=1, axis="column")
    np.testing.assert_allclose(column, plain, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [3, 13])
def test_padding_is_invisible(length, causal, draw):
    fn = functools.partial(axial, width=5, is_causal=causal)
    helpers.padding_is_invisible(fn, _draw_arrays(draw, 27), length)


def test_two_layers_reach_everything():
    length, width = 20, 6
    x = jnp.eye(length)
    zeros = jnp.zeros((length, 1))
    layer = functools.partial(_axial, zeros, zeros, width=width)
    once, twice = layer(x), layer(layer(x))
    assert not once.all() and twice.all()


@pytest.mark.parametrize("grad", [False, True])
def test_no_scores_between_all_pairs(grad):
    def fn(x):
        return axial(x, x, x, width=16)

    if grad:
        fn = jax.grad(lambda x, forward=fn: (forward(x) ** 2).sum())
    flops = {}
    for length in (256, 1024):
        x = jax.ShapeDtypeStruct((length, 8), jnp.float32)
        compiled = jax.jit(fn).lower(x).compile()
        flops[length] = compiled.cost_analysis()["flops"]
        assert not re.search(rf"\[{length},{length}\]", compiled.as_text())
    # T · (w + T/w): 256 · 32 to 1024 · 80.
    assert flops[1024] / flops[256] == pytest.approx(10.0, rel=0.15)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"width": 0}, ValueError, "`width` must be at least 1, but is 0"),
        ({"width": 4.0}, TypeError, "`width` must be an int"),
        ({"width": None}, TypeError, "`width` must be an int .* NoneType"),
        ({"axis": "rows"}, ValueError, "`axis` must be .* but is 'rows'"),
        ({"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6"),
        ({"mask": np.ones((6, 6), bool)}, TypeError, "unexpected keyword"),
    ],
)
def test_bad_arguments_are_named(options, error, message, draw):
    with pytest.raises(error, match=message):
        axial(**{**_draw_arrays(draw, 6), **options})
