"""Linear attention whose features are random, so that they approximate a softmax.

A kernel such as exp(q·k) is an expectation E_w[f(q, w) f(k, w)] over random w. The mean
over m draws is a product of m features, and with features attention costs O(T); its
error falls like m^(−1/2). Draws come from `rng` alone: the same key gives the same
result, and another key is a redraw.

Letters besides those of `attn_jax.attention`: m number of random directions w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype
from attn_jax.attention.linear_attention import (
    LEAST_LOG,
    attend_features,
    causal_product,
    divide_by_ones,
    with_ones,
)
from attn_jax.attention.softmax import dot_product

__all__ = [
    "orthogonal_features",
    "performer",
    "rfa",
    "rfa_exact",
    "rfa_gate",
    "rfa_gate_init",
]

Kernel = Literal["softmax", "relu"]

# Added to each feature of the relu kernel, as in the paper's generalised attention: no
# query is then without any similarity.
_RELU_FLOOR = 1e-3

# The mean kernel value that a denominator of trigonometric features may fall to, where
# the kernel's own least value is smaller still.
_LEAST_MEAN = 1e-6

# Beyond this a gate's sigmoid is 0 or 1 up to 1e-13.
_LARGEST_GATE_LOGIT = 30.0


def orthogonal_features(
    rng: jax.Array,
    num_features: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Random directions, each distributed as N(0, I), in blocks of orthogonal ones.

    Each block of H rows is a random rotation, whose rows get the lengths of H
    independent normal vectors. Orthogonal rows repeat each other less, so that sums
    over them vary less than over independent ones.

    Args:
      rng: random key.
      num_features: number of rows, m. The last block is cut if m is no multiple of H.
      head_dim: H.
      dtype: of the result.

    Returns:
      [m, H].

    Raises:
      ValueError: if a size is below 1.
      TypeError: if a size is no int.

    Reference: Choromanski et al., 2020, arXiv:2009.14794, section 2.4.

    >>> w = orthogonal_features(jax.random.key(0), 4, 4)
    >>> bool(abs(w[0] @ w[1]) < 1e-5)
    True
    """
    num_features, head_dim = _checks.check_sizes(
        num_features=num_features, head_dim=head_dim
    )
    num_blocks = -(-num_features // head_dim)
    rng_rotation, rng_length = jax.random.split(rng)
    shape = (num_blocks, head_dim, head_dim)
    factor, triangle = jnp.linalg.qr(jax.random.normal(rng_rotation, shape, dtype))
    # QR leaves the signs to the implementation; a positive diagonal makes the rotation
    # uniform.
    diagonal = jnp.diagonal(triangle, axis1=1, axis2=2)
    rows = jnp.where(diagonal < 0, -1, 1)[:, :, None] * factor.mT
    lengths = jnp.linalg.norm(jax.random.normal(rng_length, shape, dtype), axis=2)
    rows = rows * lengths[:, :, None]
    return rows.reshape(-1, head_dim)[:num_features]


def _project(x: jax.Array, directions: jax.Array) -> jax.Array:
    """X · w as [T, m], in full precision since it goes into an exponent or an angle."""
    return jnp.matmul(x, directions.T, precision=jax.lax.Precision.HIGHEST)


def _scaled(
    query: jax.Array, key: jax.Array, scale: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Query and key in the dtype of scores, whose product is scale · q·k."""
    dtype = score_dtype(query.dtype)
    query, key = query.astype(dtype), key.astype(dtype)
    if scale is None:
        scale = query.shape[1] ** -0.5
    factor = jnp.asarray(scale, dtype)
    root = jnp.sqrt(jnp.abs(factor))
    return jnp.sign(factor) * root * query, root * key


def performer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    num_features: int = 256,
    kernel: Kernel = "softmax",
    orthogonal: bool = True,
    chunk_size: int = 128,
) -> jax.Array:
    """Performer: softmax attention by positive random features (FAVOR+), in O(T + S).

    o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), with q and k times √scale each and
    φ_i(x) = exp(w_i·x − |x|²/2),  so that E[φ_i(q) φ_i(k)] = exp(q·k),
    or φ_i(x) = max(w_i·x, 0) + 0.001 for the kernel "relu".

    Comes to `dot_product` for m → ∞, with an error like m^(−1/2). That error grows
    exponentially with |q + k|²: it is for logits of a few units, not of dozens.

    Each feature is divided by the largest of its query or its key, and keys are put
    together by the logarithms of theirs: the largest of the real keys, or of those so
    far where causal, counts one. Features stop at e⁻⁴⁰ of the largest. So any logits
    are safe, and no query with a key is left without weights; where directions are so
    far apart that the stop matters, no finite m is any approximation.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      rng: random key, which the directions w are drawn from.
      scale: factor of the scores; None means 1/√H. For "relu" it matters against the
        constant alone.
      num_features: number of random directions, m.
      kernel: "softmax" or "relu".
      orthogonal: whether directions are drawn by `orthogonal_features`, else
        independently.
      chunk_size: tokens in a chunk of the causal form; see `causal_product`.

    Raises:
      ValueError: on wrong shapes, an unknown `kernel`, or a size below 1.

    Reference: Choromanski et al., 2020, arXiv:2009.14794, lemma 1 and section 2.4;
    generalised attention: section 2.2.

    >>> query, key = jnp.log(jnp.array([[3.0]])), jnp.array([[0.0], [1.0]])
    >>> value, rng = jnp.array([[0.0], [4.0]]), jax.random.key(0)
    >>> out = performer(query, key, value, rng=rng, num_features=4096)
    >>> bool(abs(out[0, 0] - 3) < 0.2)  # of weights 1/4 and 3/4
    True
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    num_features, chunk_size = _checks.check_sizes(
        num_features=num_features, chunk_size=chunk_size
    )
    _checks.check_choice("kernel", kernel, get_args(Kernel))
    dtype = score_dtype(query.dtype)
    head_dim = query.shape[1]
    if orthogonal:
        directions = orthogonal_features(rng, num_features, head_dim, dtype)
    else:
        directions = jax.random.normal(rng, (num_features, head_dim), dtype)
    scaled_query, scaled_key = _scaled(query, _checks.zero_masked(key, key_mask), scale)
    logs_query = _project(scaled_query, directions)
    logs_key = _project(scaled_key, directions)
    if kernel == "relu":
        return attend_features(
            jax.nn.relu(logs_query) + _RELU_FLOOR,
            jax.nn.relu(logs_key) + _RELU_FLOOR,
            value,
            key_mask,
            is_causal,
            chunk_size,
        )

    def normalised(logs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features over the largest of their row, and its logarithm, a constant."""
        top = jax.lax.stop_gradient(logs.max(axis=1, keepdims=True))
        return jnp.exp(jnp.maximum(logs - top, LEAST_LOG)), top[:, 0]

    # |q|²/2 is the same for all keys of a query, so it would cancel.
    query_features, _ = normalised(logs_query)
    key_features, log_scale = normalised(
        logs_key - 0.5 * jnp.square(scaled_key).sum(axis=1, keepdims=True)
    )
    joined = with_ones(value, key_mask)
    if key_mask is not None:
        key_features = _checks.zero_masked(key_features, key_mask)
        log_scale = jnp.where(key_mask, log_scale, MASKED_LOGIT)
    if is_causal:
        product = causal_product(
            query_features,
            key_features,
            joined,
            chunk_size=chunk_size,
            log_scale=log_scale,
        )
    else:
        top = log_scale.max(initial=MASKED_LOGIT)
        key_features = jnp.exp(log_scale - top)[:, None] * key_features
        product = query_features @ (key_features.T @ joined)
    return divide_by_ones(product).astype(value.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """Rows of length one, in the dtype of scores; rows of zeros stay so."""
    x = x.astype(score_dtype(x.dtype))
    square = jnp.square(x).sum(axis=1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square == 0, 1, square))


def _trigonometric(
    query: jax.Array, key: jax.Array, rng: jax.Array, num_features: int, sigma: float
) -> tuple[jax.Array, jax.Array]:
    """Features [T, 2m] and [S, 2m] of the Gaussian kernel on unit vectors."""
    num_features = _checks.check_int("num_features", num_features, 1)
    dtype = score_dtype(query.dtype)
    standard = jax.random.normal(rng, (num_features, query.shape[1]), dtype)
    directions = standard / _checks.check_positive("sigma", sigma)

    def features(x: jax.Array) -> jax.Array:
        angle = _project(_unit(x), directions)
        both = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
        return num_features**-0.5 * both

    return features(query), features(key)


def _divide_by_kernel(
    product: jax.Array, weight: jax.Array, sigma: float, dtype: jnp.dtype
) -> jax.Array:
    """The last column divides, but is no less than the kernel can be: [T, V].

    Args:
      product: [T, V + 1], weighted sums of the values and of ones.
      weight: [T], the sum that the weights of all keys would have at a kernel of one.
      sigma: of the kernel.
      dtype: of the result.
    """
    least = max(math.exp(-2 / sigma**2), _LEAST_MEAN)
    total = jnp.maximum(product[:, -1], least * weight)
    return divide_by_ones(product.at[:, -1].set(total)).astype(dtype)


def rfa(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    num_features: int = 128,
    sigma: float = 1.0,
    chunk_size: int = 128,
) -> jax.Array:
    """Random feature attention: softmax on unit vectors by sines and cosines, O(T + S).

    o_t = Σ_s φ(q̂_t)·φ(k̂_s) v_s / Σ_s φ(q̂_t)·φ(k̂_s), with q̂ = q/|q|, k̂ = k/|k| and
    φ(x) = m^(−1/2) [sin(w_i·x), cos(w_i·x)]_i,  w_i = ε_i / σ,  ε_i ~ N(0, I),
    so that E[φ(x)·φ(y)] = exp(−|x − y|²/2σ²), which is exp(x·y/σ²) on unit vectors, up
    to a factor that cancels.

    Comes to `rfa_exact` for m → ∞, with an error like m^(−1/2). Sums of such features
    may come near zero, or below, where the kernel cannot. The kernel is at least
    exp(−2/σ²), so a denominator over n keys is taken to be no less than n times that
    (and n times 10⁻⁶). Weights then need not sum to one.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      rng: random key, which the directions w are drawn from.
      is_causal: whether query t attends only to keys s ≤ t, aligned at the top left;
        also for T ≠ S. Without a gate: see `rfa_gate`.
      num_features: number of random directions, m; there are 2m features.
      sigma: width σ of the kernel, known at trace time: the smaller, the more peaked.
        Logits are within ±1/σ².
      chunk_size: tokens in a chunk of the causal form; see `causal_product`.

    Raises:
      ValueError: on wrong shapes, a size below 1 or a `sigma` that is not above 0.

    Reference: Peng et al., 2021, arXiv:2103.02143, sections 2.2 and 3.1.

    >>> query, key = jnp.array([[1.0, 0.0]]), jnp.array([[9.0, 0.0], [0.0, 1.0]])
    >>> value, rng = jnp.array([[0.0], [1.0]]), jax.random.key(0)
    >>> out = rfa(query, key, value, rng=rng, num_features=4096)
    >>> bool(abs(out[0, 0] - 1 / (1 + jnp.e)) < 0.05)  # cosines of 1 and 0
    True
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    num_queries, num_keys = query.shape[0], key.shape[0]
    query_features, key_features = _trigonometric(
        query, _checks.zero_masked(key, key_mask), rng, num_features, sigma
    )
    key_features = _checks.zero_masked(key_features, key_mask)
    joined = with_ones(value, key_mask)
    if is_causal:
        product = causal_product(
            query_features, key_features, joined, chunk_size=chunk_size
        )
        real = joined[:num_queries, -1]
        counts = jnp.cumsum(jnp.pad(real, (0, max(0, num_queries - num_keys))))
    else:
        product = query_features @ (key_features.T @ joined)
        counts = jnp.broadcast_to(joined[:, -1].sum(), (num_queries,))
    return _divide_by_kernel(product, counts, sigma, value.dtype)


def rfa_exact(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    sigma: float = 1.0,
) -> jax.Array:
    """What `rfa` comes to for m → ∞: softmax attention on unit vectors.

    o_t = Σ_s softmax_s(q̂_t·k̂_s / σ²) v_s, with q̂ = q/|q| and k̂ = k/|k|.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      sigma: width σ of the kernel.

    Raises:
      ValueError: on wrong shapes, or a `sigma` that is not above 0.

    Reference: Peng et al., 2021, arXiv:2103.02143, section 3.1.

    >>> x, value = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> rfa_exact(x, x, value).tolist()
    [[2.0], [2.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    out = dot_product(
        _unit(query),
        _unit(_checks.zero_masked(key, key_mask)),
        _checks.zero_masked(value, key_mask).astype(score_dtype(value.dtype)),
        key_mask=key_mask,
        scale=_checks.check_positive("sigma", sigma) ** -2,
        is_causal=is_causal,
    )
    return out.astype(value.dtype)


def rfa_gate_init(
    rng: jax.Array, head_dim: int, *, dtype: jax.typing.DTypeLike = jnp.float32
) -> dict[str, jax.Array]:
    """Parameters of the gate of `rfa_gate` for one head.

    Returns:
      {"gate": [H], "gate_bias": []}: normal with variance 1/H, and zero, so that gates
      begin near one half.

    >>> rfa_gate_init(jax.random.key(0), 4)["gate"].shape
    (4,)
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    gate = head_dim**-0.5 * jax.random.normal(rng, (head_dim,), dtype)
    return {"gate": gate, "gate_bias": jnp.zeros((), dtype)}


def rfa_gate(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    num_features: int = 128,
    sigma: float = 1.0,
    chunk_size: int = 128,
) -> jax.Array:
    """Gated random feature attention: `rfa` that learns to forget; always causal.

    g_t = sigmoid(w_g·k_t + b_g)
    S_t = g_t S_{t−1} + (1 − g_t) φ(k̂_t) v_tᵀ,  z_t = g_t z_{t−1} + (1 − g_t) φ(k̂_t)
    o_t = φ(q̂_t)ᵀ S_t / φ(q̂_t)·z_t

    The gate belongs to a recurrence over the past, so there is no `is_causal`: query t
    sees keys s ≤ t, in every call. In the paper it reads the token's representation;
    one head has no other than the key k_t. Padding leaves the state as it is.

    With w_g = 0 keys weigh less by a factor of sigmoid(b_g) with each later one; for
    b_g → ∞, up to sigmoid(30), it is `rfa` with `is_causal=True`, without its gate.
    Gate logits are cut to ±30, and the denominator is no less than its weights times
    exp(−2/σ²) or 10⁻⁶, as in `rfa`.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"gate": [H], "gate_bias": []}, as made by `rfa_gate_init`.
      rng: random key, which the directions w are drawn from.
      num_features: number of random directions, m; there are 2m features.
      sigma: width σ of the kernel, as for `rfa`.
      chunk_size: tokens in a chunk; see `causal_product`.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, a size below 1 or a `sigma` that
        is not above 0.

    Reference: Peng et al., 2021, arXiv:2103.02143, section 3.2.

    >>> params = {"gate": jnp.zeros(4), "gate_bias": jnp.log(1 / 3)}
    >>> x, value = jnp.ones((2, 4)), jnp.array([[0.0], [5.0]])
    >>> rfa_gate(x, x, value, params=params, rng=jax.random.key(0)).round(3).tolist()
    [[0.0], [4.0]]
    """
    one = "rfa_gate", "its gate runs along one sequence"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    layout = {"gate": "H", "gate_bias": ""}
    _checks.check_params("rfa_gate", params, layout, H=key.shape[1])
    dtype = score_dtype(key.dtype)
    key = _checks.zero_masked(key, key_mask)
    query_features, key_features = _trigonometric(query, key, rng, num_features, sigma)
    logits = key.astype(dtype) @ params["gate"].astype(dtype)
    logits = logits + params["gate_bias"].astype(dtype)
    logits = logits.clip(-_LARGEST_GATE_LOGIT, _LARGEST_GATE_LOGIT)
    kept = _checks.zero_masked(jax.nn.log_sigmoid(logits), key_mask)
    taken = _checks.zero_masked(jax.nn.sigmoid(-logits), key_mask)
    product = causal_product(
        query_features,
        taken[:, None] * key_features,
        with_ones(value, key_mask),
        chunk_size=chunk_size,
        log_decay=kept,
    )
    # The weights of all keys so far sum to 1 − Π g.
    weight = -jnp.expm1(jnp.cumsum(kept))
    return _divide_by_kernel(product, weight, sigma, value.dtype)
