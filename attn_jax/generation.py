"""Generation: a sequence model as a recurrent network, one token after the other.

A causal model that is written as a pure step, ``(params, state, token) -> (state,
output)``, generates with the cost of one token a token. What the state is tells models
apart: a growing list of keys and values for softmax attention (`cache_step`), a matrix
of constant size for linear attention (`attn_jax.linear_step`), the carry of an LSTM.

`generate` consumes a prompt and goes on from there, in one compiled program.
`generate_uncached` gives the same tokens by a whole forward pass for each of them: the
reference, and what generation costs without a state.

Letters: B batch, P tokens of a prompt, H size of query and key, V size of a value, L
longest sequence, C blocks of a cache, c positions of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype
from attn_jax.attention.reformer_attention import _tiling, lsh_buckets, shared_vector

__all__ = [
    "HashCache",
    "KeyValueCache",
    "cache_state",
    "cache_step",
    "generate",
    "generate_uncached",
    "hash_state",
    "hash_step",
    "sample_symbols",
]

Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]
Init = Callable[[int, int], Any]
Sample = Callable[[jax.Array, Any], jax.Array]


# ----------------------------------------------------------------- generation


def sample_symbols(
    rng: jax.Array, logits: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """Draws a symbol from softmax(logits / temperature), or takes the likeliest.

    Args:
      rng: a JAX random key; not read where `temperature` is 0.
      logits: [B, number of symbols].
      temperature: 1 samples from the model, 0 is greedy: the likeliest symbol.

    Returns:
      int32 [B]; −1, which is no symbol, where `logits` hold NaN.

    Raises:
      ValueError: if the temperature is negative.

    >>> sample_symbols(jax.random.key(0), jnp.array([[0.0, 9.0]]), temperature=0.0)
    Array([1], dtype=int32)
    """
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 or more, but is {temperature}.")
    logits = logits.astype(score_dtype(logits.dtype))
    if temperature == 0:
        drawn = jnp.argmax(logits, axis=-1)
    else:
        drawn = jax.random.categorical(rng, logits / temperature, axis=-1)
    return jnp.where(jnp.isnan(logits).any(axis=-1), -1, drawn.astype(jnp.int32))


def generate(
    params: Any,
    prompt: jax.Array,
    steps: int,
    rng: jax.Array,
    *,
    step: Step,
    init: Init,
    sample: Sample = sample_symbols,
) -> jax.Array:
    """Continues a prompt token by token: x_t ~ sample(output of the tokens before t).

    One compiled program: a scan over the prompt that keeps nothing but the state, and
    a scan over the new tokens. Beside the tokens it returns it needs the memory of one
    state and one step, so for linear attention and recurrent networks memory does not
    grow with the length. Token k is drawn with ``jax.random.fold_in(rng, k)``.

    `step`, `init` and `sample` are told apart by identity: pass the same objects again
    and the program is not compiled anew.

    Args:
      params: what `step` takes, any pytree.
      prompt: [B, P, ...] with P ≥ 1: the tokens to begin with, such as a start symbol.
        Integers of any width become int32.
      steps: number of new tokens, at least 1.
      rng: a JAX random key.
      step: pure, ``(params, state, token [B, ...]) -> (state, output)``; the output
        says what the next token is.
      init: ``(B, L) -> state``, before any token, with room for L of them. Where
        `step` returns its arrays in another dtype, they begin in that one.
      sample: ``(rng, output) -> token [B, ...]``, integers of any width where the
        prompt is of integers, else in its dtype.

    Returns:
      The new tokens [B, steps, ...].

    Raises:
      ValueError: if there is no prompt, or `steps` is below 1.
      TypeError: if `steps` is no int, or what is sampled is no token as in the prompt.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236, section 3.4.

    >>> def step(params, state, token):  # counts up, whatever came before
    ...     return state, jax.nn.one_hot(token + 1, 9)
    >>> generate(None, jnp.array([[2]]), 4, jax.random.key(0), step=step,
    ...          init=lambda batch, length: None,
    ...          sample=lambda rng, logits: jnp.argmax(logits, -1))
    Array([[3, 4, 5, 6]], dtype=int32)
    """
    prompt, steps = _check(prompt, steps)
    return _generate(
        params, prompt, rng, steps=steps, step=step, init=init, draw=sample
    )


def generate_uncached(
    params: Any,
    prompt: jax.Array,
    steps: int,
    rng: jax.Array,
    *,
    apply: Callable[[Any, jax.Array], Any],
    sample: Sample = sample_symbols,
) -> jax.Array:
    """`generate` without a state: a forward pass over all L tokens for each new one.

    The reference that `generate` is equal to, token by token, for the same `rng`.

    Args:
      params: what `apply` takes, any pytree.
      prompt: [B, P, ...] with P ≥ 1.
      steps: number of new tokens, at least 1.
      rng: a JAX random key.
      apply: pure and causal, ``(params, tokens [B, L, ...]) -> outputs [B, L, ...]``,
        where output t is of the tokens up to t.
      sample: as for `generate`.

    Returns:
      The new tokens [B, steps, ...].

    Raises:
      ValueError: if there is no prompt, or `steps` is below 1.
      TypeError: if `steps` is no int, or what is sampled is no token as in the prompt.

    >>> generate_uncached(None, jnp.array([[2]]), 4, jax.random.key(0),
    ...                   apply=lambda params, tokens: tokens + 1,
    ...                   sample=lambda rng, following: following)
    Array([[3, 4, 5, 6]], dtype=int32)
    """
    prompt, steps = _check(prompt, steps)
    return _generate_uncached(
        params, prompt, rng, steps=steps, apply=apply, draw=sample
    )


def _check(prompt: jax.Array, steps: int) -> tuple[jax.Array, int]:
    """The prompt, integers as int32, and the number of steps."""
    if prompt.ndim < 2 or prompt.shape[1] < 1:
        raise ValueError(
            "`prompt` must be [B, P, ...] with at least one token, such as a start "
            f"symbol, but has shape {tuple(prompt.shape)}."
        )
    if jnp.issubdtype(prompt.dtype, jnp.integer):
        prompt = _checks.as_int32("prompt", prompt)
    return prompt, _checks.check_int("steps", steps, 1)


def _drawn(sample: Sample, rng: jax.Array, output: Any, token: jax.Array) -> jax.Array:
    """The next token; what it must look like is told by the one before."""
    new = sample(rng, output)
    if jnp.issubdtype(new.dtype, jnp.integer) and token.dtype == jnp.int32:
        new = _checks.as_int32("sample", new)
    if new.shape != token.shape or new.dtype != token.dtype:
        raise TypeError(
            f"`sample` must return tokens {token.dtype} {tuple(token.shape)} as in "
            f"`prompt`, but returned {new.dtype} {tuple(new.shape)}."
        )
    drawn: jax.Array = _checks.varying(new, token)
    return drawn


def _as_returned(step: Step, params: Any, state: Any, token: jax.Array) -> Any:
    """A first state in the dtypes that it will have after a step."""
    after = jax.eval_shape(step, params, state, token)[0]

    def cast(leaf: Any, then: jax.ShapeDtypeStruct) -> Any:
        same = jnp.result_type(leaf) == then.dtype
        return leaf if same else jnp.asarray(leaf).astype(then.dtype)

    try:
        return jax.tree.map(cast, state, after)
    except ValueError:  # of another structure, which the scan says better
        return state


@functools.partial(jax.jit, static_argnames=("steps", "step", "init", "draw"))
def _generate(
    params: Any,
    prompt: jax.Array,
    rng: jax.Array,
    *,
    steps: int,
    step: Step,
    init: Init,
    draw: Sample,
) -> jax.Array:
    batch, given = prompt.shape[:2]
    state = init(batch, given + steps - 1)

    # A carry keeps its type, so each leaf varies from the start over all the mesh axes
    # that any of these does, and still does after a step that does not touch it.
    given_arrays = (params, prompt, rng)
    token = _checks.varying(prompt[:, -1], given_arrays)

    def advance(state: Any, token: jax.Array) -> tuple[Any, Any]:
        state, output = step(params, state, token)
        return _checks.varying(state, given_arrays), output

    def consume(state: Any, token: jax.Array) -> tuple[Any, None]:
        return advance(state, token)[0], None

    state = _checks.varying(state, given_arrays)
    state = _as_returned(step, params, state, token)
    state, _ = jax.lax.scan(consume, state, jnp.moveaxis(prompt[:, :-1], 1, 0))

    def extend(
        carry: tuple[Any, jax.Array], index: jax.Array
    ) -> tuple[tuple[Any, jax.Array], jax.Array]:
        state, token = carry
        state, output = advance(state, token)
        token = _drawn(draw, jax.random.fold_in(rng, index), output, token)
        return (state, token), token

    steps_to_come = jnp.arange(steps, dtype=jnp.int32)
    _, tokens = jax.lax.scan(extend, (state, token), steps_to_come)
    return jnp.moveaxis(tokens, 0, 1)


@functools.partial(jax.jit, static_argnames=("steps", "apply", "draw"))
def _generate_uncached(
    params: Any,
    prompt: jax.Array,
    rng: jax.Array,
    *,
    steps: int,
    apply: Callable[[Any, jax.Array], Any],
    draw: Sample,
) -> jax.Array:
    given = prompt.shape[1]
    # What is not known yet is zeros; no output before it depends on them.
    room = [(0, 0), (0, steps - 1)] + [(0, 0)] * (prompt.ndim - 2)
    tokens = jnp.pad(prompt, room)

    def extend(
        carry: tuple[jax.Array, jax.Array], index: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tokens, token = carry
        last = given - 1 + index
        output = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, last, 1, keepdims=False),
            apply(params, tokens),
        )
        token = _drawn(draw, jax.random.fold_in(rng, index), output, token)
        zero = jnp.zeros((), last.dtype)
        where = (zero, last + 1, *(zero,) * (tokens.ndim - 2))
        # The very last token has no place; nobody reads it.
        kept = jax.lax.dynamic_update_slice(tokens, token[:, None], where)
        tokens = jnp.where(index < steps - 1, kept, tokens)
        return (tokens, token), token

    start = _checks.varying((tokens, prompt[:, -1]), params, prompt, rng)
    _, found = jax.lax.scan(extend, start, jnp.arange(steps, dtype=jnp.int32))
    return jnp.moveaxis(found, 0, 1)


# ------------------------------------------------------------ softmax attention


class KeyValueCache(NamedTuple):
    """What softmax attention remembers: every key and value so far.

    Room for C · c positions from the beginning, in blocks, so that a step reads those
    that are filled and no other. Leading axes, such as batch and heads, stand between
    C and c.

    Attributes:
      key: [C, ..., c, H].
      value: [C, ..., c, V].
    """

    key: jax.Array
    value: jax.Array


def cache_state(
    length: int,
    head_dim: int,
    value_dim: int,
    *,
    batch: tuple[int, ...] = (),
    block_size: int = 112,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> KeyValueCache:
    """The state of `cache_step` before the first token.

    Args:
      length: positions there must be room for, L.
      head_dim: H.
      value_dim: V.
      batch: leading axes, such as (B, N).
      block_size: c at most; blocks are as even as can be.
      dtype: of keys and values.

    Returns:
      Zeros, of C = ⌈L / c⌉ blocks.

    Raises:
      ValueError: on a size below 1.
      TypeError: on a size that is no int.

    >>> cache_state(100, 4, 3, batch=(2,), block_size=64).value.shape
    (2, 2, 50, 3)
    """
    length = _checks.check_int("length", length, 1)
    block_size = _checks.check_int("block_size", block_size, 1)
    blocks = -(-length // block_size)
    size = -(-length // blocks)
    return KeyValueCache(
        jnp.zeros((blocks, *batch, size, head_dim), dtype),
        jnp.zeros((blocks, *batch, size, value_dim), dtype),
    )


def _in_room(
    position: jax.Array, room: int, *arrays: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """A position as int32 in 0 … room − 1, and arrays that are NaN if it was not."""
    why = ", the room of the state: make it with a larger `length`"
    position = _checks.check_ids("position", position, room, why=why)
    exists = position >= 0
    return jnp.maximum(position, 0), [
        jnp.where(exists, x, jnp.asarray(jnp.nan, x.dtype)) for x in arrays
    ]


def cache_step(
    cache: KeyValueCache,
    position: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
) -> tuple[KeyValueCache, jax.Array]:
    """One token of causal softmax attention with a key-value cache: O(t) in time.

    o_t = Σ_{s ≤ t} exp(scale · q·k_s) v_s / Σ_{s ≤ t} exp(scale · q·k_s)

    Equal to row t of `attn_jax.dot_product` with `is_causal=True`. The sums go over
    the blocks that hold anything, under a running maximum. Not to be differentiated in
    reverse mode: for training use the parallel form.

    Args:
      cache: keys and values of the positions before; `cache_state` makes the first.
      position: int [], t, below C · c.
      query: [..., H], with the leading axes of the cache.
      key: [..., H].
      value: [..., V].
      scale: factor of the scores; None means 1/√H.

    Returns:
      The cache with this key and value in it, and the output [..., V] in the dtype of
      the value.

    Raises:
      ValueError: if the shapes do not belong together, or a known position is beyond
        the room of the cache; a traced one gives NaN from then on.
      TypeError: if the position is no integer.

    >>> cache = cache_state(2, 4, 1)
    >>> x = jnp.ones(4)
    >>> cache, out = cache_step(cache, jnp.int32(0), x, x, jnp.array([3.0]))
    >>> cache, out = cache_step(cache, jnp.int32(1), x, x, jnp.array([5.0]))
    >>> out.tolist()
    [4.0]
    """
    batch, (size, head_dim) = cache.key.shape[1:-2], cache.key.shape[-2:]
    letters = ("B",) * len(batch)
    for name, array, width in (
        ("query", query, head_dim),
        ("key", key, head_dim),
        ("value", value, cache.value.shape[-1]),
    ):
        if array.shape != (*batch, width):
            raise ValueError(
                f"`{name}` must have the shape [{', '.join([*letters, 'H or V'])}] = "
                f"{(*batch, width)} of one position of the cache, but has shape "
                f"{tuple(array.shape)}."
            )
    dtype = score_dtype(query.dtype)
    scale = head_dim**-0.5 if scale is None else scale
    room = size * cache.key.shape[0]
    position, (key, value) = _in_room(position, room, key, value)
    block, row = position // size, position % size
    zero = jnp.zeros((), jnp.int32)
    where = (block, *(zero,) * len(batch), row, zero)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)[None, ..., None, :]
        return jax.lax.dynamic_update_slice(old, new, where)

    cache = KeyValueCache(put(cache.key, key), put(cache.value, value))
    scaled = query.astype(dtype) * jnp.asarray(scale, dtype)
    places = jnp.arange(size, dtype=jnp.int32)

    def read(
        index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, mixed = sums
        keys = jax.lax.dynamic_index_in_dim(cache.key, index, keepdims=False)
        values = jax.lax.dynamic_index_in_dim(cache.value, index, keepdims=False)
        scores = jnp.einsum("...h,...sh->...s", scaled, keys.astype(dtype))
        seen = (index * size + places <= position)[(None,) * len(batch)]
        scores = jnp.where(seen, scores, MASKED_LOGIT)
        higher = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        kept = jnp.exp(top - higher)
        new = jnp.einsum("...s,...sv->...v", weights, values.astype(dtype))
        return (
            higher,
            kept * total + weights.sum(axis=-1),
            kept[..., None] * mixed + new,
        )

    empty = jnp.zeros(batch, dtype)
    sums = (
        jnp.full(batch, MASKED_LOGIT, dtype),
        empty,
        jnp.zeros(value.shape, dtype),
    )
    sums = _checks.varying(sums, scaled, cache, position)
    _, total, mixed = jax.lax.fori_loop(0, block + 1, read, sums)
    return cache, (mixed / total[..., None]).astype(value.dtype)


# -------------------------------------------------------------------- reformer


class HashCache(NamedTuple):
    """What causal `reformer` remembers: all tokens, and how each of them hashed.

    Attributes:
      key: [..., L, H], the shared vectors, of length one.
      value: [..., L, V].
      bucket: int32 [R, ..., L], −1 where there is no token yet.
      tile: int32 [R, ..., L], which tile of its bucket a token is in.
      counts: int32 [R, ..., n], tokens of each bucket.
    """

    key: jax.Array
    value: jax.Array
    bucket: jax.Array
    tile: jax.Array
    counts: jax.Array


def hash_state(
    length: int,
    head_dim: int,
    value_dim: int,
    *,
    batch: tuple[int, ...] = (),
    num_buckets: int = 64,
    num_rounds: int = 4,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> HashCache:
    """The state of `hash_step` before the first token.

    Args:
      length: positions there must be room for, L.
      head_dim: H.
      value_dim: V.
      batch: leading axes, such as (B, N).
      num_buckets: n.
      num_rounds: R.
      dtype: of keys and values.

    >>> hash_state(16, 4, 3, num_buckets=2, num_rounds=1).bucket.shape
    (1, 16)
    """
    rounds = (num_rounds, *batch)
    return HashCache(
        jnp.zeros((*batch, length, head_dim), dtype),
        jnp.zeros((*batch, length, value_dim), dtype),
        jnp.full((*rounds, length), -1, jnp.int32),
        jnp.zeros((*rounds, length), jnp.int32),
        jnp.zeros((*rounds, num_buckets), jnp.int32),
    )


def hash_step(
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
      cache: of the positions before; `hash_state` makes the first.
      position: int [], t, below L.
      query: [..., H], with the leading axes of the cache.
      key: [..., H].
      value: [..., V].
      rng: random key of the rotations, the same at every step.
      scale: as for `reformer`.
      chunk_size: c, as for `reformer`.

    Returns:
      The new cache, and the output [..., V] in the dtype of the value.

    Raises:
      ValueError: if a known position is beyond the room of the cache; a traced one
        gives NaN.
      TypeError: if the position is no integer.

    Reference: Kitaev et al., 2020, arXiv:2001.04451, section 2.

    >>> cache = hash_state(2, 4, 1, num_buckets=2, num_rounds=1)
    >>> x, rng = jnp.ones(4), jax.random.key(0)
    >>> cache, out = hash_step(cache, jnp.int32(0), x, x, jnp.array([3.0]), rng=rng)
    >>> cache, out = hash_step(cache, jnp.int32(1), x, x, jnp.array([5.0]), rng=rng)
    >>> out.tolist()  # a token sees itself only where it sees no other
    [3.0]
    """
    batch, (length, head_dim) = cache.key.shape[:-2], cache.key.shape[-2:]
    rounds, num_buckets = cache.counts.shape[0], cache.counts.shape[-1]
    tile_size, back = _tiling(chunk_size, chunk_size, True)
    dtype = score_dtype(query.dtype)
    scale = 1.0 if scale is None else scale
    position, (query, key, value) = _in_room(position, length, query, key, value)
    flat = (query.reshape(-1, head_dim), key.reshape(-1, head_dim))
    x, unit = (part.reshape(*batch, head_dim) for part in shared_vector(*flat, None))
    buckets = functools.partial(lsh_buckets, num_buckets=num_buckets, num_rounds=rounds)
    if rng.ndim == 0 or not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        bucket = buckets(x.reshape(-1, head_dim), rng).reshape(rounds, *batch)
    else:
        heads = x.reshape(-1, *x.shape[-2:])
        bucket = jax.vmap(buckets, (1, 0), 2)(heads, rng).reshape(rounds, *batch)
    own = jax.nn.one_hot(bucket, num_buckets, dtype=jnp.int32)
    tile = (own * cache.counts).sum(axis=-1) // tile_size
    past = (jnp.arange(length) < position)[(None,) * (len(batch) + 1)]
    apart = tile[..., None] - cache.tile
    visible = (cache.bucket == bucket[..., None]) & (apart >= 0) & (apart <= back)
    visible = (visible & past).any(axis=0)
    logits = jnp.einsum(
        "...h,...sh->...s",
        x.astype(query.dtype).astype(dtype),
        cache.key.astype(dtype),
    )
    logits = jnp.where(visible, logits * jnp.asarray(scale, dtype), MASKED_LOGIT)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, weights, 0)
    mixed = jnp.einsum("...s,...sv->...v", weights, cache.value.astype(dtype))
    out = _checks.safe_divide(mixed, weights.sum(axis=-1)[..., None])
    alone = ~visible.any(axis=-1)
    out = jnp.where(alone[..., None], value.astype(dtype), out).astype(value.dtype)

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
