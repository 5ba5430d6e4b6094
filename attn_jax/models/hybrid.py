"""Hybrid: a convolutional stem makes the tokens, a Transformer relates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.models.resnet import GroupNorm, StdConv, _groups
from attn_jax.nn.encoder import Encoder, add_positions, check_images, zero_head
from attn_jax.positions import sinusoidal_2d
from attn_jax.variant import Variant


class Hybrid(nnx.Module):
    """Strided convolutions in place of a ViT's patch embedding.

    Args:
      image_shape: (height, width, channels) of the images.
      num_classes: number of labels.
      stem_widths: channels of the 3x3 convolutions of stride 2; each halves the
        image (rounding up), and the last map's pixels are the tokens.
      dim, depth, num_heads, mlp_dim: width, blocks, heads and feed-forward width.
      attention: any attention variant, see `EncoderBlock`.
      dropout_rate: see `EncoderBlock`.

    Reference: Dosovitskiy et al., arXiv:2010.11929, "Hybrid Architecture"; Xiao et
    al., Early Convolutions Help Transformers See Better, arXiv:2106.14881.

    >>> model = Hybrid((8, 8, 1), 10, stem_widths=(4, 8), dim=8, depth=1,
    ...                num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        stem_widths: Sequence[int],
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        attention: str | Callable | Variant = "dot_product",
        dropout_rate: float = 0.0,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if not stem_widths:
            raise ValueError("`stem_widths` must name at least one convolution.")
        height, width, self.channels = image_shape
        convs, norms, features = [], [], self.channels
        for out_features in stem_widths:
            convs.append(
                StdConv(
                    features,
                    out_features,
                    kernel_size=3,
                    stride=2,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            norms.append(
                GroupNorm(out_features, num_groups=_groups(out_features), dtype=dtype)
            )
            features = out_features
            height, width = -(-height // 2), -(-width // 2)
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)
        self.grid = (height, width)
        self.dim = dim
        self.embed = nnx.Linear(features, dim, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)
        self.encoder = Encoder(
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            attention=attention,
            max_length=self.grid[0] * self.grid[1],
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )
        self.head = zero_head(dim, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps images [B, height, width, C] to logits [B, classes]."""
        check_images(images, self.channels)
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        x = self.embed(x.reshape(x.shape[0], -1, x.shape[-1]))
        x = add_positions(x, sinusoidal_2d(*self.grid, self.dim))
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        x = self.encoder(x, deterministic=deterministic, rngs=rngs)
        return self.head(jnp.mean(x, axis=1))
