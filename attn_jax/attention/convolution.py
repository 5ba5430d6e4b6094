"""A convolution is an attention layer: the construction, and the layer it gives.

Each position of the kernel gets a head of its own. The head's scores know nothing of
the content; they are largest for the key at one offset from the query, and sharp enough
to copy that key alone. What the head then does to the copy is the slice of the kernel
at this position.

Letters besides those of `attn_jax.attention`: N heads, kh × kw positions of a kernel, T
queries (pixels of the output), S keys (pixels of the padded image), C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.softmax import dot_product

__all__ = ["attention_convolution", "convolution_as_attention", "quadratic"]

Padding = Literal["SAME", "VALID"]


def _are_small(*arrays: ArrayLike) -> bool:
    """Whether these are arrays of numpy with numbers that float32 holds exactly."""
    return all(
        isinstance(x, np.ndarray)
        and (x.size == 0 or max(-int(x.min()), int(x.max())) <= 2**24)
        for x in arrays
    )


def quadratic(
    query_positions: ArrayLike,
    key_positions: ArrayLike,
    centre: jax.Array,
    precision: float | jax.Array,
) -> jax.Array:
    """A bias that is largest for the key at a given offset from the query.

    b[t, s] = −(δ − Δ)ᵀ P (δ − Δ) + Δᵀ P Δ with δ = key position less query position

    Its softmax over s is a Gaussian around the query's position + Δ. As P grows each
    query copies the key that is nearest there.

    Args:
      query_positions: [T, D], any real dtype.
      key_positions: [S, D], any real dtype.
      centre: Δ [D], the offset to attend to.
      precision: P, symmetric [D, D], or a scalar α for α times the identity.

    Returns:
      [T, S], computed in float32, or float64 for a float64 `centre`. With whole
      positions and centres it is exact up to one rounding for a scalar `precision`.

    Raises:
      ValueError: if shapes do not fit.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, section 3 (quadratic
    encoding).

    >>> places = jnp.arange(3.0)[:, None]
    >>> quadratic(places[:1], places, jnp.array([1.0]), 2.0).tolist()
    [[0.0, 2.0, 0.0]]
    """
    centre = jnp.asarray(centre)
    given = query_positions, key_positions
    points = [jnp.asarray(x) for x in given]
    if centre.ndim != 1:
        raise ValueError(
            f"`centre` must be a vector [D], but has shape {centre.shape}."
        )
    for name, x in zip(("query_positions", "key_positions"), points, strict=True):
        if x.ndim != 2 or x.shape[1] != centre.size:
            raise ValueError(
                f"`{name}` must have shape [positions, D] with D={centre.size}, the "
                f"size of `centre`, but has shape {x.shape}."
            )
    dtype = score_dtype(centre.dtype)
    precision = jnp.asarray(precision).astype(dtype)
    if precision.shape not in ((), (centre.size,) * 2):
        raise ValueError(
            f"`precision` must be a scalar or [D, D] with D={centre.size}, but has "
            f"shape {precision.shape}."
        )
    # Whole places are told apart as such where a float could not.
    if all(x.dtype == jnp.int32 for x in points) and not _are_small(*given):
        cast_before, cast_after = jnp.int32, dtype
    else:
        cast_before = cast_after = dtype
    from_query, to_key = (x.astype(cast_before) for x in points)
    offset = (to_key[None, :, :] - from_query[:, None, :]).astype(cast_after)
    # Without squares that cancel: (2Δ − δ)ᵀ P δ.
    other = 2 * centre.astype(dtype)[None, None, :] - offset
    if precision.ndim:
        exact = jax.lax.Precision.HIGHEST
        return (jnp.matmul(other, precision, precision=exact) * offset).sum(axis=-1)
    return precision * (other * offset).sum(axis=-1)


def convolution_as_attention(
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    alpha: float,
) -> dict[str, jax.Array]:
    """Parameters of the attention layer that a convolution of stride 1 is.

    Head (i, j) has centre Δ = (i − ⌊(kh − 1)/2⌋, j − ⌊(kw − 1)/2⌋), sharpness α, no
    query and no key, and kernel[i, j] as the product of its value and output maps.

    The leaves may be trained, as in the paper's layers: a centre need not be whole.

    Args:
      kernel: [kh, kw, C_in, C_out], as in `jax.lax.conv_general_dilated` with
        "HWIO". Sizes may be even.
      bias: [C_out] or None for zeros.
      alpha: α, how sharply a head attends to its centre. A neighbour of the centre has
        e^−α of its weight: at 16 the layer is the convolution to 1e-6.

    Returns:
      {"centre": [kh, kw, 2], "alpha": [kh, kw], "value": [kh, kw, C_in, C_out],
      "bias": [C_out]}, in the kernel's dtype.

    Raises:
      ValueError: on wrong shapes or an empty kernel.
      TypeError: on wrong dtypes.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, theorem 1, lemmas 1 and 2.

    >>> params = convolution_as_attention(jnp.ones((1, 2, 3, 4)), alpha=16.0)
    >>> params["centre"].tolist()
    [[[0.0, 0.0], [0.0, 1.0]]]
    """
    kernel = jnp.asarray(kernel)
    _checks.check_shape("kernel", kernel, ("kh", "kw", "C_in", "C_out"), {})
    _checks.check_float("kernel", kernel)
    if 0 in kernel.shape:
        raise ValueError(f"`kernel` must not be empty, but has shape {kernel.shape}.")
    height, width, _, channels = kernel.shape
    if bias is None:
        bias = jnp.zeros(channels, kernel.dtype)
    _checks.check_shape("bias", bias, ("C_out",), {"C_out": channels})
    rows, columns = np.indices((height, width))
    centre = np.stack([rows - (height - 1) // 2, columns - (width - 1) // 2], axis=-1)
    return {
        "centre": jnp.asarray(centre, kernel.dtype),
        "alpha": jnp.full((height, width), alpha, kernel.dtype),
        "value": kernel,
        "bias": jnp.asarray(bias, kernel.dtype),
    }


def _points(begin: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """[rows · columns, 2] places of a grid in row-major order, from `begin` on."""
    return np.indices(shape).reshape(2, -1).T + np.asarray(begin)


def attention_convolution(
    params: Mapping[str, jax.Array],
    image: jax.Array,
    padding: Padding = "SAME",
) -> jax.Array:
    """The attention layer of `convolution_as_attention`, computed as attention.

    O = b + Σ_h softmax(−α_h (‖δ − Δ_h‖² − ‖Δ_h‖²)) X W_h, where δ is the place of the
    key less that of the query

    As α → ∞ each head copies the key at its centre, and the layer is the convolution
    with the kernel, at every pixel: for "SAME", the keys are the image and around it a
    ring of tokens of value zero, as wide as the kernel needs, so that a head that
    looks over the border copies a zero. For "VALID" there is no ring, and only those
    pixels are queries from which no head looks over the border. The ring follows from
    the kernel's size, not from centres that have moved in training.

    It makes N = kh · kw times T · S scores, which is what the construction costs.

    Args:
      params: {"centre": [kh, kw, 2], "alpha": [kh, kw], "value": [kh, kw, C_in,
        C_out], "bias": [C_out]}.
      image: [height, width, C_in].
      padding: "SAME" or "VALID", with the meaning of `jax.lax.conv`.

    Returns:
      [height, width, C_out], or [height − kh + 1, width − kw + 1, C_out] for "VALID",
      in the dtype of the image.

    Raises:
      ValueError: on wrong shapes or parameters, or an unknown `padding`.
      TypeError: on wrong dtypes.

    Reference: Cordonnier et al., 2019, arXiv:1911.03584, theorem 1, lemmas 1 and 2.

    >>> params = convolution_as_attention(jnp.ones((3, 3, 1, 1)), alpha=40.0)
    >>> attention_convolution(params, jnp.ones((3, 4, 1)))[..., 0].tolist()
    [[4.0, 6.0, 6.0, 4.0], [6.0, 9.0, 9.0, 6.0], [4.0, 6.0, 6.0, 4.0]]
    """
    layout = {"value": "hwio", "centre": "hw2", "alpha": "hw", "bias": "o"}
    maker = "convolution_as_attention(kernel, alpha=...)"
    sizes = _checks.check_params(maker, params, layout, **{"2": 2})
    kh, kw, num_inputs, channels = (sizes[letter] for letter in layout["value"])
    _checks.check_choice("padding", padding, get_args(Padding))
    image = jnp.asarray(image)
    letters = ("height", "width", "C_in")
    _checks.check_shape("image", image, letters, {"C_in": num_inputs})
    _checks.check_float("image", image)

    top, left = (kh - 1) // 2, (kw - 1) // 2
    bottom, right = kh - 1 - top, kw - 1 - left
    height, width, _ = image.shape
    if padding == "SAME":
        keys = _points((-top, -left), (height + kh - 1, width + kw - 1))
        queries = _points((0, 0), (height, width))
        image = jnp.pad(image, ((top, bottom), (left, right), (0, 0)))
    else:
        keys = _points((0, 0), (height, width))
        height, width = max(0, height - kh + 1), max(0, width - kw + 1)
        queries = _points((top, left), (height, width))
    if 0 in (height, width):
        return jnp.zeros((height, width, channels), image.dtype)
    # No content: zero queries and keys of size 1.
    query, key = (jnp.zeros((len(x), 1), image.dtype) for x in (queries, keys))
    value = image.reshape(len(keys), -1)

    def head(centre: jax.Array, alpha: jax.Array) -> jax.Array:
        return dot_product(query, key, value, quadratic(queries, keys, centre, alpha))

    mixed = jax.vmap(head)(
        params["centre"].reshape(kh * kw, 2), params["alpha"].reshape(kh * kw)
    )
    maps = params["value"].astype(image.dtype).reshape(kh * kw, -1, channels)
    out = _scores.einsum("ntc,ncd->td", mixed, maps).astype(image.dtype)
    out = out + params["bias"].astype(image.dtype)[None, :]
    return out.reshape(height, width, channels)
