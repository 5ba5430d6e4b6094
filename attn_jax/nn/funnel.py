"""The Funnel Transformer: fewer tokens from stage to stage, and back to all of them.

Letters: B batch, T length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.nn.cross_attention import CrossAttention
from attn_jax.nn.encoder import MlpBlock
from attn_jax.variant import Variant

__all__ = ["FunnelEncoder", "halved"]


def halved(x: jax.Array, key_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every two tokens beside each other as one, the mean of those that are real.

    Args:
      x: [B, T, D].
      key_mask: bool [B, T], True = real.

    Returns:
      [B, ⌈T/2⌉, D], zeros where neither is real, and bool [B, ⌈T/2⌉].

    >>> x = jnp.arange(3.0).reshape(1, 3, 1)
    >>> halved(x, jnp.ones((1, 3), bool))[0].ravel().tolist()
    [0.5, 2.0]
    """
    odd = x.shape[1] % 2
    x = jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype))
    x = jnp.pad(x, ((0, 0), (0, odd), (0, 0)))
    pairs = jnp.pad(key_mask, ((0, 0), (0, odd))).reshape(len(x), -1, 2)
    sums = x.reshape(len(x), -1, 2, x.shape[-1]).sum(axis=2)
    count = jnp.maximum(pairs.sum(axis=2), 1).astype(x.dtype)
    return sums / count[:, :, None], pairs.any(axis=2)


class _Block(nnx.Module):
    """Pre-norm: ``x ← x + attend(norm(x) to norm(memory))``, then a network."""

    def __init__(self, dim: int, *, mlp_dim: int, dropout_rate: float, **attends: Any):
        rngs = attends["rngs"]
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = CrossAttention(dim, **attends)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp = MlpBlock(dim, mlp_dim, dropout_rate=dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        key_mask: jax.Array,
        rng: jax.Array,
        **dropout: Any,
    ) -> jax.Array:
        """Maps [B, T, D], which read a memory [B, S, D], to [B, T, D]."""
        heads = self.attention.remember(self.norm(memory))
        h = self.attention(self.norm(x), heads, key_mask, rng)
        x = x + self.dropout(h, **dropout)
        return x + self.dropout(self.mlp(self.mlp_norm(x), **dropout), **dropout)


class FunnelEncoder(nnx.Module):
    """Stages of blocks; between two of them every two tokens become one.

    x' = pool(x),  x' ← x' + attend(norm(x') to norm(x))

    The first block of a later stage asks with the pooled tokens and still reads all
    tokens of the stage before, so what is dropped is chosen by attention. With a
    decoder the last stage is spread back to T tokens, the output of the first stage is
    added, and further blocks follow: a vector for each token again. The paper keeps a
    token of its own out of the pooling; here there is none.

    Args:
      dim: width D.
      depths: blocks of each stage, at least one stage.
      num_heads: heads; D must be a multiple of it.
      mlp_dim: hidden width of the feed-forward networks.
      decoder_depth: blocks behind what is spread back; None = tokens stay pooled.
      attention: any attention variant with `cross`.
      max_length: the longest sequence T, for variants whose parameters depend on it.
      dropout_rate: of what each part of a block adds, and of hidden units.

    Raises:
      ValueError: for no stage or one without a block, heads that do not divide the
        width, or a variant that cannot.

    Reference: Dai et al., 2020, arXiv:2006.03236.

    >>> encoder = FunnelEncoder(8, depths=(1, 1), num_heads=2, mlp_dim=16,
    ...                         rngs=nnx.Rngs(0))
    >>> encoder(jnp.ones((2, 5, 8)))[0].shape
    (2, 3, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depths: Sequence[int],
        num_heads: int,
        mlp_dim: int,
        decoder_depth: int | None = None,
        attention: str | Callable[..., jax.Array] | Variant = "dot_product",
        max_length: int | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not depths or min(depths) < 1:
            raise ValueError(
                "`depths` must be a number of blocks, 1 or more, for each stage, but "
                f"is {tuple(depths)}."
            )

        def blocks(count: int) -> Any:
            def block() -> _Block:
                return _Block(
                    dim,
                    mlp_dim=mlp_dim,
                    dropout_rate=dropout_rate,
                    num_heads=num_heads,
                    variant=attention,
                    max_length=max_length,
                    rngs=rngs,
                )

            return nnx.List([block() for _ in range(count)])

        self.stages = nnx.List([blocks(depth) for depth in depths])
        self.spreads = decoder_depth is not None
        self.decoder = blocks(decoder_depth or 0)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Maps tokens to fewer, or to as many with a decoder.

        Args:
          x: [B, T, D], with positions.
          key_mask: bool [B, T], True = real, or None.
          rng: key of a random variant.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B, T', D], T' = ⌈T / 2^(stages − 1)⌉ or, with a decoder, T; and bool [B, T'],
          which of them are real.

        Raises:
          ValueError: for a mask of another shape.
          TypeError: for one that is not bool.
        """
        key_mask = jnp.ones(x.shape[:2], bool) if key_mask is None else key_mask
        _checks.check_bool("key_mask", key_mask)
        if key_mask.shape != x.shape[:2]:
            raise ValueError(
                f"`key_mask` must be [B, T] = {tuple(x.shape[:2])}, but has shape "
                f"{tuple(key_mask.shape)}."
            )
        # What padding holds, NaN too, has no gradient.
        x = jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype))
        rng = jax.random.key(0) if rng is None else rng
        dropout: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        real, count, first = key_mask, 0, x
        for number, stage in enumerate(self.stages):
            memory, seen = x, real
            if number:
                x, real = halved(x, real)
            for block in stage:
                key = jax.random.fold_in(rng, count)
                x, count = block(x, memory, seen, key, **dropout), count + 1
                memory, seen = x, real
            first = first if number else x
        if not self.spreads:
            return self.norm(x), real
        spread = jnp.repeat(x, 2 ** (len(self.stages) - 1), axis=1)
        x = first + spread[:, : first.shape[1]] if len(self.stages) > 1 else x
        for block in self.decoder:
            key = jax.random.fold_in(rng, count)
            x, count = block(x, x, key_mask, key, **dropout), count + 1
        return self.norm(x), key_mask
