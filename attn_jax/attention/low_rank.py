"""Low-rank attention: the keys are reduced to m rows before the queries see them.

The common idea is that the [T, S] matrix of weights has about rank m. Linformer mixes
the keys with a learned matrix, memory-compressed attention with a strided convolution,
Nyströmformer goes through the means of m segments of the sequence. What is made is
[T, m] and [m, S], not [T, S].

Letters besides those of `attn_jax.attention`: L longest sequence, k rank of a
projection, c keys in a window, m landmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles
from attn_jax.attention._scores import normalize_softmax, score_dtype
from attn_jax.attention.softmax import dot_product

__all__ = [
    "linformer",
    "linformer_init",
    "memory_compressed",
    "memory_compressed_init",
    "nystromformer",
    "nystromformer_init",
]

Scheme = Literal["normal", "pool"]

# Rows that are convolved together at least.
_LEAST_BLOCK = 32


def linformer_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    rank: int = 256,
    scheme: Scheme = "normal",
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Projections of keys and of values along the sequence, for one head.

    Args:
      rng: random key; "pool" does not use it.
      rank: k, the number of projected keys; at most L are made.
      scheme: "normal" draws from N(0, 1/k), the paper's choice. "pool" takes the means
        of k segments of the L positions, which the paper allows as a projection too;
        with k = L it is the identity.

    Returns:
      {"key": [L, k], "value": [L, k]}.

    Raises:
      ValueError: on a size below 1 or an unknown `scheme`.

    >>> means = {"max_length": 4, "rank": 2, "scheme": "pool"}
    >>> linformer_init(jax.random.key(0), 4, **means)["key"].tolist()
    [[0.5, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.5]]
    """
    _, length, rank = _checks.check_sizes(
        head_dim=head_dim, max_length=max_length, rank=rank
    )
    rank = min(rank, length)
    _checks.check_choice("scheme", scheme, get_args(Scheme))
    if scheme == "pool":
        segment = np.arange(length) * rank // length
        member = segment[:, None] == np.arange(rank)[None, :]
        means = jnp.asarray(member / member.sum(axis=0, keepdims=True), dtype)
        return {"key": means, "value": means}
    rng_key, rng_value = jax.random.split(rng)
    return {
        "key": rank**-0.5 * jax.random.normal(rng_key, (length, rank), dtype),
        "value": rank**-0.5 * jax.random.normal(rng_value, (length, rank), dtype),
    }


def linformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention to k learned mixtures of the keys, in O((T + S) · k).

    O = softmax(scale · Q (Eᵀ K)ᵀ) Fᵀ V

    Equal to `dot_product` if E = F is the identity, as "pool" makes it for k = L. A
    sequence shorter than L uses the first rows of E and F. A projected key that no real
    token feeds, since its columns of E and F are zero at all of them, takes no part;
    this happens with "pool" alone. Each projected key mixes past and future, so there
    is no causal form and no mask of pairs.

    Args:
      query: [T, H].
      key: [S, H], with S ≤ L.
      value: [S, V].
      params: {"key": [L, k], "value": [L, k]}: E and F, as made by `linformer_init`.

    Returns:
      [T, V], in the dtype of the inputs; zeros if no key is real.

    Raises:
      ValueError: on wrong shapes or parameters, or S > L.

    Reference: Wang et al., 2020, arXiv:2006.04768, section 4.

    >>> means = {"max_length": 3, "rank": 2, "scheme": "pool"}
    >>> params = linformer_init(jax.random.key(0), 1, **means)
    >>> x, value = jnp.zeros((3, 1)), jnp.array([[0.0], [2.0], [6.0]])
    >>> linformer(x[:1], x, value, params=params).tolist()  # of 1 = (0 + 2)/2, and 6
    [[3.5]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    layout = {"key": "Lk", "value": "Lk"}
    longest = _checks.check_params("linformer", params, layout)["L"]
    _checks.check_longest("linformer", longest, S=key.shape[0])
    length, dtype = key.shape[0], query.dtype
    by_key, by_value = (
        params[name][:length].astype(dtype) for name in ("key", "value")
    )
    fed = (by_key != 0) | (by_value != 0)
    if key_mask is not None:
        fed &= key_mask[:, None]

    def project(matrix: jax.Array, rows: jax.Array) -> jax.Array:
        return _scores.matmul(matrix.T, _checks.zero_masked(rows, key_mask))

    # In the dtype of scores: sums over many keys may be nearly equal.
    out = dot_product(
        query.astype(score_dtype(dtype)),
        project(by_key, key),
        project(by_value, value),
        key_mask=fed.any(axis=0),
        scale=scale,
    )
    return out.astype(dtype)


def memory_compressed_init(
    rng: jax.Array,
    head_dim: int,
    *,
    compression: int = 3,
    value_dim: int | None = None,
    scheme: Scheme = "normal",
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Kernels of the strided convolutions of keys and of values, for one head.

    Args:
      rng: random key; "pool" does not use it.
      compression: c, how many keys become one; width and stride of the convolution.
      scheme: "normal" draws with LeCun's variance 1/(c·H), as is usual for
        convolutions. "pool" takes the mean of the c keys; with c = 1 it is the
        identity.

    Returns:
      {"key": [c, H, H], "value": [c, V, V]}, the axes being place in the window, input
      and output.

    Raises:
      ValueError: on a size below 1 or an unknown `scheme`.

    >>> params = memory_compressed_init(jax.random.key(0), 4, value_dim=2)
    >>> params["key"].shape, params["value"].shape
    ((3, 4, 4), (3, 2, 2))
    """
    key_dim, width, value_dim = _checks.check_sizes(
        head_dim=head_dim,
        compression=compression,
        value_dim=head_dim if value_dim is None else value_dim,
    )
    _checks.check_choice("scheme", scheme, get_args(Scheme))
    params = {}
    for name, size, stream in zip(
        ("key", "value"), (key_dim, value_dim), jax.random.split(rng), strict=True
    ):
        shape = (width, size, size)
        if scheme == "pool":
            mean = jnp.eye(size, dtype=dtype)[None] / width
            params[name] = jnp.broadcast_to(mean, shape)
        else:
            std = (width * size) ** -0.5
            params[name] = std * jax.random.normal(stream, shape, dtype)
    return params


def compress(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows [L, D] made c times fewer by a kernel [c, D, D]: [⌈L / c⌉, D].

    Σ_i W_iᵀ x_{jc+i}; behind the end there are zeros.

    >>> compress(jnp.arange(3.0).reshape(3, 1), jnp.ones((2, 1, 1))).tolist()
    [[1.0], [2.0]]
    """
    width, size, _ = kernel.shape
    windows = _tiles.cut(rows, width).reshape(-1, width * size)
    short: jax.Array = _scores.matmul(windows, kernel.reshape(width * size, size))
    return short.astype(rows.dtype)


def memory_compressed(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Attention to keys and values that a strided convolution has made c times fewer.

    k'_j = Σ_i W_iᵀ k_{jc+i},  v'_j = Σ_i U_iᵀ v_{jc+i},  i = 0 … c − 1
    O = softmax(scale · Q K'ᵀ) V'

    Equal to `dot_product` for c = 1 with identities, as "pool" makes them. It is still
    quadratic, with a constant c times smaller. The last window is filled up with zeros,
    and so are keys of padding; a window without any real key takes no part.

    With `is_causal` query t sees the windows that end at or before it,
    (j + 1) c − 1 ≤ t. The first c − 1 queries see none and give zeros.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      params: {"key": [c, H, H], "value": [c, V, V]}: W and U, as made by
        `memory_compressed_init`.
      is_causal: whether query t attends only to windows of keys s ≤ t.

    Returns:
      [T, V], in the dtype of the inputs; zeros for a query that sees no window.

    Reference: Liu et al., 2018, arXiv:1801.10198 (memory-compressed attention).

    >>> params = memory_compressed_init(
    ...     jax.random.key(0), 1, compression=2, scheme="pool"
    ... )
    >>> x, value = jnp.ones((4, 1)), jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> memory_compressed(x, x, value, params=params, is_causal=True).tolist()
    [[0.0], [2.0], [2.0], [4.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    layout, dims = {"key": "cHH", "value": "cVV"}, (key.shape[1], value.shape[1])
    sizes = dict(zip("HV", dims, strict=True))
    width = _checks.check_params("memory_compressed", params, layout, **sizes)["c"]
    dtype = query.dtype
    num_queries, num_keys = query.shape[0], key.shape[0]
    windows = -(-num_keys // width)
    mask, seen = None, key_mask
    if is_causal:
        ends = width * np.arange(1, windows + 1) - 1
        mask = jnp.asarray(ends)[None, :] <= jnp.arange(num_queries)[:, None]
        reached = (ends < num_queries).repeat(width)[:num_keys]
        if not reached.all():
            seen = jnp.asarray(reached) if seen is None else seen & reached

    live = None
    if key_mask is not None:
        live = _tiles.cut(key_mask, width).any(axis=1)
    short: dict[str, Any] = {
        name: compress(_checks.zero_masked(rows, seen), params[name].astype(dtype))
        for name, rows in (("key", key), ("value", value))
    }
    return dot_product(
        query,
        **short,
        mask=mask,
        key_mask=live,
        scale=scale,
    )


def nystromformer_init(
    rng: jax.Array,
    head_dim: int,
    *,
    kernel_size: int = 33,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Kernel of the convolution beside Nyström attention, for one head: zeros.

    So it starts as plain Nyström attention, an approximation of `dot_product`, and
    learns the rest. The paper's code draws this kernel at random.

    Args:
      rng: random key, not used.
      kernel_size: width of the convolution, odd; 0 for none.

    Returns:
      {"convolution": [kernel_size]}, shared by all V channels.

    Raises:
      ValueError: on a `kernel_size` that is neither odd nor 0.

    >>> nystromformer_init(jax.random.key(0), 4, kernel_size=3)["convolution"].tolist()
    [0.0, 0.0, 0.0]
    """
    del rng
    _checks.check_int("head_dim", head_dim, 1)
    width = _checks.check_int("kernel_size", kernel_size, 0)
    if width and width % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd or 0, but is {width}.")
    return {"convolution": jnp.zeros((width,), dtype)}


def _segment_means(
    rows: tuple[jax.Array, jax.Array], real: jax.Array, num_segments: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Means [m, H] of two [S, H] over segments of the real rows, and who is not empty.

    The n real rows are numbered in order, and row r belongs to segment ⌊r·m/n⌋; with
    n < m each is a segment of its own.
    """
    dtype = rows[0].dtype
    count = real.sum(dtype=jnp.int32)
    number = jnp.cumsum(real, dtype=jnp.int32) - 1
    segment = number * jnp.minimum(num_segments, count) // jnp.maximum(count, 1)
    ids = jnp.arange(num_segments, dtype=jnp.int32)
    member = ((segment[None, :] == ids[:, None]) & real[None, :]).astype(dtype)
    size = member.sum(axis=1, keepdims=True)
    first, second = (
        jnp.matmul(member, x, precision="highest") / jnp.maximum(size, 1) for x in rows
    )
    return first, second, size[:, 0] > 0


def _pseudo_inverse(matrix: jax.Array, iterations: int) -> jax.Array:
    """Z → A⁺ of a square A by Z ← Z (13 I − AZ (15 I − AZ (7 I − AZ))) / 4."""

    def times(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision="highest")

    total = jnp.abs(matrix)
    norms = total.sum(axis=0).max() * total.sum(axis=1).max()
    inverse = _checks.safe_divide(matrix.T, norms)
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    for _ in range(iterations):
        product = times(matrix, inverse)
        inner = 15 * identity - times(product, 7 * identity - product)
        inverse = times(inverse, 13 * identity - times(product, inner)) / 4
    return inverse


def _convolve(value: jax.Array, kernel: jax.Array) -> jax.Array:
    """Σ_i kernel[i] value[t + i − ⌊width/2⌋], zero outside, in each channel: [T, V].

    As a product of a small Toeplitz matrix with each block of rows and its margins,
    which is many times faster on CPU than XLA's convolution with one kernel a head.
    """
    length, width = value.shape[0], kernel.shape[0]
    block = min(length, max(width, _LEAST_BLOCK))
    rows = np.arange(0, length, block)[:, None] + np.arange(block + width - 1)[None, :]
    before = width // 2
    value = jnp.pad(value, ((before, rows[-1, -1] + 1 - before - length), (0, 0)))
    tap = np.arange(block + width - 1)[None, :] - np.arange(block)[:, None]
    inside = (tap >= 0) & (tap < width)
    toeplitz = jnp.where(inside, kernel[tap.clip(0, width - 1)], 0)
    return (toeplitz[None] @ value[rows]).reshape(-1, value.shape[1])[:length]


def nystromformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    num_landmarks: int = 64,
    pinv_iterations: int = 6,
) -> jax.Array:
    """Attention through m landmarks by Nyström's method, in O(T · m · (H + V)).

    O = softmax(scale · Q K̃ᵀ) softmax(scale · Q̃ K̃ᵀ)⁺ softmax(scale · Q̃ Kᵀ) V + w ∗ V

    Q̃ and K̃ are the means of m segments of the real tokens, in order. The
    pseudo-inverse is iterated from Aᵀ/(‖A‖₁ ‖A‖∞), and w ∗ V is a convolution along the
    sequence. For m ≥ T and w = 0 it tends to `dot_product` with more iterations, for
    real queries: each token is its own landmark, and W W⁺ W = W. On random inputs at
    T = 48 the error is 1 to 4 % after 6 iterations and below 0.1 % after 12. For m < T
    it need not fall with every landmark: where logits are peaked, as of a standard
    deviation of 4, half as many landmarks as tokens may be worse than a few. With the
    inverse in between, weights may be negative and large: outputs may lie far outside
    of the values, with errors above their own size.

    It is of one sequence, whose landmarks of queries and keys stand side by side.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"convolution": [width]}: w, as made by `nystromformer_init`.
      key_mask: bool [T], True = a real token, or None. Padded queries take no part in
        the landmarks.
      num_landmarks: m; a shorter sequence has as many as tokens.
      pinv_iterations: steps of the pseudo-inverse; the paper takes 6.

    Returns:
      [T, V], in the dtype of the inputs; zeros if no token is real.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, or an option out of range.

    Reference: Xiong et al., 2021, arXiv:2102.03902, section 3.

    >>> x, value = jnp.zeros((3, 1)), jnp.array([[0.0], [3.0], [0.0]])
    >>> params = {"convolution": jnp.array([0.0, 0.0, 1.0])}
    >>> out = nystromformer(x, x, value, params=params)
    >>> out.round(2).tolist()  # the mean, and the next value by the convolution
    [[4.0], [1.0], [1.0]]
    """
    one = "nystromformer", "landmarks are of one sequence"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    layout = {"convolution": "w"}
    width = _checks.check_params("nystromformer", params, layout)["w"]
    num_landmarks = _checks.check_int("num_landmarks", num_landmarks, 1)
    iterations = _checks.check_int("pinv_iterations", pinv_iterations, 0)
    if width and width % 2 == 0:
        raise ValueError(
            f"`params['convolution']` must be of odd size, but has {width}."
        )
    length, dtype = query.shape[0], score_dtype(query.dtype)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    real = jnp.ones(length, bool) if key_mask is None else key_mask
    # In float32 throughout: the pseudo-inverse would amplify coarser roundings.
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    k, v = _checks.zero_masked(k, key_mask), _checks.zero_masked(v, key_mask)
    near_q, near_k, live = _segment_means(
        (_checks.zero_masked(q, key_mask), k), real, min(num_landmarks, length)
    )

    def weights(rows: jax.Array, columns: jax.Array, allowed: jax.Array) -> jax.Array:
        return normalize_softmax(rows @ columns.T * scale, allowed)

    to_landmarks = weights(q, near_k, live[None, :])
    between = weights(near_q, near_k, live[:, None] & live[None, :])
    from_landmarks = weights(near_q, k, live[:, None] & real[None, :])
    out = to_landmarks @ (_pseudo_inverse(between, iterations) @ (from_landmarks @ v))
    if width:
        out += _convolve(v, params["convolution"].astype(dtype))
    return out.astype(value.dtype)
