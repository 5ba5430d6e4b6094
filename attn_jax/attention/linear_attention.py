"""Linear attention: scores that are dot products of features, φ(q)·φ(k).

Such scores need no [T, S] matrix: the sum Σ_s φ(k_s) v_sᵀ is made once and each query
reads it, in O(T). Over the past it is a sum that grows from token to token, so causal
linear attention is a recurrent network with a matrix as its state. Three forms are
equal: parallel over all pairs, recurrent token by token, and chunked, which is
parallel inside of a chunk and recurrent between chunks.

Letters besides those of `attn_jax.attention`: M number of features, C number of chunks,
c size of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax import masks
from attn_jax.attention import _checks, _tiles
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

__all__ = [
    "FEATURE_MAPS",
    "LinearState",
    "causal_product",
    "cosformer",
    "linear",
    "linear_parallel",
    "linear_recurrent",
    "linear_init_state",
    "linear_step",
]

# exp(LEAST_LOG) is the least positive feature, relative to one: small enough to be
# invisible beside it, and large enough that products of two are no underflow.
LEAST_LOG = -40.0


def _elu_plus_one(x: jax.Array) -> jax.Array:
    """Elu(x) + 1 without the cancellation: x + 1, or exp(x) where x < 0."""
    below = jnp.maximum(jnp.where(x > 0, 0, x), LEAST_LOG)
    return jnp.where(x > 0, x + 1, jnp.exp(below))


FeatureMap = str | Callable[[jax.Array], jax.Array]

FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "elu": _elu_plus_one,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
}
"""Non-negative feature maps φ, by name: elu(x) + 1 (never below e⁻⁴⁰), relu, softplus.

Under relu a query may have nothing in common with any key; it gets zeros.
"""


def _map_of(feature_map: FeatureMap) -> Callable[[jax.Array], jax.Array]:
    """The function that `feature_map` names, or is."""
    if callable(feature_map):
        return feature_map
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"`feature_map` must be one of {sorted(FEATURE_MAPS)} or a function, but "
            f"is {feature_map!r}."
        )
    return FEATURE_MAPS[feature_map]


def with_ones(value: jax.Array, key_mask: jax.Array | None = None) -> jax.Array:
    """Values [S, V + 1] with a column of ones, in the dtype of scores; padding is 0.

    What a product does to the ones is the denominator of what it does to the values.
    """
    ones = jnp.ones((value.shape[0], 1), value.dtype)
    joined = jnp.concatenate([value, ones], axis=1).astype(score_dtype(value.dtype))
    return _checks.zero_masked(joined, key_mask)


def divide_by_ones(product: jax.Array) -> jax.Array:
    """The last column divides the others: [T, V + 1] -> [T, V]; 0 where it is 0."""
    total = product[:, -1:]
    # Dividing both by a constant first keeps the gradient finite: it has the square
    # of the denominator in it, which a small one would not survive.
    size = jax.lax.stop_gradient(jnp.where(total == 0, 1, total))
    return _checks.safe_divide(product[:, :-1] / size, total / size)


def causal_product(
    query_features: jax.Array,
    key_features: jax.Array,
    value: jax.Array,
    *,
    chunk_size: int = 128,
    log_scale: jax.Array | None = None,
    log_decay: jax.Array | None = None,
) -> jax.Array:
    """Unnormalised causal linear attention, chunk by chunk, in O(T).

    o_t = Σ_{s ≤ t} w[t, s] (φq_t · φk_s) v_s

    where w = 1 without the options. With `log_decay`, log w[t, s] = L_t − L_s, where L
    is its cumulative sum. With `log_scale` key s stands for φk_s · exp(log_scale_s),
    and log w[t, s] = log_scale_s − m_t, where m_t is the largest log_scale_s of s ≤ t
    (with both: of log_scale_s + L_t − L_s). So no weight is above one, whatever the
    scale, and nothing of a later key, in the same chunk or not, touches o_t. All of a
    row has the same m_t: append a column of ones to `value` and divide by what becomes
    of it, and m_t cancels.

    Chunks are computed side by side: each has a masked product of c × c pairs, and
    reads the state Σ φk_s v_sᵀ [M, V] of all keys before it. The states are summed up
    by a scan. Time O(T·c·(M + V) + T·M·V), memory O(T·c + T·M·V/c), also for the
    gradient.

    Args:
      query_features: [T, M].
      key_features: [S, M]; what lies beyond T is not read.
      value: [S, V].
      chunk_size: tokens in a chunk, c.
      log_scale: [S] or None. `MASKED_LOGIT` for padding, where the features are 0.
      log_decay: [S] or None, none above zero: the decay of all earlier keys when s
        comes.

    Returns:
      [T, V], in float32 or wider.

    Raises:
      ValueError: on wrong shapes or a `chunk_size` below 1.
      TypeError: on a `chunk_size` that is no int.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, equations 8-15;
    chunks as in Hua et al., 2022, arXiv:2202.10447.

    >>> x = jnp.ones((4, 1))
    >>> causal_product(x, x, x, chunk_size=2)[:, 0].tolist()
    [1.0, 2.0, 3.0, 4.0]
    >>> causal_product(x, x, x, log_decay=jnp.log(jnp.full(4, 0.5)))[:, 0].tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    length, num_features = query_features.shape
    sizes = {"S": key_features.shape[0], "M": num_features}
    _checks.check_shape("key_features", key_features, ("S", "M"), sizes)
    _checks.check_shape("value", value, ("S", "V"), sizes)
    for name, logs in (("log_scale", log_scale), ("log_decay", log_decay)):
        if logs is not None:
            _checks.check_shape(name, logs, ("S",), sizes)
    dtype = score_dtype(query_features.dtype)
    chunk = min(_checks.check_int("chunk_size", chunk_size, 1), max(length, 1))
    num_chunks = -(-length // chunk)

    def chunked(array: jax.Array, fill: float = 0.0) -> jax.Array:
        """[C, c, ...] of [T or S, ...], cut or filled up at the end."""
        array = array[:length].astype(dtype)
        return _tiles.cut(array, chunk, fill, blocks=num_chunks)

    query, key, value = map(chunked, (query_features, key_features, value))
    past = jnp.asarray(np.tri(chunk, dtype=bool))[None]
    scores = jnp.where(past, jnp.einsum("ctm,csm->cts", query, key), 0)
    empty = jnp.zeros((num_features, value.shape[2]), dtype)
    if log_scale is None and log_decay is None:
        added = jnp.einsum("csm,csv->cmv", key, value)
        empty = _checks.varying(empty, added)
        _, states = jax.lax.scan(lambda state, new: (state + new, state), empty, added)
        seen = jnp.einsum("ctm,cmv->ctv", query, states)
    else:
        # Inside of a chunk all logarithms count from its beginning: at its token t,
        # key s weighs exp(logs_s + decay_t).
        decay = jnp.zeros((num_chunks, chunk), dtype)
        if log_decay is not None:
            decay = jnp.cumsum(chunked(log_decay), axis=1)
        if log_scale is None:
            logs = top = -decay
            least = jnp.zeros((), dtype)
        else:
            logs = chunked(log_scale, MASKED_LOGIT) - decay
            top = jax.lax.cummax(logs, axis=1)
            least = jnp.full((), MASKED_LOGIT, dtype)
        weighted = key * jnp.exp(logs - top[:, -1:])[:, :, None]
        added = jnp.einsum("csm,csv->cmv", weighted, value)

        def step(
            carry: tuple[jax.Array, jax.Array],
            chunk: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
            state, size = carry  # the state is this times exp(size)
            new, top, decay = chunk
            larger = jnp.maximum(size, top)
            both = jnp.exp(size - larger) * state + jnp.exp(top - larger) * new
            return (both, larger + decay), carry

        new = (added, top[:, -1], decay[:, -1])
        start = _checks.varying((empty, least), new)
        _, (states, size) = jax.lax.scan(step, start, new)
        top = jnp.maximum(size[:, None], top)
        between = logs[:, None, :] - top[:, :, None]
        scores = scores * jnp.exp(jnp.where(past, between, MASKED_LOGIT))
        seen = jnp.einsum("ctm,cmv->ctv", query, states)
        seen = jnp.exp(size[:, None] - top)[:, :, None] * seen
    out = jnp.einsum("cts,csv->ctv", scores, value) + seen
    return out.reshape(num_chunks * chunk, value.shape[2])[:length]


def attend_features(
    query_features: jax.Array,
    key_features: jax.Array,
    value: jax.Array,
    key_mask: jax.Array | None,
    is_causal: bool,
    chunk_size: int,
) -> jax.Array:
    """Normalised linear attention of non-negative features, [T, V] in value's dtype."""
    key_features = _checks.zero_masked(key_features, key_mask)
    joined = with_ones(value, key_mask)
    if is_causal:
        product = causal_product(
            query_features, key_features, joined, chunk_size=chunk_size
        )
    else:
        product = query_features @ (key_features.T @ joined)
    return divide_by_ones(product).astype(value.dtype)


def _features(x: jax.Array, feature_map: FeatureMap) -> jax.Array:
    """φ of rows [..., H], in the dtype of scores."""
    return _map_of(feature_map)(x.astype(score_dtype(x.dtype)))


def linear(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    feature_map: FeatureMap = "elu",
    chunk_size: int = 128,
) -> jax.Array:
    """Linear attention, the linear transformer: similarity is a product of features.

    o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), over s ≤ t where causal.

    Equal to `linear_parallel` and, where causal, to `linear_recurrent`, in O(T + S).
    Where φ is constant it is the mean over the keys.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      feature_map: a name in `FEATURE_MAPS`, or a function on [..., H] that gives
        non-negative features [..., M].
      chunk_size: tokens in a chunk of the causal form; see `causal_product`.

    Returns:
      [T, V], in the dtype of the inputs; zeros for a query without any key, or whose
      features have nothing in common with those of its keys.

    Raises:
      ValueError: on wrong shapes, an unknown `feature_map` or a bad `chunk_size`.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, equations 4-9.

    >>> query, key = jnp.array([[1.0], [5.0]]), jnp.array([[0.0], [2.0]])
    >>> value = jnp.array([[0.0], [4.0]])
    >>> linear(query, key, value).round(4).tolist()  # φ(k) is 1 and 3, with H = 1
    [[3.0], [3.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    key = _checks.zero_masked(key, key_mask)
    return attend_features(
        _features(query, feature_map),
        _features(key, feature_map),
        value,
        key_mask,
        is_causal,
        chunk_size,
    )


def linear_parallel(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    feature_map: FeatureMap = "elu",
) -> jax.Array:
    """`linear` with all T × S scores written out: its reference, quadratic in T.

    O = ((φ(Q) φ(K)ᵀ) ⊙ A) V, each row divided by its sum of scores, where A is 1 for
    pairs that are allowed, else 0.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      feature_map: as for `linear`.

    Raises:
      ValueError: on wrong shapes or an unknown `feature_map`.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, equation 4.

    >>> value = jnp.array([[1.0], [3.0]])
    >>> linear_parallel(jnp.ones((1, 4)), jnp.ones((2, 4)), value).tolist()
    [[2.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    key = _checks.zero_masked(key, key_mask)
    scores = _features(query, feature_map) @ _features(key, feature_map).T
    num_queries, num_keys = scores.shape
    allowed = masks.allowed_pairs(num_queries, num_keys, None, key_mask, is_causal)
    if allowed is not None:
        scores = jnp.where(allowed, scores, 0)
    return divide_by_ones(scores @ with_ones(value, key_mask)).astype(value.dtype)


class LinearState(NamedTuple):
    """What recurrent linear attention remembers of all keys so far.

    Attributes:
      memory: [M, V], S = Σ φ(k_s) v_sᵀ.
      normalizer: [M], z = Σ φ(k_s).
    """

    memory: jax.Array
    normalizer: jax.Array


def linear_init_state(
    head_dim: int,
    value_dim: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    feature_map: FeatureMap = "elu",
) -> LinearState:
    """The state of `linear_step` before the first token.

    Args:
      head_dim: H.
      value_dim: V.
      dtype: dtype of queries, keys and values; the state is float32 or wider.
      feature_map: as for `linear`.

    Returns:
      Zeros: memory [M, V] and normalizer [M].

    >>> linear_init_state(4, 3).memory.shape
    (4, 3)
    """
    key = jax.ShapeDtypeStruct((1, head_dim), jnp.dtype(dtype))
    features = jax.eval_shape(lambda x: _features(x, feature_map), key)
    zeros = jnp.zeros((features.shape[1], value_dim + 1), score_dtype(key.dtype))
    return LinearState(zeros[:, :-1], zeros[:, -1])


def linear_step(
    state: LinearState,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    feature_map: FeatureMap = "elu",
) -> tuple[LinearState, jax.Array]:
    """One token of causal linear attention, as a recurrent network: O(1) in T.

    S ← S + φ(k) vᵀ,  z ← z + φ(k),  o = φ(q)ᵀ S / φ(q)·z

    Args:
      state: of all tokens before; `linear_init_state` makes the first. It keeps its
        dtype.
      query: [H].
      key: [H].
      value: [V].
      key_mask: bool [], whether this is a real token, or None. Padding does not change
        the state.
      feature_map: as for `linear`.

    Returns:
      The new state, and the output [V] in the dtype of the value.

    Raises:
      ValueError: if the shapes do not belong together, or on an unknown `feature_map`.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, equations 16-20.

    >>> x = jnp.ones(4)
    >>> state, out = linear_step(linear_init_state(4, 1), x, x, jnp.array([3.0]))
    >>> state, out = linear_step(state, x, x, jnp.array([5.0]))
    >>> out.tolist()
    [4.0]
    """
    real = None if key_mask is None else key_mask[None]
    new_key = _checks.zero_masked(key[None], real)
    new = _checks.zero_masked(_features(new_key, feature_map), real)
    features = _features(query[None], feature_map)
    sizes = {"M": new.shape[1], "V": value.shape[0]}
    _checks.check_shape("state.memory", state.memory, ("M", "V"), sizes)
    _checks.check_shape("state.normalizer", state.normalizer, ("M",), sizes)
    new, features = (x.astype(state.memory.dtype) for x in (new, features))
    rows = _checks.zero_masked(value[None].astype(new.dtype), real)
    state = LinearState(state.memory + new.T @ rows, state.normalizer + new[0])
    joined = jnp.concatenate([state.memory, state.normalizer[:, None]], axis=1)
    return state, divide_by_ones(features @ joined)[0].astype(value.dtype)


def linear_recurrent(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    feature_map: FeatureMap = "elu",
) -> jax.Array:
    """Causal `linear`, token by token: a scan of `linear_step`.

    Equal to `linear` with `is_causal=True`. It needs T steps one after another, so it
    shows what the others are equal to, and generates; for training use `linear`.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      feature_map: as for `linear`.

    Raises:
      ValueError: on wrong shapes, T ≠ S or an unknown `feature_map`.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, section 3.4.

    >>> value = jnp.array([[1.0], [3.0]])
    >>> linear_recurrent(jnp.ones((2, 4)), jnp.ones((2, 4)), value).tolist()
    [[1.0], [2.0]]
    """
    one = "linear_recurrent", "it takes one query, key and value in each step"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    if key_mask is None:
        key_mask = jnp.ones(key.shape[0], bool)

    def step(
        state: LinearState, token: tuple[jax.Array, ...]
    ) -> tuple[LinearState, jax.Array]:
        query, key, value, real = token
        return linear_step(
            state, query, key, value, key_mask=real, feature_map=feature_map
        )

    sizes = key.shape[1], value.shape[1]
    state = linear_init_state(*sizes, value.dtype, feature_map=feature_map)
    tokens = (query, key, value, key_mask)
    return jax.lax.scan(step, _checks.varying(state, tokens), tokens)[1]


def cosformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    horizon: int | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """Linear attention with relu features, weighted by the cosine of the distance.

    o_t = Σ_s w[t, s] v_s / Σ_s w[t, s],
    w[t, s] = relu(q_t)·relu(k_s) cos(π/2 · (t − s)/N)

    N is the horizon, at least the length; the paper takes the length, and so does this
    function unless it is told. Ptolemy's formula, cos(a − b) = cos a cos b +
    sin a sin b, makes it a product of 2H features, so it costs O(T). As |t − s| < N no
    weight is negative. Near keys weigh more: for N → ∞ at fixed t − s it is `linear`
    with relu, from which it cannot be told where N is many times the length.

    So how much a distance counts depends on the length. Where causal, no later query,
    key or value touches o_t, but without a `horizon` the number of later tokens does:
    what a prefix gives alone is not what it gives in a longer sequence. To generate, to
    stream, or to compare lengths, give as `horizon` the longest length there will be,
    the same in training.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      key_mask: bool [T], True = a real token, or None. Queries beyond the horizon count
        as if they stood on its last place.
      horizon: N. None means the length: the place of the last real token plus one.
      chunk_size: tokens in a chunk of the causal form; see `causal_product`.

    Returns:
      [T, V], in the dtype of the inputs; zeros for a query without any key, or whose
      features have nothing in common with those of its keys.

    Raises:
      ValueError: on wrong shapes, T ≠ S, a sequence beyond a given horizon, or a bad
        `chunk_size`.

    Reference: Qin et al., 2022, arXiv:2202.08791.

    >>> value = jnp.array([[0.0], [1.0], [0.0]])
    >>> jnp.round(100 * cosformer(jnp.ones((3, 4)), jnp.ones((3, 4)), value)).tolist()
    [[37.0], [37.0], [37.0]]
    """
    one = "cosformer", "it weighs pairs by their distance"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    length = query.shape[0]
    dtype = score_dtype(query.dtype)
    places = np.arange(length)
    last = jnp.asarray(length - 1)
    if horizon is not None:
        horizon = _checks.check_int("horizon", horizon, 1)
        if length > horizon:
            raise ValueError(
                f"`cosformer` has a `horizon` of {horizon} tokens, but T={length}; "
                "give a larger one, which must stay the same for all lengths."
            )
        last = jnp.asarray(horizon - 1)
    elif key_mask is not None:
        last = jnp.max(jnp.where(key_mask, places, 0), initial=0)
    angle = jnp.minimum(places, last).astype(dtype) / (last + 1).astype(dtype)
    angle = (0.5 * np.pi * angle)[:, None]
    turn = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)  # [T, 2]

    def features(x: jax.Array) -> jax.Array:
        x = _features(x, "relu")
        return jnp.concatenate([x * turn[:, :1], x * turn[:, 1:]], axis=1)

    return attend_features(
        features(query),
        features(_checks.zero_masked(key, key_mask)),
        value,
        key_mask,
        is_causal,
        chunk_size,
    )
