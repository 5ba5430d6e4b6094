"""Position tables against their equations, their symmetries, and bad sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax import positions
from attn_jax.attention.convolution import quadratic
from attn_jax.nn.positional import LearnedPositions


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
        (
            lambda: positions.sinusoidal_1d(4, 5),
            ValueError,
            "`dim` .* multiple of 2.*5",
        ),
        (lambda: positions.sinusoidal_1d(0, 4), ValueError, "`length` .* is 0"),
        (lambda: positions.sinusoidal_1d(4, -2), ValueError, "`dim` .* is -2"),
        (lambda: positions.sinusoidal_1d(4.0, 2), TypeError, "`length` .* float"),
        (
            lambda: positions.sinusoidal_2d(2, 2, 6),
            ValueError,
            "`dim` .* multiple of 4",
        ),
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
            "`max_wavelength` must be positive",
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
    module = LearnedPositions(5, 3, rngs=nnx.Rngs(0))
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
    module = LearnedPositions(5, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dim=3 and T ≤ 5"):
        module(jnp.ones(shape))


def test_rotary_is_the_equation(draw):
    x, points = draw({"x": (5, 6), "points": (5,)}).values()
    points = 20.0 * points
    found = positions.rotary(x, points, max_wavelength=50.0)
    for t in range(5):
        for i in range(3):
            turned = (x[t, 2 * i] + 1j * x[t, 2 * i + 1]) * np.exp(
                1j * points[t] * 50.0 ** (-2 * i / 6)
            )
            np.testing.assert_allclose(
                found[t, 2 * i : 2 * i + 2], [turned.real, turned.imag], atol=1e-5
            )
    half = positions.rotary(jnp.bfloat16(x), jnp.arange(5))
    assert half.dtype == jnp.bfloat16


def test_rotary_products_depend_on_the_offset_alone(draw):
    q, k = (np.repeat(x, 9, axis=0) for x in draw({"q": (1, 8), "k": (1, 8)}).values())
    place = jnp.arange(9)
    products = np.asarray(positions.rotary(q, place) @ positions.rotary(k, place).T)
    shifted = positions.rotary(q, place + 70) @ positions.rotary(k, place + 70).T
    np.testing.assert_allclose(shifted, products, atol=1e-4)
    for offset in range(-8, 9):
        diagonal = np.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.std(products[0]) > 0.1
    np.testing.assert_array_equal(positions.rotary(q, jnp.zeros(9)), q)


def test_alibi_is_the_equation_and_the_papers_under_a_causal_mask():
    slopes = np.asarray(positions.alibi_slopes(8))
    np.testing.assert_allclose(slopes, [2.0**-h for h in range(1, 9)])
    assert positions.alibi_slopes(3)[-1] == 2.0**-8
    found = jax.vmap(lambda m: positions.alibi(4, 6, slope=m))(slopes)
    assert found.shape == (8, 4, 6)
    for h in range(8):
        for t in range(4):
            for s in range(6):
                assert found[h, t, s] == -slopes[h] * abs(t - s)
    # The paper adds m · [0 … t] to row t: the same up to a constant per row.
    row = np.asarray(found[0, 3, :4])
    np.testing.assert_allclose(row - row[0], slopes[0] * np.arange(4), atol=1e-6)


def _t5_bucket(offset, num_buckets, max_distance, bidirectional):
    """The bucket by whole numbers alone: powers in the place of logarithms."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    far = num_buckets - exact
    step = max(
        j
        for j in range(far + 1)
        if distance**far * exact**j >= max_distance**j * exact**far
    )
    return first + min(exact + step, num_buckets - 1)


@pytest.mark.parametrize(
    ("num_buckets", "max_distance", "bidirectional"),
    [(32, 128, True), (32, 128, False), (8, 20, True), (5, 9, False), (4, 64, True)],
)
def test_t5_buckets_are_the_equation(num_buckets, max_distance, bidirectional):
    options = {"max_distance": max_distance, "bidirectional": bidirectional}
    found = np.asarray(
        positions.t5_buckets(150, 200, num_buckets=num_buckets, **options)
    )
    assert found.shape == (150, 200) and found.dtype == np.int32
    expected = [
        _t5_bucket(o, num_buckets, max_distance, bidirectional)
        for o in range(-149, 200)
    ]
    t, s = np.indices(found.shape)
    np.testing.assert_array_equal(found, np.array(expected)[s - t + 149])
    table = jnp.arange(num_buckets, dtype=jnp.float32) ** 2
    bias = positions.t5_bias(table, 150, 200, **options)
    np.testing.assert_array_equal(bias, found.astype("f") ** 2)
    grad = jax.grad(lambda x: positions.t5_bias(x, 150, 200, **options).sum())(table)
    np.testing.assert_array_equal(
        grad, np.bincount(found.ravel(), minlength=num_buckets)
    )


def test_relative_2d_is_the_equation(draw):
    rows, columns = draw({"rows": (5,), "columns": (7,)}).values()
    found = positions.relative_2d(rows, columns).reshape(3, 4, 3, 4)
    for r, c, i, j in np.ndindex(3, 4, 3, 4):
        assert found[r, c, i, j] == rows[i - r + 2] + columns[j - c + 3]


def test_quadratic_2d_and_gaussian_2d_are_their_equations(draw):
    centre, root = draw({"centre": (2,), "root": (2, 2)}).values()
    precision = root @ root.T
    round_ = positions.quadratic_2d(2, 3, centre, 0.8)
    gaussian = positions.gaussian_2d(2, 3, centre, precision)
    for t, s in np.ndindex(6, 6):
        offset = np.array([s // 3 - t // 3, s % 3 - t % 3], np.float64)
        squares = ((offset - centre) ** 2).sum() - (np.float64(centre) ** 2).sum()
        assert float(round_[t, s]) == pytest.approx(-0.8 * squares, abs=1e-5)
        d, p = offset - centre, np.float64(precision)
        form = -0.5 * d @ p @ d + 0.5 * centre @ p @ centre
        assert float(gaussian[t, s]) == pytest.approx(form, abs=1e-5)
    np.testing.assert_allclose(
        positions.gaussian_2d(2, 3, centre, 1.6 * np.eye(2, dtype="f")),
        round_,
        atol=1e-5,
    )
    # Sharp enough, each pixel attends to the one at the offset.
    sharp = positions.quadratic_2d(3, 4, np.array([1.0, -1.0], "f"), 1e6)
    weights = np.asarray(jax.nn.softmax(sharp)).reshape(3, 4, 3, 4)
    for r, c in np.ndindex(2, 3):
        assert weights[r, c + 1, r + 1, c] == 1.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: positions.rotary(jnp.ones((2, 3)), jnp.arange(2)),
            ValueError,
            r"`x.shape\[1\]` must be a multiple of 2, but is 3",
        ),
        (
            lambda: positions.rotary(jnp.ones((2, 4)), jnp.arange(3)),
            ValueError,
            r"`positions` .* T=2.* \(3,\)",
        ),
        (
            lambda: positions.rotary(jnp.ones(4), jnp.arange(4)),
            ValueError,
            r"`x` must be \[T, H\]",
        ),
        (
            lambda: positions.rotary(jnp.ones((2, 4), int), jnp.arange(2)),
            TypeError,
            "`x` must be a floating",
        ),
        (lambda: positions.alibi_slopes(0), ValueError, "`num_heads` .* is 0"),
        (lambda: positions.alibi(3, 0, slope=1.0), ValueError, "`key_length` .* is 0"),
        (
            lambda: positions.alibi(3, slope=jnp.ones(2)),
            ValueError,
            "`slope` must be a scalar",
        ),
        (
            lambda: positions.t5_buckets(3, num_buckets=7),
            ValueError,
            "`num_buckets` must be an even number of at least 4 .* is 7",
        ),
        (
            lambda: positions.t5_buckets(3, num_buckets=1, bidirectional=False),
            ValueError,
            "`num_buckets` must be at least 2",
        ),
        (
            lambda: positions.t5_buckets(3, max_distance=8),
            ValueError,
            "`max_distance` must exceed 8",
        ),
        (
            lambda: positions.t5_bias(jnp.ones((2, 8)), 3),
            ValueError,
            r"`table` must be \[num_buckets\]",
        ),
        (
            lambda: positions.relative_2d(jnp.ones(4), jnp.ones(3)),
            ValueError,
            "`row_table` must be a vector of odd length",
        ),
        (
            lambda: positions.quadratic_2d(2, 2, jnp.ones(2), jnp.ones(2)),
            ValueError,
            "`alpha` must be a scalar",
        ),
        (
            lambda: positions.quadratic_2d(2, 2, jnp.ones(3), 1.0),
            ValueError,
            "D=3",
        ),
        (
            lambda: positions.gaussian_2d(2, 2, jnp.ones(2), jnp.ones(2)),
            ValueError,
            r"`precision` must be \[2, 2\]",
        ),
    ],
)
def test_bad_arguments_of_biases_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# On both sides of where whole turns are taken off, where float32 has no odd numbers,
# and at the ends of int32.
FAR = np.array([0, 4095, 4096, -5000, 10**6, 2**24 + 1, 2**31 - 1, -(2**31)])


def test_far_positions_are_as_exact_as_near_ones():
    angle = FAR[:, None] * 10_000.0 ** -(np.arange(0, 8, 2) / 8)
    exact = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(len(FAR), 8)
    close = dict(rtol=0, atol=np.where(abs(FAR) < 4096, 3e-4, 2e-6)[:, None])
    places = FAR.astype(np.int32)
    code = jax.jit(lambda p: positions.sinusoidal(p, 8))(places)
    assert (abs(code - exact) <= close["atol"]).all()
    # (1, 0) turned by an angle is its cosine and sine.
    x = np.tile(np.array([1.0, 0.0], "f"), (len(FAR), 4))
    turned = jax.jit(positions.rotary)(x, places)
    swapped = np.asarray(turned).reshape(len(FAR), 4, 2)[..., ::-1].reshape(-1, 8)
    assert (abs(swapped - exact) <= close["atol"]).all()


def test_far_positions_between_two():
    def code(p):
        return positions.sinusoidal(p, 4)[0, 0]

    p = np.float32(10**6 + 0.25)
    value, slope = jax.jit(jax.value_and_grad(lambda p: code(p[None])))(p)
    assert float(value) == pytest.approx(np.sin(np.float64(p)), abs=2e-6)
    assert float(slope) == pytest.approx(np.cos(np.float64(p)), abs=2e-6)
    lost = positions.sinusoidal(np.array([3e9, np.inf, 7.0], "f"), 4)
    assert np.isnan(lost).all(axis=1).tolist() == [True, True, False]


def test_a_long_table_is_exact_where_a_short_one_has_no_rows():
    table = positions.sinusoidal_1d(4100, 8)[4096:, 2]
    np.testing.assert_allclose(table, np.sin(0.1 * np.arange(4096, 4100)), atol=2e-6)


def test_alibi_masks_no_key_in_a_narrow_dtype():
    distance = np.arange(70_000)
    for slope in (2.0**-8, 2.0):  # at 2 the bias itself is out of range
        want = np.maximum(-slope * distance, np.finfo(np.float16).min)
        got = positions.alibi(1, 70_000, slope=slope, dtype=jnp.float16)[0]
        assert got.dtype == jnp.float16
        np.testing.assert_allclose(np.float64(got), want, rtol=2**-10)


def test_quadratic_tells_far_places_apart():
    places = jnp.array([2**24, 2**24 + 1])[:, None]
    near = jnp.array([0, 1])[:, None]
    ours = quadratic(places, places, jnp.ones(1), 1.0)
    np.testing.assert_array_equal(ours, quadratic(near, near, jnp.ones(1), 1.0))
