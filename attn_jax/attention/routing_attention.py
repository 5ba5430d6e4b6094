"""Routing attention: each centroid picks the queries and keys that meet.

The common idea of the learned patterns is to let content choose the pairs. Here C
centroids each take their top queries and top keys, a C-th of the tokens, so that every
cluster is of the same size and attention inside it is one dense product.

Letters besides those of `attn_jax.attention`: C clusters, w size of a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype
from attn_jax.attention.clustered_attention import clusterformer_init
from attn_jax.attention.reformer_attention import bucketed
from attn_jax.attention.softmax import dot_product

__all__ = ["routing", "routing_exact", "routing_init", "routing_update"]

# Added to the variance under the root, as layers do that normalise.
_EPSILON = 1e-6

_WHY = "`key_mask` marks queries and keys alike"


def routing_init(
    rng: jax.Array,
    head_dim: int,
    *,
    num_clusters: int | None = None,
    max_length: int = 512,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Centroids of `routing` for one head: random directions of length one.

    Args:
      num_clusters: C; None means √max_length rounded, which makes the cost least.
      max_length: length of the longest sequences; used only if `num_clusters` is None.

    Returns:
      {"centroid": [C, H]}.

    >>> routing_init(jax.random.key(0), 4, max_length=100)["centroid"].shape
    (10, 4)
    """
    max_length = _checks.check_int("max_length", max_length, 1)
    if num_clusters is None:
        num_clusters = round(math.sqrt(max_length))
    return clusterformer_init(rng, head_dim, num_clusters=num_clusters, dtype=dtype)


def _normalize(x: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Rows less their mean over their standard deviation, in the dtype of scores."""
    x = _checks.zero_masked(x, key_mask).astype(score_dtype(x.dtype))
    x -= x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + _EPSILON)


def _affinity(x: jax.Array, centroid: jax.Array) -> jax.Array:
    """Products of tokens and centroids, [C, T], without gradients."""
    x = jax.lax.stop_gradient(x)
    centroid = jax.lax.stop_gradient(centroid).astype(x.dtype)
    return jnp.matmul(centroid, x.T, precision=jax.lax.Precision.HIGHEST)


def routing_exact(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """What `routing` comes near to: attention on normalised queries and keys."""
    out = dot_product(
        _normalize(query, key_mask).astype(query.dtype),
        _normalize(key, key_mask).astype(key.dtype),
        _checks.zero_masked(value, key_mask),
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
    )
    return _checks.zero_masked(out, key_mask)


def routing(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    chunk_size: int = 64,
) -> jax.Array:
    """Routing Transformer's attention, in O(T·(C + w)·(H + V)) with w = T/C.

    q̂_t, k̂_s = queries and keys, normalised to mean 0 and variance 1 (a layer
    normalisation without scale and bias); Q_j, K_j = the w tokens of the largest
    μ_j · q̂_t, and of the largest μ_j · k̂_s; w = ⌈tokens / C⌉.

    o_t = mean over {j : t ∈ Q_j} of Σ_{s ∈ K_j} w_j[t, s] v_s, with w_j[t, ·] the
    softmax over K_j of scale · q̂_t · k̂_s. A token that no centroid takes gets zeros.

    With C ≈ √T the cost is O(T·√T·H). No gradient reaches the centroids:
    `routing_update` moves them.

    Causal: which tokens are among the top w of a sequence depends on later tokens, so a
    causal mask inside the paper's clusters would still let the future decide what a
    query sees. Here each token goes to the centroid nearest to q̂ + k̂ (the paper shares
    queries and keys where causal), as in `routing_update`, and attends to those tokens
    of its centroid that came before it, in sorted chunks: see `reformer.bucketed`.

    Equal to `dot_product` on q̂ and k̂ with C = 1 (and, where causal, a chunk of T).

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"centroid": [C, H]}, rows of length one.
      key_mask: bool [T], True = a real token, or None. Padding is never taken nor
        counted, and gives zeros.
      chunk_size: of how many tokens of its centroid a query sees at least the last, if
        there are so many; used only where causal.

    Raises:
      ValueError: on wrong shapes, T ≠ S, wrong parameters, or a chunk size below 1.

    Reference: Roy et al., 2020, arXiv:2003.05997, section 4.

    >>> x = jnp.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    >>> value = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> routing(x, x, value, params={"centroid": x[:2] / jnp.sqrt(2.0)}).tolist()
    [[2.0], [3.0], [2.0], [3.0]]
    """
    one = "routing", _WHY
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    length = query.shape[0]
    _checks.check_params("routing", params, {"centroid": "CH"}, H=query.shape[1])
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    dtype = score_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = _normalize(query, key_mask), _normalize(key, key_mask)
    value = jnp.asarray(_checks.zero_masked(value, key_mask))
    key_mask = None if key_mask is None else jnp.asarray(key_mask)
    centroid = params["centroid"]
    num_clusters = centroid.shape[0]
    if is_causal:
        nearest = jnp.argmax(_affinity(queries + keys, centroid), axis=0)
        return bucketed(
            queries.astype(query.dtype),
            keys.astype(key.dtype),
            value,
            nearest.astype(jnp.int32)[None],
            num_buckets=num_clusters,
            key_mask=key_mask,
            scale=scale,
            is_causal=True,
            chunk_size=chunk_size,
        )
    most = -(-length // num_clusters)
    if key_mask is None:
        taken = jnp.ones((most,), bool)
    else:
        real = key_mask.sum(dtype=jnp.int32)
        taken = jnp.arange(most, dtype=jnp.int32) < -(-real // num_clusters)

    def take(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens of every cluster, the largest affinity first, and which count."""
        affinity = _affinity(x, centroid)
        if key_mask is not None:
            affinity = jnp.where(key_mask[None, :], affinity, MASKED_LOGIT)
        token = _checks.largest(affinity, most)  # [C, w]
        counts = jnp.broadcast_to(taken[None, :], token.shape)
        return token, counts if key_mask is None else counts & key_mask[token]

    of_query, query_counts = take(queries)
    of_key, key_counts = take(keys)
    logits = _scores.einsum(
        "cth,csh->cts",
        queries.astype(query.dtype)[of_query],
        keys.astype(key.dtype)[of_key],
    )
    # A cluster has as many keys as queries: no row is without keys but unused ones.
    logits = jnp.where(key_counts[:, None, :], logits * scale, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = jnp.where(key_counts[:, None, :] & query_counts[:, :, None], weights, 0)
    mixed = _scores.einsum("cts,csv->ctv", weights.astype(value.dtype), value[of_key])
    total = jnp.zeros(value.shape, dtype).at[of_query].add(mixed)
    times = jnp.zeros((length,), dtype).at[of_query].add(query_counts.astype(dtype))
    return (total / jnp.maximum(times, 1)[:, None]).astype(value.dtype)


def routing_update(
    params: Mapping[str, jax.Array],
    query: jax.Array,
    key: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    decay: float = 0.999,
) -> dict[str, jax.Array]:
    """Moves the centroids of `routing` towards the tokens nearest to them.

    μ_j ← λ μ_j + (1 − λ)/2 · (Σ_{t nearest to j} q̂_t + Σ_{s nearest to j} k̂_s),
    then scaled to length one; q̂ and k̂ are normalised to mean 0 and length one. A
    centroid without tokens stays. For a batch, concatenate its sequences.

    Args:
      params: {"centroid": [C, H]}.
      query: [T, H].
      key: [S, H].
      key_mask: bool [S], True = a real token, or None; with it T = S.
      decay: λ, in [0, 1].

    Returns:
      {"centroid": [C, H]}, rows of length one.

    Raises:
      ValueError: on wrong shapes or parameters, or a decay outside [0, 1].
      TypeError: on wrong dtypes.

    Reference: Roy et al., 2020, arXiv:2003.05997, section 4.1.

    >>> x = jnp.array([[1.0, -1.0]])
    >>> params = {"centroid": jnp.array([[0.0, -1.0], [0.0, 1.0]])}
    >>> new = routing_update(params, x, x, decay=0.0)["centroid"]
    >>> [[round(m, 3) for m in row] for row in new.tolist()]
    [[0.707, -0.707], [0.0, 1.0]]
    """
    one = None if key_mask is None else ("routing_update", _WHY)
    _checks.check_inputs(query, key, key, key_mask=key_mask, one_sequence=one)
    _checks.check_params("routing", params, {"centroid": "CH"}, H=query.shape[1])
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"`decay` must be in [0, 1], but is {decay}.")
    dtype = score_dtype(query.dtype)
    old = params["centroid"].astype(dtype)
    moved = decay * old
    for x in (query, key):
        x = _normalize(x, key_mask)
        nearest = jnp.argmax(_affinity(x, old), axis=0)
        members = nearest[None, :] == jnp.arange(old.shape[0])[:, None]  # [C, T]
        if key_mask is not None:
            members &= key_mask[None, :]
        sums = jnp.matmul(members.astype(dtype), x, precision=jax.lax.Precision.HIGHEST)
        moved += (1 - decay) / 2 * x.shape[-1] ** -0.5 * sums
    norm = jnp.linalg.norm(moved, axis=1, keepdims=True)
    # With decay 0 a centroid without tokens would vanish.
    moved = jnp.where(norm == 0, old, moved / jnp.where(norm == 0, 1, norm))
    return {"centroid": moved.astype(params["centroid"].dtype)}
