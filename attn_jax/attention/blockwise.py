"""Dot-product attention block by block: the exact result in O(T + S) memory.

The [T, S] scores never exist: one block of them at a time is made, used and dropped,
with the softmax's maximum and sum carried from block to block. The backward pass makes
each block again from the inputs and the logarithm of the softmax's sum, which is all
that the forward pass keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention.softmax import MASKED_LOGIT, score_dtype

__all__ = ["blockwise"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is known before any number is: block sizes and options."""

    scale: float
    is_causal: bool
    query_block: int
    key_block: int
    num_query_blocks: int
    num_key_blocks: int


class _Inputs(NamedTuple):
    """The arrays, padded to whole blocks: Tp and Sp are T and S rounded up."""

    query: jax.Array  # [Tp, H]
    key: jax.Array  # [Sp, H]
    value: jax.Array  # [Sp, V]
    bias: jax.Array | None  # [Tp or 1, Sp or 1]
    mask: jax.Array | None  # bool [Tp or 1, Sp or 1]
    key_mask: jax.Array | None  # bool [Sp]


def _block(array: jax.Array, index: jax.Array | int, size: int) -> jax.Array:
    """Block `index` along the leading axis."""
    return jax.lax.dynamic_slice_in_dim(array, index * size, size)


def _pairs_at(
    plan: _Plan, shape: tuple[int, ...], i: jax.Array | int, j: jax.Array | int
) -> tuple[tuple[Any, Any], tuple[int, int]]:
    """Where block (i, j) of a bias or mask begins, and its shape."""
    rows, columns = plan.query_block, plan.key_block
    begins = (0 if shape[0] == 1 else i * rows, 0 if shape[1] == 1 else j * columns)
    return begins, (min(shape[0], rows), min(shape[1], columns))


def _matmul(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two matrices over the named axes, summed in float32 or wider."""
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=score_dtype(left.dtype),
    )


def _block_logits(
    plan: _Plan, inputs: _Inputs, query: jax.Array, i: jax.Array | int, j: Any
) -> jax.Array:
    """Masked logits of query block i against key block j."""
    rows, columns = plan.query_block, plan.key_block
    key = _block(inputs.key, j, columns)
    logits = _matmul(query, key, (1, 1)) * plan.scale
    if inputs.bias is not None:
        at = _pairs_at(plan, inputs.bias.shape, i, j)
        bias = jax.lax.dynamic_slice(inputs.bias, *at)
        logits = logits + bias.astype(logits.dtype)
    allowed = None
    if inputs.mask is not None:
        at = _pairs_at(plan, inputs.mask.shape, i, j)
        allowed = jax.lax.dynamic_slice(inputs.mask, *at)
    if inputs.key_mask is not None:
        keys = _block(inputs.key_mask, j, columns)[None, :]
        allowed = keys if allowed is None else allowed & keys
    if plan.is_causal:
        queries, keys = i * rows + jnp.arange(rows), j * columns + jnp.arange(columns)
        causal = queries[:, None] >= keys[None, :]
        allowed = causal if allowed is None else allowed & causal
    return logits if allowed is None else jnp.where(allowed, logits, MASKED_LOGIT)


def _over_key_blocks(
    plan: _Plan, i: jax.Array | int, step: Callable[[Any, Any], Any], start: Any
) -> Any:
    """Folds `step(j, carry)` over the key blocks that query block i may see."""
    if plan.num_key_blocks == 1:
        return step(0, start)
    stop: jax.Array | int = plan.num_key_blocks
    if plan.is_causal:
        # Key blocks that begin after the last query of block i are wholly masked.
        stop = jnp.minimum(((i + 1) * plan.query_block - 1) // plan.key_block + 1, stop)
    return jax.lax.fori_loop(0, stop, step, start)


def _forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Output [Tp, V] and, per query, log Σ exp(logits) [Tp] (0 if it sees no key)."""
    wide = score_dtype(inputs.query.dtype)

    def one_query_block(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        query = _block(inputs.query, i, plan.query_block)

        def step(j: Any, carry: Any) -> Any:
            peak, total, mixed = carry
            logits = _block_logits(plan, inputs, query, i, j)
            value = _block(inputs.value, j, plan.key_block)
            new_peak = jnp.maximum(peak, logits.max(axis=1))
            # While a query has seen no allowed key its peak is MASKED_LOGIT and its
            # sums are meaningless; the first allowed key scales them by exactly 0.
            weights = jnp.exp(logits - new_peak[:, None])
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(axis=1)
            mixed = mixed * shrink[:, None] + _matmul(
                weights.astype(value.dtype), value, (1, 0)
            )
            return new_peak, total, mixed

        start = (
            jnp.full((plan.query_block,), MASKED_LOGIT, wide),
            jnp.zeros((plan.query_block,), wide),
            jnp.zeros((plan.query_block, inputs.value.shape[1]), wide),
        )
        peak, total, mixed = _over_key_blocks(plan, i, step, start)
        seen = ~(peak <= 0.5 * MASKED_LOGIT)  # and NaN stays NaN
        total = jnp.where(seen, total, 1.0)
        out = jnp.where(seen[:, None], mixed / total[:, None], 0.0)
        log_sum = jnp.where(seen, peak + jnp.log(total), 0.0)
        return out.astype(inputs.value.dtype), log_sum

    if plan.num_query_blocks == 1:
        return one_query_block(0)
    out, log_sum = jax.lax.map(one_query_block, jnp.arange(plan.num_query_blocks))
    return out.reshape(-1, out.shape[-1]), log_sum.reshape(-1)


def _backward(
    plan: _Plan,
    inputs: _Inputs,
    out: jax.Array,
    log_sum: jax.Array,
    cotangent: jax.Array,
    with_bias: bool,
) -> _Inputs:
    """Gradients of query, key, value and, if asked for, bias."""
    query, key, value = inputs.query, inputs.key, inputs.value
    bias = inputs.bias if with_bias else None
    wide, dtype = score_dtype(query.dtype), query.dtype
    # Σ_s w[t, s] (g_t · v_s) = g_t · o_t: the softmax's share of the gradient.
    centre = (cotangent.astype(wide) * out.astype(wide)).sum(axis=1)

    def one_query_block(carry: Any, i: jax.Array | int) -> tuple[Any, jax.Array]:
        query_i = _block(query, i, plan.query_block)
        cotangent_i = _block(cotangent, i, plan.query_block)
        log_sum_i = _block(log_sum, i, plan.query_block)
        centre_i = _block(centre, i, plan.query_block)

        def step(j: Any, carry: Any) -> Any:
            grad_query_i, grad_key, grad_value, grad_bias = carry
            start = j * plan.key_block
            key_j = _block(key, j, plan.key_block)
            value_j = _block(value, j, plan.key_block)
            logits = _block_logits(plan, inputs, query_i, i, j)
            weights = jnp.exp(logits - log_sum_i[:, None])
            from_value = _matmul(cotangent_i, value_j, (1, 1))
            grad_logits = weights * (from_value - centre_i[:, None])
            if grad_bias is not None:
                at, size = _pairs_at(plan, grad_bias.shape, i, j)
                shared = tuple(axis for axis in (0, 1) if grad_bias.shape[axis] == 1)
                added = grad_logits.sum(axis=shared, keepdims=True)
                grad_bias = jax.lax.dynamic_update_slice(
                    grad_bias, jax.lax.dynamic_slice(grad_bias, at, size) + added, at
                )
            narrow = grad_logits.astype(dtype)
            grad_query_i = grad_query_i + _matmul(narrow, key_j, (1, 0))
            added_key = _matmul(narrow, query_i, (0, 0))
            added_value = _matmul(weights.astype(dtype), cotangent_i, (0, 0))
            grad_key = jax.lax.dynamic_update_slice_in_dim(
                grad_key, _block(grad_key, j, plan.key_block) + added_key, start, 0
            )
            grad_value = jax.lax.dynamic_update_slice_in_dim(
                grad_value,
                _block(grad_value, j, plan.key_block) + added_value,
                start,
                0,
            )
            return grad_query_i, grad_key, grad_value, grad_bias

        start = (jnp.zeros(query_i.shape, wide), *carry)
        grad_query_i, *sums = _over_key_blocks(plan, i, step, start)
        return tuple(sums), grad_query_i

    sums = (
        jnp.zeros(key.shape, wide),
        jnp.zeros(value.shape, wide),
        None if bias is None else jnp.zeros(bias.shape, wide),
    )
    if plan.num_query_blocks == 1:
        sums, grad_query = one_query_block(sums, 0)
    else:
        sums, grad_query = jax.lax.scan(
            one_query_block, sums, jnp.arange(plan.num_query_blocks)
        )
    grad_key, grad_value, grad_bias = sums
    return _Inputs(
        query=(grad_query.reshape(query.shape) * plan.scale).astype(dtype),
        key=(grad_key * plan.scale).astype(dtype),
        value=grad_value.astype(dtype),
        bias=None
        if bias is None or grad_bias is None
        else grad_bias.astype(bias.dtype),
        mask=None,
        key_mask=None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, inputs: _Inputs) -> jax.Array:
    return _forward(plan, inputs)[0]


def _attend_forward(plan: _Plan, inputs: Any) -> tuple[jax.Array, Any]:
    bias = inputs.bias  # here every leaf has a `value` and says if it is `perturbed`
    # The gradient of the bias can be [T, S]: made only if someone asks for it. An empty
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


def _split(length: int, block_size: int) -> tuple[int, int]:
    """Number of blocks of at most `block_size`, and their size, as even as can be."""
    number = -(-length // block_size)
    return number, -(-length // number)


def _pad(array: jax.Array, length: int) -> jax.Array:
    """Appends zeros (False) up to the given length of the leading axis."""
    missing = length - array.shape[0]
    if missing == 0:
        return array
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _pad_pairs(array: jax.Array | None, rows: int, columns: int) -> jax.Array | None:
    """Pads a bias or mask [T or 1, S or 1], leaving axes of size 1 alone."""
    if array is None or array.shape == (rows, columns):
        return array
    sizes = zip(array.shape, (rows, columns), strict=True)
    return jnp.pad(array, [(0, 0 if have == 1 else n - have) for have, n in sizes])


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
    block_size: int = 512,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """Dot-product attention in O(T + S) memory, exact, forward and backward.

    O = softmax(scale · Q Kᵀ + bias) V, equal to `dot_product`. Over key blocks j, with
    running maximum m, sum ℓ and output o of one query:

        m' = max(m, max_s l_s),  ℓ' = ℓ e^{m−m'} + Σ_s e^{l_s−m'},
        o' = o e^{m−m'} + Σ_s e^{l_s−m'} v_s,  and O = o / ℓ at the end.

    With `block_size` ≥ T, S it is one block, that is `dot_product` itself. The gradient
    is a custom rule for reverse mode, once: for forward mode or second derivatives use
    `dot_product`.

    Args:
      query: [T, H].
      key: [S, H].
      value: [S, V].
      bias: [T or 1, S or 1] or None; −∞ masks. Its gradient, of the same shape, is
        made only if asked for.
      mask: bool [T or 1, S or 1], True = attend, or None.
      key_mask: bool [S], True = a real token, or None.
      scale: factor of the scores; None means 1/√H. An array is multiplied into the
        query, in its dtype.
      is_causal: whether query t attends only to keys s ≤ t; blocks that are wholly
        masked by it are skipped.
      block_size: number of queries, and of keys, in a block at most.
      dropout_rate: must be 0: this function has no dropout.

    Returns:
      [T, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes, a block size below 1, or dropout.
      TypeError: on wrong dtypes, such as a float mask.

    Reference: Dao et al., 2022, arXiv:2205.14135; Rabe and Staats, 2021,
    arXiv:2112.05682.

    >>> value = jnp.arange(6.0).reshape(6, 1)
    >>> blockwise(jnp.ones((6, 4)), jnp.ones((6, 4)), value, block_size=4).tolist()
    [[2.5], [2.5], [2.5], [2.5], [2.5], [2.5]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask, shared_axes=True)
    if dropout_rate:
        raise ValueError(
            "`blockwise` has no dropout on the attention weights (got `dropout_rate`="
            f"{dropout_rate}); use `dot_product`, or drop out the output instead."
        )
    if block_size < 1:
        raise ValueError(f"`block_size` must be at least 1, but is {block_size}.")
    num_queries, num_keys = query.shape[0], key.shape[0]
    if num_queries == 0 or num_keys == 0:
        return jnp.zeros((num_queries, value.shape[1]), value.dtype)
    if scale is None:
        scale = query.shape[1] ** -0.5
    elif isinstance(scale, jax.Array):
        query, scale = (query * scale).astype(query.dtype), 1.0
    num_query_blocks, query_block = _split(num_queries, block_size)
    num_key_blocks, key_block = _split(num_keys, block_size)
    padded_queries = num_query_blocks * query_block
    padded_keys = num_key_blocks * key_block
    if padded_keys > num_keys and key_mask is None:
        key_mask = jnp.ones((num_keys,), bool)
    plan = _Plan(
        scale=float(scale),
        is_causal=is_causal,
        query_block=query_block,
        key_block=key_block,
        num_query_blocks=num_query_blocks,
        num_key_blocks=num_key_blocks,
    )
    inputs = _Inputs(
        query=_pad(query, padded_queries),
        key=_pad(key, padded_keys),
        value=_pad(value, padded_keys),
        bias=_pad_pairs(bias, padded_queries, padded_keys),
        mask=_pad_pairs(mask, padded_queries, padded_keys),
        key_mask=None if key_mask is None else _pad(key_mask, padded_keys),
    )
    return _attend(plan, inputs)[:num_queries]
