"""Sparse Sinkhorn attention: blocks of keys sorted by a learned soft permutation.

The common idea of the learned patterns is to let content choose the pairs. Here a small
network looks at blocks of keys and says which block every block of queries should meet;
Sinkhorn's iteration makes that a soft permutation, and each query attends to its own
block and to the one that was brought.

Letters besides those of `attn_jax.attention`: b size of a block, B = ⌈T/b⌉ blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype

__all__ = ["sinkhorn", "sinkhorn_init", "sinkhorn_normalize"]

# A place of a sorted block counts by its share of real tokens; with less, not at all.
_LEAST_SHARE = 1e-6


def sinkhorn_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    block_size: int = 64,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Parameters of the sorting network for one head, drawn with LeCun's variance.

    Args:
      max_length: the longest sequence.
      block_size: b, the same as `sinkhorn` is called with.

    Returns:
      {"hidden": [H, H], "out": [H, ⌈max_length / b⌉]}.

    >>> params = sinkhorn_init(jax.random.key(0), 4, max_length=20, block_size=8)
    >>> {name: leaf.shape for name, leaf in sorted(params.items())}
    {'hidden': (4, 4), 'out': (4, 3)}
    """
    head_dim, max_length, block_size = _checks.check_sizes(
        head_dim=head_dim, max_length=max_length, block_size=block_size
    )
    rng_hidden, rng_out = jax.random.split(rng)
    std = head_dim**-0.5
    hidden = std * jax.random.normal(rng_hidden, (head_dim, head_dim), dtype)
    blocks = -(-max_length // block_size)
    out = std * jax.random.normal(rng_out, (head_dim, blocks), dtype)
    return {"hidden": hidden, "out": out}


def sinkhorn_normalize(
    logits: jax.Array,
    iterations: int = 8,
    mask: jax.Array | None = None,
    *,
    is_causal: bool = False,
) -> jax.Array:
    """Makes exp(logits) doubly stochastic by Sinkhorn's iteration, in the log domain.

    After a softmax over rows, each iteration divides columns by their sums, then rows
    by theirs. So rows sum to one exactly, and columns in the limit. Rows and columns
    that the mask excludes wholly are zero.

    Causal balancing divides entry [i, j] by the sum of its column over the rows i' ≤ i,
    so that no row depends on a later one.

    Args:
      logits: [B, B].
      iterations: how often; 0 gives a softmax over the rows.
      mask: bool, broadcastable to [B, B], True = may be positive, or None.
      is_causal: whether columns are summed up to the row alone. Which entries may be
        positive is the mask's business.

    Returns:
      [B, B], in float32 or wider.

    Raises:
      ValueError: if `logits` is no matrix, or `iterations` is negative.
      TypeError: if `iterations` is no int.

    Reference: Sinkhorn, 1964; Tay et al., 2020, arXiv:2002.11296, section 3.1.

    >>> doubly = sinkhorn_normalize(jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    >>> [round(x, 3) for x in doubly[0].tolist()]
    [0.881, 0.119]
    """
    _checks.check_shape("logits", logits, ("B", "B"), {})
    iterations = _checks.check_int("iterations", iterations, 0)
    logits = logits.astype(score_dtype(logits.dtype))
    allowed = jnp.asarray(True) if mask is None else mask
    allowed = jnp.broadcast_to(allowed, logits.shape)
    logits = jnp.where(allowed, logits, MASKED_LOGIT)

    def rows(logits: jax.Array) -> jax.Array:
        total = jax.nn.logsumexp(logits, axis=1, keepdims=True)
        return jnp.where(allowed, logits - total, MASKED_LOGIT)

    def columns(logits: jax.Array) -> jax.Array:
        if is_causal:
            total = jax.lax.cumlogsumexp(logits, axis=0)
        else:
            total = jax.nn.logsumexp(logits, axis=0, keepdims=True)
        return jnp.where(allowed, logits - total, MASKED_LOGIT)

    def balance(logits: jax.Array, _: None) -> tuple[jax.Array, None]:
        return rows(columns(logits)), None

    logits, _ = jax.lax.scan(balance, rows(logits), length=iterations)
    return jnp.where(allowed, jnp.exp(logits), 0)


def _pooled(key: jax.Array, real: jax.Array, is_causal: bool) -> jax.Array:
    """Mean of the real keys of every block, [B, H]; causal: of all up to its first."""
    counts = real.astype(key.dtype)[:, :, None]
    sums, totals = key.sum(axis=1), counts.sum(axis=1)
    if is_causal:
        # All of the blocks before, and the first token of this one. Shifted and not
        # subtracted: no later token may leave a trace, not even by rounding.
        sums, totals = (
            jnp.cumsum(jnp.pad(x, ((1, 0), (0, 0)))[:-1], axis=0)
            for x in (sums, totals)
        )
        sums, totals = sums + key[:, 0], totals + counts[:, 0]
    return sums / jnp.maximum(totals, 1)


def sinkhorn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    rng: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    block_size: int = 64,
    iterations: int = 8,
    temperature: float = 1.0,
) -> jax.Array:
    """Sparse Sinkhorn attention: own block and a sorted one, in O(T·b·H + T²·H/b).

    R = sinkhorn((relu(X W) U + noise) / τ), with x_i the mean of the keys of block i;
    K̃_i = Σ_j R[i, j] K_j and Ṽ_i = Σ_j R[i, j] V_j, token by token of the blocks;
    a query of block i attends to [K_i; K̃_i] and [V_i; Ṽ_i] under one softmax.

    The sort is soft, so every block of keys takes part in each sorted one; that is the
    T²·H/b in the cost. It is less than dense attention's by a factor of b.

    A token of padding has no share in what is mixed: K̃ and Ṽ are means over the real
    ones, and such a place counts in the softmax by how much of R they hold, which is 1
    where all are real. Blocks of padding alone are out of the sort.

    Causal: x_i is the mean over all keys up to the first of block i, only blocks j < i
    are brought to block i, and Sinkhorn's iteration sums columns over rows i' ≤ i. So
    no query depends on a later token.

    Equal to `dot_product` with one block, b ≥ T: the sorted block is then the own one,
    and all keys count twice.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"hidden": [H, H], "out": [H, at least B]} from `sinkhorn_init`.
      rng: random key of the Gumbel noise that the paper adds in training; None for no
        noise. Layers give one in training calls alone, so a deterministic forward pass
        has no noise.
      key_mask: bool [T], True = a real token, or None. Padding gives zeros.
      block_size: b.
      iterations: of Sinkhorn's normalisation.
      temperature: τ; small ones make the permutation hard.

    Raises:
      ValueError: on wrong shapes, T ≠ S, wrong parameters, a sequence that is longer
        than they allow, or an option out of range.

    Reference: Tay et al., 2020, arXiv:2002.11296, section 3. The paper
    sums where this takes means, which makes the sort independent of the block size.

    >>> query, key = jnp.zeros((3, 3)), jnp.eye(3)
    >>> value = jnp.array([[0.0], [2.0], [4.0]])
    >>> params = {"hidden": jnp.eye(3), "out": 99 * jnp.roll(jnp.eye(3), 1, axis=1)}
    >>> out = sinkhorn(query, key, value, params=params, block_size=1)
    >>> out.round(4).tolist()  # own, and the next block's, which the sort has brought
    [[1.0], [3.0], [2.0]]
    """
    one = "sinkhorn", "a block has queries and keys"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    block_size = _checks.check_int("block_size", block_size, 1)
    length, head_dim = query.shape
    layout = {"hidden": "HH", "out": "HB"}
    most = _checks.check_params("sinkhorn", params, layout, H=head_dim)["B"]
    _checks.check_positive("temperature", temperature)
    blocks = -(-length // block_size)
    if blocks > most:
        raise ValueError(
            f"`params` sort at most {most} blocks, but T={length} "
            f"with block_size={block_size} has {blocks}; make them with "
            f"`sinkhorn_init(rng, head_dim, max_length={length}, "
            f"block_size={block_size})` or a larger `max_length`."
        )
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    dtype = score_dtype(query.dtype)
    scale = head_dim**-0.5 if scale is None else scale

    query, keys, values = (
        _tiles.cut(_checks.zero_masked(x, key_mask), block_size)
        for x in (query, key, value)
    )
    real = jnp.ones(length, bool) if key_mask is None else key_mask
    real = _tiles.cut(real, block_size)

    pooled = _pooled(keys.astype(dtype), real, is_causal)
    hidden = jax.nn.relu(pooled @ params["hidden"].astype(dtype))
    logits = hidden @ params["out"][:, :blocks].astype(dtype)
    if rng is not None:
        logits += jax.random.gumbel(rng, logits.shape, jnp.float32).astype(dtype)
    some = real.any(axis=1)
    pairs = some[:, None] & some[None, :]
    if is_causal:
        pairs &= np.tri(blocks, k=-1, dtype=bool)
    sort = sinkhorn_normalize(
        logits / temperature, iterations, pairs, is_causal=is_causal
    ).astype(query.dtype)

    # How much of what is brought to each place is real, [B, b].
    share = _scores.matmul(sort, real.astype(sort.dtype))
    brought = share > _LEAST_SHARE
    divisor = jnp.where(brought, share, 1)[:, :, None]

    def bring(x: jax.Array) -> jax.Array:
        """Blocks [B, b, ·] mixed by the sort."""
        flat = x.reshape(blocks, -1)
        mixed = _scores.matmul(sort, flat)
        return (mixed.reshape(x.shape) / divisor).astype(x.dtype)

    own = jnp.broadcast_to(real[:, None, :], (blocks, block_size, block_size))
    if is_causal:
        own &= np.tri(block_size, dtype=bool)[None]
    both = jnp.concatenate(
        [own, jnp.broadcast_to(brought[:, None, :], own.shape)], axis=2
    )
    logits = _scores.einsum(
        "ith,ish->its", query, jnp.concatenate([keys, bring(keys)], axis=1)
    )
    logits = jnp.where(both, logits * scale, MASKED_LOGIT)
    top = jax.lax.stop_gradient(logits).max(axis=2, keepdims=True)
    weights = jnp.where(both, jnp.exp(logits - top), 0)
    counts = jnp.concatenate([jnp.ones_like(share), share], axis=1)
    weights *= counts[:, None, :]
    mixed = _scores.einsum(
        "its,isv->itv",
        weights.astype(value.dtype),
        jnp.concatenate([values, bring(values)], axis=1),
    )
    out = _checks.safe_divide(mixed, weights.sum(axis=2, keepdims=True))
    out = out.reshape(-1, value.shape[1])[:length].astype(value.dtype)
    return _checks.zero_masked(out, key_mask)
