"""Scores, how they become weights, and what a query without keys gets: zeros.

What a query may not attend to has no weight and no gradient, whatever it holds, also
NaN: masked logits take a finite value, and what nobody sees is replaced by zeros first.
Scores and sums over keys are float32, or wider inputs'.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import masks
from attn_jax.attention import _checks

# Masked logits take this value: finite, so that no inf - inf can arise, and far
# enough below any real score that its exponential is exactly zero.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)

# From this many scores of a head on, `attend_large` is faster on CPU.
LARGE = 128 * 128


def score_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that scores and softmax are computed in: float32, or wider inputs'.

    Args:
      dtype: a floating-point dtype of the inputs.

    Returns:
      float64 for float64, else float32.

    >>> score_dtype(jnp.dtype("bfloat16"))
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


# What says which query may attend to which key: `mask`, `key_mask` and `is_causal`.
Pairs = tuple[jax.Array | None, jax.Array | None, bool]


def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """The product left @ rightᵀ of [T, H] and [S, H], summed in the dtype of scores."""
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (1,)), ((), ())),
        preferred_element_type=score_dtype(left.dtype),
    )


def matmul(left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.matmul`, summed in the dtype of scores."""
    return jnp.matmul(left, right, preferred_element_type=score_dtype(left.dtype))


def einsum(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays, summed in the dtype of scores."""
    dtype = score_dtype(left.dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def zero_unseen(
    query: jax.Array, *of_keys: jax.Array, pairs: Pairs
) -> tuple[jax.Array, ...]:
    """Zeros for queries that see no key, and in key and value, that no query sees.

    They go before anything is read, since a weight of zero does not hide NaN, as
    0 · NaN is NaN, and neither does a gradient of zero.

    Args:
      query: [T, ...].
      *of_keys: arrays [S, ...], such as key and value.
      pairs: what says who may see whom: `mask`, `key_mask` and `is_causal`.

    Returns:
      The arrays in this order.
    """
    rows, keys = masks.seen_ends(len(query), len(of_keys[0]), *pairs)
    return (
        _checks.zero_masked(query, rows),
        *(_checks.zero_masked(x, keys) for x in of_keys),
    )


def zero_unseen_arrays(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
    left: int | None = None,
    right: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zeros for queries that see no key, and for keys and values that no query sees.

    `zero_unseen` on whole arrays, where query t sees keys t − left … t + right at most.
    """
    num_queries, num_keys, groups = query.shape[1], key.shape[1], key.shape[2]
    real = None if key_mask is None else key_mask[:, None]  # [B or 1, N or 1, S]
    if mask is not None and mask.shape[2] == 1:
        given = jnp.broadcast_to(mask[:, :, 0], (*mask.shape[:2], num_keys))
        real, mask = given if real is None else given & real, None
    t, s = np.arange(num_queries), np.arange(num_keys)
    rows = keys = None  # [B or 1, N or 1, T or 1], [B or 1, N or 1, S or 1]
    if mask is not None:
        pairs = mask if real is None else mask & real[:, :, None]
        if left is not None:
            pairs = pairs & (s[None] >= t[:, None] - left)[None, None]
        if right is not None:
            pairs = pairs & (s[None] <= t[:, None] + right)[None, None]
        # Else XLA works a constant mask out while it compiles, which takes seconds.
        pairs = jax.lax.optimization_barrier(jnp.asarray(pairs))
        rows, keys = pairs.any(axis=3), pairs.any(axis=2)
    elif real is not None:
        # By how many real keys come before where a query's window begins and ends.
        count = jnp.cumsum(real, axis=2, dtype=jnp.int32)
        count = jnp.pad(count, ((0, 0), (0, 0), (1, 0)))
        begin = np.zeros(1, int) if left is None else t - left
        end = np.full(1, num_keys) if right is None else t + right + 1
        upto, before = (count[:, :, x.clip(0, num_keys)] for x in (end, begin))
        rows, keys = upto > before, real
    if right is not None and num_keys > num_queries + right:
        reached = jnp.asarray(s < num_queries + right)[None, None]
        keys = reached if keys is None else keys & reached
    if rows is not None:
        query = jnp.where(rows.transpose(0, 2, 1)[..., None], query, 0)
    if keys is not None:
        if keys.shape[1] > 1:
            keys = keys.reshape(keys.shape[0], groups, -1, keys.shape[2]).any(axis=2)
        keys = keys.transpose(0, 2, 1)[..., None]
        key, value = (jnp.where(keys, x, 0) for x in (key, value))
    return query, key, value


def normalize_softmax(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Softmax over the allowed keys, zeros where a query may attend to none.

    w[t, s] = exp(l[t, s]) / Σ_{s' allowed} exp(l[t, s'])

    As all normalisers it takes scores [T, S], and which pairs are allowed, bool that is
    broadcastable to [T, S], or None for all; it gives weights [T, S].

    >>> w = normalize_softmax(jnp.zeros((2, 2)), jnp.array([[True, False]] * 2))
    >>> w.tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    if allowed is None:
        return jax.nn.softmax(logits, axis=-1)
    weights = jax.nn.softmax(jnp.where(allowed, logits, MASKED_LOGIT), axis=-1)
    # Only a row without any allowed key is changed here: softmax gave it 1/S each.
    return jnp.where(allowed, weights, 0.0)


def _num_allowed(logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
    """Number of keys each query may attend to, at least one, as [T or 1, 1]."""
    if allowed is None:
        return jnp.full((1, 1), logits.shape[-1], logits.dtype)
    # An axis of size 1 stands for all keys: each of them counts.
    pairs = jnp.broadcast_to(allowed, (allowed.shape[0], logits.shape[-1]))
    return jnp.maximum(pairs.sum(axis=-1, keepdims=True), 1).astype(logits.dtype)


def normalize_relu(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Rectified scores over the number of keys, the replacement for softmax in ViT.

    w[t, s] = max(l[t, s], 0) / n_t, where n_t counts the keys that t may attend to.
    Without a mask n_t = S, as in the paper; counting allowed keys makes a padded
    sequence give what the unpadded one gives.

    Reference: Wortsman et al., 2023, arXiv:2309.08586.

    >>> normalize_relu(jnp.array([[-1.0, 4.0]])).tolist()
    [[0.0, 2.0]]
    """
    weights = jax.nn.relu(logits) / _num_allowed(logits, allowed)
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


def normalize_sigmoid(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Element-wise sigmoid of scores shifted by the logarithm of the number of keys.

    w[t, s] = σ(l[t, s] − log n_t), where n_t counts the keys that t may attend to.
    The shift makes all weights of a row sum to about one when the scores are zero.

    Reference: Ramapuram et al., 2024, arXiv:2409.04431.

    >>> normalize_sigmoid(jnp.array([[0.0]])).tolist()
    [[0.5]]
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, 0.0)  # its slope would be NaN at NaN
    weights = jax.nn.sigmoid(logits - jnp.log(_num_allowed(logits, allowed)))
    return weights if allowed is None else jnp.where(allowed, weights, 0.0)


NORMALIZERS: dict[str, Callable[[jax.Array, jax.Array | None], jax.Array]] = {
    "softmax": normalize_softmax,
    "relu": normalize_relu,
    "sigmoid": normalize_sigmoid,
}
"""Ways to turn scores and allowed pairs into weights, by name."""


def weights_of(
    logits: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
) -> jax.Array:
    """Weights [T, S] of scores [T, S]: with the bias added, masked and normalised."""
    _checks.check_choice("normalize", normalize, tuple(NORMALIZERS))
    logits, allowed = _masked(logits, bias, mask, key_mask, is_causal, normalize)
    return NORMALIZERS[normalize](logits, allowed)


def _masked(
    logits: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
    is_causal: bool,
    normalize: str = "softmax",
) -> tuple[jax.Array, jax.Array | None]:
    """Scores with the bias added, and which pairs are allowed; None for all."""
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    num_queries, num_keys = logits.shape
    allowed = masks.allowed_pairs(num_queries, num_keys, mask, key_mask, is_causal)
    if bias is not None and normalize == "softmax":
        # A bias of -inf masks. Written so that NaN stays NaN.
        finite = ~(logits < 0.5 * MASKED_LOGIT)
        allowed = finite if allowed is None else allowed & finite
    return logits, allowed


def mix(
    weights: jax.Array,
    value: jax.Array,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Drops some weights [T, S] if asked to, and mixes values [S, V]: [T, V]."""
    if dropout_rate > 0.0:
        assert rng is not None  # check_dropout has seen to it
        kept = jax.random.bernoulli(rng, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    return weights.astype(value.dtype) @ value


def large_on_cpu(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether `attend_large` is the faster one: many scores, on CPU, in float32."""
    many = len(query) * len(key) >= LARGE
    wide = query.dtype == value.dtype == score_dtype(value.dtype)
    return many and wide and jax.default_backend() == "cpu"


def attend_large(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    pairs: Pairs,
) -> jax.Array:
    """softmax(Q Kᵀ + bias) V of a scaled query, made of what XLA:CPU is fast at.

    Keys and values are transposed once, behind barriers, since products whose gradient
    contracts the first axis of both factors take several times as long; and the softmax
    is divided after the product, [T, V] numbers in place of [T, S].
    """
    logits = matmul(query, jax.lax.optimization_barrier(key.T))
    logits, allowed = _masked(logits, bias, *pairs)
    if allowed is not None:
        logits = jnp.where(allowed, logits, MASKED_LOGIT)
    return _mix_exp(logits, value)


def _exp_and_mix(
    logits: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [T, V], e^(l − max) [T, S] and its sums [T, 1]."""
    peak = jax.lax.optimization_barrier(logits.max(axis=1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    seen = ~(peak <= 0.5 * MASKED_LOGIT)  # and NaN stays NaN
    weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
    total = jnp.where(seen, weights.sum(axis=1, keepdims=True), 1.0)
    return _mix_turned(weights, value) / total, weights, total


def _mix_turned(weights: jax.Array, value: jax.Array) -> jax.Array:
    return product(weights, jax.lax.optimization_barrier(value.T))


@jax.custom_jvp
def _mix_exp(logits: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(logits) @ value; zeros for a row of nothing but `MASKED_LOGIT`."""
    return _exp_and_mix(logits, value)[0]


@_mix_exp.defjvp
def _mix_exp_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Transposed, it is dS = P ∘ (G Vᵀ − Σ_v G ∘ O), and keeps one array of [T, S].

    A column of ones makes the difference a part of the product. As a subtraction, XLA's
    fusion of it gives wrong numbers where G has a batch that V has not (jaxlib 0.10.2).
    """
    (_, value), (logits_dot, value_dot) = primals, tangents
    out, weights, total = _exp_and_mix(*primals)
    ones = jnp.ones((len(value), 1), value.dtype)
    moved = _mix_turned(weights * logits_dot, jnp.concatenate([value, ones], axis=1))
    mixed = moved[:, :-1] + _mix_turned(weights, value_dot)
    return out, (mixed - out * moved[:, -1:]) / total


def attend(
    logits: jax.Array, value: jax.Array, bias: jax.Array | None, pairs: Pairs
) -> jax.Array:
    """Softmax of logits [T, S] over the allowed keys, times values [S, V]: [T, V]."""
    return mix(weights_of(logits, bias, *pairs), value)
