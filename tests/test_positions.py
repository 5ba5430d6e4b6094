"""Position tables against their equations, their symmetries, and bad sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import positions


def _sinusoidal_loops(points, dim, max_wavelength):
    """The equation of the paper, in float64 and with loops."""
    table = np.zeros((len(points), dim))
    for row, point in enumerate(points):
        for i in range(dim // 2):
            angle = point * max_wavelength ** (-2 * i / dim)
            table[row, 2 * i] = np.sin(angle)
            table[row, 2 * i + 1] = np.cos(angle)
    return table


@pytest.mark.parametrize("max_wavelength", [10_000.0, 50.0])
def test_sinusoidal_1d_is_the_equation(max_wavelength):
    ours = positions.sinusoidal_1d(300, 8, max_wavelength=max_wavelength)
    reference = _sinusoidal_loops(range(300), 8, max_wavelength)
    assert ours.shape == (300, 8)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, reference, atol=5e-5)


def test_sinusoidal_of_fractions_and_shifts():
    points = jnp.array([-1.5, 0.25, 7.0])
    np.testing.assert_allclose(
        positions.sinusoidal(points, 6),
        _sinusoidal_loops(np.asarray(points), 6, 10_000.0),
        atol=1e-5,
    )
    # Integer positions, shifted as in decoding, are rows of the table.
    table = positions.sinusoidal_1d(9, 6)
    np.testing.assert_array_equal(positions.sinusoidal(jnp.arange(4, 9), 6), table[4:])


def test_sinusoidal_products_depend_on_the_distance_alone():
    table = positions.sinusoidal_1d(20, 16)
    products = np.asarray(table @ table.T)
    for distance in range(20):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert products[0, 0] > products[0, 1] > products[0, 2]


def test_sinusoidal_2d_is_row_code_and_column_code():
    height, width, dim = 3, 4, 8
    grid = positions.sinusoidal_2d(height, width, dim).reshape(height, width, dim)
    rows = positions.sinusoidal_1d(height, dim // 2)
    columns = positions.sinusoidal_1d(width, dim // 2)
    for r in range(height):
        for c in range(width):
            np.testing.assert_array_equal(grid[r, c, : dim // 2], rows[r])
            np.testing.assert_array_equal(grid[r, c, dim // 2 :], columns[c])
    flat = np.asarray(grid).reshape(-1, dim)
    assert len(np.unique(flat, axis=0)) == height * width


def test_dtype_of_tables():
    assert positions.sinusoidal_1d(3, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert positions.sinusoidal_2d(2, 2, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    rng = jax.random.key(0)
    assert positions.learned_init(rng, 3, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_tables_are_the_same_under_jit():
    jitted = jax.jit(lambda: positions.sinusoidal_2d(2, 3, 8))()
    np.testing.assert_allclose(jitted, positions.sinusoidal_2d(2, 3, 8), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: positions.sinusoidal_1d(4, 5), ValueError, "dim .* multiple of 2.*5"),
        (lambda: positions.sinusoidal_1d(0, 4), ValueError, "length .* got 0"),
        (lambda: positions.sinusoidal_1d(4, -2), ValueError, "dim .* got -2"),
        (lambda: positions.sinusoidal_1d(4.0, 2), TypeError, "length .* float"),
        (lambda: positions.sinusoidal_2d(2, 2, 6), ValueError, "dim .* multiple of 4"),
        (lambda: positions.sinusoidal_2d(0, 2, 4), ValueError, "height"),
        (lambda: positions.sinusoidal_2d(2, True, 4), TypeError, "width"),
        (
            lambda: positions.sinusoidal(jnp.ones((2, 2)), 4),
            ValueError,
            r"vector \[T\]",
        ),
        (
            lambda: positions.sinusoidal_1d(2, 4, max_wavelength=0.0),
            ValueError,
            "max_wavelength must be positive",
        ),
        (
            lambda: positions.learned_init(jax.random.key(0), 2, 4, stddev=-1.0),
            ValueError,
            "stddev",
        ),
        (lambda: positions.learned_init(jax.random.key(0), 2, 0), ValueError, "dim"),
    ],
)
def test_bad_sizes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_learned_init_is_normal_and_reproducible():
    table = positions.learned_init(jax.random.key(0), 100, 50, stddev=0.1)
    assert abs(float(table.mean())) < 0.01
    assert abs(float(table.std()) - 0.1) < 0.01
    again = positions.learned_init(jax.random.key(0), 100, 50, stddev=0.1)
    other = positions.learned_init(jax.random.key(1), 100, 50, stddev=0.1)
    np.testing.assert_array_equal(table, again)
    assert not np.array_equal(table, other)


def test_learned_positions_add_their_first_rows_and_train():
    module = positions.LearnedPositions(5, 3, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4, 3), jnp.bfloat16)
    assert module(x).dtype == jnp.bfloat16
    x = jnp.ones((2, 4, 3))
    np.testing.assert_array_equal(module(x)[1], 1.0 + module.table[...][:4])
    graph, params = nnx.split(module, nnx.Param)
    grads = jax.grad(lambda p: nnx.merge(graph, p)(x).sum())(params)
    # Two examples add up; the row that was not used has no gradient.
    expected = np.repeat([[2.0]] * 4 + [[0.0]], 3, axis=1)
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], expected)


@pytest.mark.parametrize("shape", [(6, 3), (4, 2), (3,)])
def test_learned_positions_refuse_what_does_not_fit(shape):
    module = positions.LearnedPositions(5, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dim = 3 and T <= 5"):
        module(jnp.ones(shape))
