"""The pre-norm Transformer encoder that every attention model here is built of."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.layers import as_attention_fn
from attn_jax.variants import Variant


class MlpBlock(nnx.Module):
    """Position-wise feed-forward network, ``x ↦ W₂ gelu(W₁ x + b₁) + b₂``.

    Args:
      dim: width D of input and output.
      hidden_dim: width of the hidden layer.
      dropout_rate: probability of dropping a hidden unit while training.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Reference: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, §3.3.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> MlpBlock(4, 8, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4))).shape
    (2, 3, 4)
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        dropout_rate: float = 0.0,
        dtype: jax.typing.DTypeLike | None = None,
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

    Args:
      dim: width D of the tokens.
      num_heads: number of heads N; D must be a multiple of it.
      mlp_dim: hidden width of the feed-forward network.
      attention: any attention variant: a name in ``VARIANTS``, a
        ``"path/file.py:function"``, a `Variant`, or a function that keeps the
        contract.
      max_length: the longest sequence T, for variants whose parameters depend on it.
      dropout_rate: applied to attention weights (where the variant can), to the
        hidden layer of the feed-forward network and to both residual branches.
      dtype: dtype of the computation; parameters stay float32.
      rngs: source of initialisation randomness.

    Reference: Xiong et al., On Layer Normalization in the Transformer
    Architecture, arXiv:2002.04745.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
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
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if dim % num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, got dim={dim} and "
                f"num_heads={num_heads}."
            )
        self.attention_norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads,
            dim,
            dtype=dtype,
            dropout_rate=dropout_rate,
            broadcast_dropout=False,
            attention_fn=as_attention_fn(
                attention,
                num_heads=num_heads,
                head_dim=dim // num_heads,
                rngs=rngs,
                max_length=max_length,
            ),
            decode=False,
            rngs=rngs,
        )
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
        """Maps tokens [B, T, D] to [B, T, D]; ``mask`` is bool, True = attend."""
        h = self.attention(
            self.attention_norm(x),
            mask=mask,
            deterministic=deterministic,
            rngs=rngs,
        )
        x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        h = self.mlp(self.mlp_norm(x), deterministic=deterministic, rngs=rngs)
        return x + self.dropout(h, deterministic=deterministic, rngs=rngs)


class Encoder(nnx.Module):
    """``depth`` pre-norm blocks and a final layer normalisation.

    Args:
      depth: number of blocks L.
      dim, num_heads, mlp_dim, attention, max_length, dropout_rate, dtype, rngs: as in
        `EncoderBlock`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
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
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            [
                EncoderBlock(
                    dim,
                    num_heads=num_heads,
                    mlp_dim=mlp_dim,
                    attention=attention,
                    max_length=max_length,
                    dropout_rate=dropout_rate,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]; ``mask`` is bool, True = attend."""
        for block in self.blocks:
            x = block(x, mask, deterministic=deterministic, rngs=rngs)
        return self.norm(x)


def check_images(images: jax.Array, channels: int) -> None:
    """Raises ValueError unless ``images`` is [B, height, width, channels]."""
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(
            f"images must be [B, height, width, {channels}], got shape "
            f"{tuple(images.shape)}."
        )


def add_positions(tokens: jax.Array, table: jax.Array) -> jax.Array:
    """Adds a position table [T, D] to tokens [B, T, D], in the tokens' dtype."""
    if tokens.shape[1:] != table.shape:
        raise ValueError(
            f"tokens have shape [B, T, D] = {tuple(tokens.shape)}, but the position "
            f"table has [T, D] = {tuple(table.shape)}: the input must have the size "
            "the model was built for."
        )
    return tokens + jnp.asarray(table, tokens.dtype)[None]
