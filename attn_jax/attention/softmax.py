"""Attention by scores over all keys: dot-product and additive scoring.

This is the reference that every other family is tested against: each function
writes the [T, S] score matrix out. `attn_jax.attention.blockwise` computes the
same dot-product result without it.

Letters besides those of `attn_jax.attention`: D size of the hidden layer of additive
scoring.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import NORMALIZERS

__all__ = [
    "NORMALIZERS",
    "additive",
    "additive_init",
    "additive_weights",
    "dot_product",
    "dot_product_weights",
]


def dot_product_weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
) -> jax.Array:
    """Weights of dot-product attention, for inspection and for `dot_product`.

    W = softmax(scale · Q Kᵀ + bias)

    Args:
      query, key: [T, H], [S, H]; others: see `attn_jax.attention`.
      normalize: a name in `NORMALIZERS`.

    Returns:
      [T, S] weights, in float32 or wider.

    Raises:
      ValueError: on wrong shapes or an unknown `normalize`.

    >>> dot_product_weights(jnp.ones((1, 4)), jnp.ones((2, 4))).tolist()
    [[0.5, 0.5]]
    """
    _checks.check_inputs(query, key, key, bias, mask, key_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key = _scores.zero_unseen(query, key, pairs=pairs)
    logits = _scores.product(query, key) * scale
    return _scores.weights_of(logits, bias, *pairs, normalize)


def dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Dot-product attention, written out: the reference of this package.

    O = softmax(scale · Q Kᵀ + bias) V

    With one key, or with scale → ∞ and one best key, it copies that key's value;
    with scale = 0 and no bias it is the mean over the allowed values.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      normalize: a name in `NORMALIZERS`.

    Raises:
      ValueError: on wrong shapes, an unknown `normalize`, or dropout without `rng`.

    Reference: Vaswani et al., 2017, arXiv:1706.03762.

    >>> query, key = jnp.log(jnp.array([[3.0]])), jnp.array([[1.0], [0.0]])
    >>> value = jnp.array([[4.0], [0.0]])
    >>> dot_product(query, key, value).round(4).tolist()  # weights 3/4 and 1/4
    [[3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    _checks.check_dropout(dropout_rate, rng)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    plain = normalize == "softmax" and dropout_rate == 0.0
    if plain and _scores.large_on_cpu(query, key, value):
        return _scores.attend_large(query * scale, key, value, bias, pairs)
    logits = _scores.product(query, key) * scale
    weights = _scores.weights_of(logits, bias, *pairs, normalize)
    return _scores.mix(weights, value, dropout_rate, rng)


def additive_init(
    rng: jax.Array,
    head_dim: int,
    *,
    key_dim: int | None = None,
    hidden_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Parameters of additive scoring for one head, drawn with LeCun's variance.

    Args:
      head_dim: H, the size of a query.
      key_dim: size of a key; None means H.
      hidden_dim: D, the size of the hidden layer; None means H.

    Returns:
      {"query": [H, D], "key": [key_dim, D], "score": [D]}.

    >>> params = additive_init(jax.random.key(0), 4, hidden_dim=8)
    >>> {name: leaf.shape for name, leaf in sorted(params.items())}
    {'key': (4, 8), 'query': (4, 8), 'score': (8,)}
    """
    key_dim = head_dim if key_dim is None else key_dim
    hidden_dim = head_dim if hidden_dim is None else hidden_dim
    _checks.check_sizes(head_dim=head_dim, key_dim=key_dim, hidden_dim=hidden_dim)
    rng_query, rng_key, rng_score = jax.random.split(rng, 3)
    # Query and key together feed the hidden layer: fan-in is the sum of both.
    std_hidden = (head_dim + key_dim) ** -0.5
    std_score = hidden_dim**-0.5
    return {
        "query": std_hidden
        * jax.random.normal(rng_query, (head_dim, hidden_dim), dtype),
        "key": std_hidden * jax.random.normal(rng_key, (key_dim, hidden_dim), dtype),
        "score": std_score * jax.random.normal(rng_score, (hidden_dim,), dtype),
    }


def _additive_logits(
    query: jax.Array, key: jax.Array, params: Mapping[str, jax.Array]
) -> jax.Array:
    """wᵀ tanh(W_qᵀ q_t + W_kᵀ k_s), [T, S]."""
    layout, sizes = (
        {"query": "HD", "key": "KD", "score": "D"},
        zip("HK", (query.shape[1], key.shape[1]), strict=True),
    )
    _checks.check_params("additive", params, layout, **dict(sizes))
    of_query = query @ params["query"].astype(query.dtype)
    of_key = key @ params["key"].astype(query.dtype)
    score = params["score"].astype(query.dtype)
    # The hidden layer of all pairs, [T, S, D], is made for a few queries at a time.
    most = max(1, _HIDDEN // max(1, of_key.size))
    if len(query) <= most:
        return _additive_rows(of_query, of_key, score)
    number = -(-len(query) // most)
    size = -(-len(query) // number)
    of_query = jnp.pad(of_query, ((0, number * size - len(query)), (0, 0)))
    logits = jax.lax.map(
        jax.checkpoint(lambda rows: _additive_few_rows(rows, of_key, score)),
        of_query.reshape(number, size, -1),
    )
    return logits.reshape(-1, len(key))[: len(query)]


# Numbers of the hidden layer that are made at a time: what a core's cache holds.
_HIDDEN = 1 << 18


def _additive_rows(
    of_query: jax.Array, of_key: jax.Array, score: jax.Array
) -> jax.Array:
    """Σ_d score[d] tanh(of_query[t, d] + of_key[s, d]), [T, S]."""
    hidden = jnp.tanh(of_query[:, None, :] + of_key[None, :, :])
    return _scores.matmul(hidden, score)


_additive_few_rows = jax.custom_jvp(_additive_rows)


@_additive_few_rows.defjvp
def _additive_few_rows_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """As JAX has it, but written as products: fast, transposed too, with many keys."""
    of_query, of_key, score = primals
    query_dot, key_dot, score_dot = tangents
    hidden = jnp.tanh(of_query[:, None, :] + of_key[None, :, :])
    slope = (1 - hidden * hidden) * score[None, None, :]
    return _scores.matmul(hidden, score), (
        _scores.einsum("tsd,td->ts", slope, query_dot)
        + _scores.einsum("tsd,sd->ts", slope, key_dot)
        + _scores.matmul(hidden, score_dot)
    )


def additive_weights(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
) -> jax.Array:
    """Weights of additive attention, for inspection and for `additive`.

    W[t, s] = softmax_s(wᵀ tanh(W_qᵀ q_t + W_kᵀ k_s) + bias[t, s])

    Args:
      query: [T, H].
      key: [S, key_dim], where key_dim may differ from H.
      params: {"query": [H, D], "key": [key_dim, D], "score": [D]}.
      normalize: a name in `NORMALIZERS`.

    Returns:
      [T, S] weights, in float32 or wider.

    Raises:
      ValueError: on wrong shapes, parameters or an unknown `normalize`.

    >>> params = additive_init(jax.random.key(0), 4)
    >>> additive_weights(jnp.ones((1, 4)), jnp.ones((2, 4)), params=params).tolist()
    [[0.5, 0.5]]
    """
    given = (bias, mask, key_mask)
    _checks.check_inputs(query, key, key, *given, same_head_dim=False)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key = _scores.zero_unseen(query, key, pairs=pairs)
    logits = _additive_logits(query, key, params)
    return _scores.weights_of(logits, bias, *pairs, normalize)


def additive(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    normalize: str = "softmax",
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Additive attention: a small network scores each pair of query and key.

    O[t] = Σ_s softmax_s(wᵀ tanh(W_qᵀ q_t + W_kᵀ k_s) + bias[t, s]) v_s

    With w = 0 it is the mean over the allowed values.

    Args:
      query: [T, H].
      key: [S, key_dim], where key_dim may differ from H.
      value: [S, V].
      params: {"query": [H, D], "key": [key_dim, D], "score": [D]}, as made by
        `additive_init`.
      normalize: a name in `NORMALIZERS`.

    Reference: Bahdanau et al., 2014, arXiv:1409.0473.

    >>> params = {"query": jnp.eye(1), "key": jnp.eye(1)}
    >>> params["score"] = jnp.log(jnp.array([3.0])) / 2
    >>> key, value = jnp.array([[-9.0], [9.0]]), jnp.array([[0.0], [4.0]])
    >>> out = additive(jnp.zeros((1, 1)), key, value, params=params)
    >>> out.round(4).tolist()  # tanh is −1 and 1: weights 1/4 and 3/4
    [[3.0]]
    """
    given = (bias, mask, key_mask)
    _checks.check_inputs(query, key, value, *given, same_head_dim=False)
    _checks.check_dropout(dropout_rate, rng)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    logits = _additive_logits(query, key, params)
    weights = _scores.weights_of(logits, bias, *pairs, normalize)
    return _scores.mix(weights, value, dropout_rate, rng)
