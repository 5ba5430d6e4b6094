"""Positions: tables to add to the tokens, a rotation, and biases of the scores.

Attention itself does not know the order of its keys; this is where order enters. A
table `[positions, dim]` (sinusoidal, learned, FLOATER) is added to the token embeddings
before the first layer. `rotary` turns queries and keys of every layer. A bias `[T, S]`
(ALiBi, T5, relative in two dimensions, quadratic) is added to the scores of every
layer: `fn(query, key, value, bias)` takes it, and one per head stacks to `[1, N, T, S]`
for `multi_head`.

`length` is T, `key_length` S (T if not given), and `dtype` that of the result. A size
that is not positive, and shapes that do not fit, raise ValueError; a size that is no
int, and a wrong dtype, TypeError.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.convolution import quadratic
from attn_jax.attention.relative import relative_shift
from attn_jax.flow import floater, floater_init

__all__ = [
    "alibi",
    "alibi_slopes",
    "floater",
    "floater_init",
    "gaussian_2d",
    "learned_init",
    "quadratic_2d",
    "relative_2d",
    "rotary",
    "sinusoidal",
    "sinusoidal_1d",
    "sinusoidal_2d",
    "t5_bias",
    "t5_buckets",
]


# Angles of positions below are the product in float32, good to 3e-4 there.
_NEAR = 4096

_LARGEST = 2**31 - 1


def frequencies(dim: int, max_wavelength: float) -> np.ndarray:
    """Frequencies ω_i = max_wavelength^(−2i/dim), [dim/2] in float64.

    Raises:
      ValueError: if `max_wavelength` is not positive.
    """
    _checks.check_positive("max_wavelength", max_wavelength)
    # Static, so float64 on the host costs nothing and rounds only once.
    return max_wavelength ** -(np.arange(0, dim, 2) / dim)


def _high_word(x: jax.Array, y: jax.Array) -> jax.Array:
    """⌊x · y / 2³²⌋ of uint32."""
    half, low = jnp.uint32(16), jnp.uint32(0xFFFF)
    x1, x0, y1, y0 = x >> half, x & low, y >> half, y & low
    middle = x1 * y0 + (x0 * y0 >> half)
    return x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)


def _reduced_angles(positions: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Angles p · ω less whole turns, [T, F] float32 of int32 positions [T].

    Whole numbers count turns in units of 2⁻⁶⁴ and lose, by their overflow, whole turns
    alone. So no position is less exact than another.
    """
    units = np.ldexp(frequency / (2 * np.pi) % 1.0, 32)
    words = np.floor(units), np.ldexp(units % 1.0, 32)
    high, low = (jnp.asarray(word.astype(np.uint32))[None] for word in words)
    steps = jax.lax.bitcast_convert_type(jnp.abs(positions), jnp.uint32)[:, None]
    turns = steps * high + _high_word(steps, low)
    angle = jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32)
    angle = angle * jnp.float32(2 * np.pi / 2**32)
    return jnp.where(positions[:, None] < 0, -angle, angle)


def _angles(
    positions: jax.Array, frequency: np.ndarray, dtype: jnp.dtype, near: bool = False
) -> jax.Array:
    """Angles p · ω, [T, F], exact to 3e-4 up to 4,096 and to 1e-6 from there on.

    Args:
      positions: [T], any real dtype.
      frequency: ω [F].
      dtype: float32 or float64, of the result.
      near: whether it is known that all positions are less than `_NEAR`.

    Returns:
      In float32, NaN for positions that int32 does not hold.
    """
    wide = positions.astype(dtype)[:, None]
    factor = jnp.asarray(frequency, dtype)[None, :]
    angle = wide * factor
    if near or dtype == jnp.float64:
        return angle
    if jnp.issubdtype(positions.dtype, jnp.integer):
        whole = _checks.as_int32("positions", positions)
        exact = positions == whole.astype(positions.dtype)
        far = _reduced_angles(whole, frequency)
    else:
        floor = jnp.floor(positions)
        exact = jnp.abs(floor.astype(jnp.float32)) < 2.0**31
        whole = jnp.where(exact, floor, 0).astype(jnp.int32)
        part = (positions - floor).astype(dtype)[:, None]
        far = _reduced_angles(whole, frequency) + part * factor
    far = jnp.where(exact[:, None], far, jnp.nan)
    return jnp.where(jnp.abs(wide) < _NEAR, angle, far)


def _as_positions(positions: ArrayLike) -> jax.Array:
    """Positions as an array of JAX; known whole ones must be what int32 holds."""
    if isinstance(positions, jax.core.Tracer):
        return jnp.asarray(positions)
    array = np.asarray(positions)
    if jnp.issubdtype(array.dtype, jnp.integer) and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -_LARGEST - 1 or high > _LARGEST:
            raise ValueError(
                f"`positions` must lie in {-_LARGEST - 1} … {_LARGEST}, but has "
                f"values from {low} to {high}."
            )
    return jnp.asarray(positions)


def sinusoidal(
    positions: ArrayLike,
    dim: int,
    *,
    max_wavelength: float = 10_000.0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Sinusoidal code of arbitrary, also fractional, positions.

    P[t, 2i] = sin(p_t · ω_i),  P[t, 2i+1] = cos(p_t · ω_i),
    ω_i = max_wavelength^(−2i/dim)

    The code of p + k is a rotation of the code of p that depends on k alone,
    and the inner product of two codes depends on their distance alone.

    Args:
      positions: `[T]`, any real dtype; computed in float32. Whole turns are taken off
        exactly, so the code of every position that int32 holds is good to 3e-4, and
        from 4,096 on to 1e-6; others give NaN.
      dim: size of the code, even.
      max_wavelength: the slowest channels turn once in about 2π times this many
        positions.

    Returns:
      `[T, dim]`.

    Raises:
      ValueError: if `positions` is not a vector or has known integers that int32 does
        not hold, `dim` is odd, or `max_wavelength` is not positive.

    Reference: Vaswani et al., 2017, arXiv:1706.03762, section 3.5.

    >>> sinusoidal(jnp.array([0.0, 0.5]), 2).round(2).tolist()
    [[0.0, 1.0], [0.47999998927116394, 0.8799999952316284]]
    """
    dim = _checks.check_int("dim", dim, 1, multiple_of=2)
    positions = _as_positions(positions)
    if positions.ndim != 1:
        raise ValueError(
            f"`positions` must be a vector [T], but has shape {positions.shape}."
        )
    return _sinusoidal(positions, dim, max_wavelength, dtype)


def _sinusoidal(
    positions: jax.Array,
    dim: int,
    max_wavelength: float,
    dtype: DTypeLike,
    near: bool = False,
) -> jax.Array:
    frequency = frequencies(dim, max_wavelength)
    angle = _angles(positions, frequency, jnp.dtype(jnp.float32), near)
    code = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return code.reshape(positions.shape[0], dim).astype(dtype)


def sinusoidal_1d(
    length: int,
    dim: int,
    *,
    max_wavelength: float = 10_000.0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Sinusoidal table of the positions 0 … length − 1 of a sequence.

    It is `sinusoidal(jnp.arange(length), dim)`.

    Args:
      length: T.
      dim: size of the embedding, even.

    Returns:
      `[T, dim]`.

    Reference: Vaswani et al., 2017, arXiv:1706.03762, section 3.5.

    >>> sinusoidal_1d(5, 8).shape
    (5, 8)
    """
    length = _checks.check_int("length", length, 1)
    dim = _checks.check_int("dim", dim, 1, multiple_of=2)
    places = jnp.arange(length, dtype=jnp.int32)
    return _sinusoidal(places, dim, max_wavelength, dtype, near=length <= _NEAR)


def sinusoidal_2d(
    height: int,
    width: int,
    dim: int,
    *,
    max_wavelength: float = 10_000.0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Sinusoidal table of a grid of patches, in row-major order.

    P[r · width + c] = [ P¹ᵈ_{dim/2}[r] ; P¹ᵈ_{dim/2}[c] ]

    The first half of the channels codes the row, the second half the column.
    With `height = 1` the second half is the 1-D table of size dim/2 and the
    first half is constant.

    Args:
      height: number of rows of patches.
      width: number of columns of patches.
      dim: size of the embedding, a multiple of 4.

    Returns:
      `[height · width, dim]`.

    Raises:
      ValueError: if `dim` is not a multiple of 4 or a size is not positive.

    Reference: Beyer et al., 2022, arXiv:2205.01580.

    >>> sinusoidal_2d(2, 3, 8).shape
    (6, 8)
    """
    height = _checks.check_int("height", height, 1)
    width = _checks.check_int("width", width, 1)
    dim = _checks.check_int("dim", dim, 1, multiple_of=4)
    half = dim // 2
    rows = sinusoidal_1d(height, half, max_wavelength=max_wavelength, dtype=dtype)
    columns = sinusoidal_1d(width, half, max_wavelength=max_wavelength, dtype=dtype)
    grid = (height, width, half)
    table = jnp.concatenate(
        [
            jnp.broadcast_to(rows[:, None, :], grid),
            jnp.broadcast_to(columns[None, :, :], grid),
        ],
        axis=-1,
    )
    return table.reshape(height * width, dim)


def learned_init(
    rng: jax.Array,
    length: int,
    dim: int,
    *,
    stddev: float = 0.02,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """First values of a learned position table, P[t, i] ~ N(0, stddev²).

    Args:
      rng: a JAX random key.
      length: largest number of positions T.
      dim: size of the embedding.
      stddev: standard deviation; 0 starts from no position information.

    Returns:
      `[T, dim]`.

    Raises:
      ValueError: if a size is not positive or `stddev` is negative.

    Reference: Gehring et al., 2017, arXiv:1705.03122, section 3.1.

    >>> learned_init(jax.random.key(0), 5, 3).shape
    (5, 3)
    """
    length = _checks.check_int("length", length, 1)
    dim = _checks.check_int("dim", dim, 1)
    if stddev < 0:
        raise ValueError(f"`stddev` must be at least 0, but is {stddev}.")
    return jnp.asarray(stddev, dtype) * jax.random.normal(rng, (length, dim), dtype)


def rotary(
    x: jax.Array, positions: ArrayLike, *, max_wavelength: float = 10_000.0
) -> jax.Array:
    """Rotates queries or keys by angles that grow with their position (RoPE).

    (y_{t,2i}, y_{t,2i+1}) = R(p_t · ω_i) (x_{t,2i}, x_{t,2i+1}), where R(φ) turns the
    plane by φ and ω_i = max_wavelength^(−2i/H)

    The product of a rotated query and a rotated key depends on their positions by the
    offset alone. Values are not rotated. At position 0 it changes nothing, and no
    vector changes its length.

    Args:
      x: `[T, H]`, queries or keys of one head, H even.
      positions: `[T]`, any real dtype; see `sinusoidal` for what is exact.
      max_wavelength: the slowest channels turn once in about 2π times this many
        positions.

    Returns:
      `[T, H]`, in the dtype of `x`; computed in float32, or float64 for a float64 `x`.

    Raises:
      ValueError: if `x` is no matrix, H is odd, `positions` is not `[T]` or has known
        integers that int32 does not hold, or `max_wavelength` is not positive.

    Reference: Su et al., 2021, arXiv:2104.09864, section 3.2.

    >>> rotary(jnp.array([[1.0, 0.0]] * 2), jnp.array([0.0, jnp.pi])).round(3).tolist()
    [[1.0, 0.0], [-1.0, -0.0]]
    """
    return _rotary(x, _as_positions(positions), max_wavelength)


def _rotary(
    x: jax.Array, positions: jax.Array, max_wavelength: float, near: bool = False
) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"`x` must be [T, H] (one head), but has shape {x.shape}.")
    _checks.check_float("x", x)
    length, dim = x.shape
    _checks.check_int("x.shape[1]", dim, 1, multiple_of=2)
    if positions.shape != (length,):
        raise ValueError(
            f"`positions` must be a vector [T] with T={length}, the length of `x`, but "
            f"has shape {positions.shape}."
        )
    frequency = frequencies(dim, max_wavelength)
    return turn(x, _angles(positions, frequency, score_dtype(x.dtype), near))


def turn(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Turns the planes (x_2i, x_{2i+1}) of x [T, H] by angles [T, H/2]."""
    length, dim = x.shape
    wide = angle.dtype
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs = x.astype(wide).reshape(length, dim // 2, 2)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    turned = jnp.stack(
        [first * cos - second * sin, first * sin + second * cos], axis=-1
    )
    return turned.reshape(length, dim).astype(x.dtype)


def _lengths(length: int, key_length: int | None) -> tuple[int, int]:
    """T and S, checked."""
    length = _checks.check_int("length", length, 1)
    if key_length is None:
        return length, length
    return length, _checks.check_int("key_length", key_length, 1)


def _by_offset(values: jax.Array, length: int) -> jax.Array:
    """[T, S] of one value per offset s − t, from 1 − T to S − 1."""
    return relative_shift(jnp.broadcast_to(values[None, :], (length, values.size)))


def alibi_slopes(num_heads: int, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Slopes of ALiBi, m_h = 2^(−8h/N) for the heads h = 1 … N.

    For every N the geometric sequence of the paper; for an N that is no power of two
    its code mixes the sequences of two powers instead.

    Args:
      num_heads: N.

    Returns:
      `[N]`.

    Reference: Press et al., 2021, arXiv:2108.12409, section 3.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    num_heads = _checks.check_int("num_heads", num_heads, 1)
    return jnp.asarray(2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads), dtype)


def alibi(
    length: int,
    key_length: int | None = None,
    *,
    slope: float | jax.Array,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """A bias that falls linearly with the distance of query and key (ALiBi).

    b[t, s] = −m · |t − s|

    With `is_causal` in the attention it is the paper's; without, the symmetric form
    for encoders. With m = 0 nothing is added. Computed in float32 or wider; what a
    narrow dtype cannot hold is its least finite number, which masks no key.

    Args:
      slope: m of one head; one per head by
        `jax.vmap(lambda m: alibi(length, slope=m))(alibi_slopes(num_heads))`.

    Returns:
      `[T, S]`.

    Raises:
      ValueError: if a size is not positive or `slope` is no scalar.

    Reference: Press et al., 2021, arXiv:2108.12409, section 3.

    >>> alibi(2, 3, slope=0.5).tolist()
    [[-0.0, -0.5, -1.0], [-0.5, -0.0, -0.5]]
    """
    length, key_length = _lengths(length, key_length)
    dtype = jnp.dtype(dtype)
    wide = score_dtype(dtype)
    slope = jnp.asarray(slope).astype(wide)
    if slope.ndim:
        raise ValueError(
            f"`slope` must be a scalar, but has shape {slope.shape}; use `jax.vmap` "
            "over heads."
        )
    distance = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(key_length)[None, :])
    bias = -slope * distance.astype(wide)
    if dtype == wide:
        return bias
    return jnp.maximum(bias, float(jnp.finfo(dtype).min)).astype(dtype)


def _t5_bucket_of_offset(
    length: int,
    key_length: int,
    num_buckets: int,
    max_distance: int,
    bidirectional: bool,
) -> np.ndarray:
    """Buckets of the offsets s − t from 1 − T to S − 1: int32 [T + S − 1]."""
    num_buckets = _checks.check_int("num_buckets", num_buckets, 1)
    max_distance = _checks.check_int("max_distance", max_distance, 1)
    offset = np.arange(1 - length, key_length)
    buckets = num_buckets // 2 if bidirectional else num_buckets
    if bidirectional and num_buckets % 2 or buckets < 2:
        need = "an even number of at least 4" if bidirectional else "at least 2"
        raise ValueError(
            f"`num_buckets` must be {need} where `bidirectional` is {bidirectional}, "
            f"but is {num_buckets}."
        )
    exact = buckets // 2
    if max_distance <= exact:
        raise ValueError(
            f"`max_distance` must exceed {exact}, the distances with a bucket of their "
            f"own where `num_buckets` is {num_buckets}, but is {max_distance}."
        )
    distance = np.abs(offset) if bidirectional else np.maximum(-offset, 0)
    growth = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    # Where a distance lies on a border, rounding must not put it below.
    far = exact + np.floor(growth * (buckets - exact) + 1e-9).astype(int)
    bucket = np.where(distance < exact, distance, np.minimum(far, buckets - 1))
    if bidirectional:
        bucket = bucket + buckets * (offset > 0)
    return bucket.astype(np.int32)


def t5_buckets(
    length: int,
    key_length: int | None = None,
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> jax.Array:
    """The bucket of each pair's offset in T5: near ones alone, far ones together.

    With n buckets for a direction and d = |t − s|: bucket d for d < n/2, else
    min(n − 1, n/2 + ⌊log(d / (n/2)) / log(max_distance / (n/2)) · n/2⌋). If
    `bidirectional`, keys after the query have n = num_buckets/2 buckets of their own;
    else they all are in bucket 0, and n = num_buckets.

    Args:
      num_buckets: number of buckets.
      max_distance: from here on all distances share the last bucket.
      bidirectional: whether the sign of an offset counts.

    Returns:
      `[T, S]` int32 in 0 … num_buckets − 1.

    Raises:
      ValueError: if a size is not positive, `num_buckets` is too small (or odd, where
        it is halved), or `max_distance` lies among the near ones.

    Reference: Raffel et al., 2019, arXiv:1910.10683, section 2.1.

    >>> t5_buckets(1, 6, num_buckets=8, max_distance=8).tolist()
    [[0, 5, 6, 6, 7, 7]]
    """
    length, key_length = _lengths(length, key_length)
    bucket = _t5_bucket_of_offset(
        length, key_length, num_buckets, max_distance, bidirectional
    )
    return _by_offset(jnp.asarray(bucket), length)


def t5_bias(
    table: jax.Array,
    length: int,
    key_length: int | None = None,
    *,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> jax.Array:
    """The learned bias of T5, one number per bucket of offsets.

    b[t, s] = table[bucket(s − t)]

    In T5 the scores under it are not scaled (`scale=1.0`).

    Args:
      table: `[num_buckets]`, of one head; use `jax.vmap` for several.
      max_distance: see `t5_buckets`.
      bidirectional: see `t5_buckets`.

    Returns:
      `[T, S]`, in the dtype of the table.

    Raises:
      ValueError: if `table` is no vector, or as in `t5_buckets`.

    Reference: Raffel et al., 2019, arXiv:1910.10683, section 2.1.

    >>> t5_bias(jnp.arange(8.0), 2, max_distance=8).tolist()
    [[0.0, 5.0], [1.0, 0.0]]
    """
    table = jnp.asarray(table)
    if table.ndim != 1:
        raise ValueError(f"`table` must be [num_buckets], but has shape {table.shape}.")
    _checks.check_float("table", table)
    length, key_length = _lengths(length, key_length)
    bucket = _t5_bucket_of_offset(
        length, key_length, table.size, max_distance, bidirectional
    )
    return _by_offset(table[bucket], length)


def relative_2d(row_table: jax.Array, column_table: jax.Array) -> jax.Array:
    """A learned bias by the offsets of rows and of columns between pixels.

    b[(r, c), (r', c')] = row_table[r' − r + h − 1] + column_table[c' − c + w − 1]

    Args:
      row_table: `[2h − 1]`, for the offsets 1 − h … h − 1 of a grid of h rows.
      column_table: `[2w − 1]`, for a grid of w columns.

    Returns:
      `[h · w, h · w]`, pixels in row-major order.

    Raises:
      ValueError: if a table is no vector of odd length.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, section 4.3 (no content).

    >>> relative_2d(jnp.zeros(1), jnp.array([-1.0, 0.0, 1.0])).tolist()
    [[0.0, 1.0], [-1.0, 0.0]]
    """
    parts = []
    for name, given in (("row_table", row_table), ("column_table", column_table)):
        table = jnp.asarray(given)
        if table.ndim != 1 or table.size % 2 == 0:
            raise ValueError(
                f"`{name}` must be a vector of odd length, one number for each offset "
                f"1 − n … n − 1, but has shape {table.shape}."
            )
        _checks.check_float(name, table)
        parts.append(_by_offset(table, (table.size + 1) // 2))
    rows, columns = parts
    pixels = rows.shape[0] * columns.shape[0]
    pairs = rows[:, None, :, None] + columns[None, :, None, :]
    return pairs.reshape(pixels, pixels)


def _grid_points(height: int, width: int) -> np.ndarray:
    """Rows and columns of pixels in row-major order: [height · width, 2]."""
    sizes = _checks.check_int("height", height, 1), _checks.check_int("width", width, 1)
    return np.indices(sizes).reshape(2, -1).T


def quadratic_2d(
    height: int, width: int, centre: jax.Array, alpha: float | jax.Array
) -> jax.Array:
    """The quadratic encoding, by which a head attends to one offset between pixels.

    b[t, s] = −α (‖δ − Δ‖² − ‖Δ‖²) with δ the place of s less that of t

    As α → ∞ each pixel copies the one at the offset Δ, which is how a convolution's
    kernel is made of heads: see `attention_convolution`.

    Args:
      height: number of rows.
      width: number of columns.
      centre: Δ `[2]`, in rows and columns.
      alpha: α.

    Returns:
      `[height · width, height · width]`, pixels in row-major order.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, section 3.

    >>> quadratic_2d(1, 3, jnp.array([0.0, 1.0]), 2.0).tolist()
    [[0.0, 2.0, 0.0], [-6.0, 0.0, 2.0], [-16.0, -6.0, 0.0]]
    """
    points = _grid_points(height, width)
    if jnp.ndim(alpha):
        raise ValueError(
            f"`alpha` must be a scalar, but has shape {jnp.shape(alpha)}; "
            "`gaussian_2d` takes a matrix."
        )
    return quadratic(points, points, centre, alpha)


def gaussian_2d(
    height: int, width: int, centre: jax.Array, precision: jax.Array
) -> jax.Array:
    """The generalised quadratic encoding: a Gaussian of any shape between pixels.

    b[t, s] = −½ (δ − Δ)ᵀ P (δ − Δ) + ½ Δᵀ P Δ with δ the place of s less that of t

    The last term, the same for all pixels, is of no effect in a softmax. With P = 2α I
    it is `quadratic_2d`.

    Args:
      height: number of rows.
      width: number of columns.
      centre: Δ `[2]`, in rows and columns.
      precision: P `[2, 2]`, symmetric, the inverse of the covariance. A learned one
        stays positive as A Aᵀ.

    Returns:
      `[height · width, height · width]`, pixels in row-major order.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, section 4.2.

    >>> gaussian_2d(1, 2, jnp.array([0.0, 1.0]), 2.0 * jnp.eye(2)).tolist()
    [[0.0, 1.0], [-3.0, 0.0]]
    """
    points = _grid_points(height, width)
    if jnp.shape(precision) != (2, 2):
        raise ValueError(
            f"`precision` must be [2, 2], but has shape {jnp.shape(precision)}."
        )
    return quadratic(points, points, centre, 0.5 * jnp.asarray(precision))
