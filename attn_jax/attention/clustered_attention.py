"""Attention by clusters: of queries that share a result, or of tokens that meet.

The common idea is k-means. `clustered` groups the queries and lets each centroid attend
in their place; `improved_clustered` then computes the few largest weights exactly, for
each query. `clusterformer` groups whole tokens by learned centroids, and only tokens of
one cluster meet.

Letters besides those of `attn_jax.attention`: C clusters, i iterations of k-means, k
keys that are computed exactly, c size of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import MASKED_LOGIT, normalize_softmax, score_dtype
from attn_jax.attention.reformer_attention import bucketed, shared_vector, unit_rows

__all__ = [
    "clustered",
    "clusterformer",
    "clusterformer_init",
    "clusterformer_update",
    "improved_clustered",
    "kmeans",
]


_WHY = "`key_mask` marks the queries that are padding, too"


def _one_hot(labels: jax.Array, num_classes: int, dtype: jnp.dtype) -> jax.Array:
    """[T, C] of [T]; a row of zeros for a label outside [0, C)."""
    classes = jnp.arange(num_classes, dtype=labels.dtype)
    return (labels[:, None] == classes[None, :]).astype(dtype)


def _nearest(x: jax.Array, centroid: jax.Array, usable: jax.Array) -> jax.Array:
    """Number of the usable centroid that is nearest to each row: int32 [T]."""
    products = jnp.matmul(x, centroid.T, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.sum(centroid * centroid, axis=1)[None, :] - 2 * products
    distances = jnp.where(usable[None, :], distances, jnp.inf)
    return jnp.argmin(distances, axis=1).astype(jnp.int32)


def _means(
    x: jax.Array, labels: jax.Array, centroid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean of the rows of each label [C, H], or its old centre, and how many: [C]."""
    members = _one_hot(labels, centroid.shape[0], x.dtype)
    sizes = members.sum(axis=0)
    sums = jnp.matmul(members.T, x, precision=jax.lax.Precision.HIGHEST)
    means = sums / jnp.maximum(sizes, 1)[:, None]
    return jnp.where((sizes > 0)[:, None], means, centroid), sizes


def kmeans(
    x: jax.Array,
    rng: jax.Array,
    *,
    num_clusters: int,
    iterations: int = 10,
    key_mask: jax.Array | None = None,
) -> jax.Array:
    """Groups rows by Lloyd's algorithm, from different rows drawn as centres.

    Each iteration assigns rows to the nearest centre, a_t = argmin_j |x_t − μ_j|², and
    moves centres to the mean of their rows; a centre without rows stays. With C ≥ T
    every row is a cluster of its own (equal rows share one).

    Computed in float32 or wider, without gradients.

    Args:
      x: [T, H].
      rng: random key.
      num_clusters: C.
      iterations: i.
      key_mask: bool [T], True = a real row, or None. Others are no centres, weigh
        nothing, and get no cluster.

    Returns:
      int32 [T], the cluster of each row, and C for padding.

    Raises:
      ValueError: if an option is out of range.
      TypeError: if an option is no int.

    >>> x = jnp.array([[0.0], [9.0], [0.5], [9.5]])
    >>> a = kmeans(x, jax.random.key(0), num_clusters=2)
    >>> bool(a[0] == a[2] != a[1] == a[3])
    True
    """
    num_clusters = _checks.check_int("num_clusters", num_clusters, 1)
    iterations = _checks.check_int("iterations", iterations, 0)
    length = x.shape[0]
    if length == 0:
        return jnp.zeros((0,), jnp.int32)
    x = jax.lax.stop_gradient(x).astype(score_dtype(x.dtype))
    real = jnp.ones(length, bool) if key_mask is None else jnp.asarray(key_mask)
    x = _checks.zero_masked(x, key_mask)
    # Drawn in float32 for every input dtype, so that all of them start alike.
    lots = jnp.where(real, jax.random.uniform(rng, (length,), jnp.float32), -1)
    first = _checks.largest(lots, min(num_clusters, length))
    usable = real[first]
    # Padding belongs to no cluster, so it has no weight.
    nowhere = jnp.asarray(num_clusters, jnp.int32)

    def assign(centroid: jax.Array) -> jax.Array:
        return jnp.where(real, _nearest(x, centroid, usable), nowhere)

    def iterate(_: int, centroid: jax.Array) -> jax.Array:
        return _means(x, assign(centroid), centroid)[0]

    centroid = jax.lax.fori_loop(0, iterations, iterate, x[first])
    return assign(centroid)


def _centroid_attention(
    query: jax.Array,
    key: jax.Array,
    labels: jax.Array,
    num_clusters: int,
    key_mask: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Weights of the mean query of every cluster, [C, T], and their logits."""
    members = _one_hot(labels, num_clusters, query.dtype)
    sums = _scores.matmul(members.T, query)
    sizes = members.astype(sums.dtype).sum(axis=0)
    centroid = sums / jnp.maximum(sizes, 1)[:, None]
    logits = scale * _scores.matmul(centroid.astype(query.dtype), key.T)
    allowed = None if key_mask is None else key_mask[None, :]
    return normalize_softmax(logits, allowed), logits


def clustered(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    num_clusters: int = 64,
    iterations: int = 10,
) -> jax.Array:
    """Clustered attention: like queries share one result, in O(T·C·(H·i + V)).

    o_t = Σ_s A[a_t, s] v_s with A = softmax(scale · Q̄ Kᵀ) and q̄_j the mean of the
    queries of cluster j.

    Clusters come from k-means with Euclidean distances, which is what the paper bounds
    the error by. (The paper's program hashes queries to bits first, and compares
    those, to save time.) No gradient flows through the assignment; it flows through
    the means.

    Equal to `dot_product` once C ≥ T, where every query is its own cluster.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      rng: random key, for the first centres.
      key_mask: bool [T], True = a real token, or None. Queries of padding weigh nothing
        in the means, and give zeros.
      num_clusters: C.
      iterations: i, of k-means.

    Reference: Vyas et al., 2020, arXiv:2007.04825, section 3.2.

    >>> query, key = 2 * jnp.log(jnp.array([[1.0], [3.0]])), jnp.array([[0.0], [1.0]])
    >>> value, rng = jnp.array([[0.0], [4.0]]), jax.random.key(0)
    >>> out = clustered(query, key, value, rng=rng, num_clusters=1)
    >>> out.round(4).tolist()  # both have the result of their mean, log 3
    [[3.0], [3.0]]
    """
    one = "clustered", _WHY
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (_checks.zero_masked(x, key_mask) for x in (query, key, value))
    options = {"num_clusters": num_clusters, "iterations": iterations}
    labels = kmeans(query, rng, key_mask=key_mask, **options)
    weights, _ = _centroid_attention(query, key, labels, num_clusters, key_mask, scale)
    shared = _scores.matmul(weights.astype(value.dtype), value)
    out = shared.at[labels].get(mode="clip").astype(value.dtype)
    return _checks.zero_masked(out, key_mask)


def improved_clustered(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    num_clusters: int = 64,
    top_k: int = 32,
    iterations: int = 10,
) -> jax.Array:
    """Clustered attention with the largest weights exact, in O(T·(C·H·i + k·H + k·V)).

    Let A be the weights of the centroids (see `clustered`), K_j the k keys that
    centroid j weighs most, and m_j = Σ_{s ∈ K_j} A[j, s]. A query t of cluster j has

    w[t, s] = m_j · exp(l[t, s]) / Σ_{r ∈ K_j} exp(l[t, r])  for s ∈ K_j,
    w[t, s] = A[j, s]                                        elsewhere,

    with l = scale · Q Kᵀ. So the mass that the centroid gives to its best keys is kept,
    and shared out by the query's own scores.

    Equal to `dot_product` once C ≥ T or k ≥ T.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      rng: random key, for the first centres.
      key_mask: bool [T], True = a real token, or None. Queries of padding weigh nothing
        in the means, and give zeros.
      num_clusters: C.
      top_k: k.
      iterations: i, of k-means.

    Reference: Vyas et al., 2020, arXiv:2007.04825, section 3.3.

    >>> x, value = jnp.eye(2, 4), jnp.array([[1.0], [3.0]])
    >>> rng = jax.random.key(0)
    >>> out = improved_clustered(x, x, value, rng=rng, num_clusters=1)
    >>> [round(o, 3) for o in out[:, 0].tolist()]
    [1.755, 2.245]
    """
    one = "improved_clustered", _WHY
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    top_k = _checks.check_int("top_k", top_k, 1)
    dtype = score_dtype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (
        jnp.asarray(_checks.zero_masked(x, key_mask)) for x in (query, key, value)
    )
    key_mask = None if key_mask is None else jnp.asarray(key_mask)
    options = {"num_clusters": num_clusters, "iterations": iterations}
    labels = kmeans(query, rng, key_mask=key_mask, **options)
    weights, scores = _centroid_attention(
        query, key, labels, num_clusters, key_mask, scale
    )
    # Chosen by score, not by weight: many weights may be zero.
    scores = jax.lax.stop_gradient(scores)
    if key_mask is not None:
        scores = jnp.where(key_mask[None, :], scores, MASKED_LOGIT)
    best = _checks.largest(scores, min(top_k, key.shape[0]))  # [C, k]
    row = jnp.arange(num_clusters)[:, None]
    mass = weights[row, best].sum(axis=1)
    rest = _scores.matmul(weights.at[row, best].set(0).astype(value.dtype), value)

    own = best.at[labels].get(mode="clip")  # [T, k]

    def take(x: jax.Array) -> jax.Array:
        """[T, k, ...]: many queries take one key, whose gradients add up in float32."""
        return x.astype(dtype)[own].astype(x.dtype)

    logits = scale * _scores.einsum("th,tkh->tk", query, take(key))
    exact = normalize_softmax(logits, None if key_mask is None else key_mask[own])
    exact *= mass.at[labels].get(mode="clip")[:, None]
    out = _scores.einsum("tk,tkv->tv", exact.astype(value.dtype), take(value))
    out += rest.at[labels].get(mode="clip")
    return _checks.zero_masked(out.astype(value.dtype), key_mask)


def clusterformer_init(
    rng: jax.Array,
    head_dim: int,
    *,
    num_clusters: int = 64,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Centroids of `clusterformer` for one head: random directions of length one.

    Args:
      num_clusters: C.

    Returns:
      {"centroid": [C, H]}.

    >>> clusterformer_init(jax.random.key(0), 4, num_clusters=3)["centroid"].shape
    (3, 4)
    """
    num_clusters, head_dim = _checks.check_sizes(
        num_clusters=num_clusters, head_dim=head_dim
    )
    drawn = jax.random.normal(rng, (num_clusters, head_dim), dtype)
    return {"centroid": drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)}


def _routed(query: jax.Array, key: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Direction of (q + k)/2, what decides on the cluster of a token, ungraded."""
    query, key = jax.lax.stop_gradient((query, key))
    return shared_vector(query, key, key_mask)[1]


def clusterformer(
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
    """Cluster-Former: tokens of one cluster meet, in O(T·(c + C)·H + T·log T).

    o_t = Σ_{s ∈ P_t} w[t, s] v_s, with w[t, ·] the softmax over P_t of
    scale · q_t · k_s. The cluster of a token is argmax_j cos(x_t, μ_j). Tokens are
    sorted by cluster and position and cut into chunks of c; P_t holds the tokens of the
    same cluster in the chunk of t and in the one before it.

    The paper clusters hidden states, which this function does not see. Here
    x_t = (q_t + k_t)/2 stands for them, for the assignment alone. Chunks that overlap
    by half, in the paper, are chunks that look one back here, and they do not look
    across the borders of a cluster. For what differs in the causal case see
    `attn_jax.attention.bucketed`.

    No gradient reaches the centroids: `clusterformer_update` moves them.

    Equal to `dot_product` with C = 1 and c ≥ T.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"centroid": [C, H]}.
      key_mask: bool [T], True = a real token, or None. Padding is in no cluster, and
        gives zeros.
      chunk_size: c.

    Reference: Wang et al., 2020, arXiv:2009.06097.

    >>> x, value = jnp.eye(2, 2), jnp.array([[1.0], [3.0]])
    >>> params = {"centroid": jnp.eye(2, 2)}
    >>> clusterformer(x, x, value, params=params).tolist()
    [[1.0], [3.0]]
    """
    one = "clusterformer", "queries and keys are one sorted sequence"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    _checks.check_params("clusterformer", params, {"centroid": "CH"}, H=query.shape[1])
    x = _routed(query, key, key_mask)
    centroid = unit_rows(jax.lax.stop_gradient(params["centroid"]).astype(x.dtype))
    buckets = _most_alike(x, centroid)
    return bucketed(
        query,
        key,
        value,
        buckets[None, :],
        num_buckets=centroid.shape[0],
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
        chunk_size=chunk_size,
    )


def _most_alike(x: jax.Array, centroid: jax.Array) -> jax.Array:
    """Number of the centroid with the largest product with each row: int32 [T]."""
    products = jnp.matmul(x, centroid.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, axis=1).astype(jnp.int32)


def clusterformer_update(
    params: Mapping[str, jax.Array],
    query: jax.Array,
    key: jax.Array,
    key_mask: jax.Array | None = None,
    *,
    iterations: int = 10,
) -> dict[str, jax.Array]:
    """Moves the centroids of `clusterformer` by k-means over tokens.

    Each iteration, from where they are, assigns tokens by the largest cosine and sets a
    centroid to the direction of the mean of its tokens; one without tokens stays. The
    paper does this from time to time, over tokens kept from many sequences:
    concatenate them.

    Args:
      params: {"centroid": [C, H]}.
      query: [T, H].
      key: [T, H].
      key_mask: bool [T], True = a real token, or None.
      iterations: i.

    Returns:
      {"centroid": [C, H]}, rows of length one.

    Raises:
      ValueError: on wrong shapes or parameters, or a negative `iterations`.
      TypeError: on wrong dtypes.

    Reference: Wang et al., 2020, arXiv:2009.06097.

    >>> x = jnp.array([[3.0, 4.0]])
    >>> new = clusterformer_update({"centroid": jnp.eye(2)}, x, x)
    >>> [round(m, 3) for m in new["centroid"][1].tolist()]
    [0.6, 0.8]
    """
    one = "clusterformer_update", _WHY
    _checks.check_inputs(query, key, key, key_mask=key_mask, one_sequence=one)
    _checks.check_params("clusterformer", params, {"centroid": "CH"}, H=query.shape[1])
    iterations = _checks.check_int("iterations", iterations, 0)
    x = _routed(query, key, key_mask)
    centroid = unit_rows(params["centroid"].astype(x.dtype))
    real = jnp.ones(x.shape[0], bool) if key_mask is None else key_mask

    def iterate(_: int, centroid: jax.Array) -> jax.Array:
        nowhere = jnp.asarray(centroid.shape[0], jnp.int32)
        labels = jnp.where(real, _most_alike(x, centroid), nowhere)
        return unit_rows(_means(x, labels, centroid)[0])

    centroid = _checks.varying(centroid, x, real)
    centroid = jax.lax.fori_loop(0, iterations, iterate, centroid)
    return {"centroid": centroid.astype(params["centroid"].dtype)}
