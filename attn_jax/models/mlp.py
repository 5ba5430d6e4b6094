"""Fully connected network on the flattened image: no structure assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from flax import nnx

from attn_jax.nn.encoder import check_images, zero_head


class Mlp(nnx.Module):
    """``x ↦ W_n relu(… relu(W_1 vec(x)))``.

    Args:
      image_shape: (height, width, channels) of the images.
      num_classes: number of labels.
      hidden_dims: widths of the hidden layers.
      dropout_rate: probability of dropping a hidden unit while training.

    >>> import jax.numpy as jnp
    >>> model = Mlp((8, 8, 1), 10, hidden_dims=(16,), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        hidden_dims: Sequence[int],
        dropout_rate: float = 0.0,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.image_shape = tuple(image_shape)
        features, layers = math.prod(image_shape), []
        for hidden_dim in hidden_dims:
            layers.append(
                nnx.Linear(
                    features,
                    hidden_dim,
                    kernel_init=nnx.initializers.he_normal(),
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            features = hidden_dim
        self.layers = nnx.List(layers)
        self.dropout = nnx.Dropout(dropout_rate)
        self.head = zero_head(features, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps images [B, height, width, C] to logits [B, classes]."""
        check_images(images, self.image_shape[2])
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"`images` must be [B, {', '.join(map(str, self.image_shape))}], but "
                f"has shape {tuple(images.shape)}."
            )
        x = images.reshape(images.shape[0], -1)
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
            x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        return self.head(x)
