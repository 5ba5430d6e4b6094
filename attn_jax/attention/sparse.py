"""Sparse attention: each query sees a fixed pattern of keys, not all of them.

One softmax runs over the union of what the pattern names: keys nearby, keys at regular
distances, a few keys that all see, random ones. Each function equals `dot_product`
under the mask of its pattern, but scores outside of the pattern's tiles are never made.
Query and key stand in one sequence, so T = S.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _scores, _tiles

__all__ = [
    "bigbird",
    "etc",
    "etc_init",
    "longformer",
    "sparse_fixed",
    "sparse_strided",
]

_WHY = "its pattern is about positions of one sequence"


def sparse_strided(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    stride: int = 64,
) -> jax.Array:
    """Strided attention of the Sparse Transformer: nearby keys and every stride-th one.

    o_t = Σ_s w[t, s] v_s, one softmax over |t − s| ≤ stride or stride | t − s.

    Equal to `dot_product` with stride = 1, or with stride ≥ T − 1. The paper's form is
    causal (`is_causal=True`): then the mask is
    `any_of(window(T, stride, 0), strided(T, stride, is_causal=True))` of
    `attn_jax.masks`. The form that looks both ways adds its mirror image.

    Costs O(T · (stride + T / stride) · H): quadratic in T with a small constant for a
    fixed stride. Choose stride near √T, as the paper does, for O(T·√T·H).

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      stride: distance of the keys far away, and how far a query sees all keys.

    Reference: Child et al., 2019, arXiv:1904.10509, section 4.3 (strided attention).

    >>> x, value = jnp.zeros((6, 2)), jnp.arange(6.0).reshape(6, 1)
    >>> out = sparse_strided(x, x, value, stride=2, is_causal=True)
    >>> round(float(out[5, 0]), 3)  # the mean of 1, 3, 4 and 5
    3.25
    """
    one = "sparse_strided", _WHY
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    stride = _checks.check_int("stride", stride, 1)
    length = query.shape[0]
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)

    pairs: Any = {"bias": bias, "mask": mask, "key_mask": key_mask}
    attend: Callable[..., _tiles.Part] = functools.partial(
        _tiles.attend, query, key, value, **pairs, scale=scale, is_causal=is_causal
    )
    rows, columns = _tiles.window_tiles(length, stride, 0 if is_causal else stride)
    part = attend(rows, columns, lambda t, s: abs(t - s) <= stride)
    if length > 2 * stride:
        classes = _tiles.blocks_of(length, stride).T  # positions of one remainder each
        far = attend(classes, classes, lambda t, s: abs(t - s) > stride)
        part = _tiles.merge(part, far)
    return part.out.astype(value.dtype)


def sparse_fixed(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    block_size: int = 64,
    num_summary: int = 4,
) -> jax.Array:
    """Fixed attention of the Sparse Transformer: the own block and summary positions.

    o_t = Σ_s w[t, s] v_s, one softmax over the keys with
    ⌊t/b⌋ = ⌊s/b⌋ or s mod b ≥ b − c, b = `block_size` and c = `num_summary`.

    A query sees its own block and the last c positions of every block; these gather
    what later layers spread. Equal to `dot_product` with `num_summary` = `block_size`,
    or with `block_size` ≥ T. The paper's form is causal (`is_causal=True`).

    Costs O(T · (b + c·T / b) · H): quadratic in T with a small constant for a fixed
    block. Choose b near √T, as the paper does, for O(c·T·√T·H).

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      block_size: number of positions in a block, the paper's stride.
      num_summary: how many positions at a block's end all queries see. The default
        keeps the ratio of c = 8 to blocks of 128 of the paper.

    Reference: Child et al., 2019, arXiv:1904.10509, section 4.3 (fixed attention).

    >>> x, value = jnp.zeros((6, 2)), jnp.arange(6.0).reshape(6, 1)
    >>> out = sparse_fixed(x, x, value, block_size=2, num_summary=1)
    >>> round(float(out[4, 0]), 3)  # the mean of 1, 3, 4 and 5
    3.25
    """
    one = "sparse_fixed", _WHY
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    block_size = _checks.check_int("block_size", block_size, 1)
    num_summary = _checks.check_int("num_summary", num_summary, 0)
    if num_summary > block_size:
        raise ValueError(
            f"`num_summary` must be at most `block_size`, but is {num_summary} where "
            f"`block_size` is {block_size}."
        )
    length = query.shape[0]

    pairs: Any = {"bias": bias, "mask": mask, "key_mask": key_mask}
    attend: Callable[..., _tiles.Part] = functools.partial(
        _tiles.attend, query, key, value, **pairs, scale=scale, is_causal=is_causal
    )
    blocks = _tiles.blocks_of(length, max(1, min(block_size, length)))
    part = attend(blocks, blocks)
    if len(blocks) > 1 and num_summary:
        everyone = _tiles.blocks_of(length, length)
        ends = blocks[:, block_size - num_summary :].reshape(1, -1)
        others = attend(everyone, ends, lambda t, s: t // block_size != s // block_size)
        part = _tiles.merge(part, others)
    return part.out.astype(value.dtype)


def _with_globals(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int,
    dilation: int,
    num_global: int,
    is_causal: bool,
    extra: Callable[[np.ndarray, np.ndarray, bool], jax.Array] | None = None,
    **options: Any,
) -> jax.Array:
    """A sliding window, and `num_global` tokens in front that see and are seen by all.

    `extra(rows, columns, are_global)` is added to the scaled scores of these tiles.
    """
    length = query.shape[0]
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    num_global = min(num_global, length)

    def attend(
        rows: np.ndarray,
        columns: np.ndarray,
        sees: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> _tiles.Part:
        more = None if extra is None else extra(rows, columns, sees is None)
        given: Any = options | {"is_causal": is_causal, "extra": more}
        return _tiles.attend(query, key, value, rows, columns, sees, **given)

    def sees(t: jax.Array, s: jax.Array) -> jax.Array:
        near = (abs(t - s) <= window * dilation) & ((t - s) % dilation == 0)
        return (near | (s < num_global)) & (t >= num_global)

    dilation = max(1, min(dilation, length))
    window = min(window, length)
    rows, columns = _tiles.window_tiles(
        length, window, 0 if is_causal else window, dilation
    )
    tokens = np.arange(num_global, dtype=np.int32)[None]
    # A global token within the slab stands there twice, and counts once.
    slabs = np.concatenate([columns, np.repeat(tokens, len(columns), axis=0)], axis=1)
    part = attend(rows, slabs, sees)
    if num_global:
        part = _tiles.merge(part, attend(tokens, _tiles.blocks_of(length, length)))
    return part.out.astype(value.dtype)


def longformer(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    window: int = 64,
    dilation: int = 1,
    num_global: int = 1,
) -> jax.Array:
    """Longformer: a sliding, maybe dilated window, and global tokens in front.

    o_t = Σ_s w[t, s] v_s, one softmax over the keys with t < g or s < g or
    (|t − s| ≤ window · dilation and dilation | t − s), g = `num_global`.

    The first g tokens see all keys and are seen by all queries. Equal to `dot_product`
    once `window` ≥ T − 1 with `dilation` = 1, or `num_global` ≥ T. Without global
    tokens and dilation it is `truncated`. The paper gives global attention projections
    of its own; here, with one query, key and value a token, both share theirs.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      is_causal: whether query t attends only to keys s ≤ t; this holds for global
        tokens too. The paper's autoregressive form has no global tokens.
      window: how many keys on each side a query sees (the paper's w is both sides).
      dilation: distance between these keys.
      num_global: number of global tokens; 1 for a class token.

    Reference: Beltagy et al., 2020, arXiv:2004.05150, section 3.1.

    >>> x, value = jnp.zeros((6, 2)), jnp.arange(6.0).reshape(6, 1)
    >>> longformer(x, x, value, window=1)[3].tolist()  # the mean of 0, 2, 3 and 4
    [2.25]
    """
    one = "longformer", _WHY
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    return _with_globals(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        key_mask=key_mask,
        scale=scale,
        is_causal=is_causal,
        window=_checks.check_int("window", window, 0),
        dilation=_checks.check_int("dilation", dilation, 1),
        num_global=_checks.check_int("num_global", num_global, 0),
    )


def _unseen_blocks(
    rng: jax.Array,
    number: jax.Array,
    most: jax.Array,
    num_global: int,
    reach: int,
    num_random: int,
) -> jax.Array:
    """Different blocks that block `number` does not see anyway: int32 [num_random].

    They are of the blocks `num_global` … `most` − 1 without `number` ± `reach`. Each
    set of them is as likely as any other. Where there are not so many, all are named
    and the rest is −1.
    """
    first = jnp.maximum(number - reach, num_global)
    near = jnp.maximum(jnp.minimum(number + reach, most - 1) - first + 1, 0)
    others = most - num_global - near
    taken = jnp.minimum(num_random, others)
    # Floyd's sampling: of 0 … j, or j itself if that one is taken already.
    last = others - taken + jnp.arange(num_random, dtype=jnp.int32)
    draws = jax.random.randint(
        rng, (num_random,), 0, jnp.maximum(last + 1, 1), jnp.int32
    )
    found: list[jax.Array] = []
    for i in range(num_random):
        again = [draws[i] == earlier for earlier in found]
        repeated = functools.reduce(jnp.logical_or, again, jnp.asarray(False))
        found.append(jnp.where(repeated, last[i], draws[i]))
    ranks = jnp.stack(found)
    blocks = num_global + ranks
    blocks = jnp.where(blocks >= first, blocks + near, blocks)
    return jnp.where(jnp.arange(num_random, dtype=jnp.int32) < taken, blocks, -1)


def bigbird(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    rng: jax.Array,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    block_size: int = 64,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    num_random_blocks: int = 3,
) -> jax.Array:
    """BigBird: blocks that see their neighbours, global blocks, and random blocks.

    o_t = Σ_s w[t, s] v_s, one softmax over the keys of the blocks that the block of t
    sees: those at a distance of up to (`num_window_blocks` − 1)/2, the first
    `num_global_blocks`, and random ones; all blocks if t is in a global block.

    Equal to `dot_product` once the window or the global blocks cover the sequence. This
    is the paper's internal construction (ITC), where existing tokens are global. Random
    blocks are drawn for each block of queries, without replacement, among those blocks
    with real tokens that it does not see anyway; where there are fewer than
    `num_random_blocks` of them, it sees all. What a block draws does not depend on the
    length of padding.

    Costs O(T·n·H), n = `block_size` times the number of blocks seen.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      rng: random key of the random blocks; the same key gives the same pattern.
      block_size: number of positions in a block.
      num_window_blocks: how many blocks around its own, with it, a query sees; odd.
      num_global_blocks: how many blocks in front see all and are seen by all.
      num_random_blocks: how many more blocks are drawn for each block of queries.

    Reference: Zaheer et al., 2020, arXiv:2007.14062, section 2 and appendix D.

    >>> x, value = jnp.zeros((6, 2)), jnp.arange(6.0).reshape(6, 1)
    >>> options = dict(block_size=1, num_window_blocks=1, num_random_blocks=0)
    >>> bigbird(x, x, value, rng=jax.random.key(0), **options)[4].tolist()  # 0 and 4
    [2.0]
    """
    one = "bigbird", _WHY
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    block_size = _checks.check_int("block_size", block_size, 1)
    num_window_blocks = _checks.check_int("num_window_blocks", num_window_blocks, 1)
    num_global_blocks = _checks.check_int("num_global_blocks", num_global_blocks, 0)
    num_random_blocks = _checks.check_int("num_random_blocks", num_random_blocks, 0)
    if num_window_blocks % 2 == 0:
        raise ValueError(
            "`num_window_blocks` must be odd, as many blocks before as after a "
            f"query's own and that one, but is {num_window_blocks}."
        )
    length = query.shape[0]

    pairs: Any = {"bias": bias, "mask": mask, "key_mask": key_mask}
    attend: Callable[..., _tiles.Part] = functools.partial(
        _tiles.attend, query, key, value, **pairs, scale=scale
    )
    blocks = _tiles.blocks_of(length, block_size)
    count = len(blocks)
    num_global = min(num_global_blocks, count)
    numbers = np.arange(num_global, count, dtype=np.int32)[:, None]
    reach = min(num_window_blocks // 2, count)
    near = numbers + np.arange(-reach, reach + 1, dtype=np.int32)
    first = np.arange(num_global, dtype=np.int32)[None].repeat(len(numbers), axis=0)
    chosen = np.concatenate([np.where(near < count, near, -1), first], axis=1)
    seen: _tiles.Index = chosen
    if num_random_blocks and len(numbers):
        real = jnp.asarray(length, jnp.int32)
        if key_mask is not None:  # up to the last real token
            ends = jnp.arange(1, length + 1, dtype=jnp.int32)
            real = jnp.where(key_mask, ends, 1).max()
        most = (real + block_size - 1) // block_size

        drawn = jax.vmap(
            lambda number: _unseen_blocks(
                jax.random.fold_in(rng, number),
                number,
                most,
                num_global,
                reach,
                min(num_random_blocks, count),
            )
        )(jnp.asarray(numbers[:, 0]))
        seen = jnp.concatenate([jnp.asarray(chosen), drawn], axis=1)
    seen = _tiles.once(seen)[:, :, None]
    inner = np.arange(block_size, dtype=np.int32)
    columns = jnp.where(seen < 0, -1, seen * block_size + inner[None, None])
    part = attend(
        blocks[num_global:],
        columns.reshape(len(numbers), seen.shape[1] * block_size),
        distinct=True,
    )
    if num_global:
        top = blocks[:num_global].reshape(1, -1)
        part = _tiles.merge(part, attend(top, _tiles.blocks_of(length, length)))
    return part.out.astype(value.dtype)


def etc_init(
    rng: jax.Array,
    head_dim: int,
    *,
    clip: int = 12,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Relative position labels of `etc` for one head, normal with variance 1/H.

    Args:
      clip: largest distance of two long tokens that has a label of its own.

    Returns:
      {"label": [2·clip + 1, H], "global_label": [3, H]}: labels between long tokens,
      for s − t = −clip … clip; then global to global, global to long, long to global.

    >>> jax.tree.map(jnp.shape, etc_init(jax.random.key(0), 8, clip=2))
    {'global_label': (3, 8), 'label': (5, 8)}
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    clip = _checks.check_int("clip", clip, 0)
    draws = jax.random.normal(rng, (2 * clip + 4, head_dim), dtype)
    draws = draws * jnp.asarray(head_dim**-0.5, dtype)
    return {"label": draws[3:], "global_label": draws[:3]}


def etc(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    radius: int = 64,
    num_global: int = 16,
) -> jax.Array:
    """Extended Transformer Construction: global tokens, long tokens, relative labels.

    o_t = Σ_s w[t, s] v_s, l[t, s] = scale · q_t · (k_s + a[t, s]) + bias[t, s], with
    w the softmax of l over the keys with t < g or s < g or |t − s| ≤ `radius`, where
    g = `num_global`.

    The sequence is the paper's global input followed by its long input: [g global
    tokens; T − g long tokens]. Global tokens see and are seen by all, long tokens also
    see each other within the radius. The label a depends on s − t between long tokens,
    clipped, and is one vector each for global to global, global to long, and long to
    global. With labels of zeros this is `longformer`; with these and `radius` ≥ T − 1
    or `num_global` ≥ T it is `dot_product`. Both inputs share their projections here.

    Costs O(T·(g + radius + clip)·H). The paper is about encoders: there is no causal
    form.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"label": [2·clip + 1, H], "global_label": [3, H]}, from `etc_init`.
      radius: how many long tokens on each side a long token sees.
      num_global: how many tokens in front are global.

    Reference: Ainslie et al., 2020, arXiv:2004.08483, section 3.1 (relative
    position encodings) and 3.2 (global-local attention).

    >>> x, value = jnp.zeros((6, 2)), jnp.arange(6.0).reshape(6, 1)
    >>> params = etc_init(jax.random.key(0), 2)
    >>> etc(x, x, value, params=params, radius=1, num_global=1)[3].tolist()
    [2.25]
    """
    one = "etc", _WHY
    _checks.check_inputs(query, key, value, bias, mask, key_mask, one_sequence=one)
    width, layout = query.shape[1], {"label": "lH", "global_label": "gH"}
    labels = _checks.check_params("etc", params, layout, H=width, g=3)["l"]
    clip = labels // 2
    if labels % 2 == 0:
        raise ValueError(
            "`params['label']` must have an odd number of rows, one for each distance "
            f"of −clip … clip, but has {labels}."
        )
    radius = _checks.check_int("radius", radius, 0)
    num_global = _checks.check_int("num_global", num_global, 0)
    factor = width**-0.5 if scale is None else scale

    def against(labels: jax.Array, rows: np.ndarray) -> jax.Array:
        """Scaled scores [blocks, b, labels] of queries against label vectors."""
        queries = _tiles.take(query, rows)
        scores = _scores.einsum("...h,lh->...l", queries, labels.astype(query.dtype))
        return scores * jnp.asarray(factor, scores.dtype)

    def extra(rows: np.ndarray, columns: np.ndarray, are_global: bool) -> jax.Array:
        """Scores of the labels, [blocks, b, n]."""
        to_global = jnp.asarray(columns < num_global)[:, None]
        if are_global:
            ours = against(params["global_label"][:2], rows)
            return jnp.where(to_global, ours[:, :, :1], ours[:, :, 1:])
        # Windows stand in every slab at the same distances from its queries.
        distance = (columns[0][None, :] - rows[0][:, None]).clip(-clip, clip)
        near = against(params["label"], rows)
        near = near[:, np.arange(rows.shape[1])[:, None], distance + clip]
        return jnp.where(to_global, against(params["global_label"][2:], rows), near)

    return _with_globals(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        key_mask=key_mask,
        scale=scale,
        is_causal=False,
        window=radius,
        dilation=1,
        num_global=num_global,
        extra=extra,
    )
