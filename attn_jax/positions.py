"""Absolute position tables: sinusoidal in one and two dimensions, and learned.

A table is an array `[positions, dim]` that is added to the token embeddings
before the first layer. Attention itself does not know the order of its keys;
this is where order enters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

__all__ = [
    "LearnedPositions",
    "learned_init",
    "sinusoidal",
    "sinusoidal_1d",
    "sinusoidal_2d",
]


def _check_size(name: str, value: int, *, multiple_of: int = 1) -> None:
    """Refuse anything but a positive int, divisible as the table needs it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}: {value!r}")
    if value < 1 or value % multiple_of:
        of = f" multiple of {multiple_of}" if multiple_of > 1 else ""
        raise ValueError(f"{name} must be a positive{of or ' number'}, got {value}")


def sinusoidal(
    positions: jax.Array,
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
      positions: `[T]`, any real dtype; computed in float32.
      dim: size of the code, even.
      max_wavelength: the slowest channels turn once in about 2π times this many
        positions.
      dtype: dtype of the result.

    Returns:
      `[T, dim]`.

    Raises:
      ValueError: if `positions` is not a vector, `dim` is odd, or
        `max_wavelength` is not positive.

    Reference:
      Vaswani et al., "Attention Is All You Need", section 3.5.
      https://arxiv.org/abs/1706.03762

    >>> sinusoidal(jnp.array([0.0, 0.5]), 2).round(2).tolist()
    [[0.0, 1.0], [0.47999998927116394, 0.8799999952316284]]
    """
    _check_size("dim", dim, multiple_of=2)
    positions = jnp.asarray(positions)
    if positions.ndim != 1:
        raise ValueError(f"positions must be a vector [T], got shape {positions.shape}")
    if not max_wavelength > 0:
        raise ValueError(f"max_wavelength must be positive, got {max_wavelength}")
    # Static, so float64 on the host costs nothing and rounds only once.
    exponent = np.arange(0, dim, 2) / dim
    frequency = jnp.asarray(max_wavelength**-exponent, jnp.float32)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
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

    P[t, 2i] = sin(t · ω_i),  P[t, 2i+1] = cos(t · ω_i),
    ω_i = max_wavelength^(−2i/dim)

    Args:
      length: number of positions T.
      dim: size of the embedding, even.
      max_wavelength: see `sinusoidal`.
      dtype: dtype of the result.

    Returns:
      `[T, dim]`.

    Raises:
      ValueError: if `dim` is odd or a size is not positive.

    Reference:
      Vaswani et al., "Attention Is All You Need", section 3.5.
      https://arxiv.org/abs/1706.03762

    >>> sinusoidal_1d(5, 8).shape
    (5, 8)
    """
    _check_size("length", length)
    return sinusoidal(
        jnp.arange(length), dim, max_wavelength=max_wavelength, dtype=dtype
    )


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
      max_wavelength: see `sinusoidal`.
      dtype: dtype of the result.

    Returns:
      `[height · width, dim]`.

    Raises:
      ValueError: if `dim` is not a multiple of 4 or a size is not positive.

    Reference:
      Beyer et al., "Better plain ViT baselines for ImageNet-1k".
      https://arxiv.org/abs/2205.01580

    >>> sinusoidal_2d(2, 3, 8).shape
    (6, 8)
    """
    _check_size("height", height)
    _check_size("width", width)
    _check_size("dim", dim, multiple_of=4)
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
      dtype: dtype of the result.

    Returns:
      `[T, dim]`.

    Raises:
      ValueError: if a size is not positive or `stddev` is negative.

    Reference:
      Gehring et al., "Convolutional Sequence to Sequence Learning", section 3.1.
      https://arxiv.org/abs/1705.03122

    >>> learned_init(jax.random.key(0), 5, 3).shape
    (5, 3)
    """
    _check_size("length", length)
    _check_size("dim", dim)
    if stddev < 0:
        raise ValueError(f"stddev must not be negative, got {stddev}")
    return jnp.asarray(stddev, dtype) * jax.random.normal(rng, (length, dim), dtype)


class LearnedPositions(nnx.Module):
    """Adds a learned table to the embeddings, y[t] = x[t] + P[t].

    Args:
      length: largest number of positions it will see.
      dim: size of the embedding.
      stddev: standard deviation of the first values.
      rngs: `nnx.Rngs` with a `params` (or default) stream.
      param_dtype: dtype of the table; it is cast to the input's when added.

    Reference:
      Gehring et al., "Convolutional Sequence to Sequence Learning", section 3.1.
      https://arxiv.org/abs/1705.03122

    >>> add = LearnedPositions(5, 3, rngs=nnx.Rngs(0))
    >>> add(jnp.zeros((2, 4, 3))).shape
    (2, 4, 3)
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        stddev: float = 0.02,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.table = nnx.Param(
            learned_init(rngs.params(), length, dim, stddev=stddev, dtype=param_dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Add the first T rows of the table to `x[..., T, dim]`."""
        table = self.table[...]
        length, dim = table.shape
        if x.ndim < 2 or x.shape[-1] != dim or x.shape[-2] > length:
            raise ValueError(
                f"x must be [..., T, dim] with dim = {dim} and T <= {length} (the "
                f"length of the table), got shape {x.shape}"
            )
        rows = table[: x.shape[-2]].astype(x.dtype)
        return x + rows.reshape((1,) * (x.ndim - 2) + rows.shape)
