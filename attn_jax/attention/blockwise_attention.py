"""Dot-product attention block by block: the exact result in O(T + S) memory.

The [T, S] scores never exist. The forward pass makes those of one block of queries
against all the keys that the block may see, takes their softmax and drops them. The
backward pass goes through blocks of keys instead, so that of its five products only the
smallest meets a transposed operand, and makes each block again from the inputs and the
logarithm of the softmax's sum, which is all that the forward pass keeps.

It is written for how XLA:CPU works: plain products of two matrices instead of batched
ones, read from and written to the whole arrays in place, and, where blocks are too
small to be worth both cores, several independent ones in one step of the loop, which
XLA runs side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_jax import masks
from attn_jax.attention import _checks
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype, zero_unseen_arrays

__all__ = ["blockwise", "blockwise_arrays"]

# Measured on a CPU with 1 MB of L2 cache per core; see benchmarks/README.md. Sizes of
# blocks at most: queries in the forward pass, keys in the backward pass, keys where the
# mask is a triangle, and scores. Larger ones no longer pay for the memory they take.
_QUERY_BLOCK = 1024
_KEY_BLOCK = 512
_TRIANGLE_KEY_BLOCK = 256
_BLOCK_SCORES = 1 << 22
# Scores that one step of a loop should hold, in as many blocks as that takes, so that
# its products keep all cores busy; and the most blocks in a step.
_STEP_SCORES = 1 << 20
_MAX_UNROLL = 8
# Where the mask is a triangle, blocks are put into so many groups at most, each of
# which reads the keys that its last block needs.
_MAX_GROUPS = 8


NO_FORWARD_MODE = (
    "blockwise attention has derivatives in reverse mode alone: for `jax.jvp` or "
    "`jax.jacfwd` give `dot_product_attention` implementation='reference' and "
    "`truncated` map_blocks='vmap', or use `dot_product`."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known before any number is: block sizes and options."""

    scale: float
    left: int | None  # a query sees so many keys before its own position; None: all
    right: int | None  # and after
    query_block: int  # in the forward pass
    key_block: int  # in the backward pass
    max_unroll: int


class Inputs(NamedTuple):
    """Whole arrays, where T and S are whole blocks."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, V]
    bias: jax.Array | None  # [B or 1, N or 1, T or 1, S or 1]
    mask: jax.Array | None  # bool, of such a shape
    key_mask: jax.Array | None  # bool [B, S]


class _Head(NamedTuple):
    """Where one head of one example lies in the whole arrays."""

    example: Any
    query: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class _Group:
    """Blocks along one axis that read equally much of the other axis.

    Block i of `first`, ..., `first + count − 1` reads `span` entries from
    `start + i · step` on.
    """

    first: int
    count: int
    span: int
    start: int
    step: int

    def begin(self, i: Any, length: int) -> Any:
        """Where block i begins to read."""
        if self.step == 0:
            return self.start
        return jnp.clip(self.start + i * self.step, 0, length - self.span)


def _groups(
    count: int, size: int, length: int, before: int | None, after: int | None
) -> Iterator[_Group]:
    """Groups of `count` blocks of `size`, whose entry i sees i − before … i + after."""
    if before is None and after is None:
        yield _Group(0, count, length, 0, 0)
        return
    if before is not None and after is not None and count > _MAX_GROUPS:
        span = size + before + after
        if span < length:
            yield _Group(0, count, span, -before, size)
            return
    number = min(count, _MAX_GROUPS)
    for g in range(number):
        first, stop = g * count // number, (g + 1) * count // number
        low = 0 if before is None else min(max(first * size - before, 0), length - 1)
        high = length if after is None else min(stop * size + after, length)
        yield _Group(first, stop - first, max(high - low, 1), low, 0)


def _merge(plan: Plan, groups: Iterable[_Group]) -> list[list[_Group]]:
    """Groups of one block each into one list, to be run side by side; else one each."""
    groups = list(groups)
    if plan.max_unroll > 1 and all(group.count == 1 for group in groups):
        return [groups]
    return [[group] for group in groups]


def _unroll(plan: Plan, total: int, scores: int) -> int:
    """How many of `total` blocks with so many scores each make one step of a loop."""
    most = min(plan.max_unroll, max(1, _STEP_SCORES // scores))
    return max(n for n in range(1, most + 1) if total % n == 0)


def _loop(count: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`carry = step(i, carry)` for i < count."""
    return step(0, carry) if count == 1 else jax.lax.fori_loop(0, count, step, carry)


def _split_index(index: Any, size: int) -> tuple[Any, Any]:
    """Quotient and remainder of an index that is not negative."""
    if isinstance(index, int):
        return divmod(index, size)
    by = jnp.asarray(size, index.dtype)  # a loop counts in int64 under x64
    return jax.lax.div(index, by), jax.lax.rem(index, by)


def _head(inputs: Inputs, index: Any) -> _Head:
    """Head number `index` of all B · N."""
    num_heads, num_kv_heads = inputs.query.shape[2], inputs.key.shape[2]
    example, query = _split_index(index, num_heads)
    return _Head(example, query, _split_index(query, num_heads // num_kv_heads)[0])


def _read(array: jax.Array, example: Any, head: Any, begin: Any, size: int) -> Any:
    """[size, H] of one head of a [B, T, N, H] array."""
    block = jax.lax.dynamic_slice(
        array,
        (example, begin, head, 0),
        (1, size, 1, array.shape[3]),
        allow_negative_indices=False,
    )
    return block.reshape(size, array.shape[3])


def _write(
    array: jax.Array, block: jax.Array, example: Any, head: Any, begin: Any
) -> jax.Array:
    """Puts [size, H] into one head of a [B, T, N, H] array, in its dtype."""
    block = block.astype(array.dtype)[None, :, None]
    return jax.lax.dynamic_update_slice(
        array, block, (example, begin, head, 0), allow_negative_indices=False
    )


def _pairs_at(
    shape: tuple[int, ...], head: _Head, begins: tuple[Any, Any], sizes: tuple[int, int]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Where a block of a [B|1, N|1, T|1, S|1] array begins, and its shape."""
    at = (head.example, head.query, *begins)
    begin = tuple(0 if n == 1 else i for n, i in zip(shape, at, strict=True))
    return begin, (1, 1, *(min(n, m) for n, m in zip(shape[2:], sizes, strict=True)))


def _matmul(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over the named axes, summed in float32 or wider."""
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=score_dtype(left.dtype),
    )


def _scaled(plan: Plan, query: jax.Array) -> tuple[jax.Array, float]:
    """The query times the scale, and the factor that scores then still lack."""
    if plan.scale == 1.0 or query.dtype != score_dtype(query.dtype):
        return query, plan.scale  # a narrow query would be rounded once more
    return query * plan.scale, 1.0


def _finish_logits(
    plan: Plan,
    inputs: Inputs,
    scores: jax.Array,
    head: _Head,
    begins: tuple[Any, Any],
    sizes: tuple[int, int],
    transposed: bool,
) -> jax.Array:
    """Adds the bias to a block of scores [t, s], or [s, t], and masks it."""

    def turn(pairs: jax.Array) -> jax.Array:
        return pairs.T if transposed else pairs

    (t, s), (rows, columns) = begins, sizes
    if inputs.bias is not None:
        at, size = _pairs_at(inputs.bias.shape, head, begins, sizes)
        bias = jax.lax.dynamic_slice(inputs.bias, at, size)[0, 0]
        scores = scores + turn(bias.astype(scores.dtype))
    allowed = []
    if inputs.mask is not None:
        at, size = _pairs_at(inputs.mask.shape, head, begins, sizes)
        allowed.append(jax.lax.dynamic_slice(inputs.mask, at, size)[0, 0])
    if inputs.key_mask is not None:
        at, size = (head.example, s), (1, columns)
        allowed.append(jax.lax.dynamic_slice(inputs.key_mask, at, size))
    if plan.left is not None or plan.right is not None:
        offset = (s - t + jnp.arange(columns))[None, :] - jnp.arange(rows)[:, None]
        if plan.left is not None:
            allowed.append(offset >= -plan.left)
        if plan.right is not None:
            allowed.append(offset <= plan.right)
    if not allowed:
        return scores
    return jnp.where(
        turn(functools.reduce(jnp.logical_and, allowed)), scores, MASKED_LOGIT
    )


def _may_mask(plan: Plan, inputs: Inputs) -> bool:
    """Whether some query might see no key."""
    given = (inputs.bias, inputs.mask, inputs.key_mask, plan.left, plan.right)
    return any(x is not None for x in given)


def forward_blocks(
    plan: Plan, inputs: Inputs, out_dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, V] and log Σ exp(logits) [B, N, T] (0 if no key is seen)."""
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, num_queries, num_heads, _ = query.shape
    num_keys, rows = key.shape[1], plan.query_block
    wide = score_dtype(query.dtype)

    def one_block(head: _Head, t: Any, s: Any, span: int) -> tuple[Any, Any]:
        query_i, factor = _scaled(plan, _read(query, head.example, head.query, t, rows))
        key_i = _read(key, head.example, head.key, s, span)
        value_i = _read(value, head.example, head.key, s, span)
        logits = _matmul(query_i, key_i, (1, 1))
        logits = logits if factor == 1.0 else logits * factor
        logits = _finish_logits(
            plan, inputs, logits, head, (t, s), (rows, span), transposed=False
        )
        # Else XLA:CPU puts all up to the weights into one kernel that runs on one core.
        peak = jax.lax.optimization_barrier(logits.max(axis=1, keepdims=True))
        if not _may_mask(plan, inputs):
            weights = jnp.exp(logits - peak)
            total = weights.sum(axis=1, keepdims=True)
            mixed = _matmul(weights.astype(value.dtype), value_i, (1, 0))
            return mixed / total, peak + jnp.log(total)
        peak = jnp.maximum(peak, MASKED_LOGIT)
        weights = jnp.exp(logits - peak)
        total = weights.sum(axis=1, keepdims=True)
        mixed = _matmul(weights.astype(value.dtype), value_i, (1, 0))
        seen = ~(peak <= 0.5 * MASKED_LOGIT)  # and NaN stays NaN
        total = jnp.where(seen, total, 1.0)
        log_sum = jnp.where(seen, peak + jnp.log(total), 0.0)
        return jnp.where(seen, mixed / total, 0.0), log_sum

    carry = (
        jnp.zeros((batch, num_queries, num_heads, value.shape[3]), out_dtype),
        jnp.zeros((batch, num_heads, num_queries), wide),
    )
    carry = _checks.varying(carry, inputs)
    groups = _groups(num_queries // rows, rows, num_keys, plan.left, plan.right)
    for together in _merge(plan, groups):
        count = together[0].count
        total = batch * num_heads * count
        scores = rows * sum(group.span for group in together)
        unroll = _unroll(plan, total, scores)

        def step(
            i: Any,
            carry: Any,
            together: Sequence[_Group] = together,
            count: int = count,
            unroll: int = unroll,
        ) -> Any:
            made = []
            for u in range(unroll):
                index, block = _split_index(i * unroll + u, count)
                head = _head(inputs, index)
                for group in together:
                    t = (group.first + block) * rows
                    s = group.begin(group.first + block, num_keys)
                    made.append((head, t, one_block(head, t, s, group.span)))
            out, log_sums = carry
            for head, t, (mixed, log_sum) in made:
                out = _write(out, mixed, head.example, head.query, t)
                log_sums = jax.lax.dynamic_update_slice(
                    log_sums, log_sum.reshape(1, 1, rows), (head.example, head.query, t)
                )
            return out, log_sums

        carry = _loop(total // unroll, step, carry)
    return carry


def backward_blocks(
    plan: Plan,
    inputs: Inputs,
    out: jax.Array,
    log_sums: jax.Array,
    cotangent: jax.Array,
    with_bias: bool,
) -> Inputs:
    """Gradients of query, key, value and, if asked for, bias.

    With P the weights, G the cotangent and c = Σ_v G ∘ O: dV = Pᵀ G,
    dS = P ∘ (G Vᵀ − c), dQ = scale · dS K, dK = scale · dSᵀ Q. Blocks are transposed,
    [s, t], and dQᵀ is summed over them.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    rows, wide, dtype = plan.key_block, score_dtype(query.dtype), query.dtype
    # Has the batch of O, also where a vmapped batch shares it: XLA:CPU fuses G Vᵀ − c
    # to wrong numbers where V and O alone have it (jaxlib 0.10.2).
    cotangent = jnp.where(out == out, cotangent, jnp.asarray(jnp.nan, cotangent.dtype))
    merged = _merge(
        plan, _groups(num_keys // rows, rows, num_queries, plan.right, plan.left)
    )

    def one_block(head: _Head, group: _Group, block: Any) -> tuple[Any, ...]:
        s, t = block * rows, group.begin(block, num_queries)
        span = group.span
        query_j, factor = _scaled(plan, _read(query, head.example, head.query, t, span))
        given = _read(cotangent, head.example, head.query, t, span)
        out_j = _read(out, head.example, head.query, t, span)
        # Σ_s w[t, s] (g_t · v_s) = g_t · o_t: the softmax's share of the gradient.
        centre = (given.astype(wide) * out_j.astype(wide)).sum(axis=1)[None, :]
        log_sum = jax.lax.dynamic_slice(
            log_sums, (head.example, head.query, t), (1, 1, span)
        )[0]
        key_j = _read(key, head.example, head.key, s, rows)
        value_j = _read(value, head.example, head.key, s, rows)
        logits = _matmul(key_j, query_j, (1, 1))
        logits = logits if factor == 1.0 else logits * factor
        logits = _finish_logits(
            plan, inputs, logits, head, (t, s), (span, rows), transposed=True
        )
        weights = jnp.exp(logits - log_sum)
        grad_logits = weights * (_matmul(value_j, given, (1, 1)) - centre)
        narrow = grad_logits.astype(dtype)
        grad_key = _matmul(narrow, query_j, (1, 0))
        return (
            (t, s),
            _matmul(key_j.T, narrow, (1, 0)),
            grad_key if factor == 1.0 else grad_key * factor,
            _matmul(weights.astype(dtype), given, (1, 0)),
            grad_logits if with_bias else None,
        )

    def add_to_bias(
        grad_bias: jax.Array, head: _Head, begins: tuple[Any, Any], block: jax.Array
    ) -> jax.Array:
        """Adds a block [s, t] to the gradient of the bias, summed as that is shared."""
        at, size = _pairs_at(
            grad_bias.shape, head, begins, (block.shape[1], block.shape[0])
        )
        shared = tuple(axis for axis in (2, 3) if size[axis] == 1)
        block = block.T[None, None].sum(shared, keepdims=True)
        before = jax.lax.dynamic_slice(grad_bias, at, size)
        return jax.lax.dynamic_update_slice(grad_bias, before + block, at)

    # A step of the outer loop takes `unroll` heads, one of the inner loop a block each
    # of every group.
    scores = max(rows * sum(group.span for group in together) for together in merged)
    unroll = _unroll(plan, batch * num_heads, scores)

    def heads_step(i: Any, grads: Inputs) -> Inputs:
        heads = [_head(inputs, i * unroll + u) for u in range(unroll)]
        nothing = jnp.zeros((head_dim, num_queries), wide)
        sums = [_checks.varying(nothing, inputs)] * unroll  # of dQᵀ
        for together in merged:

            def step(j: Any, carry: Any, together: Sequence[_Group] = together) -> Any:
                sums, grads = list(carry[0]), carry[1]
                blocks = [(u, group) for u in range(unroll) for group in together]
                made = [
                    one_block(heads[u], group, group.first + j) for u, group in blocks
                ]
                for (u, group), made_one in zip(blocks, made, strict=True):
                    head = heads[u]
                    (t, s), grad_query, grad_key, grad_value, grad_logits = made_one
                    if group.span < num_queries:
                        before = jax.lax.dynamic_slice_in_dim(sums[u], t, group.span, 1)
                        sums[u] = jax.lax.dynamic_update_slice_in_dim(
                            sums[u], before + grad_query, t, 1
                        )
                    else:
                        sums[u] = sums[u] + grad_query
                    where = (head.example, head.query, s)
                    grads = grads._replace(
                        key=_write(grads.key, grad_key, *where),
                        value=_write(grads.value, grad_value, *where),
                    )
                    if grads.bias is not None:
                        bias = add_to_bias(grads.bias, head, (t, s), grad_logits)
                        grads = grads._replace(bias=bias)
                return sums, grads

            sums, grads = _loop(together[0].count, step, (sums, grads))
        for u, head in enumerate(heads):
            grad_query = sums[u].T * plan.scale
            written = _write(grads.query, grad_query, head.example, head.query, 0)
            grads = grads._replace(query=written)
        return grads

    # Heads that share keys and values have gradients of their own, added at the end.
    shared = num_heads > num_kv_heads
    per_head = wide if shared else dtype
    grads = Inputs(
        query=jnp.zeros(query.shape, dtype),
        key=jnp.zeros((batch, num_keys, num_heads, head_dim), per_head),
        value=jnp.zeros((batch, num_keys, num_heads, value.shape[3]), per_head),
        bias=jnp.zeros(inputs.bias.shape, wide)
        if with_bias and inputs.bias is not None
        else None,
        mask=None,
        key_mask=None,
    )
    grads = _checks.varying(grads, inputs)
    grads = _loop(batch * num_heads // unroll, heads_step, grads)
    if shared:

        def add(grad: jax.Array) -> jax.Array:
            grad = grad.reshape(*grad.shape[:2], num_kv_heads, -1, grad.shape[3])
            return grad.sum(axis=3).astype(dtype)

        grads = grads._replace(key=add(grads.key), value=add(grads.value))
    if grads.bias is not None and inputs.bias is not None:
        grads = grads._replace(bias=grads.bias.astype(inputs.bias.dtype))
    return grads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, inputs: Inputs) -> jax.Array:
    return forward_blocks(plan, inputs, inputs.value.dtype)[0]


def _attend_forward(plan: Plan, inputs: Any) -> tuple[jax.Array, Any]:
    bias = inputs.bias  # here every leaf has a `value` and says if it is `perturbed`
    # The gradient of the bias can be [T, S]: made only if someone asks for it. An empty
    # tuple stands for yes, since the residuals' structure is all that is static.
    with_bias = () if bias is not None and bias.perturbed else None
    inputs = jax.tree.map(lambda leaf: leaf.value, inputs, is_leaf=_is_leaf)
    # The backward pass takes small differences to the output: it gets it unrounded.
    dtype = inputs.value.dtype
    out, log_sums = forward_blocks(plan, inputs, score_dtype(dtype))
    return out.astype(dtype), (inputs, out, log_sums, with_bias)


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _attend_backward(plan: Plan, residuals: Any, cotangent: jax.Array) -> tuple[Inputs]:
    inputs, out, log_sums, with_bias = residuals
    if not isinstance(cotangent, jax.Array):  # a symbolic zero
        cotangent = jnp.zeros(out.shape, inputs.value.dtype)
    wanted = with_bias is not None
    return (backward_blocks(plan, inputs, out, log_sums, cotangent, wanted),)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _pad(array: jax.Array | None, sizes: Mapping[int, int]) -> Any:
    """Appends zeros (False) up to the given lengths of axes, those of size 1 apart."""
    if array is None:
        return None
    shape = array.shape
    missing = [0 if n == 1 else sizes.get(i, n) - n for i, n in enumerate(shape)]
    return jnp.pad(array, [(0, n) for n in missing]) if any(missing) else array


def _even_block(length: int, most: int) -> int:
    """Size of the fewest blocks of at most `most`, as even as can be."""
    number = -(-length // most)
    return -(-length // number)


def _choose_block(
    length: int, other: int, before: int | None, after: int | None, most: int
) -> int:
    """Size of blocks along an axis whose entry i sees i − before … i + after."""
    if before is not None and after is not None:
        most = min(most, max(before + after, 128))
        other = min(other, most + before + after)
    elif before is not None or after is not None:
        most = min(most, max(length // _MAX_GROUPS, 128))
    return _even_block(length, min(most, max(_BLOCK_SCORES // other, 128)))


def in_blocks(
    given: Inputs,
    scale: float | jax.Array | None,
    sides: tuple[int | None, int | None],
    block_size: int | None = None,
    *,
    side_by_side: bool = True,
) -> tuple[Plan, Inputs]:
    """Block sizes and options, and the arrays ready for them: padded to whole blocks.

    What nobody sees is zeros in them.

    Args:
      given: whole arrays of any length above zero.
      scale: of the scores; None means 1/√H.
      sides: how many keys before and after its own place a query sees.
      block_size, side_by_side: see `blockwise` and `blockwise_arrays`.
    """
    query, key, value, bias, mask, key_mask = given
    batch, num_queries, _, head_dim = query.shape
    num_keys = key.shape[1]
    if scale is None:
        scale = head_dim**-0.5
    elif isinstance(scale, jax.Array):
        wide = score_dtype(query.dtype)
        scaled = query.astype(wide) * scale.astype(wide)
        query, scale = scaled.astype(query.dtype), 1.0
    left, right = sides
    left = None if left is None or left >= num_queries - 1 else left
    right = None if right is None or right >= num_keys - 1 else right
    if block_size is None:
        triangle = (left is None) != (right is None)
        most = _TRIANGLE_KEY_BLOCK if triangle else _KEY_BLOCK
        query_block = _choose_block(num_queries, num_keys, left, right, _QUERY_BLOCK)
        key_block = _choose_block(num_keys, num_queries, right, left, most)
    else:
        query_block = _even_block(num_queries, block_size)
        key_block = _even_block(num_keys, block_size)
    plan = Plan(
        scale=float(scale),
        left=left,
        right=right,
        query_block=query_block,
        key_block=key_block,
        max_unroll=_MAX_UNROLL if side_by_side else 1,
    )
    query, key, value = zero_unseen_arrays(
        query, key, value, mask, key_mask, left, right
    )
    padded_queries = -(-num_queries // query_block) * query_block
    padded_keys = -(-num_keys // key_block) * key_block
    if padded_keys > num_keys and key_mask is None:
        key_mask = jnp.ones((batch, num_keys), bool)
    inputs = Inputs(
        query=_pad(query, {1: padded_queries}),
        key=_pad(key, {1: padded_keys}),
        value=_pad(value, {1: padded_keys}),
        bias=_pad(bias, {2: padded_queries, 3: padded_keys}),
        mask=_pad(mask, {2: padded_queries, 3: padded_keys}),
        key_mask=_pad(key_mask, {1: padded_keys}),
    )
    return plan, inputs


def blockwise_arrays(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    block_size: int | None = None,
    side_by_side: bool = True,
) -> jax.Array:
    """`blockwise` on whole arrays, in a loop over heads and blocks: for CPU.

    The caller has checked the arrays, which are as for `attn_jax.dot_product_attention`
    (the result is [B, T, N, V]); for the options see `blockwise`. With `side_by_side`
    one step of a loop may make several small blocks.
    """
    _checks.check_dtypes(query, key, value)
    if block_size is not None:
        block_size = _checks.check_int("block_size", block_size, 1)
    left, right = masks.window_sides(local_window_size, is_causal)
    if 0 in (*query.shape[:3], key.shape[1]):
        shape = (*query.shape[:3], value.shape[3])
        return jnp.zeros(shape, value.dtype)
    given = Inputs(query, key, value, bias, mask, key_mask)
    plan, inputs = in_blocks(
        given, scale, (left, right), block_size, side_by_side=side_by_side
    )
    inputs = _checks.reverse_mode_only(inputs, NO_FORWARD_MODE)
    # All of one kind, as gradients have to be; those of an array that is the same on
    # all devices are summed when it is made to vary.
    return _attend(plan, _checks.varying(inputs, inputs))[:, : query.shape[1]]


def blockwise(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """Dot-product attention in O(T + S) memory, exact, forward and backward.

    O = softmax(scale · Q Kᵀ + bias) V, equal to `dot_product`, for one block of queries
    after the other. With P the weights, made again from the logarithm of their sum, G
    the cotangent of O and c[t] = Σ_v G[t, v] O[t, v], for one block of keys after the
    other:

        dV = Pᵀ G,  dS = P ∘ (G Vᵀ − c),  dQ = scale · dS K,  dK = scale · dSᵀ Q.

    With `block_size` ≥ T, S it is one block, that is `dot_product` itself. Blocks are
    chosen by the sizes alone, and keys that no query of a block may see are skipped:
    `is_causal` halves the work, and a window of w keys leaves O(T·w) of it. The
    gradient is a custom rule for reverse mode, once: for forward mode or second
    derivatives use `dot_product`.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      bias: [T or 1, S or 1] or None; −∞ masks. Its gradient, of the same shape, is
        made only if asked for.
      scale: factor of the scores; None means 1/√H. An array is multiplied into the
        query, in its dtype.
      local_window_size: (left, right): query t attends only to keys t − left ≤ s ≤
        t + right; one number for both; None for all, as in
        `jax.nn.dot_product_attention`.
      block_size: number of queries (of keys, in the backward pass) in a block at most;
        None chooses.

    Raises:
      ValueError: on wrong shapes, a block size below 1, or a wrong window.

    Reference: Dao et al., 2022, arXiv:2205.14135; Rabe and Staats, 2021,
    arXiv:2112.05682.

    >>> query, key = jnp.log(jnp.array([[3.0]])), jnp.array([[0.0], [1.0], [0.0]])
    >>> value = jnp.array([[0.0], [5.0], [0.0]])
    >>> blockwise(query, key, value, block_size=2).round(4).tolist()  # 1/5, 3/5, 1/5
    [[3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    out = blockwise_arrays(
        query[None, :, None],
        key[None, :, None],
        value[None, :, None],
        None if bias is None else bias[None, None],
        None if mask is None else mask[None, None],
        key_mask=None if key_mask is None else key_mask[None],
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        block_size=block_size,
        side_by_side=False,  # under `jax.vmap` all heads' blocks are side by side
    )
    return out[0, :, 0]
