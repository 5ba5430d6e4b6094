"""Causal self-attention with two forms: a whole sequence, or a token with a state.

Letters: B batch, T length, D width, N heads, H size of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.multihead import multi_head, multi_head_state, multi_head_step
from attn_jax.nn.attention_fn import head_params
from attn_jax.positions import rotary
from attn_jax.variant import Variant, require, resolve

DType = jax.typing.DTypeLike

__all__ = ["CausalAttention"]


class CausalAttention(nnx.Module):
    """Causal multi-head self-attention with a parallel and a recurrent form.

    Args:
      dim: width D.
      num_heads: N; D must be a multiple of it.
      variant: name, `path/file.py:function`, function, or `Variant`, with a step.
      max_length: the longest sequence, for a variant whose parameters depend on it.
      rotated: whether queries and keys are turned by their position, by `rotary`.
      key_dim: size of a head's queries and keys; None = D / N, that of its values.

    Raises:
      ValueError: if D is no multiple of N, the variant has no step or takes no values
        of another size than keys, or a head that is rotated has an odd size.

    >>> layer = CausalAttention(8, num_heads=2, variant="linear", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 8)), jax.random.key(0)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        variant: str | Callable[..., jax.Array] | Variant,
        max_length: int | None = None,
        rotated: bool = False,
        key_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.rotated = num_heads, rotated
        self.variant, self.head_dim, self.value_dim = sized(
            variant, dim, num_heads, key_dim
        )
        if rotated and self.head_dim % 2:
            raise ValueError(
                "positions 'rope' need an even head size, by default dim / num_heads, "
                f"but with dim / num_heads = {dim} / {num_heads} = {self.value_dim} "
                f"and key_dim={key_dim} it is {self.head_dim}."
            )
        require(self.variant, "step")
        if max_length is not None:
            self.variant = self.variant.fit(max_length=max_length)
        # One product for all three, over two axes, is what XLA:CPU is fast at.
        width = 2 * num_heads * self.head_dim + dim
        self.project = nnx.Linear(dim, width, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        if self.variant.init is not None:
            sizes = (num_heads, self.head_dim)
            self.params, self.restore = head_params(self.variant, *sizes, rngs)

    def _heads(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key, value [B, T, N, H or V] of [B, T, D] at positions int32 [T]."""
        flat, width = self.project(x.reshape(-1, x.shape[-1])), self.head_dim
        width *= self.num_heads
        query, key, value = (
            part.reshape(
                *x.shape[:-1], self.num_heads, part.shape[-1] // self.num_heads
            )
            for part in jnp.split(flat, (width, 2 * width), axis=-1)
        )
        if self.rotated:
            turn = functools.partial(rotary, positions=positions)
            of_heads = jax.vmap(jax.vmap(turn, in_axes=1, out_axes=1))
            query, key = of_heads(query), of_heads(key)
        return query, key, value

    def _merge(self, out: jax.Array) -> jax.Array:
        flat = out.reshape(-1, self.num_heads * self.value_dim)
        return self.out(flat).reshape(*out.shape[:-2], flat.shape[-1])

    def _carried(self, rng: jax.Array) -> dict[str, Any]:
        """Parameters and key of the variant, for both forms alike."""
        has = self.variant.init is not None
        return {
            "params": self.restore(self.params) if has else None,
            "rng": rng if self.variant.stochastic else None,
        }

    def __call__(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; ``rng`` is the key of a random variant."""
        attend = multi_head(self.variant)
        # A variant without `is_causal` is causal by itself, as its step is.
        causal = {"is_causal": True} if self.variant.causal else {}
        heads = self._heads(x, jnp.arange(x.shape[1], dtype=jnp.int32))
        return self._merge(attend(*heads, **self._carried(rng), **causal))

    def init_state(self, batch: int, length: int, dtype: DType | None = None) -> Any:
        """The state before the first token, with room for ``length`` of them."""
        return multi_head_state(
            self.variant,
            batch,
            self.num_heads,
            length=length,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.project.kernel.dtype if dtype is None else dtype,
        )

    def step(
        self, state: Any, position: jax.Array, x: jax.Array, rng: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Maps the token [B, D] at a position to (state, [B, D])."""
        step = multi_head_step(self.variant)
        heads = (part[:, 0] for part in self._heads(x[:, None], position[None]))
        state, out = step(state, position, *heads, **self._carried(rng))
        return state, self._merge(out)


def size_of_head(dim: int, num_heads: int) -> int:
    """H of heads that share a width."""
    if dim % num_heads:
        raise ValueError(
            f"`dim` must be a multiple of `num_heads`, but they are {dim} and "
            f"{num_heads}."
        )
    return dim // num_heads


def sized(
    variant: str | Callable[..., jax.Array] | Variant,
    dim: int,
    num_heads: int,
    key_dim: int | None,
) -> tuple[Variant, int, int]:
    """A variant for heads of these sizes, H of queries and keys, and V of values.

    Args:
      variant: name, `path/file.py:function`, function, or `Variant`.
      dim: width D; the values of all heads have it together.
      num_heads: N.
      key_dim: H; None = V.

    Raises:
      ValueError: if D is no multiple of N, or H is not V and the variant cannot.

    >>> sized("dot_product", 8, 2, 3)[1:], sized("dot_product", 8, 2, None)[1:]
    ((3, 4), (4, 4))
    """
    found, value_dim = resolve(variant), size_of_head(dim, num_heads)
    if key_dim in (None, value_dim):
        return found, value_dim, value_dim
    _checks.check_int("key_dim", key_dim, 1)
    require(found, "value_dim")
    return found.fit(value_dim=value_dim), key_dim, value_dim
