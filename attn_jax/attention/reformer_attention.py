"""Reformer: attention among tokens that hash to the same bucket, by sorting.

The common idea, shared with `attn_jax.attention.clusterformer`: tokens are
given bucket numbers, sorted by them, and cut into chunks; a chunk attends to itself and
to the one before it, and only within one bucket. `bucketed` does this for any bucket
numbers; `reformer` takes them from random rotations, several times over.

Letters besides those of `attn_jax.attention`: R rounds of hashing, n buckets, c size of
a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype
from attn_jax.attention.cache import in_room
from attn_jax.attention.softmax import dot_product

__all__ = [
    "HashCache",
    "bucketed",
    "lsh_buckets",
    "reformer",
    "reformer_exact",
    "reformer_init_state",
    "reformer_step",
]

# Causal chunks are made of tiles; this many rows at least (as `chunk_size` allows) and
# this many tiles at most.
_LEAST_TILE, _MOST_TILES = 16, 4


def _tiling(length: int, chunk_size: int, is_causal: bool) -> tuple[int, int]:
    """Rows of a tile and how many tiles before its own a query looks back."""
    chunk = max(1, min(chunk_size, length))
    if not is_causal:
        return chunk, 1
    tile = min(chunk, max(_LEAST_TILE, -(-chunk // _MOST_TILES)))
    return tile, -(-chunk // tile)


def _layout(
    buckets: jax.Array, num_buckets: int, tile: int, apart: bool
) -> tuple[jax.Array, int]:
    """Place of every token among the sorted ones, [R, T], and the number of tiles.

    With `apart` every bucket begins a tile of its own, so that where a token stands in
    its tile depends on earlier tokens alone. Tokens of bucket `num_buckets` are padding
    and come last, where they may fall behind the last tile.
    """
    rounds, length = buckets.shape
    order = jnp.argsort(buckets, axis=1, stable=True)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    if not apart:
        return place, -(-length // tile)
    row = jnp.arange(rounds)[:, None]
    counts = jnp.zeros((rounds, num_buckets + 1), jnp.int32).at[row, buckets].add(1)
    wide = -(-counts // tile) * tile
    # By how much each bucket is moved by the gaps before it.
    gaps = jnp.cumsum(wide - counts, axis=1) - (wide - counts)
    most = (length + min(num_buckets, length) * (tile - 1)) // tile
    return place + gaps[row, buckets], most


def bucketed(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    buckets: jax.Array,
    *,
    num_buckets: int,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    chunk_size: int = 64,
    own: bool = True,
) -> jax.Array:
    """Attention within buckets, by sorting and chunking, joined over rounds.

    o_t = Σ_{s ∈ P_t} exp(l[t, s]) v_s / Σ_{s ∈ P_t} exp(l[t, s]) with l = scale · Q Kᵀ
    and P_t = ∪_r {s : b_r(s) = b_r(t), c_r(t) − 1 ≤ c_r(s) ≤ c_r(t)}.

    c_r numbers the chunks of c tokens after a stable sort by bucket and position. A
    pair that several rounds show counts once: it belongs to the first of them. The
    comparison needs bucket and chunk numbers alone, O(R) for each pair.

    Causal attention must not know how later tokens hash, and the borders of the chunks
    do. So there each bucket is cut by itself, into tiles of c/4 tokens (or 16, if that
    is more), and a query sees the tokens s ≤ t of its own tile and of the tiles that
    hold the c tokens before it, all of its bucket.

    Equal to `dot_product` if there is one bucket and c ≥ T.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      buckets: int [R, T], numbers in [0, n); those of padding are not read. Others
        raise where they are known, and give NaN for their token where they are traced.
      num_buckets: n.
      key_mask: bool [T], True = a real token, or None. Others neither see nor are
        seen, and count in no chunk.
      chunk_size: c.
      own: whether a query sees its own position. If not, it does so only where it sees
        nothing else.

    Returns:
      [T, V], in the dtype of the inputs; zeros for padding.

    Raises:
      ValueError: on wrong shapes, T ≠ S, an option below 1, or a bucket out of range.

    Reference: Kitaev et al., 2020, arXiv:2001.04451, section 2.

    >>> value = jnp.array([[1.0], [3.0], [5.0]])
    >>> same = jnp.array([[0, 1, 0]])
    >>> x = jnp.ones((3, 4))
    >>> bucketed(x, x, value, same, num_buckets=2).tolist()
    [[3.0], [3.0], [3.0]]
    """
    one = "bucketed", "queries and keys are one sorted sequence"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    num_buckets, chunk_size = _checks.check_sizes(
        num_buckets=num_buckets, chunk_size=chunk_size
    )
    length = query.shape[0]
    _checks.check_shape("buckets", buckets, ("R", "T"), {"T": length})
    wanted = _checks.as_int32("buckets", buckets)
    if key_mask is not None:
        wanted = jnp.where(jnp.asarray(key_mask)[None, :], wanted, 0)
    buckets = _checks.check_ids("buckets", wanted, num_buckets)
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (
        jnp.asarray(_checks.zero_masked(x, key_mask)) for x in (query, key, value)
    )
    lost = buckets < 0  # they go where padding goes
    buckets = jnp.where(lost, num_buckets, buckets)
    if key_mask is not None:
        key_mask = jnp.asarray(key_mask)
        buckets = jnp.where(key_mask[None, :], buckets, num_buckets)

    rounds = buckets.shape[0]
    tile, back = _tiling(length, chunk_size, is_causal)
    place, tiles = _layout(buckets, num_buckets, tile, apart=is_causal)
    row = jnp.arange(rounds)[:, None]
    # The token in each place, from 1; 0 is an empty place.
    token = jnp.zeros((rounds, tiles * tile), jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), place.shape)
    token = token.at[row, place].set(numbers, mode="drop", unique_indices=True)
    token = token.reshape(rounds, tiles, tile)
    taken, token = token > 0, jnp.maximum(token - 1, 0)
    if key_mask is not None:
        taken &= key_mask[token]

    def look_back(x: jax.Array) -> jax.Array:
        """[R, tiles, (back + 1) · tile, ...]: every tile after those before it."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (back, 0)
        padded = jnp.pad(x, widths)
        views = [padded[:, i : i + tiles] for i in range(back + 1)]
        return jnp.concatenate(views, axis=2)

    # One number tells bucket and tile: the difference is in [0, back] if, and only if,
    # the bucket is the same and the key's tile is one of those that the query sees.
    code = buckets * (tiles + back + 1) + place // tile
    visible = taken[..., :, None] & look_back(taken)[..., None, :]
    first = jnp.full(visible.shape, rounds, jnp.int32)
    for r in reversed(range(rounds)):
        codes = code[r][token]
        apart = codes[..., :, None] - look_back(codes)[..., None, :]
        first = jnp.where((apart >= 0) & (apart <= back), r, first)
    visible &= first == jnp.arange(rounds, dtype=jnp.int32)[:, None, None, None]
    ahead = token[..., :, None] - look_back(token)[..., None, :]
    if is_causal:
        visible &= ahead >= 0
    if not own:
        visible &= ahead != 0

    logits = _scores.einsum("rnth,rnsh->rnts", query[token], look_back(key[token]))
    logits = jnp.where(visible, logits * scale, MASKED_LOGIT)

    def by_token(x: jax.Array) -> jax.Array:
        """[R, T, ...] of [R, tiles, tile, ...]."""
        flat = x.reshape(rounds, tiles * tile, *x.shape[3:])
        return flat.at[row, place].get(mode="clip")

    top = by_token(jax.lax.stop_gradient(logits).max(axis=-1)).max(axis=0)
    weights = jnp.exp(logits - top[token][..., None])
    weights = jnp.where(visible, weights, 0)
    mixed = _scores.einsum(
        "rnts,rnsv->rntv", weights.astype(value.dtype), look_back(value[token])
    )
    total = by_token(weights.sum(axis=-1)).sum(axis=0)
    out = _checks.safe_divide(by_token(mixed).sum(axis=0), total[:, None])
    if not own:
        # Alone in its bucket: its own value, whatever the score.
        out = jnp.where((total == 0)[:, None], value.astype(out.dtype), out)
    out = jnp.where(lost.any(axis=0)[:, None], jnp.nan, out)
    return _checks.zero_masked(out, key_mask).astype(value.dtype)


def lsh_buckets(
    x: jax.Array, rng: jax.Array, *, num_buckets: int, num_rounds: int
) -> jax.Array:
    """Hashes vectors by angle: near ones often get the same number.

    b_r(x) = argmax([x R_r; −x R_r]) with R_r random normal of shape [H, n/2].

    Computed in float32 or wider. Round r draws the same rotation however many rounds
    there are, so more rounds only add pairs.

    Args:
      x: [T, H].
      rng: random key.
      num_buckets: n, even.
      num_rounds: R.

    Returns:
      int32 [R, T], numbers in [0, n).

    Raises:
      ValueError: if n is odd or an option is below 1.
      TypeError: if an option is no int.

    Reference: Andoni et al., 2015, arXiv:1509.02897; Kitaev et al., 2020,
    arXiv:2001.04451, section 2.

    >>> x = jnp.array([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])
    >>> b = lsh_buckets(x, jax.random.key(0), num_buckets=4, num_rounds=1)[0]
    >>> bool(b[0] == b[1]), bool(b[0] == b[2])
    (True, False)
    """
    # Buckets come in pairs of opposite directions.
    num_buckets = _checks.check_int("num_buckets", num_buckets, 2, multiple_of=2)
    num_rounds = _checks.check_int("num_rounds", num_rounds, 1)
    dtype = score_dtype(x.dtype)
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(num_rounds))
    shape = (x.shape[1], num_buckets // 2)
    # Drawn in float32 for every input dtype, so that all of them hash alike.
    rotations = jax.vmap(lambda r: jax.random.normal(r, shape, jnp.float32))(rngs)
    rotated = jnp.einsum(
        "th,rhn->rtn",
        jax.lax.stop_gradient(x).astype(dtype),
        rotations.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    both = jnp.concatenate([rotated, -rotated], axis=-1)
    return jnp.argmax(both, axis=-1).astype(jnp.int32)


def unit_rows(x: jax.Array) -> jax.Array:
    """Rows of length one; rows of zeros stay so, without a gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0, x / jnp.sqrt(jnp.where(zero, 1, square)))


def shared_vector(
    query: jax.Array, key: jax.Array, key_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The shared vector x = (q + k)/2 and x/|x|, in the dtype of scores."""
    dtype = score_dtype(query.dtype)
    query, key = (
        _checks.zero_masked(x, key_mask).astype(dtype) / 2 for x in (query, key)
    )
    x = query + key
    return x, unit_rows(x)


def reformer_exact(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """What `reformer` comes near to: shared-QK attention over all other tokens."""
    x, unit = shared_vector(query, key, key_mask)
    length = query.shape[0]
    others = ~jnp.eye(length, dtype=bool)
    value = _checks.zero_masked(value, key_mask)
    real = jnp.ones(length, bool) if key_mask is None else key_mask
    seen = others & real[None, :]
    if is_causal:
        seen &= jnp.tri(length, dtype=bool)
    # A token that sees no other sees itself.
    seen |= ~seen.any(axis=1, keepdims=True) & ~others
    return dot_product(
        x.astype(query.dtype),
        unit.astype(query.dtype),
        value,
        mask=seen & real[:, None],
        scale=1.0 if scale is None else scale,
    )


def reformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    num_buckets: int = 64,
    num_rounds: int = 4,
    chunk_size: int = 64,
) -> jax.Array:
    """Reformer: attention among tokens that hash alike, in O(T·c·R·H + T·log T).

    o_t = Σ_{s ∈ P_t} w[t, s] v_s, with w[t, ·] the softmax over P_t of
    scale · x_t · x_s/|x_s|, and P_t the tokens s ≠ t that some round puts into the
    bucket of t and no further away than the chunk before (see `bucketed`). A token
    whose P_t is empty sees itself.

    The method shares one vector between query and key, and x_t = (q_t + k_t)/2 is it.
    Whoever passes one array as both gets the paper's model. For linear projections
    q = W_q h and k = W_k h it is the paper's with the shared projection (W_q + W_k)/2,
    so both arguments count alike.

    Rounds are joined under one softmax over the union of their pairs, each counted
    once, as in the paper. Chunks look one back, also where attention is not causal,
    and the first does not wrap around to the last. For what differs in the causal case
    see `bucketed`: there the future may not move the borders of chunks.

    Equal to attention with x and x/|x| to all other tokens once all tokens share a
    bucket in some round and c ≥ T.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      rng: random key of the rotations.
      key_mask: bool [T], True = a real token, or None. Padding is in a bucket of its
        own that nothing sees, and gives zeros.
      scale: factor of the scores; None means 1, as the authors' program has it: keys
        have length one, and queries their own.
      num_buckets: n, even. A bucket should hold about half a chunk: n ≈ 2T/c.
      num_rounds: R.
      chunk_size: c.

    Raises:
      ValueError: on wrong shapes, T ≠ S, an odd n, or an option below 1.

    Reference: Kitaev et al., 2020, arXiv:2001.04451, section 2.

    >>> x = jnp.array([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]])
    >>> value = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> reformer(x, x, value, rng=jax.random.key(0)).tolist()  # no pair but the twins
    [[3.0], [4.0], [1.0], [2.0]]
    """
    one = "reformer", "query and key of a token are one vector"
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    x, unit = shared_vector(query, key, key_mask)
    buckets = lsh_buckets(x, rng, num_buckets=num_buckets, num_rounds=num_rounds)
    return bucketed(
        x.astype(query.dtype),
        unit.astype(query.dtype),
        value,
        buckets,
        num_buckets=num_buckets,
        key_mask=key_mask,
        scale=1.0 if scale is None else scale,
        is_causal=is_causal,
        chunk_size=chunk_size,
        own=False,
    )


class HashCache(NamedTuple):
    """What causal `reformer` remembers: all tokens, and how each of them hashed.

    Attributes:
      key: [L, H], the shared vectors, of length one.
      value: [L, V].
      bucket: int32 [R, L], −1 where there is no token yet.
      tile: int32 [R, L], which tile of its bucket a token is in.
      counts: int32 [R, n], tokens of each bucket.
    """

    key: jax.Array
    value: jax.Array
    bucket: jax.Array
    tile: jax.Array
    counts: jax.Array


def reformer_init_state(
    length: int,
    head_dim: int,
    value_dim: int,
    *,
    num_buckets: int = 64,
    num_rounds: int = 4,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> HashCache:
    """The state of `reformer_step` before the first token.

    Args:
      length: positions there must be room for, L.
      head_dim: H.
      value_dim: V.
      num_buckets: n.
      num_rounds: R.
      dtype: of keys and values.

    >>> reformer_init_state(16, 4, 3, num_buckets=2, num_rounds=1).bucket.shape
    (1, 16)
    """
    return HashCache(
        jnp.zeros((length, head_dim), dtype),
        jnp.zeros((length, value_dim), dtype),
        jnp.full((num_rounds, length), -1, jnp.int32),
        jnp.zeros((num_rounds, length), jnp.int32),
        jnp.zeros((num_rounds, num_buckets), jnp.int32),
    )


def reformer_step(
    cache: HashCache,
    position: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    rng: jax.Array,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[HashCache, jax.Array]:
    """One token of causal `reformer`, equal to its row t for the same `rng`.

    The step compares the token's bucket with those of all tokens before, O(t), and so
    saves no time over a key-value cache; it shows what the parallel form computes.

    Args:
      cache: of the positions before; `reformer_init_state` makes the first.
      position: int [], t, below L.
      query: [H].
      key: [H].
      value: [V].
      rng: random key of the rotations, the same at every step.
      scale: as for `reformer`.
      chunk_size: c, as for `reformer`.

    Returns:
      The new cache, and the output [V] in the dtype of the value.

    Raises:
      ValueError: if a known position is beyond the room of the cache; a traced one
        gives NaN.
      TypeError: if the position is no integer.

    Reference: Kitaev et al., 2020, arXiv:2001.04451, section 2.

    >>> cache = reformer_init_state(2, 4, 1, num_buckets=2, num_rounds=1)
    >>> x, rng = jnp.ones(4), jax.random.key(0)
    >>> cache, out = reformer_step(cache, jnp.int32(0), x, x, jnp.array([3.0]), rng=rng)
    >>> cache, out = reformer_step(cache, jnp.int32(1), x, x, jnp.array([5.0]), rng=rng)
    >>> out.tolist()  # a token sees itself only where it sees no other
    [3.0]
    """
    length = cache.key.shape[0]
    rounds, num_buckets = cache.counts.shape
    tile_size, back = _tiling(chunk_size, chunk_size, True)
    dtype = score_dtype(query.dtype)
    scale = 1.0 if scale is None else scale
    position, (query, key, value) = in_room(position, length, query, key, value)
    x, unit = (part[0] for part in shared_vector(query[None], key[None], None))
    bucket = lsh_buckets(x[None], rng, num_buckets=num_buckets, num_rounds=rounds)[:, 0]
    own = jax.nn.one_hot(bucket, num_buckets, dtype=jnp.int32)
    tile = (own * cache.counts).sum(axis=-1) // tile_size
    apart = tile[:, None] - cache.tile
    visible = (cache.bucket == bucket[:, None]) & (apart >= 0) & (apart <= back)
    visible = (visible & (jnp.arange(length) < position)[None]).any(axis=0)
    query = x.astype(query.dtype).astype(dtype)
    logits = jnp.einsum("h,sh->s", query, cache.key.astype(dtype))
    logits = jnp.where(visible, logits * jnp.asarray(scale, dtype), MASKED_LOGIT)
    weights = jnp.where(visible, jnp.exp(logits - logits.max()), 0)
    mixed = jnp.einsum("s,sv->v", weights, cache.value.astype(dtype))
    out = _checks.safe_divide(mixed, weights.sum())
    out = jnp.where(visible.any(), out, value.astype(dtype)).astype(value.dtype)

    def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        new = jnp.expand_dims(new.astype(old.dtype), axis)
        return jax.lax.dynamic_update_slice_in_dim(old, new, position, axis)

    cache = HashCache(
        put(cache.key, unit, -2),
        put(cache.value, value, -2),
        put(cache.bucket, bucket, -1),
        put(cache.tile, tile, -1),
        cache.counts + own,
    )
    return cache, out
