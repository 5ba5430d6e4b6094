"""Two detectors: a Transformer that gives a set of boxes, and a convolutional peer.

Letters: B pictures, h × w places of the last map, S = h · w, D width, Q queries,
K classes, L layers of the decoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.models.resnet import ResidualBlock, ResNet
from attn_jax.nn.attention_fn import as_attention_fn
from attn_jax.nn.cross_attention import CrossAttention
from attn_jax.nn.decoder import DecoderBlock
from attn_jax.nn.encoder import Encoder, add_positions
from attn_jax.positions import sinusoidal_2d
from attn_jax.variant import Variant

Attention = str | Callable[..., jax.Array] | Variant


class Predictions(NamedTuple):
    """What a layer of the decoder says, the last of all last.

    Attributes:
      logits: [L, B, Q, K + 1], the last class for "nothing".
      boxes: [L, B, Q, 4] in (0, 1).
    """

    logits: jax.Array
    boxes: jax.Array


class SetAttention(nnx.Module):
    """Self-attention of queries, which have no order and hide nothing."""

    def __init__(self, dim: int, num_heads: int, attention: Attention, rngs: nnx.Rngs):
        self.attend = nnx.MultiHeadAttention(
            num_heads,
            dim,
            attention_fn=as_attention_fn(
                attention, num_heads=num_heads, head_dim=dim // num_heads, rngs=rngs
            ),
            decode=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """Maps [B, Q, D] to [B, Q, D]; ``rng`` is not needed."""
        return self.attend(x)


class Detr(nnx.Module):
    """A set of boxes from a picture, by self-attention (DETR).

    As in the paper: a convolutional map, an encoder over its places, learned queries
    that attend to one another and to the places, a class and a box of each query from
    every layer of the decoder, by the same heads. Otherwise than there: layer
    normalisation stands before each part, and positions and queries enter once, at the
    input, where the paper adds them in every layer.

    Args:
      image_shape: (side, side, channels).
      num_classes: K.
      widths: channels of the backbone's stages; the stem halves the picture, and so
        does every stage but the first.
      dim: width D, a multiple of 4 and of the heads.
      depth: blocks of the encoder; 0 = none.
      decoder_depth: blocks L of the decoder.
      mlp_dim: hidden width of the feed-forward networks.
      num_heads: heads.
      num_queries: queries Q, the most boxes that can be told.
      attention: of the encoder, any variant.
      cross: of the queries to the places, any variant with `cross`.
      positions: whether places have a two-dimensional sinusoid.
      dropout_rate: while training, of what each part adds and of hidden units.

    Reference: Carion et al., 2020, arXiv:2005.12872.

    >>> model = Detr((16, 16, 1), 3, widths=(4, 8), dim=8, depth=1, decoder_depth=2,
    ...              mlp_dim=8, num_heads=2, num_queries=5, rngs=nnx.Rngs(0))
    >>> found = model(jnp.zeros((2, 16, 16, 1)))
    >>> found.logits.shape, found.boxes.shape
    ((2, 2, 5, 4), (2, 2, 5, 4))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: Sequence[int],
        dim: int,
        depth: int,
        decoder_depth: int,
        mlp_dim: int,
        num_heads: int,
        num_queries: int,
        attention: Attention = "dot_product",
        cross: Attention = "dot_product",
        positions: bool = True,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone(image_shape, widths, rngs)
        self.project = nnx.Linear(self.backbone.out_features, dim, rngs=rngs)
        rows, columns = map_size(image_shape, widths)
        self.positions = positions
        made = functools.partial(
            Encoder,
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            attention=attention,
            max_length=rows * columns,
            dropout_rate=dropout_rate,
            drops_weights=False,
            rngs=rngs,
        )
        self.encoder = made() if depth else None
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (num_queries, dim)))
        self.key = nnx.Variable(
            rngs.params()
        )  # of random variants; redrawn in training

        def crossing() -> CrossAttention:
            return CrossAttention(
                dim,
                num_heads=num_heads,
                variant=cross,
                max_length=rows * columns,
                rngs=rngs,
            )

        self.blocks = nnx.List(
            [
                DecoderBlock(
                    dim,
                    lambda: SetAttention(dim, num_heads, "dot_product", rngs),
                    mlp_dim=mlp_dim,
                    make_cross=crossing,
                    dropout_rate=dropout_rate,
                    rngs=rngs,
                )
                for _ in range(decoder_depth)
            ]
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.classify = nnx.Linear(dim, num_classes + 1, rngs=rngs)
        self.box = nnx.List([nnx.Linear(dim, n, rngs=rngs) for n in (dim, dim, 4)])

    def tokens(self, images: jax.Array) -> jax.Array:
        """What the encoder gets of pictures: [B, S, D]."""
        found = self.backbone(images)
        batch, rows, columns, _ = found.shape
        tokens = self.project(found.reshape(batch, rows * columns, -1))
        if self.positions:
            table = sinusoidal_2d(rows, columns, tokens.shape[-1])
            tokens = add_positions(tokens, table)
        return tokens

    def _keys(self) -> list[jax.Array]:
        """A key of random attention for every block of the decoder."""
        key = self.key[...]
        return [jax.random.fold_in(key, index) for index in range(len(self.blocks))]

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = self.norm(x)
        hidden = jax.nn.relu(self.box[0](x))
        boxes = self.box[2](jax.nn.relu(self.box[1](hidden)))
        return self.classify(x), jax.nn.sigmoid(boxes.astype(jnp.float32))

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Predictions:
        """Maps pictures [B, side, side, C] to the predictions of every layer."""
        dropout: Any = dict(deterministic=deterministic, rngs=rngs)
        memory = self.tokens(images)
        if self.encoder is not None:
            memory = self.encoder(memory, **dropout)
        real = jnp.ones(memory.shape[:2], bool)
        x = jnp.broadcast_to(self.queries[...], (len(images), *self.queries[...].shape))
        told = []
        for key, block in zip(self._keys(), self.blocks, strict=True):
            x = block(x, key, block.cross.remember(memory), real, **dropout)
            told.append(self._heads(x))
        return Predictions(*map(jnp.stack, zip(*told, strict=True)))

    def looks(self, images: jax.Array) -> jax.Array:
        """What the queries of the last block see: weights [B, N, Q, S].

        Raises:
          ValueError: if the variant of `cross` cannot say it.
        """
        memory, keys = self.tokens(images), self._keys()
        if self.encoder is not None:
            memory = self.encoder(memory)
        real = jnp.ones(memory.shape[:2], bool)
        x = jnp.broadcast_to(self.queries[...], (len(images), *self.queries[...].shape))
        for key, block in zip(keys[:-1], self.blocks[:-1], strict=True):
            x = block(x, key, block.cross.remember(memory), real)
        last = self.blocks[-1]
        return last.cross_weights(x, keys[-1], last.cross.remember(memory), real)


def backbone(
    image_shape: tuple[int, int, int], widths: Sequence[int], rngs: nnx.Rngs
) -> ResNet:
    """A residual block a stage, behind a stem that halves the picture."""
    depths = (1,) * len(widths)
    return ResNet(
        image_shape, None, widths=widths, depths=depths, stem_stride=2, rngs=rngs
    )


def map_size(
    image_shape: tuple[int, int, int], widths: Sequence[int]
) -> tuple[int, int]:
    """Rows and columns of the backbone's last map.

    >>> map_size((96, 96, 1), (16, 32, 64))
    (12, 12)
    """
    side = 2 ** len(widths)
    return -(-image_shape[0] // side), -(-image_shape[1] // side)


class Heat(NamedTuple):
    """What the convolutional detector says of every place of its map.

    Attributes:
      logits: [B, h, w, K]: is the centre of an item of that class here?
      boxes: [B, h, w, 4] as shares of the picture, were it here.
    """

    logits: jax.Array
    boxes: jax.Array


class Centers(nnx.Module):
    """A map of centres and the box at each, by convolutions alone (CenterNet).

    The same backbone, residual blocks in place of the Transformer, and a 3 × 3 and a
    1 × 1 convolution to classes and to boxes.

    Args:
      image_shape, num_classes, widths: as of `Detr`.
      blocks: residual blocks behind the backbone, as wide as its last stage.

    Reference: Zhou et al., 2019, arXiv:1904.07850.

    >>> model = Centers((16, 16, 1), 3, widths=(4, 8), blocks=1, rngs=nnx.Rngs(0))
    >>> found = model(jnp.zeros((2, 16, 16, 1)))
    >>> found.logits.shape, found.boxes.shape
    ((2, 4, 4, 3), (2, 4, 4, 4))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: Sequence[int],
        blocks: int,
        rngs: nnx.Rngs,
    ):
        self.backbone = backbone(image_shape, widths, rngs)
        width = self.backbone.out_features
        self.blocks = nnx.List(
            [ResidualBlock(width, width, rngs=rngs) for _ in range(blocks)]
        )
        self.hidden = nnx.Conv(width, width, (3, 3), rngs=rngs)
        # A centre is rare: one in a hundred places, as focal losses begin.
        rare = nnx.initializers.constant(-4.6)
        self.classify = nnx.Conv(width, num_classes, (1, 1), bias_init=rare, rngs=rngs)
        self.box = nnx.Conv(width, 4, (1, 1), rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Heat:
        """Maps pictures [B, side, side, C] to what each place says."""
        x = self.backbone(images)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu(self.hidden(x))
        raw = self.box(x).astype(jnp.float32)
        rows, columns = x.shape[1:3]
        # The centre lies within its place, a size is at most that of the picture.
        across, along = jnp.meshgrid(jnp.arange(columns), jnp.arange(rows))
        place = jnp.stack([across, along], axis=-1).astype(jnp.float32)[None]
        scale = jnp.array([columns, rows], jnp.float32)[None, None, None]
        within = jax.nn.sigmoid(raw)
        centre = (place + within[..., :2]) / scale
        boxes = jnp.concatenate([centre, within[..., 2:]], axis=-1)
        return Heat(self.classify(x).astype(jnp.float32), boxes)
