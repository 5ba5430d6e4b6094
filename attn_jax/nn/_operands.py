"""What Flax's layers hand over, as what a variant takes: masks, batches, precision."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks


def _precision_name(precision: Any) -> str | None:
    """Name of a precision as `jax.default_matmul_precision` takes it."""
    if precision is None:
        return None
    if isinstance(precision, tuple | list) and len(set(precision)) == 1:
        precision = precision[0]
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return precision.name
    if isinstance(precision, str):
        try:
            with jax.default_matmul_precision(precision):
                return precision
        except ValueError:
            pass
    raise ValueError(
        "`precision` must be None, a name such as 'highest', a jax.lax.Precision or a "
        f"jax.lax.DotAlgorithmPreset, one for both operands, but is {precision!r}."
    )


def with_precision(
    call: Callable[..., jax.Array], precision: Any
) -> Callable[..., jax.Array]:
    """Runs a function of arrays, and its pullback, at a given matmul precision."""
    name = _precision_name(precision)
    if name is None:
        return call

    def context() -> contextlib.AbstractContextManager[Any]:
        return jax.default_matmul_precision(name)

    # The setting alone would reach the forward pass, but not backward passes that are
    # written by hand (custom_vjp): those are traced later, when it is over.
    @jax.custom_vjp
    def run(operands: Any) -> jax.Array:
        with context():
            return call(operands)

    message = (
        "with a `precision` attention has derivatives in reverse mode alone: for "
        "`jax.jvp` or `jax.jacfwd` leave it out of the Flax layer, and trace inside of "
        "`jax.default_matmul_precision(...)`."
    )

    def forward(operands: Any) -> tuple[jax.Array, Any]:
        with context():
            return jax.vjp(call, operands)

    def backward(pullback: Any, cotangent: jax.Array) -> Any:
        with context():
            return pullback(cotangent)

    run.defvjp(forward, backward)
    return lambda operands: run(_checks.reverse_mode_only(operands, message))


def bool_mask(mask: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """A mask as bool, and whether its numbers were all 0 or 1 (None if it was bool)."""
    mask = jnp.asarray(mask)
    if mask.dtype == jnp.bool_:
        return mask, None
    is_mask = ((mask == 0) | (mask == 1)).all()
    if not isinstance(is_mask, jax.core.Tracer):
        if not is_mask:
            raise ValueError(
                "`mask` must hold 0 and 1 alone (1 = attend), but has dtype "
                f"{mask.dtype} and values from {mask.min()} to {mask.max()}; numbers "
                "to be added to the scores are a bias, which Flax's layers do not pass."
            )
        return mask != 0, None
    return mask != 0, is_mask


def check_unambiguous(mask: jax.Array, query: jax.Array) -> None:
    """Refuses [T, S] that might as well be [B, S], and [N, T, S] that might [B, T, S].

    Flax reads both without the batch, and so a mask of padding as one of pairs.
    """
    *batch, length, heads, _ = query.shape
    missing = len(batch) + 3 - mask.ndim
    first = mask.shape[0] if mask.ndim else 1
    if not batch or first == 1 or first != batch[-1]:
        return
    for rank, letters, size, fix in (
        (2, "[T, S] or [B, S]", length, "[:, None, None]"),
        (3, "[N, T, S] or [B, T, S]", heads, "[:, None]"),
    ):
        if missing > 0 and mask.ndim == rank and first == size:
            raise ValueError(
                f"`mask` of shape {mask.shape} may be {letters}, since B={first} too; "
                "give it all axes: "
                f"`mask{fix}` for one that differs between examples (which keys are "
                "real is `key_mask` in attn_jax), else "
                f"`mask{'[None, None]' if rank == 2 else '[None]'}`."
            )


def to_4d(name: str, array: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """Brings [batch..., N or 1, T or 1, S or 1] to one batch axis, B or 1."""
    rank = len(batch) + 3
    if array.ndim > rank:
        raise ValueError(
            f"`{name}` must be broadcastable to [{'B, ' * len(batch)}N, T, S] with "
            f"batch sizes {batch}, but has shape {array.shape}."
        )
    array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    leading, rest = array.shape[:-3], array.shape[-3:]
    if all(size == 1 for size in leading):
        return array.reshape(1, *rest)
    if any(size not in (1, full) for size, full in zip(leading, batch, strict=True)):
        raise ValueError(
            f"`{name}` has batch sizes {leading} where the layer's input has {batch}; "
            f"each must be equal or 1 (`{name}` has shape {array.shape})."
        )
    return jnp.broadcast_to(array, (*batch, *rest)).reshape(math.prod(batch), *rest)
