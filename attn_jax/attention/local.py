"""Local attention: each query sees the keys near it, in time and memory O(T·w).

The queries are taken in blocks. A block of b queries needs one slab of b + w − 1 keys
beside each other, where w is the window, so each block is two plain matrix products
and a softmax between them; scores outside of these tiles are never made.

Letters: T queries and keys, H size of query and key, V size of a value, L keys in the
slab of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks
from attn_jax.attention.softmax import MASKED_LOGIT, score_dtype

__all__ = ["truncated"]

# Blocks side by side in a loop over the others: enough for their products to be shared
# out over the cores of a CPU, few enough for their scores to stay in its cache.
_GROUP = 8

MapBlocks = Literal["auto", "vmap", "loop"]

Index = jax.Array | int


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before any number is: the band, block sizes and options."""

    scale: float
    length: int  # T
    left: int
    right: int
    block: int
    num_blocks: int
    group: int  # blocks computed side by side; divides num_blocks
    slab: int  # L


class _Inputs(NamedTuple):
    """The arrays, padded to whole blocks: Tp is T rounded up."""

    query: jax.Array  # [Tp, H]
    key: jax.Array  # [Tp, H]
    value: jax.Array  # [Tp, V]
    bias: jax.Array | None  # [Tp or 1, Tp or 1]
    mask: jax.Array | None  # bool [Tp or 1, Tp or 1]
    key_mask: jax.Array | None  # bool [Tp]


def _rows(array: jax.Array, start: Index, size: int) -> jax.Array:
    """`size` entries of the leading axis."""
    return jax.lax.dynamic_slice_in_dim(array, start, size)


def _pairs_at(
    shape: tuple[int, ...], start: tuple[Index, Index], size: tuple[int, int]
) -> tuple[tuple[Index, Index], tuple[int, int]]:
    """Where a tile of a bias or mask begins, and its shape; axes of 1 are shared."""
    shared = shape[0] == 1, shape[1] == 1
    begins = (0 if shared[0] else start[0], 0 if shared[1] else start[1])
    return begins, (1 if shared[0] else size[0], 1 if shared[1] else size[1])


def _matmul(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over the named axes, summed in float32 or wider."""
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=score_dtype(left.dtype),
    )


def _slab_start(plan: _Plan, block: Index, reach: int) -> Index:
    """First row of the slab that begins `reach` before a block, kept inside [0, Tp)."""
    last = plan.num_blocks * plan.block - plan.slab
    return jnp.clip(block * plan.block - reach, 0, last)


def _tile_logits(
    plan: _Plan,
    inputs: _Inputs,
    query: jax.Array,
    key: jax.Array,
    start: tuple[Index, Index],
) -> jax.Array:
    """Masked logits of some queries against some keys, which begin at `start`."""
    size = query.shape[0], key.shape[0]
    logits = _matmul(query, key, (1, 1)) * plan.scale
    if inputs.bias is not None:
        at = _pairs_at(inputs.bias.shape, start, size)
        logits = logits + jax.lax.dynamic_slice(inputs.bias, *at).astype(logits.dtype)
    t, s = (first + jnp.arange(n) for first, n in zip(start, size, strict=True))
    offset = s[None, :] - t[:, None]
    allowed = (offset >= -plan.left) & (offset <= plan.right)
    if plan.num_blocks * plan.block > plan.length:
        allowed &= (s < plan.length)[None, :]
    if inputs.key_mask is not None:
        allowed &= _rows(inputs.key_mask, start[1], size[1])[None, :]
    if inputs.mask is not None:
        at = _pairs_at(inputs.mask.shape, start, size)
        allowed &= jax.lax.dynamic_slice(inputs.mask, *at)
    return jnp.where(allowed, logits, MASKED_LOGIT)


def _forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Output [Tp, V] and, per query, log Σ exp(logits) [Tp] (0 if it sees no key)."""

    def one_block(i: Index) -> tuple[jax.Array, jax.Array]:
        start = i * plan.block, _slab_start(plan, i, plan.left)
        query = _rows(inputs.query, start[0], plan.block)
        key = _rows(inputs.key, start[1], plan.slab)
        value = _rows(inputs.value, start[1], plan.slab)
        logits = _tile_logits(plan, inputs, query, key, start)
        # Not below MASKED_LOGIT, also where a bias of −∞ masks the whole row.
        peak = jnp.maximum(logits.max(axis=1), MASKED_LOGIT)
        weights = jnp.exp(logits - peak[:, None])
        total = weights.sum(axis=1)
        mixed = _matmul(weights.astype(value.dtype), value, (1, 0))
        seen = ~(peak <= 0.5 * MASKED_LOGIT)  # and NaN stays NaN
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[:, None], mixed / total[:, None], 0.0)
        log_sum = jnp.where(seen, peak + jnp.log(total), 0.0)
        return out.astype(value.dtype), log_sum

    out, log_sum = _over_blocks(plan, one_block)
    return out.reshape(-1, out.shape[-1]), log_sum.reshape(-1)


def _groups(plan: _Plan) -> jax.Array:
    """Block indices [groups, group]: those of a row are computed side by side."""
    return jnp.arange(plan.num_blocks).reshape(-1, plan.group)


def _over_blocks(plan: _Plan, one_block: Any) -> Any:
    """Calls `one_block(i)` for every block; results gain one or two leading axes."""
    of_group, groups = jax.vmap(one_block), _groups(plan)
    if len(groups) == 1:
        return of_group(groups[0])
    return jax.lax.map(of_group, groups)


class _Saved(NamedTuple):
    """What the backward pass needs for each query beside the inputs."""

    cotangent: jax.Array  # [Tp, V]
    log_sum: jax.Array  # [Tp]
    centre: jax.Array  # [Tp], Σ_s w[t, s] (g_t · v_s) = g_t · o_t


def _tile_gradient(
    plan: _Plan,
    inputs: _Inputs,
    saved: _Saved,
    start: tuple[Index, Index],
    size: tuple[int, int],
) -> tuple[jax.Array, jax.Array, _Inputs, jax.Array]:
    """Weights and gradient of the logits in a tile; the inputs and cotangent there."""
    query = _rows(inputs.query, start[0], size[0])
    cotangent, log_sum, centre = (_rows(x, start[0], size[0]) for x in saved)
    key = _rows(inputs.key, start[1], size[1])
    value = _rows(inputs.value, start[1], size[1])
    logits = _tile_logits(plan, inputs, query, key, start)
    weights = jnp.exp(logits - log_sum[:, None])
    grad_logits = weights * (_matmul(cotangent, value, (1, 1)) - centre[:, None])
    return weights, grad_logits, _Inputs(query, key, value, None, None, None), cotangent


def _backward_by_scan(
    plan: _Plan, inputs: _Inputs, saved: _Saved, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Block by block, each adding to the sums of its keys: five products a tile."""
    wide, narrow = score_dtype(inputs.query.dtype), inputs.query.dtype
    size = plan.block, plan.slab

    def added(total: jax.Array, part: jax.Array, start: tuple[Index, ...]) -> jax.Array:
        old = jax.lax.dynamic_slice(total, start, part.shape)
        return jax.lax.dynamic_update_slice(total, old + part, start)

    def one_block(
        i: Index,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        start = i * plan.block, _slab_start(plan, i, plan.left)
        weights, grad_logits, tile, cotangent = _tile_gradient(
            plan, inputs, saved, start, size
        )
        of_bias = None
        if bias is not None:
            shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
            of_bias = grad_logits.sum(axis=shared, keepdims=True)
        grad_logits = grad_logits.astype(narrow)
        grad_query = _matmul(grad_logits, tile.key, (1, 0))
        of_key = _matmul(grad_logits, tile.query, (0, 0))
        of_value = _matmul(weights.astype(narrow), cotangent, (0, 0))
        return grad_query, of_key, of_value, of_bias

    def one_group(sums: Any, group: jax.Array) -> tuple[Any, jax.Array]:
        grad_key, grad_value, grad_bias = sums
        grad_query, *parts = jax.vmap(one_block)(group)
        for i in range(plan.group):
            of_key, of_value, of_bias = jax.tree.map(lambda x, i=i: x[i], parts)
            start = group[i] * plan.block, _slab_start(plan, group[i], plan.left)
            grad_key = added(grad_key, of_key, (start[1], 0))
            grad_value = added(grad_value, of_value, (start[1], 0))
            if grad_bias is not None:
                at, _ = _pairs_at(grad_bias.shape, start, size)
                grad_bias = added(grad_bias, of_bias, at)
        return (grad_key, grad_value, grad_bias), grad_query

    sums = (
        jnp.zeros(inputs.key.shape, wide),
        jnp.zeros(inputs.value.shape, wide),
        None if bias is None else jnp.zeros(bias.shape, wide),
    )
    sums, grad_query = jax.lax.scan(one_group, sums, _groups(plan))
    return grad_query, *sums


def _backward_by_keys(
    plan: _Plan, inputs: _Inputs, saved: _Saved
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All blocks side by side: seven products a tile, but nothing is added up.

    The queries that see a block of keys lie beside each other too, so a second pass
    takes a slab of queries for each block of keys.
    """
    narrow = inputs.query.dtype

    def of_queries(i: Index) -> jax.Array:
        start = i * plan.block, _slab_start(plan, i, plan.left)
        size = plan.block, plan.slab
        _, grad_logits, tile, _ = _tile_gradient(plan, inputs, saved, start, size)
        return _matmul(grad_logits.astype(narrow), tile.key, (1, 0))

    def of_keys(j: Index) -> tuple[jax.Array, jax.Array]:
        start = _slab_start(plan, j, plan.right), j * plan.block
        size = plan.slab, plan.block
        weights, grad_logits, tile, cotangent = _tile_gradient(
            plan, inputs, saved, start, size
        )
        grad_key = _matmul(grad_logits.astype(narrow), tile.query, (0, 0))
        return grad_key, _matmul(weights.astype(narrow), cotangent, (0, 0))

    return _over_blocks(plan, of_queries), *_over_blocks(plan, of_keys)


def _backward(
    plan: _Plan,
    inputs: _Inputs,
    out: jax.Array,
    log_sum: jax.Array,
    cotangent: jax.Array,
    with_bias: bool,
) -> _Inputs:
    """Gradients of query, key, value and, if asked for, bias."""
    dtype, wide = inputs.query.dtype, score_dtype(inputs.query.dtype)
    bias = inputs.bias if with_bias else None
    centre = (cotangent.astype(wide) * out.astype(wide)).sum(axis=1)
    saved = _Saved(cotangent, log_sum, centre)
    grad_bias: jax.Array | None = None
    if plan.group == plan.num_blocks > _GROUP and bias is None:
        query, key, value = _backward_by_keys(plan, inputs, saved)
    else:
        query, key, value, grad_bias = _backward_by_scan(plan, inputs, saved, bias)
    if bias is not None and grad_bias is not None:
        grad_bias = grad_bias.astype(bias.dtype)
    return _Inputs(
        query=(query.reshape(inputs.query.shape) * plan.scale).astype(dtype),
        key=(key.reshape(inputs.key.shape) * plan.scale).astype(dtype),
        value=value.reshape(inputs.value.shape).astype(dtype),
        bias=grad_bias,
        mask=None,
        key_mask=None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs) -> jax.Array:
    return _forward(plan, inputs)[0]


def _attend_forward(plan: _Plan, inputs: Any) -> tuple[jax.Array, Any]:
    bias = inputs.bias  # here every leaf has a `value` and says if it is `perturbed`
    # The gradient of the bias can be [T, T]: made only if someone asks for it. An empty
    # tuple stands for yes, since the residuals' structure is all that is static.
    with_bias = () if bias is not None and bias.perturbed else None
    inputs = jax.tree.map(lambda leaf: leaf.value, inputs, is_leaf=_is_leaf)
    out, log_sum = _forward(plan, inputs)
    return out, (inputs, out, log_sum, with_bias)


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "perturbed")


def _attend_backward(
    plan: _Plan, residuals: Any, cotangent: jax.Array
) -> tuple[_Inputs]:
    inputs, out, log_sum, with_bias = residuals
    if not isinstance(cotangent, jax.Array):  # a symbolic zero
        cotangent = jnp.zeros(out.shape, out.dtype)
    grads = _backward(plan, inputs, out, log_sum, cotangent, with_bias is not None)
    return (grads,)


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _pad(array: jax.Array, length: int) -> jax.Array:
    """Appends zeros (False) up to the given length of the leading axis."""
    missing = length - array.shape[0]
    if missing == 0:
        return array
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _pad_pairs(array: jax.Array | None, length: int) -> jax.Array | None:
    """Pads a bias or mask [T or 1, T or 1], leaving axes of size 1 alone."""
    if array is None or all(size in (1, length) for size in array.shape):
        return array
    return jnp.pad(array, [(0, 0 if n == 1 else length - n) for n in array.shape])


def _default_block(window: int) -> int:
    """Queries in a block: more make better products, and more scores for nothing."""
    half = 1 << max(2 * window // 3, 1).bit_length() - 1  # w/3 to 2w/3, a power of two
    return min(max(32, half), 128)


def _check_int(name: str, given: int, least: int) -> int:
    """Checks that a static option is a whole number that is large enough."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(
            f"`{name}` must be an int known at trace time, but is "
            f"{type(given).__name__}: {given!r}."
        )
    if given < least:
        raise ValueError(f"`{name}` must be at least {least}, but is {given}.")
    return int(given)


def truncated(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    left: int = 64,
    right: int = 64,
    block_size: int | None = None,
    map_blocks: MapBlocks = "auto",
) -> jax.Array:
    """Dot-product attention to the keys within a window, in O(T · (left + right)).

    o_t = Σ_s w[t, s] v_s over t − left ≤ s ≤ t + right, with
    w[t, s] = exp(l[t, s]) / Σ_s' exp(l[t, s']) and l = scale · Q Kᵀ + bias.

    Equal to `dot_product` under `masks.window(T, left, right)`, and to `dot_product`
    alone once left, right ≥ T − 1. The gradient is a custom rule for reverse mode,
    once: for forward mode or second derivatives use `dot_product` with that mask.

    Queries and keys are of one sequence: where T ≠ S it is unknown which query stands
    beside which key, so that raises.

    Args:
      query: [T, H].
      key: [T, H].
      value: [T, V].
      bias: [T or 1, T or 1] or None; −∞ masks. What lies outside the band is not read.
        Its gradient, of the same shape, is made only if asked for.
      mask: bool [T or 1, T or 1], True = attend, or None; it narrows the band.
      key_mask: bool [T], True = a real token, or None.
      scale: factor of the scores; None means 1/√H. An array is multiplied into the
        query, in its dtype.
      is_causal: whether query t attends only to keys s ≤ t, whatever `right` is.
      left: how many keys before its own position a query sees. The default of 64 on
        both sides keeps a layer local at the lengths (T of several hundred) where
        truncation begins to pay; set it to what the data asks for.
      right: how many keys after its own position a query sees.
      block_size: number of queries in a block at most; None chooses by the window.
      map_blocks: "vmap" computes all blocks side by side, "loop" one after another in
        less memory; "auto" loops on CPU, where plain products are faster than
        batched ones. Equal up to the order of sums.

    Returns:
      [T, V], in the dtype of the inputs; zeros for a query that may attend to nothing.

    Raises:
      ValueError: on wrong shapes, T ≠ S, a negative `left` or `right`, a block size
        below 1, or an unknown `map_blocks`.
      TypeError: on wrong dtypes, such as a float mask or a window that is no int.

    Reference: Yeh et al., 2019, arXiv:1910.12977, section 3.2 (truncated
    self-attention); Beltagy et al., 2020, arXiv:2004.05150, section 3.1 (sliding
    window).

    >>> value = jnp.arange(5.0).reshape(5, 1)
    >>> truncated(jnp.ones((5, 4)), jnp.ones((5, 4)), value, left=1, right=0).tolist()
    [[0.0], [0.5], [1.5], [2.5], [3.5]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask, shared_axes=True)
    left, right = _check_int("left", left, 0), _check_int("right", right, 0)
    if block_size is not None:
        block_size = _check_int("block_size", block_size, 1)
    if map_blocks not in get_args(MapBlocks):
        raise ValueError(
            f"`map_blocks` must be 'auto', 'vmap' or 'loop', but is {map_blocks!r}."
        )
    length = query.shape[0]
    if key.shape[0] != length:
        raise ValueError(
            "`truncated` needs as many keys as queries, since its window is around "
            f"each query's own position, but T={length} and S={key.shape[0]}; use "
            "`dot_product` with a mask that says who sees whom."
        )
    if length == 0:
        return jnp.zeros(value.shape, value.dtype)
    if scale is None:
        scale = query.shape[1] ** -0.5
    elif isinstance(scale, jax.Array):
        query, scale = (query * scale).astype(query.dtype), 1.0
    left, right = min(left, length - 1), 0 if is_causal else min(right, length - 1)
    block_size = _default_block(left + right) if block_size is None else block_size
    if map_blocks == "auto":
        map_blocks = "loop" if jax.default_backend() == "cpu" else "vmap"
    # Groups and blocks as even as can be.
    num_blocks = -(-length // block_size)
    num_groups = 1 if map_blocks == "vmap" else -(-num_blocks // _GROUP)
    group = -(-num_blocks // num_groups)
    num_blocks = num_groups * group
    block = -(-length // num_blocks)
    padded = num_blocks * block
    plan = _Plan(
        scale=float(scale),
        length=length,
        left=left,
        right=right,
        block=block,
        num_blocks=num_blocks,
        group=group,
        slab=min(block + left + right, padded),
    )
    inputs = _Inputs(
        query=_pad(query, padded),
        key=_pad(key, padded),
        value=_pad(value, padded),
        bias=_pad_pairs(bias, padded),
        mask=_pad_pairs(mask, padded),
        key_mask=None if key_mask is None else _pad(key_mask, padded),
    )
    return _attend(plan, inputs)[:length]
