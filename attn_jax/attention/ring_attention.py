"""Exact attention on a sequence that is split over devices: keys and values go round.

Each device holds the queries, keys and values of its share of the sequence. Keys and
values are handed on from device to device, and every device takes what it holds into
its softmax, as `blockwise` does for blocks: P − 1 messages later all have seen all. The
next keys travel while the present ones are used. A device never holds more than the
shares of two others, so memory falls as 1/P.

If query t saw keys s ≤ t and each device held a run of tokens, the first would be done
after one turn and the last after P. So tokens are dealt out like cards where attention
is causal, token g to device g mod P: then every device sees a triangle in every turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks
from attn_jax.attention._scores import MASKED_LOGIT, score_dtype
from attn_jax.attention.blockwise_attention import (
    NO_FORWARD_MODE,
    Inputs,
    Plan,
    backward_blocks,
    forward_blocks,
    in_blocks,
)

__all__ = ["deal", "ring", "undeal"]


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known before any number is."""

    plan: Plan
    axis_name: Hashable
    is_causal: bool


def deal(array: jax.Array, axis_name: Hashable) -> jax.Array:
    """From a run of tokens on each device to token g on device g mod P.

    Args:
      array: [T/P, ...], the tokens of this device: a run of T/P of them.
      axis_name: of the mesh, which has P devices along it.

    Returns:
      [T/P, ...]: tokens i, i + P, i + 2P, ... on device i.

    Raises:
      ValueError: if T is no multiple of P².
    """
    rows = array.reshape(-1, _size_of_deal(array, axis_name), *array.shape[1:])
    return jax.lax.all_to_all(rows, axis_name, 1, 0, tiled=True).reshape(array.shape)


def undeal(array: jax.Array, axis_name: Hashable) -> jax.Array:
    """The reverse of `deal`."""
    _size_of_deal(array, axis_name)
    rows = jax.lax.all_to_all(array[:, None], axis_name, 0, 1, tiled=True)
    return rows.reshape(array.shape)


def _size_of_deal(array: jax.Array, axis_name: Hashable) -> int:
    """P, of which the tokens of a share have to be a multiple."""
    size, length = jax.lax.axis_size(axis_name), len(array)
    if length % size:
        raise ValueError(
            f"causal attention in a ring needs T to be a multiple of the square of the "
            f"number of devices along {axis_name!r}, {size}² = {size**2}, but "
            f"T={size * length}: pad the sequence at its end."
        )
    return size


def _pass_on(axis_name: Hashable, tree: Any) -> Any:
    """Arrays of the device before."""
    size = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(tree, axis_name, [(i, (i + 1) % size) for i in range(size)])


def _turns(
    setup: _Ring, inputs: Inputs, take: Any, carry: Any, travelling: Any = None
) -> tuple[Any, Any]:
    """`carry, travelling = take(carry, travelling, inputs)` with each device's keys.

    `travelling` goes along with the keys, and home in the end.
    """
    size = jax.lax.axis_size(setup.axis_name)
    here = jax.lax.axis_index(setup.axis_name)
    of_keys = (inputs.key, inputs.value, inputs.key_mask)

    def with_keys(turn: Any, of_keys: Any) -> tuple[Any, Inputs]:
        """Whether the keys come from a later device, and the inputs with them."""
        key, value, key_mask = of_keys
        later = here < turn  # for they are of device (here − turn) mod P
        if setup.is_causal:
            # Token aP + i may see token bP + j if b < a, or b = a and j ≤ i. Keys of
            # a later device are moved on by one place, and then b ≤ a says it too.
            key, value, key_mask = (
                jnp.where(later, jnp.pad(x, _FIRST[x.ndim])[:, :-1], x)
                for x in (key, value, key_mask)
            )
        return later, inputs._replace(key=key, value=value, key_mask=key_mask)

    def turn(number: Any, state: Any) -> Any:
        of_keys, carry, travelling = state
        coming = _pass_on(setup.axis_name, of_keys)
        number = number.astype(here.dtype)  # a loop counts in int64 under x64
        carry, travelling = take(carry, travelling, *with_keys(number, of_keys))
        return coming, carry, _pass_on(setup.axis_name, travelling)

    state = _checks.varying((of_keys, carry, travelling), inputs, here)
    of_keys, carry, travelling = jax.lax.fori_loop(0, size - 1, turn, state)
    carry, travelling = take(carry, travelling, *with_keys(size - 1, of_keys))
    return carry, _pass_on(setup.axis_name, travelling)


# What pads an array [B, S, ...] by one place at the front.
_FIRST = {n: [(0, 0), (1, 0), *[(0, 0)] * (n - 2)] for n in range(2, 5)}


def _sees(setup: _Ring, inputs: Inputs) -> jax.Array | bool:
    """Which queries see one of these keys: bool [B, 1, T], or True."""
    if inputs.key_mask is None:
        return True
    if not setup.is_causal:
        return inputs.key_mask.any(axis=1)[:, None, None]
    some = jax.lax.cummax(inputs.key_mask.astype(jnp.int8), axis=1) > 0
    last = jnp.arange(inputs.query.shape[1]).clip(max=some.shape[1] - 1)
    return some[:, last][:, None]


def _forward(setup: _Ring, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, V] and log Σ exp(logits) [B, N, T], wide."""
    batch, num_queries, num_heads, _ = inputs.query.shape
    wide = score_dtype(inputs.query.dtype)

    def take(carry: Any, travelling: Any, later: Any, inputs: Inputs) -> Any:
        out, log_sum = carry
        new, new_log_sum = forward_blocks(setup.plan, inputs, wide)
        new_log_sum = jnp.where(_sees(setup, inputs), new_log_sum, MASKED_LOGIT)
        peak = jnp.maximum(log_sum, new_log_sum)
        shares = jnp.exp(log_sum - peak), jnp.exp(new_log_sum - peak)
        total = shares[0] + shares[1]
        old_share, new_share = (
            (share / total).transpose(0, 2, 1)[..., None] for share in shares
        )
        return (old_share * out + new_share * new, peak + jnp.log(total)), travelling

    carry = (
        jnp.zeros((batch, num_queries, num_heads, inputs.value.shape[3]), wide),
        jnp.full((batch, num_heads, num_queries), MASKED_LOGIT, wide),
    )
    (out, log_sum), _ = _turns(setup, inputs, take, carry)
    return out, log_sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setup: _Ring, inputs: Inputs) -> jax.Array:
    return _forward(setup, inputs)[0].astype(inputs.value.dtype)


def _attend_forward(setup: _Ring, inputs: Inputs) -> tuple[jax.Array, Any]:
    out, log_sum = _forward(setup, inputs)
    unseeing = log_sum <= 0.5 * MASKED_LOGIT  # and NaN stays NaN
    log_sum = jnp.where(unseeing, 0.0, log_sum)
    unseeing = unseeing.transpose(0, 2, 1)[..., None]
    kept = inputs._replace(query=jnp.where(unseeing, 0, inputs.query))
    return out.astype(inputs.value.dtype), (kept, out, log_sum)


def _attend_backward(
    setup: _Ring, residuals: Any, cotangent: jax.Array
) -> tuple[Inputs]:
    inputs, out, log_sum = residuals
    wide = score_dtype(inputs.query.dtype)

    def take(carry: Any, travelling: Any, later: Any, inputs: Inputs) -> Any:
        grads = backward_blocks(setup.plan, inputs, out, log_sum, cotangent, False)
        of_keys = [x.astype(wide) for x in (grads.key, grads.value)]
        if setup.is_causal:  # back by the place that the keys were moved on
            of_keys = [jnp.where(later, jnp.pad(x, _LAST)[:, 1:], x) for x in of_keys]
        travelling = [sum_ + x for sum_, x in zip(travelling, of_keys, strict=True)]
        return carry + grads.query.astype(wide), travelling

    carry, *travelling = (
        jnp.zeros(x.shape, wide) for x in (inputs.query, inputs.key, inputs.value)
    )
    query, (key, value) = _turns(setup, inputs, take, carry, travelling)
    given = inputs._replace(key_mask=None)
    grads = given._replace(query=query, key=key, value=value)
    return (jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, given),)


_LAST = [(0, 0), (0, 1), (0, 0), (0, 0)]
_attend.defvjp(_attend_forward, _attend_backward)


def ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    axis_name: Hashable,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    is_dealt: bool = False,
    block_size: int | None = None,
) -> jax.Array:
    """Dot-product attention on a sequence that is split over devices, exact.

    O = softmax(scale · Q Kᵀ) V, equal to `dot_product` on the whole sequence, forward
    and backward, for use inside of `jax.shard_map`: arguments and result are the shares
    of this device, one of the P along a mesh axis. Keys and values go round in P − 1
    messages, in the backward pass their gradients with them in P. On whole arrays it is
    `attn_jax.dot_product_attention(..., implementation="ring")`.

    Where attention is causal, the tokens are dealt out first, so that all devices have
    equally much to do, and the result is brought back. Layers that follow one another
    can leave them so: `deal` what comes in, positions too, and give `is_dealt=True`.

    Args:
      query, key, value: [T/P, H], [S/P, H], [S/P, V], runs of tokens, in order of the
        devices; key_mask: bool [S/P]; others: see `attn_jax.attention`.
      axis_name: of the mesh axis that the sequence is split over.
      is_dealt: whether device i holds tokens i, i + P, i + 2P, ... already, and the
        result is to be so; of no effect but where attention is causal.
      block_size: as for `blockwise`.

    Raises:
      ValueError: on wrong shapes; if T ≠ S, or T is no multiple of P², where attention
        is causal.

    Reference: Liu et al., 2023, arXiv:2310.01889 (ring); Brandon et al., 2023,
    arXiv:2311.09431 (tokens dealt out).

    >>> from jax.sharding import AxisType, PartitionSpec
    >>> mesh = jax.make_mesh((1,), ("sequence",), (AxisType.Auto,))
    >>> spec = PartitionSpec("sequence")
    >>> attend = functools.partial(ring, axis_name="sequence")
    >>> run = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    >>> run(jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.array([[1.0], [3.0]])).tolist()
    [[2.0], [2.0]]
    """
    one = "ring", "where attention is causal, both are of one sequence"
    _checks.check_inputs(
        query, key, value, None, None, key_mask, one_sequence=one if is_causal else None
    )
    _checks.check_dtypes(query, key, value)
    num_queries, num_keys = len(query), len(key)
    if block_size is not None:
        block_size = _checks.check_int("block_size", block_size, 1)
    if is_causal:
        key_mask = jnp.ones(num_keys, bool) if key_mask is None else key_mask
        if not is_dealt:
            query, key, value, key_mask = (
                deal(x, axis_name) for x in (query, key, value, key_mask)
            )
    if 0 in (num_queries, num_keys):
        return jnp.zeros((num_queries, value.shape[1]), value.dtype)
    key, value = (_checks.zero_masked(x, key_mask) for x in (key, value))
    given = Inputs(
        query[None, :, None], key[None, :, None], value[None, :, None], None, None, None
    )
    sides = (None, 0 if is_causal else None)
    plan, inputs = in_blocks(given, scale, sides, block_size, side_by_side=False)
    if key_mask is not None:
        missing = inputs.key.shape[1] - num_keys
        inputs = inputs._replace(key_mask=jnp.pad(key_mask, (0, missing))[None])
    inputs = _checks.reverse_mode_only(inputs, NO_FORWARD_MODE)
    setup = _Ring(plan, axis_name, is_causal)
    out = _attend(setup, _checks.varying(inputs, inputs))[0, :num_queries, 0]
    return undeal(out, axis_name) if is_causal and not is_dealt else out
