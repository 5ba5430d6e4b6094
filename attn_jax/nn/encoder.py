"""The Transformer encoder that every attention model here is built of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.nn.attention_fn import as_attention_fn, training
from attn_jax.nn.causal_attention import sized
from attn_jax.nn.positional import Positions, shared_tables
from attn_jax.variant import Variant

__all__ = ["Encoder", "EncoderBlock", "MlpBlock"]

DType = jax.typing.DTypeLike
Norm = Literal["pre", "post"]


class MlpBlock(nnx.Module):
    """Position-wise feed-forward network, ``x ↦ W₂ gelu(W₁ x + b₁) + b₂``.

    Args:
      dim: width D of input and output.
      hidden_dim: width of the hidden layer.
      dropout_rate: probability of dropping a hidden unit while training.

    Reference: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, §3.3.

    >>> MlpBlock(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.expand = nnx.Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.contract = nnx.Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        # Two axes: the weight gradient is then one plain product. Over three, XLA:CPU
        # copies both factors and takes a slow path.
        tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        tokens = jax.nn.gelu(self.expand(tokens))
        tokens = self.dropout(tokens, deterministic=deterministic, rngs=rngs)
        return self.contract(tokens).reshape(x.shape)


class EncoderBlock(nnx.Module):
    """Pre-norm block, ``x ← x + attend(norm(x))``, then ``x ← x + mlp(norm(x))``.

    Post-norm, as in the first Transformer: ``x ← norm(x + attend(x))``, and likewise.

    Args:
      dim: width D of the tokens.
      num_heads: number of heads N; D must be a multiple of it.
      mlp_dim: hidden width of the feed-forward network.
      attention: any attention variant: a name in ``VARIANTS``, a
        ``"path/file.py:function"``, a `Variant`, or a function that keeps the
        contract.
      max_length: the longest sequence T, for variants whose parameters depend on it.
      dropout_rate: applied to attention weights, which the variant must be able to
        drop, to the hidden layer of the feed-forward network and to both residual
        branches.
      drops_weights: whether attention weights are dropped too; the first Transformer
        did not drop them.
      positions: how attention knows the order of the tokens, by `make_positions`;
        None leaves that to the tokens. What a kind adds to the input is added by
        `Encoder` alone.
      block_index: number of the block among those that share ``positions``.
      norm: "pre" or "post".
      key_dim: size of a head's queries and keys; None = D / N, that of its values.

    Raises:
      ValueError: if the heads do not divide the width, ``positions`` were made for
        other sizes or cannot serve this attention, or are in it beside a ``key_dim``.
      TypeError: if ``positions`` is no module of positions.

    References: Vaswani et al., Attention Is All You Need, arXiv:1706.03762; Xiong et
    al., On Layer Normalization in the Transformer Architecture, arXiv:2002.04745.

    >>> block = EncoderBlock(8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        attention: str | Callable | Variant = "dot_product",
        max_length: int | None = None,
        dropout_rate: float = 0.0,
        positions: Positions | None = None,
        block_index: int = 0,
        norm: Norm = "pre",
        drops_weights: bool = True,
        key_dim: int | None = None,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.pre = check_norm(norm) == "pre"
        attention, head_dim, value_dim = sized(attention, dim, num_heads, key_dim)
        self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        attend: Callable[..., jax.Array]
        attend = inner = as_attention_fn(
            attention,
            num_heads=num_heads,
            head_dim=head_dim,
            rngs=rngs,
            max_length=max_length,
        )
        if positions is not None:
            _check_positions(positions, dim, num_heads)
            if positions.in_blocks and head_dim != value_dim:
                raise ValueError(
                    f"`key_dim` must be left out, or {value_dim}, with positions "
                    f"{positions.name!r}, which are in attention, but is {head_dim}."
                )
            attend = positions.attention_fn(block_index, inner)
        self.attention = nnx.MultiHeadAttention(
            num_heads,
            dim,
            dtype=dtype,
            dropout_rate=dropout_rate if drops_weights else 0.0,
            broadcast_dropout=False,
            attention_fn=attend,
            decode=False,
            rngs=rngs,
        )
        if head_dim != value_dim:  # Flax has one size for all three
            make = functools.partial(
                nnx.LinearGeneral, dim, (num_heads, head_dim), dtype=dtype, rngs=rngs
            )
            self.attention.query, self.attention.key = make(), make()
        self.mlp_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.mlp = MlpBlock(
            dim, mlp_dim, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs
        )
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps tokens to tokens.

        Args:
          x: [B, T, D].
          mask: bool [B or 1, N or 1, T or 1, T], True = attend, or None.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B, T, D].

        Raises:
          ValueError: for a mask of another shape.
        """
        _check_mask(mask, x)
        with training(not deterministic):
            h = self.attention(
                self.attention_norm(x) if self.pre else x,
                mask=mask,
                deterministic=deterministic,
                rngs=rngs,
            )
        x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        x = x if self.pre else self.attention_norm(x)
        h = self.mlp_norm(x) if self.pre else x
        h = self.mlp(h, deterministic=deterministic, rngs=rngs)
        x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        return x if self.pre else self.mlp_norm(x)


class Encoder(nnx.Module):
    """``depth`` blocks and, behind pre-norm ones, a final layer normalisation.

    Args:
      depth: number of blocks L.
      dim, num_heads, mlp_dim, attention, max_length, dropout_rate, norm,
        drops_weights, key_dim, dtype, rngs: as in `EncoderBlock`.
      positions: how it learns the order of the tokens, by `make_positions`, at its
        input or in every block; None leaves that to the tokens.

    Raises:
      ValueError: as `EncoderBlock`, and if ``positions`` were made for another depth.
      TypeError: as `EncoderBlock`.

    >>> encoder = Encoder(2, 8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    >>> encoder(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        attention: str | Callable | Variant = "dot_product",
        max_length: int | None = None,
        dropout_rate: float = 0.0,
        positions: Positions | None = None,
        norm: Norm = "pre",
        drops_weights: bool = True,
        key_dim: int | None = None,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if positions is not None:
            _check_positions(positions, dim, num_heads, depth)
        self.positions = positions
        make = functools.partial(
            EncoderBlock,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            attention=attention,
            max_length=max_length,
            dropout_rate=dropout_rate,
            positions=positions,
            norm=norm,
            drops_weights=drops_weights,
            key_dim=key_dim,
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List([make(block_index=index) for index in range(depth)])
        pre = norm == "pre"
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs) if pre else None

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        key_mask: jax.Array | None = None,
        tables: Any = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps tokens to tokens.

        Args:
          x: [B, T, D].
          mask: bool [B or 1, N or 1, T or 1, T], True = attend, or None.
          key_mask: bool [B, T], True = a real token, or None. What comes out for
            padding is of no meaning.
          tables: what the positions of all blocks read; None for what they make of the
            length, `positions.tables(T)`.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B, T, D].

        Raises:
          ValueError: for a mask of another shape, such as [B, T].
          TypeError: for a mask that is not bool beside a ``key_mask``.
        """
        _check_mask(mask, x)
        if key_mask is not None:
            if key_mask.shape != x.shape[:2] or key_mask.dtype != jnp.bool_:
                raise ValueError(
                    f"`key_mask` must be bool [B, T] = {tuple(x.shape[:2])}, True = a "
                    f"real token, but is {key_mask.dtype} {tuple(key_mask.shape)}."
                )
            # What a weight of zero hides in attention, its gradient would not: 0 · NaN.
            x = jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype))
            keys = key_mask[:, None, None, :]
            if mask is not None:
                _checks.check_bool("mask", mask)
            mask = keys if mask is None else jnp.logical_and(mask, keys)
        if self.positions is not None:
            x = self.positions.embed(x)
            if tables is None and self.positions.in_blocks:
                tables = self.positions.tables(x.shape[1])
        with shared_tables(tables):
            for block in self.blocks:
                x = block(x, mask, deterministic=deterministic, rngs=rngs)
        return x if self.norm is None else self.norm(x)


def check_norm(norm: Norm) -> Norm:
    """The place of layer normalisation, if it is one."""
    _checks.check_choice("norm", norm, get_args(Norm))
    return norm


def _check_mask(mask: Any, x: jax.Array) -> None:
    """Raises unless a mask has all its axes: [B, T] might else be read as [T, T]."""
    if mask is None or x.ndim != 3:
        return
    batch, length = x.shape[:2]
    shape = tuple(jnp.shape(mask))
    if len(shape) != 4 or any(
        size not in (1, full)
        for size, full in zip(shape, (batch, shape[1], length, length), strict=True)
    ):
        raise ValueError(
            f"`mask` must be [B or 1, N or 1, T or 1, T] with B={batch}, T={length}, "
            f"but has shape {shape}; which tokens are real, [B, T], is `key_mask`, or "
            "`mask[:, None, None]`."
        )


def _check_positions(
    positions: Positions, dim: int, num_heads: int, depth: int | None = None
) -> None:
    """Raises unless ``positions`` were made for an encoder of these sizes."""
    if not isinstance(positions, Positions):
        raise TypeError(
            "`positions` must be a module by make_positions(name, dim=..., ...) or "
            f"None, but is {type(positions).__name__}: {positions!r}."
        )
    for name, size in (("dim", dim), ("num_heads", num_heads), ("depth", depth)):
        made = getattr(positions, name)
        if size is not None and made != size:
            raise ValueError(
                f"positions {positions.name!r} were made with {name}={made}, but the "
                f"encoder has {name}={size}."
            )


def zero_head(
    features: int, num_classes: int, *, dtype: DType | None, rngs: nnx.Rngs
) -> nnx.Linear:
    """The last layer of a classifier, which begins with logits of zero."""
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(features, num_classes, kernel_init=zeros, dtype=dtype, rngs=rngs)


def check_images(images: jax.Array, channels: int) -> None:
    """Raises ValueError unless ``images`` is [B, height, width, channels]."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"`images` must be [B, height, width, {channels}], but has shape "
            f"{tuple(images.shape)}."
        )


def add_positions(tokens: jax.Array, table: jax.Array) -> jax.Array:
    """Adds a position table [T, D] to tokens [B, T, D], in the tokens' dtype."""
    if tokens.shape[1:] != table.shape:
        raise ValueError(
            f"`tokens` must be [B, T, D] with [T, D] = {tuple(table.shape)}, the size "
            f"that the model was built for, but has shape {tuple(tokens.shape)}."
        )
    return tokens + jnp.asarray(table, tokens.dtype)[None]
