"""Vision Transformer: an image is a sequence of patches, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.nn.encoder import Encoder, add_positions, check_images, zero_head
from attn_jax.nn.positional import LearnedPositions
from attn_jax.positions import sinusoidal_2d
from attn_jax.variant import Variant


def _grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"`patch` must divide the image, but is {patch} for images of {height} x "
            f"{width} pixels."
        )
    return height // patch, width // patch


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Cuts images into non-overlapping square patches, in row-major order.

    Args:
      images: [B, height, width, C].
      patch: side P of a patch in pixels; must divide height and width.

    Returns:
      [B, (height / P) · (width / P), P · P · C].

    Raises:
      ValueError: if the patch does not divide the image.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words,
    arXiv:2010.11929, §3.1.

    >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1]
    Array([2., 3., 6., 7.], dtype=float32)
    """
    batch, height, width, channels = images.shape
    rows, columns = _grid(height, width, patch)
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, patch * patch * channels)


def default_patch(image_shape: tuple[int, int, int], preferred: int) -> int:
    """The preferred side of a patch where it divides the image, else the next best.

    The next best is the largest side that divides the image and leaves at least 4 x 4
    patches.

    Args:
      image_shape: (height, width, channels).
      preferred: side in pixels.

    Raises:
      ValueError: if no side leaves 4 x 4 patches.

    >>> default_patch((28, 28, 1), 7), default_patch((32, 32, 3), 7)
    (7, 8)
    """
    height, width, _ = image_shape
    if height % preferred == 0 and width % preferred == 0:
        return preferred
    for patch in range(min(height, width) // 4, 0, -1):
        if height % patch == 0 and width % patch == 0:
            return patch
    raise ValueError(
        f"image_shape: images of {height} x {width} pixels are too small for 4 x 4 "
        "patches."
    )


class ViT(nnx.Module):
    """A plain ViT: patches, positions, pre-norm encoder, average pooling, head.

    Args:
      image_shape: (height, width, channels) of the images.
      num_classes: number of labels.
      patch: side of a patch in pixels.
      dim, depth, num_heads, mlp_dim: width, blocks, heads and feed-forward width.
      positions: "sincos2d" (fixed), "learned", or "none".
      attention: any attention variant, see `EncoderBlock`.
      dropout_rate: see `EncoderBlock`.

    Raises:
      ValueError: if the patch does not divide the image, the heads do not divide
        the width, or ``positions`` is unknown.

    Reference: Dosovitskiy et al., arXiv:2010.11929; average pooling and fixed 2-D
    sinusoids as in Beyer et al., Better plain ViT baselines, arXiv:2205.01580.

    >>> model = ViT((8, 8, 1), 10, patch=4, dim=8, depth=1, num_heads=2,
    ...             mlp_dim=16, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        positions: str = "sincos2d",
        attention: str | Callable | Variant = "dot_product",
        dropout_rate: float = 0.0,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        height, width, channels = image_shape
        self.grid = _grid(height, width, patch)
        if positions not in ("sincos2d", "learned", "none"):
            raise ValueError(
                "`positions` must be 'sincos2d', 'learned' or 'none', but is "
                f"{positions!r}."
            )
        self.patch = patch
        self.positions = positions
        self.dim = dim
        self.channels = channels
        self.embed = nnx.Linear(patch * patch * channels, dim, dtype=dtype, rngs=rngs)
        if positions == "learned":
            self.learned_positions = LearnedPositions(
                self.grid[0] * self.grid[1], dim, rngs=rngs
            )
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
        x = self.embed(patchify(images, self.patch))
        if self.positions == "sincos2d":
            x = add_positions(x, sinusoidal_2d(*self.grid, self.dim))
        elif self.positions == "learned":
            x = self.learned_positions(x)
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        x = self.encoder(x, deterministic=deterministic, rngs=rngs)
        return self.head(jnp.mean(x, axis=1))
