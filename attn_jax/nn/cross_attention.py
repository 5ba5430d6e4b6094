"""Attention of tokens to a memory, such as what an encoder makes of a sentence.

Letters: B batch, T tokens, S length of the memory, D width, N heads, H size of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.multihead import multi_head, multi_head_init
from attn_jax.nn.attention_fn import head_params
from attn_jax.nn.causal_attention import sized
from attn_jax.variant import Variant, require

__all__ = ["CrossAttention"]


@functools.lru_cache(maxsize=64)
def _check_rows_apart(variant: Variant, length: int) -> None:
    """Raises unless a query gets the same whatever other queries there are.

    They come one after the other in generation, and all at once in training.
    """
    with jax.ensure_compile_time_eval():
        keys = jax.random.split(jax.random.key(0), 4)
        query, key, value = (
            jax.random.normal(k, (1, t, 1, 8))
            for k, t in zip(keys, (4, length, length), strict=False)
        )
        given: dict[str, Any] = {
            "key_mask": jnp.arange(length)[None] < max(1, length - 1)
        }
        if variant.init is not None:
            given["params"] = multi_head_init(variant, keys[3], 1, 8)
        if variant.stochastic:
            given["rng"] = keys[3]
        attend = multi_head(variant)
        whole = attend(query, key, value, **given)
        alone = [attend(query[:, t : t + 1], key, value, **given) for t in range(4)]
        same = np.allclose(whole, jnp.concatenate(alone, axis=1), atol=1e-4)
    if not same:
        raise ValueError(
            f"`cross` must be attention of each query by itself, as queries come one "
            f"after the other in generation, but what {variant.name!r} gives a query "
            "depends on the queries beside it, or on which of them it is."
        )


class CrossAttention(nnx.Module):
    """Multi-head attention of tokens to a memory.

    Args:
      dim: width D of tokens and memory.
      num_heads: N; D must be a multiple of it.
      variant: name, `path/file.py:function`, function, or `Variant`, with `cross`,
        whose parameters do not depend on the number of queries.
      max_length: the longest memory, for a variant whose parameters depend on it.
      key_dim: size of a head's queries and keys; None = D / N, that of its values.

    Raises:
      ValueError: if D is no multiple of N, or the variant has no `cross`, cannot leave
        out padding, or does not treat each query by itself.

    Reference: Vaswani et al., 2017, arXiv:1706.03762, section 3.2.3.

    >>> layer = CrossAttention(8, num_heads=2, variant="additive", rngs=nnx.Rngs(0))
    >>> heads, real = layer.remember(jnp.ones((2, 5, 8))), jnp.ones((2, 5), bool)
    >>> layer(jnp.ones((2, 3, 8)), heads, real, jax.random.key(0)).shape
    (2, 3, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        variant: str | Callable[..., jax.Array] | Variant,
        max_length: int | None = None,
        key_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.variant, self.head_dim, _ = sized(variant, dim, num_heads, key_dim)
        require(self.variant, "cross")
        if not self.variant.mask:
            require(self.variant, "key_mask")
        if max_length is not None:
            self.variant = self.variant.fit(max_length=max_length)
        _check_rows_apart(self.variant, min(5, max_length or 5))
        width = num_heads * self.head_dim
        self.query = nnx.Linear(dim, width, rngs=rngs)
        self.memory = nnx.Linear(dim, width + dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        if self.variant.init is not None:
            sizes = (num_heads, self.head_dim)
            self.params, self.restore = head_params(self.variant, *sizes, rngs)

    def remember(self, memory: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, N, H] and values [B, S, N, V] of a memory [B, S, D]."""
        flat = self.memory(memory.reshape(-1, memory.shape[-1]))
        key, value = (
            part.reshape(
                *memory.shape[:-1], self.num_heads, part.shape[-1] // self.num_heads
            )
            for part in jnp.split(flat, (self.num_heads * self.head_dim,), axis=-1)
        )
        return key, value

    def __call__(
        self,
        x: jax.Array,
        heads: tuple[jax.Array, jax.Array],
        key_mask: jax.Array,
        rng: jax.Array,
    ) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D].

        Args:
          x: the tokens.
          heads: of `remember`.
          key_mask: bool [B, S], True = real.
          rng: key of a random variant.
        """
        out = self._attend(x, *heads, key_mask, rng)
        return self.out(out.reshape(-1, x.shape[-1])).reshape(x.shape)

    def weights(
        self,
        x: jax.Array,
        heads: tuple[jax.Array, jax.Array],
        key_mask: jax.Array,
        rng: jax.Array,
    ) -> jax.Array:
        """How much of each value tokens get, [B, N, T, S]; arguments as of a call.

        What attention makes of one-hot values, which any variant says that takes values
        of another size than keys.

        Raises:
          ValueError: if the variant does not.
        """
        require(self.variant, "value_dim")
        key, value = heads
        batch, length, count, _ = value.shape
        one_hot = jnp.eye(length, dtype=value.dtype)[None, :, None]
        one_hot = jnp.broadcast_to(one_hot, (batch, length, count, length))
        found = self._attend(x, key, one_hot, key_mask, rng)
        return jnp.moveaxis(found, 2, 1)

    def _attend(
        self,
        x: jax.Array,
        key: jax.Array,
        value: jax.Array,
        key_mask: jax.Array,
        rng: jax.Array,
    ) -> jax.Array:
        flat = self.query(x.reshape(-1, x.shape[-1]))
        query = flat.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        has = self.variant.init is not None
        return multi_head(self.variant)(
            query,
            key,
            value,
            key_mask=key_mask,
            params=self.restore(self.params) if has else None,
            rng=rng if self.variant.stochastic else None,
        )
