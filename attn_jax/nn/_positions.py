"""What all kinds of positions are; the kinds are in `attn_jax.nn.positional`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from attn_jax.nn.attention_fn import AttentionFn, ModuleAttentionFn

_TABLES: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "attn_jax_tables", default=None
)


@contextlib.contextmanager
def shared_tables(tables: Any) -> Iterator[None]:
    """Gives to all blocks that are called inside what positions make once for them.

    `nnx.MultiHeadAttention` hands to its `attention_fn` a mask and nothing else, so an
    encoder that makes the tables once says so around the calls. It is read while a call
    is traced.

    Args:
      tables: of `Positions.tables`; with None every block makes its own.

    >>> with shared_tables(None):
    ...     pass  # x = block(x)
    """
    token = _TABLES.set(tables)
    try:
        yield
    finally:
        _TABLES.reset(token)


class Positions(nnx.Module):
    """No position information, and the base of all kinds that have some.

    A kind changes what it needs to: `embed`, or `tables` and `operands` together with
    `in_blocks = True`.

    Args:
      dim: width D of the tokens.
      num_heads: number of heads N.
      depth: number of blocks L that will share the module.
      max_length: the longest sequence T, for a kind that has a table of all positions.
    """

    name = "none"
    in_blocks = False

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        depth: int,
        max_length: int | None,
        rngs: nnx.Rngs,
    ) -> None:
        del max_length, rngs
        for name, value in (("dim", dim), ("num_heads", num_heads), ("depth", depth)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        if dim % num_heads:
            raise ValueError(
                f"`dim` must be a multiple of `num_heads`, but they are {dim} and "
                f"{num_heads}."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.depth = depth

    def embed(self, x: jax.Array) -> jax.Array:
        """Maps the encoder's input [B, T, D] to [B, T, D]."""
        return x

    def attention_fn(
        self, block_index: int, inner: AttentionFn | ModuleAttentionFn
    ) -> AttentionFn | ModuleAttentionFn | _PositionedFn:
        """The `attention_fn` of a block's `nnx.MultiHeadAttention`.

        Args:
          block_index: number of the block, 0 … L − 1.
          inner: the block's attention, from `as_attention_fn`.

        Returns:
          `inner` itself, or a module that brings the order in and then calls it.

        Raises:
          ValueError: if there is no such block, or if the attention cannot take this
            kind of positions.
        """
        self._check_block(block_index)
        return _PositionedFn(self, block_index, inner) if self.in_blocks else inner

    def tables(self, length: int) -> Any:
        """What all blocks share for sequences of T positions, or None."""
        return None

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        """What the block's attention gets for query, key, value [..., T, N, H]."""
        raise NotImplementedError

    def _check_block(self, block_index: int) -> None:
        if not 0 <= block_index < self.depth:
            raise ValueError(
                f"`block_index` must be 0 … {self.depth - 1}, since the positions were "
                f"made with depth={self.depth}, but is {block_index}."
            )


class _PositionedFn(nnx.Module):
    """A block's attention with positions, called by `nnx.MultiHeadAttention`."""

    def __init__(
        self,
        positions: Positions,
        block_index: int,
        inner: AttentionFn | ModuleAttentionFn,
    ) -> None:
        self.positions = positions
        self.block_index = block_index
        self.inner = inner

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        **options: Any,
    ) -> jax.Array:
        length, keys = query.shape[-3], key.shape[-3]
        if length != keys:
            raise ValueError(
                f"positions {self.positions.name!r} serve self-attention, but there "
                f"are {length} queries and {keys} keys."
            )
        tables = _TABLES.get()
        if tables is None:
            tables = self.positions.tables(length)
        operands = self.positions.operands(tables, self.block_index, query, key, value)
        return self.inner(**operands, **options)
