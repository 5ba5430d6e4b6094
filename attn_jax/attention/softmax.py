"""Attention by scores over all keys: dot-product and additive scoring.

This is the reference that every other family is tested against: each function
writes the [T, S] score matrix out. `attn_jax.attention.blockwise` computes the
same dot-product result without it.

Axes of size 1 in bias and mask are shared by all queries or keys.

Letters: T queries, S keys, H size of query and key, V size of a value, D size of
the hidden layer of additive scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks

__all__ = [
    "MASKED_LOGIT",
    "NORMALIZERS",
    "additive",
    "additive_concat",
    "additive_concat_params",
    "additive_concat_weights",
    "additive_init",
    "additive_weights",
    "allowed_pairs",
    "causal_pairs",
    "dot_product",
    "dot_product_weights",
    "normalize_relu",
    "normalize_sigmoid",
    "normalize_softmax",
    "relu_attention",
    "score_dtype",
    "seen_ends",
    "sigmoid_attention",
]

# Masked logits take this value: finite, so that no inf - inf can arise, and far
# enough below any real score that its exponential is exactly zero.
MASKED_LOGIT = -0.7 * float(jnp.finfo(jnp.float32).max)


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


def causal_pairs(num_queries: int, num_keys: int) -> jax.Array:
    """Which query t may attend to which key s if only s ≤ t are allowed.

    Args:
      num_queries: T.
      num_keys: S.

    Returns:
      bool [T, S], aligned at the top left as in `jax.nn.dot_product_attention`.

    >>> causal_pairs(2, 3).tolist()
    [[True, False, False], [True, True, False]]
    """
    return jnp.arange(num_queries)[:, None] >= jnp.arange(num_keys)[None, :]


def allowed_pairs(
    num_queries: int,
    num_keys: int,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array | None:
    """Combines all masks into one: which query may attend to which key.

    Causal is aligned at the top left, as in `jax.nn.dot_product_attention`: query t
    may attend to keys s ≤ t, also where T ≠ S.

    Args:
      num_queries: T.
      num_keys: S.
      mask: bool [T, S] or None, True = attend.
      key_mask: bool [S] or None, True = a real token.
      is_causal: whether query t attends only to keys s ≤ t.

    Returns:
      bool, broadcastable to [T, S], or None if every pair is allowed.

    >>> allowed_pairs(2, 3, is_causal=True).tolist()
    [[True, False, False], [True, True, False]]
    """
    allowed = mask
    if key_mask is not None:
        keys = key_mask[None, :]
        allowed = keys if allowed is None else allowed & keys
    if is_causal:
        causal = causal_pairs(num_queries, num_keys)
        allowed = causal if allowed is None else allowed & causal
    return allowed


def seen_ends(
    num_queries: int,
    num_keys: int,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which queries see any key, and which keys any query sees.

    All else is to be replaced by zeros before it is read, as `_checks.zero_masked`
    does: a weight of zero does not hide NaN, as 0 · NaN is NaN, and neither does a
    gradient of zero.

    Args:
      num_queries: T.
      num_keys: S.
      mask: bool [T or 1, S or 1] or None, True = attend.
      key_mask: bool [S] or None, True = a real token.
      is_causal: whether query t attends only to keys s ≤ t.

    Returns:
      bool [T or 1] and bool [S or 1], each None where no mask says anything.

    >>> rows, keys = seen_ends(2, 3, key_mask=jnp.array([True, False, True]))
    >>> rows.tolist(), keys.tolist()
    ([True], [True, False, True])
    """
    if mask is not None:
        pairs = allowed_pairs(num_queries, num_keys, mask, key_mask, is_causal)
        assert pairs is not None
        # Else XLA works a constant mask out while it compiles, which takes seconds.
        pairs = jax.lax.optimization_barrier(pairs)
        return pairs.any(axis=1), pairs.any(axis=0)
    if not is_causal:
        return None if key_mask is None else key_mask.any(keepdims=True), key_mask
    # Not by pairs, of which there are T · S.
    keys = None
    if num_keys > num_queries:
        keys = jnp.arange(num_keys) < num_queries
    if key_mask is None:
        return None, keys
    places = jnp.where(key_mask, jnp.arange(num_keys), num_keys)
    first = jnp.min(places, initial=num_keys)
    rows = jnp.arange(num_queries) >= first
    return rows, key_mask if keys is None else key_mask & keys


def normalize_softmax(logits: jax.Array, allowed: jax.Array | None = None) -> jax.Array:
    """Softmax over the allowed keys, zeros where a query may attend to none.

    w[t, s] = exp(l[t, s]) / Σ_{s' allowed} exp(l[t, s'])

    Args:
      logits: [T, S] scores.
      allowed: bool, broadcastable to [T, S], or None for every pair.

    Returns:
      [T, S] weights, each row summing to one, or to zero.

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

    Args:
      logits: [T, S] scores.
      allowed: bool, broadcastable to [T, S], or None for every pair.

    Returns:
      [T, S] weights, whose rows need not sum to one.

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

    Args:
      logits: [T, S] scores.
      allowed: bool, broadcastable to [T, S], or None for every pair.

    Returns:
      [T, S] weights, whose rows need not sum to one.

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


def _finish_weights(
    logits: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
    is_causal: bool,
    normalize: str,
) -> jax.Array:
    """Adds the bias to float32 scores, masks and normalises them: [T, S]."""
    if normalize not in NORMALIZERS:
        raise ValueError(
            f"`normalize` must be one of {sorted(NORMALIZERS)}, but is {normalize!r}."
        )
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    num_queries, num_keys = logits.shape
    allowed = allowed_pairs(num_queries, num_keys, mask, key_mask, is_causal)
    if bias is not None and normalize == "softmax":
        # A bias of -inf masks. Written so that NaN stays NaN.
        finite = ~(logits < 0.5 * MASKED_LOGIT)
        allowed = finite if allowed is None else allowed & finite
    return NORMALIZERS[normalize](logits, allowed)


def _attend(
    weights: jax.Array,
    value: jax.Array,
    dropout_rate: float,
    rng: jax.Array | None,
) -> jax.Array:
    """Drops some weights if asked to, and mixes the values: [T, V]."""
    if dropout_rate > 0.0:
        assert rng is not None  # check_dropout has seen to it
        kept = jax.random.bernoulli(rng, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    return weights.astype(value.dtype) @ value


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
      query: [T, H].
      key: [S, H].
      bias: [T, S], added to the scaled scores, or None.
      mask: bool [T, S], True = attend, or None.
      key_mask: bool [S], True = a real token, or None.
      scale: factor of the scores; None means 1/√H.
      is_causal: whether query t attends only to keys s ≤ t.
      normalize: a name in `NORMALIZERS`.

    Returns:
      [T, S] weights, in float32 or wider.

    Raises:
      ValueError: on wrong shapes or an unknown `normalize`.
      TypeError: on wrong dtypes.

    >>> dot_product_weights(jnp.ones((1, 4)), jnp.ones((2, 4))).tolist()
    [[0.5, 0.5]]
    """
    _checks.check_inputs(query, key, key, bias, mask, key_mask, shared_axes=True)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    query, key = _checks.zero_masked(query, rows), _checks.zero_masked(key, keys)
    logits = _scores(query, key) * scale
    return _finish_weights(logits, bias, mask, key_mask, is_causal, normalize)


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Q Kᵀ [T, S], summed in float32 or wider."""
    return jax.lax.dot_general(
        query,
        key,
        (((1,), (1,)), ((), ())),
        preferred_element_type=score_dtype(query.dtype),
    )


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
      query: [T, H].
      key: [S, H].
      value: [S, V].
      bias: [T, S], added to the scaled scores, or None; −∞ masks.
      mask: bool [T, S], True = attend, or None. A query that may attend to nothing
        gives zeros, with zero gradients.
      key_mask: bool [S], True = a real token, or None.
      scale: factor of the scores; None means 1/√H.
      is_causal: whether query t attends only to keys s ≤ t (aligned at the top
        left, as in `jax.nn`).
      normalize: a name in `NORMALIZERS`.
      dropout_rate: fraction of the weights to drop, in [0, 1).
      rng: random key, needed if `dropout_rate` > 0 and unused otherwise.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes, an unknown `normalize`, or dropout without `rng`.
      TypeError: on wrong dtypes, such as a float mask.

    Reference: Vaswani et al., 2017, arXiv:1706.03762.

    >>> query, key = jnp.log(jnp.array([[3.0]])), jnp.array([[1.0], [0.0]])
    >>> value = jnp.array([[4.0], [0.0]])
    >>> dot_product(query, key, value).round(4).tolist()  # weights 3/4 and 1/4
    [[3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask, shared_axes=True)
    _checks.check_dropout(dropout_rate, rng)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # As in dot_product_weights; here once for keys and values.
    rows, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    query, key = _checks.zero_masked(query, rows), _checks.zero_masked(key, keys)
    value = _checks.zero_masked(value, keys)
    logits = _scores(query, key) * scale
    weights = _finish_weights(logits, bias, mask, key_mask, is_causal, normalize)
    return _attend(weights, value, dropout_rate, rng)


def relu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Dot-product attention with rectified scores in the place of softmax.

    O = relu(scale · Q Kᵀ + bias) V / n, with n the number of allowed keys.

    Args:
      query: [T, H].
      key: [S, H].
      value: [S, V].
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      key_mask: bool [S], True = a real token, or None.
      scale: factor of the scores; None means 1/√H.
      is_causal: whether query t attends only to keys s ≤ t.
      dropout_rate: fraction of the weights to drop, in [0, 1).
      rng: random key, needed if `dropout_rate` > 0.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes, or dropout without `rng`.
      TypeError: on wrong dtypes.

    Reference: Wortsman et al., 2023, arXiv:2309.08586.

    >>> x = jnp.ones((2, 4))
    >>> relu_attention(x, x, jnp.array([[1.0], [3.0]])).tolist()
    [[4.0], [4.0]]
    """
    return dot_product(
        query,
        key,
        value,
        bias,
        mask,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
        normalize="relu",
        dropout_rate=dropout_rate,
        rng=rng,
    )


def sigmoid_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Dot-product attention with an element-wise sigmoid in the place of softmax.

    O = σ(scale · Q Kᵀ + bias − log n) V, with n the number of allowed keys.

    Args:
      query: [T, H].
      key: [S, H].
      value: [S, V].
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      key_mask: bool [S], True = a real token, or None.
      scale: factor of the scores; None means 1/√H.
      is_causal: whether query t attends only to keys s ≤ t.
      dropout_rate: fraction of the weights to drop, in [0, 1).
      rng: random key, needed if `dropout_rate` > 0.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes, or dropout without `rng`.
      TypeError: on wrong dtypes.

    Reference: Ramapuram et al., 2024, arXiv:2409.04431.

    >>> x = jnp.zeros((1, 4))
    >>> sigmoid_attention(x, x, jnp.array([[2.0]])).tolist()
    [[1.0]]
    """
    return dot_product(
        query,
        key,
        value,
        bias,
        mask,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
        normalize="sigmoid",
        dropout_rate=dropout_rate,
        rng=rng,
    )


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
      rng: random key.
      head_dim: H, the size of a query.
      key_dim: size of a key; None means H.
      hidden_dim: D, the size of the hidden layer; None means H.
      dtype: dtype of the parameters.

    Returns:
      {"query": [H, D], "key": [key_dim, D], "score": [D]}.

    Raises:
      ValueError: if a size is not positive.

    >>> params = additive_init(jax.random.key(0), 4, hidden_dim=8)
    >>> {name: leaf.shape for name, leaf in sorted(params.items())}
    {'key': (4, 8), 'query': (4, 8), 'score': (8,)}
    """
    key_dim = head_dim if key_dim is None else key_dim
    hidden_dim = head_dim if hidden_dim is None else hidden_dim
    for name, size in (
        ("head_dim", head_dim),
        ("key_dim", key_dim),
        ("hidden_dim", hidden_dim),
    ):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}.")
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


def _hidden_size(params: Mapping[str, jax.Array]) -> int:
    """D, or 0 for parameters that `_check_params` is about to reject."""
    given = isinstance(params, Mapping) and "score" in params
    return params["score"].shape[-1] if given else 0


def _check_params(params: Mapping[str, jax.Array], shapes: Mapping[str, tuple]) -> None:
    """Checks names and shapes of additive scoring's parameters."""
    if not isinstance(params, Mapping) or set(params) != set(shapes):
        came = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"`params` must be a mapping with {sorted(shapes)}, but is {came}; "
            "`additive_init(rng, head_dim)` makes one (`additive_concat_params` "
            "turns it into the concatenated form)."
        )
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(
                f"`params[{name!r}]` must have shape {shape}, "
                f"but has shape {params[name].shape}. Under `multi_head` every leaf "
                "leads with the number of heads N."
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
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      params: {"query": [H, D], "key": [key_dim, D], "score": [D]}.
      key_mask: bool [S], True = a real token, or None.
      is_causal: whether query t attends only to keys s ≤ t.
      normalize: a name in `NORMALIZERS`.

    Returns:
      [T, S] weights, in float32 or wider.

    Raises:
      ValueError: on wrong shapes, parameters or an unknown `normalize`.
      TypeError: on wrong dtypes.

    >>> params = additive_init(jax.random.key(0), 4)
    >>> additive_weights(jnp.ones((1, 4)), jnp.ones((2, 4)), params=params).tolist()
    [[0.5, 0.5]]
    """
    _checks.check_inputs(
        query,
        key,
        key,
        bias,
        mask,
        key_mask,
        same_head_dim=False,
        shared_axes=True,
    )
    hidden = _hidden_size(params)
    shapes = {
        "query": (query.shape[1], hidden),
        "key": (key.shape[1], hidden),
        "score": (hidden,),
    }
    _check_params(params, shapes)
    rows, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    query, key = _checks.zero_masked(query, rows), _checks.zero_masked(key, keys)
    dtype = query.dtype
    from_query = query @ params["query"].astype(dtype)
    from_key = key @ params["key"].astype(dtype)
    hidden_layer = jnp.tanh(from_query[:, None, :] + from_key[None, :, :])
    logits = jnp.matmul(
        hidden_layer,
        params["score"].astype(dtype),
        preferred_element_type=score_dtype(dtype),
    )
    return _finish_weights(logits, bias, mask, key_mask, is_causal, normalize)


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
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      params: {"query": [H, D], "key": [key_dim, D], "score": [D]}, as made by
        `additive_init`.
      key_mask: bool [S], True = a real token, or None.
      is_causal: whether query t attends only to keys s ≤ t.
      normalize: a name in `NORMALIZERS`.
      dropout_rate: fraction of the weights to drop, in [0, 1).
      rng: random key, needed if `dropout_rate` > 0.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes or parameters, or dropout without `rng`.
      TypeError: on wrong dtypes.

    Reference: Bahdanau et al., 2014, arXiv:1409.0473.

    >>> params = {"query": jnp.eye(1), "key": jnp.eye(1)}
    >>> params["score"] = jnp.log(jnp.array([3.0])) / 2
    >>> key, value = jnp.array([[-9.0], [9.0]]), jnp.array([[0.0], [4.0]])
    >>> out = additive(jnp.zeros((1, 1)), key, value, params=params)
    >>> out.round(4).tolist()  # tanh is −1 and 1: weights 1/4 and 3/4
    [[3.0]]
    """
    _checks.check_inputs(
        query,
        key,
        value,
        bias,
        mask,
        key_mask,
        same_head_dim=False,
        shared_axes=True,
    )
    _checks.check_dropout(dropout_rate, rng)
    weights = additive_weights(
        query,
        key,
        bias,
        mask,
        params=params,
        key_mask=key_mask,
        is_causal=is_causal,
        normalize=normalize,
    )
    _, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    return _attend(weights, _checks.zero_masked(value, keys), dropout_rate, rng)


def additive_concat_params(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters of the concatenated form that score exactly as `params` do.

    W = [W_q; W_k]

    Args:
      params: {"query": [H, D], "key": [key_dim, D], "score": [D]}.

    Returns:
      {"hidden": [H + key_dim, D], "score": [D]}.

    >>> params = additive_init(jax.random.key(0), 4, hidden_dim=8)
    >>> additive_concat_params(params)["hidden"].shape
    (8, 8)
    """
    return {
        "hidden": jnp.concatenate([params["query"], params["key"]], axis=0),
        "score": params["score"],
    }


def additive_concat_weights(
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
    """Weights of additive attention in its original form, on the concatenation.

    W[t, s] = softmax_s(wᵀ tanh(Wᵀ [q_t; k_s]) + bias[t, s])

    Equal to `additive_weights` for W = [W_q; W_k]; it builds every concatenated pair
    and serves to show that.

    Args:
      query: [T, H].
      key: [S, key_dim].
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      params: {"hidden": [H + key_dim, D], "score": [D]}.
      key_mask: bool [S], True = a real token, or None.
      is_causal: whether query t attends only to keys s ≤ t.
      normalize: a name in `NORMALIZERS`.

    Returns:
      [T, S] weights, in float32 or wider.

    Raises:
      ValueError: on wrong shapes, parameters or an unknown `normalize`.
      TypeError: on wrong dtypes.

    Reference: Luong et al., 2015, arXiv:1508.04025, "concat".

    >>> params = additive_concat_params(additive_init(jax.random.key(0), 4))
    >>> w = additive_concat_weights(jnp.ones((1, 4)), jnp.ones((2, 4)), params=params)
    >>> w.tolist()
    [[0.5, 0.5]]
    """
    _checks.check_inputs(
        query,
        key,
        key,
        bias,
        mask,
        key_mask,
        same_head_dim=False,
        shared_axes=True,
    )
    hidden = _hidden_size(params)
    pair_dim = query.shape[1] + key.shape[1]
    _check_params(params, {"hidden": (pair_dim, hidden), "score": (hidden,)})
    rows, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    query, key = _checks.zero_masked(query, rows), _checks.zero_masked(key, keys)
    dtype = query.dtype
    num_queries, num_keys = query.shape[0], key.shape[0]
    pairs = jnp.concatenate(
        [
            jnp.broadcast_to(
                query[:, None, :], (num_queries, num_keys, query.shape[1])
            ),
            jnp.broadcast_to(key[None, :, :], (num_queries, num_keys, key.shape[1])),
        ],
        axis=-1,
    )
    logits = jnp.matmul(
        jnp.tanh(pairs @ params["hidden"].astype(dtype)),
        params["score"].astype(dtype),
        preferred_element_type=score_dtype(dtype),
    )
    return _finish_weights(logits, bias, mask, key_mask, is_causal, normalize)


def additive_concat(
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
    """Additive attention in its original form, on the concatenation of a pair.

    O[t] = Σ_s softmax_s(wᵀ tanh(Wᵀ [q_t; k_s]) + bias[t, s]) v_s

    Equal to `additive` for W = [W_q; W_k].

    Args:
      query: [T, H].
      key: [S, key_dim].
      value: [S, V].
      bias: [T, S] or None.
      mask: bool [T, S], True = attend, or None.
      params: {"hidden": [H + key_dim, D], "score": [D]}.
      key_mask: bool [S], True = a real token, or None.
      is_causal: whether query t attends only to keys s ≤ t.
      normalize: a name in `NORMALIZERS`.
      dropout_rate: fraction of the weights to drop, in [0, 1).
      rng: random key, needed if `dropout_rate` > 0.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes or parameters, or dropout without `rng`.
      TypeError: on wrong dtypes.

    Reference: Luong et al., 2015, arXiv:1508.04025, "concat".

    >>> params = additive_concat_params(additive_init(jax.random.key(0), 4))
    >>> x, value = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> additive_concat(x, x, value, params=params).tolist()
    [[2.0], [2.0]]
    """
    _checks.check_inputs(
        query,
        key,
        value,
        bias,
        mask,
        key_mask,
        same_head_dim=False,
        shared_axes=True,
    )
    _checks.check_dropout(dropout_rate, rng)
    weights = additive_concat_weights(
        query,
        key,
        bias,
        mask,
        params=params,
        key_mask=key_mask,
        is_causal=is_causal,
        normalize=normalize,
    )
    _, keys = seen_ends(len(query), len(key), mask, key_mask, is_causal)
    return _attend(weights, _checks.zero_masked(value, keys), dropout_rate, rng)
