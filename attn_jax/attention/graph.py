"""Graph attention: a node attends to its neighbours, by a mask or by a list of edges.

Attention over a graph is attention under a mask, and so every variant with `mask` is a
graph network: see `attn_jax.masks.from_adjacency` and `from_edges`. Here are the two
ways of scoring that come from graph networks, `gat` and `gatv2`, and
`graph_attention`, which does the same from a list of edges, at a cost per edge instead
of one per pair of nodes.

Letters besides those of `attn_jax.attention`: T queries (receivers), S keys (senders),
E edges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

__all__ = [
    "gat",
    "gat_init",
    "gatv2",
    "gatv2_init",
    "graph_attention",
    "unique_edges",
]

Score = Literal["dot_product", "gat", "gatv2"]

# Of the LeakyReLU, as both papers have it.
_SLOPE = 0.2

_LAYOUTS = {"gat": {"query": "H", "key": "H"}, "gatv2": {"score": "H"}}

# Channels that are added to the scores of `gatv2` in one pass over them.
_UNROLL = 4


def _leaky(x: jax.Array) -> jax.Array:
    """max(x, 0.2 x)."""
    return jax.nn.leaky_relu(x, _SLOPE)


def _halves(
    query: jax.Array, key: jax.Array, params: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """What `gat` adds up: a_q · q_t as [T], and a_k · k_s as [S]."""
    return tuple(  # type: ignore[return-value]
        _scores.matmul(x, params[n].astype(x.dtype))
        for n, x in (("query", query), ("key", key))
    )


def gat_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Parameters of `gat` for one head, drawn with a variance of 1/(2H).

    Returns:
      {"query": [H], "key": [H]}: the two halves of the paper's vector a.

    >>> gat_init(jax.random.key(0), 4)["query"].shape
    (4,)
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    both = jax.random.normal(rng, (2, head_dim), dtype) * (2 * head_dim) ** -0.5
    return {"query": both[0], "key": both[1]}


def gat(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Attention of graph attention networks: each node alone gives its part of a score.

    o_t = Σ_s softmax_s(LeakyReLU(a_q · q_t + a_k · k_s) + bias[t, s]) v_s

    `mask` holds the graph. In the paper query, key and value are the same linear map
    of the nodes. With both vectors zero it is the mean over the neighbours. All
    queries rank the keys alike, which `gatv2` mends.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      bias: [T or 1, S or 1] or None, added after the LeakyReLU; −∞ masks.
      mask: bool [T or 1, S or 1], True = attend, or None for the complete graph.
      params: {"query": [H], "key": [H]}, as made by `gat_init`.

    Reference: Veličković et al., 2017, arXiv:1710.10903, equation 3.

    >>> params = {"query": jnp.ones(1), "key": jnp.log(jnp.array([3.0]))}
    >>> key, value = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [4.0]])
    >>> out = gat(jnp.array([[0.0], [2.0]]), key, value, params=params)
    >>> out.round(4).tolist()  # all queries rank the keys alike
    [[3.0], [3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    _checks.check_params("gat", params, _LAYOUTS["gat"], H=query.shape[1])
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    of_query, of_key = _halves(query, key, params)
    logits = _leaky(of_query[:, None] + of_key[None, :])
    return _scores.attend(logits, value, bias, pairs)


def gatv2_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Parameters of `gatv2` for one head, drawn with a variance of 1/H.

    Returns:
      {"score": [H]}: the paper's vector a.

    >>> gatv2_init(jax.random.key(0), 4)["score"].shape
    (4,)
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    return {"score": head_dim**-0.5 * jax.random.normal(rng, (head_dim,), dtype)}


def _gatv2_scores(query: jax.Array, key: jax.Array, score: jax.Array) -> jax.Array:
    """All scores a · LeakyReLU(q_t + k_s), [T, S], without the [T, S, H] inside."""

    @jax.checkpoint  # The backward pass makes each layer anew instead of keeping it.
    def add_channel(
        total: jax.Array, channel: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        of_query, of_key, weight = channel
        return total + weight * _leaky(of_query[:, None] + of_key[None, :]), None

    wide = score_dtype(query.dtype)
    total = jnp.zeros((query.shape[0], key.shape[0]), wide)
    channels = (query.T.astype(wide), key.T.astype(wide), score.astype(wide))
    total = _checks.varying(total, channels)
    return jax.lax.scan(add_channel, total, channels, unroll=_UNROLL)[0]


def gatv2(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Graph attention whose queries rank the keys each in their own way.

    o_t = Σ_s softmax_s(a · LeakyReLU(q_t + k_s) + bias[t, s]) v_s

    `mask` holds the graph. In the paper query and key are two linear maps of the
    nodes, and the value is the key. With a = 0 it is the mean over the neighbours. It
    is `additive` with a LeakyReLU and without maps of its own.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      mask: bool [T or 1, S or 1], True = attend, or None for the complete graph.
      params: {"score": [H]}, as made by `gatv2_init`.

    Reference: Brody et al., 2021, arXiv:2105.14491, equation 7.

    >>> params = {"score": jnp.log(jnp.array([3.0]))}
    >>> key, value = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [4.0]])
    >>> gatv2(jnp.zeros((1, 1)), key, value, params=params).round(4).tolist()
    [[3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    _checks.check_params("gatv2", params, _LAYOUTS["gatv2"], H=query.shape[1])
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    logits = _gatv2_scores(query, key, params["score"].astype(query.dtype))
    return _scores.attend(logits, value, bias, pairs)


def check_nodes(name: str, index: ArrayLike, num_nodes: int) -> jax.Array:
    """A list of nodes [E] as int32 in 0 … num_nodes − 1, or −1 where traced and none.

    Raises:
      TypeError: if they are no integers.
      ValueError: if it is no vector, or a known one names a node that does not exist.
    """
    if np.ndim(index) != 1:
        raise ValueError(
            f"`{name}` must be a vector [E], but has shape {np.shape(index)}; use "
            "`jax.vmap` for a batch of graphs."
        )
    why = "; mark edges that are padding by `edge_mask` and give them any node in range"
    return _checks.check_ids(name, index, num_nodes, why=why)


def graph_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    senders: ArrayLike,
    receivers: ArrayLike,
    bias: jax.Array | None = None,
    edge_mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array] | None = None,
    score: Score = "dot_product",
    scale: float | None = None,
) -> jax.Array:
    """Attention along the edges of a list, in time and memory O(E·(H + V)).

    o_t = Σ_e w_e v_{senders[e]} over the edges e with receivers[e] = t,
    w_e = exp(l_e) / Σ_{e': receivers[e'] = t} exp(l_{e'})

    Equal to `dot_product`, `gat` or `gatv2` under the mask
    `masks.from_edges(senders, receivers, T)`, and on the complete graph without one.
    Every listed edge counts: an edge that is listed twice weighs twice as much, as two
    parallel edges of a multigraph do, whereas a mask knows no number; `unique_edges`
    lists each once. A node sees itself if an edge says so.

    Args:
      query: [T, H], of the receivers.
      key: [S, H], of the senders.
      value: [S, V], of the senders.
      senders: [E] int of any width, the key at which each edge begins.
      receivers: [E] int, the query at which each edge ends, in any order. Concrete
        edges out of range raise; traced ones, whose values are unknown, are dropped.
      bias: [E], added to the scores, or None; −∞ masks.
      edge_mask: bool [E], True = a real edge, or None.
      params: those of `gat_init` or `gatv2_init` if `score` is "gat" or "gatv2".
      score: how an edge is scored: "dot_product", "gat" or "gatv2".
      scale: factor of the dot products; None means 1/√H.

    Returns:
      [T, V], in the dtype of the inputs; zeros for a node that no edge enters.

    Raises:
      ValueError: on wrong shapes, parameters, indices or an unknown `score`, or a
        `scale` or `params` that the score does not use.

    Reference: Veličković et al., 2017, arXiv:1710.10903, section 2.2.

    >>> x = jnp.ones((3, 4))
    >>> value = jnp.array([[1.0], [3.0], [5.0]])
    >>> senders, receivers = jnp.array([0, 1, 2]), jnp.array([1, 0, 1])
    >>> graph_attention(x, x, value, senders, receivers).tolist()
    [[3.0], [3.0], [0.0]]
    """
    _checks.check_inputs(query, key, value)
    num_queries, dim = query.shape
    num_keys = key.shape[0]
    senders = check_nodes("senders", senders, num_keys)
    receivers = check_nodes("receivers", receivers, num_queries)
    edges = senders.shape[0]
    _checks.check_shape("receivers", receivers, ("E",), {"E": edges})
    if bias is not None:
        _checks.check_float("bias", bias)
        _checks.check_shape("bias", bias, ("E",), {"E": edges})
    if edge_mask is not None:
        _checks.check_bool("edge_mask", edge_mask)
        _checks.check_shape("edge_mask", edge_mask, ("E",), {"E": edges})
    _checks.check_choice("score", score, get_args(Score))
    if score == "dot_product":
        if params is not None:
            raise ValueError("`params` is of no use where `score` is 'dot_product'.")
    elif scale is not None:
        raise ValueError(f"`scale` is of no use where `score` is {score!r}.")
    else:
        _checks.check_params(score, params, _LAYOUTS[score], H=dim)
    if 0 in (edges, num_queries, num_keys):
        return jnp.zeros((num_queries, value.shape[1]), value.dtype)

    real = (senders >= 0) & (receivers >= 0)
    if edge_mask is not None:
        real &= edge_mask
    # An edge that does not count reads node 0, so that nothing of its own can leak.
    senders, receivers = jnp.where(real, senders, 0), jnp.where(real, receivers, 0)

    def touched(nodes: jax.Array, count: int) -> jax.Array:
        return jax.ops.segment_sum(real.astype(jnp.int32), nodes, count) > 0

    # A node without any edge may be anything, also NaN, which 0 times it would be too.
    query = _checks.zero_masked(query, touched(receivers, num_queries))
    sends = touched(senders, num_keys)
    key, value = (_checks.zero_masked(x, sends) for x in (key, value))
    wide = score_dtype(query.dtype)
    if score == "gat":
        assert params is not None
        of_query, of_key = _halves(query, key, params)
        logits = _leaky(of_query[receivers] + of_key[senders])
    elif score == "gatv2":
        assert params is not None
        hidden = _leaky(query.astype(wide)[receivers] + key.astype(wide)[senders])
        logits = hidden @ params["score"].astype(query.dtype).astype(wide)
    else:
        factors = query.astype(wide)[receivers] * key.astype(wide)[senders]
        logits = factors.sum(axis=1) * (dim**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias.astype(wide)
        real &= ~(logits < 0.5 * MASKED_LOGIT)  # −∞ masks, and NaN stays NaN
    logits = jnp.where(real, logits, MASKED_LOGIT)

    def total(numbers: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(numbers, receivers, num_queries)

    # Where no edge enters, the maximum is −∞ and is never read.
    top = jax.ops.segment_max(jax.lax.stop_gradient(logits), receivers, num_queries)
    weights = jnp.where(real, jnp.exp(logits - top[receivers]), 0)
    # Not 0 · v: what does not count may not even be a number.
    values = jnp.where(real[:, None], value.astype(wide)[senders], 0)
    mixed = total(weights[:, None] * values)
    return _checks.safe_divide(mixed, total(weights)[:, None]).astype(value.dtype)


def unique_edges(
    senders: ArrayLike, receivers: ArrayLike, num_nodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lists each edge once, for `graph_attention`, in order of receiver and sender.

    It runs in numpy before any tracing, since the number of edges may change.

    Args:
      senders: [E] int.
      receivers: [E] int.
      num_nodes: number of nodes T = S.

    Returns:
      senders [E'] and receivers [E'], with E' ≤ E and the dtypes they came in.

    Raises:
      ValueError: if the lists differ in length, are no vectors or name a node that
        does not exist.
      TypeError: if an index or `num_nodes` is no integer.

    >>> senders, receivers = unique_edges([2, 0, 2], [1, 1, 1], 3)
    >>> senders.tolist(), receivers.tolist()
    ([0, 2], [1, 1])
    """
    num_nodes = _checks.check_int("num_nodes", num_nodes, 1)
    senders, receivers = np.asarray(senders), np.asarray(receivers)
    check_nodes("senders", senders, num_nodes)
    check_nodes("receivers", receivers, num_nodes)
    sizes = {"E": senders.shape[0]}
    _checks.check_shape("receivers", jnp.asarray(receivers), ("E",), sizes)
    codes = np.unique(receivers.astype(np.int64) * num_nodes + senders.astype(np.int64))
    return (
        (codes % num_nodes).astype(senders.dtype),
        (codes // num_nodes).astype(receivers.dtype),
    )
