"""Two players, and a judge: who draws, who tells drawn from real, who knows classes.

Letters: B pictures, s their side, C channels, K classes, W width, Z numbers that a
picture is drawn from, S places of a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attn_jax.models.resnet import ResNet
from attn_jax.multihead import multi_head
from attn_jax.nn.attention_fn import as_attention_fn, training
from attn_jax.variant import Variant, require, resolve

Attention = str | Callable[..., jax.Array] | Variant
Kind = Literal["none", "convolution", "attention"]
KINDS: tuple[Kind, ...] = ("none", "convolution", "attention")

SHRINKS = (2, 4)  # how many times smaller than the picture the map of a mixer may be


class Bounded(nnx.Module):
    """A layer whose matrix is divided by its largest singular value.

    Power iteration, a turn a training call, is state that learns without a gradient.

    Args:
      layer: of Flax, called on one array.
      rngs: stream `params`, for where the iteration begins.

    Reference: Miyato et al., 2018, arXiv:1802.05957.

    >>> layer = Bounded(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Rngs(1))
    >>> layer(jnp.ones((1, 3)), deterministic=True).shape
    (1, 2)
    """

    def __init__(self, layer: nnx.Module, rngs: nnx.Rngs):
        self.normed = nnx.SpectralNorm(layer, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """The layer's output; the iteration moves on unless ``deterministic``."""
        # Flax's layer writes the divided matrix over its own: on a copy, which may be
        # of an inner trace, the parameters stay as they are.
        copy = nnx.clone(self.normed)
        found = copy(x, update_stats=True)
        if not deterministic:
            for path, kept in self.normed.batch_stats.items():
                kept[...] = copy.batch_stats[path][...]
        return found


def _bottleneck(channels: int) -> int:
    """Hidden channels with which a convolution has the parameters of attention.

    2 · C · m of its 1 × 1 and 9 · m² of its 3 × 3 layers, against 2 · C².

    >>> [_bottleneck(c) for c in (8, 32, 64)]
    [3, 12, 24]
    """
    return max(1, round(channels * (math.sqrt(76.0) - 2.0) / 18.0))


class Mixer(nnx.Module):
    """What a map gets added of itself: x + γ · f(x), γ learnt, from 0.

    "attention": of all places, one head of C / 2; keys are as wide as values, which any
    variant can have, where the paper's have C / 8. "convolution": 1 × 1, 3 × 3 and
    1 × 1 with a bottleneck of as many parameters.

    Args:
      kind: attention or convolution.
      channels: C, even.
      places: S of the map.
      attention: any variant.

    Reference: Zhang et al., 2019, arXiv:1805.08318, section 3.

    >>> mixer = Mixer("attention", 8, 16, "dot_product", nnx.Rngs(0))
    >>> x = jnp.ones((2, 4, 4, 8))
    >>> bool((mixer(x, deterministic=True) == x).all())
    True
    """

    def __init__(
        self,
        kind: Kind,
        channels: int,
        places: int,
        attention: Attention,
        rngs: nnx.Rngs,
    ):
        self.kind = kind
        self.gamma = nnx.Param(jnp.zeros(()))
        if kind == "convolution":
            inner = _bottleneck(channels)
            sizes = ((channels, inner, 1), (inner, inner, 3), (inner, channels, 1))
            self.layers = nnx.List(
                [
                    Bounded(nnx.Conv(i, o, (k, k), use_bias=False, rngs=rngs), rngs)
                    for i, o, k in sizes
                ]
            )
            return
        head = channels // 2
        sides = ((channels, head),) * 3 + ((head, channels),)
        self.layers = nnx.List(
            [
                Bounded(nnx.Linear(i, o, use_bias=False, rngs=rngs), rngs)
                for i, o in sides
            ]
        )
        self.variant = resolve(attention)
        self.attend = as_attention_fn(
            self.variant, num_heads=1, head_dim=head, max_length=places, rngs=rngs
        )

    def _heads(self, x: jax.Array, deterministic: bool) -> list[jax.Array]:
        """Queries, keys and values [B, S, 1, H] of a map."""
        flat = x.reshape(-1, x.shape[-1])
        return [
            layer(flat, deterministic=deterministic).reshape(
                x.shape[0], -1, 1, x.shape[-1] // 2
            )
            for layer in self.layers[:3]
        ]

    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Maps [B, h, w, C] to the same shape."""
        if self.kind == "convolution":
            found = x
            for i, layer in enumerate(self.layers):
                found = jax.nn.relu(found) if i else found
                found = layer(found, deterministic=deterministic)
        else:
            with training(not deterministic):
                query, key, value = self._heads(x, deterministic)
                found = self.attend(query, key, value)
            found = found.reshape(-1, found.shape[-1])
            found = self.layers[3](found, deterministic=deterministic).reshape(x.shape)
        return x + self.gamma[...] * found

    def check_weights(self) -> None:
        """Raises ValueError unless `weights` can say them.

        It cannot where there is no attention, and of a variant that has parameters or
        draws, or cannot have values of another size than keys.
        """
        if self.kind != "attention" or self.variant.init or self.variant.stochastic:
            raise ValueError(f"a mixer of kind {self.kind!r} cannot say its weights.")
        require(self.variant, "value_dim")

    def weights(self, x: jax.Array) -> jax.Array:
        """How much of each place the places of a map see, [B, S, S].

        Raises:
          ValueError: as of `check_weights`.
        """
        self.check_weights()
        query, key, _ = self._heads(x, True)
        one_hot = jnp.eye(query.shape[1], dtype=x.dtype)[None, :, None]
        one_hot = jnp.broadcast_to(one_hot, (*query.shape[:3], query.shape[1]))
        return multi_head(self.variant)(query, key, one_hot)[:, :, 0]


def _mixer(
    kind: Kind, channels: int, side: int, attention: Attention, rngs: nnx.Rngs
) -> Mixer | None:
    if kind == "none":
        return None
    return Mixer(kind, channels, side * side, attention, rngs)


class ClassNorm(nnx.Module):
    """Batch normalisation with a gain and a bias of each class.

    Reference: Dumoulin et al., 2017, arXiv:1610.07629.
    """

    def __init__(self, features: int, num_classes: int, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(
            features, momentum=0.9, use_bias=False, use_scale=False, rngs=rngs
        )
        self.gain, self.bias = (
            nnx.Embed(num_classes, features, embedding_init=init, rngs=rngs)
            for init in (nnx.initializers.ones, nnx.initializers.zeros)
        )

    def __call__(
        self, x: jax.Array, labels: jax.Array, *, deterministic: bool
    ) -> jax.Array:
        """Maps [B, h, w, C] and classes [B] to [B, h, w, C]."""
        normed = self.norm(x, use_running_average=deterministic)
        gain, bias = (f(labels)[:, None, None] for f in (self.gain, self.bias))
        return normed * gain + bias


def doubled(x: jax.Array) -> jax.Array:
    """Every pixel four times.

    >>> doubled(jnp.arange(2.0).reshape(1, 1, 2, 1))[0, :, :, 0].tolist()
    [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    batch, rows, columns, channels = x.shape
    wide = jnp.broadcast_to(
        x[:, :, None, :, None], (batch, rows, 2, columns, 2, channels)
    )
    return wide.reshape(batch, 2 * rows, 2 * columns, channels)


class Generator(nnx.Module):
    """Draws a picture of a class from numbers: maps of side s / 4, s / 2 and s.

    Args:
      image_shape: (s, s, C); s a multiple of 4.
      num_classes: K.
      width: W; the three maps have 4 W, 2 W and W channels.
      latent: Z.
      kind: of what a map is given besides: none, convolution or attention.
      shrink: which map, of side s / 4 or s / 2.
      attention: any variant.

    Reference: Zhang et al., 2019, arXiv:1805.08318; convolutions are plain here,
    residual in the paper.

    >>> model = Generator((8, 8, 1), 3, width=2, latent=5, kind="attention", shrink=2,
    ...                   rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5)), jnp.array([0, 2])).shape
    (2, 8, 8, 1)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int,
        latent: int,
        kind: Kind,
        shrink: int,
        attention: Attention = "dot_product",
        rngs: nnx.Rngs,
    ):
        side, channels = image_shape[0], image_shape[2]
        self.side, self.shrink = side // 4, shrink
        wide = 4 * width
        first = nnx.Linear(latent, self.side**2 * wide, rngs=rngs)
        self.first = Bounded(first, rngs)
        norms, convs = [], []
        for fan_in, fan_out in ((wide, wide // 2), (wide // 2, width)):
            norms.append(ClassNorm(fan_in, num_classes, rngs))
            conv = nnx.Conv(fan_in, fan_out, (3, 3), use_bias=False, rngs=rngs)
            convs.append(Bounded(conv, rngs))
        self.norms, self.convs = nnx.List(norms), nnx.List(convs)
        self.mixer = _mixer(kind, width * shrink, side // shrink, attention, rngs)
        self.last_norm = ClassNorm(width, num_classes, rngs)
        self.last = Bounded(nnx.Conv(width, channels, (3, 3), rngs=rngs), rngs)

    def _drawn(
        self, z: jax.Array, labels: jax.Array, deterministic: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Pictures, and the map that the mixer got."""
        mode, mixed = dict(deterministic=deterministic), None
        x = self.first(z, **mode).reshape(len(z), self.side, self.side, -1)
        for shrink, norm, conv in zip((4, 2), self.norms, self.convs, strict=True):
            if self.mixer is not None and shrink == self.shrink:
                mixed, x = x, self.mixer(x, **mode)
            x = conv(doubled(jax.nn.relu(norm(x, labels, **mode))), **mode)
        x = jax.nn.relu(self.last_norm(x, labels, **mode))
        return jnp.tanh(self.last(x, **mode)), mixed

    def __call__(
        self,
        z: jax.Array,
        labels: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, Z] and classes [B] to pictures [B, s, s, C] in (−1, 1)."""
        return self._drawn(z, labels, deterministic)[0]

    def looks(self, z: jax.Array, labels: jax.Array) -> jax.Array:
        """What the places of the map see, [B, S, S].

        Raises:
          ValueError: as of `Mixer.check_weights`, or there is no mixer.
        """
        if self.mixer is None:
            raise ValueError("a generator without a mixer looks nowhere.")
        self.mixer.check_weights()
        mixed = self._drawn(z, labels, True)[1]
        assert mixed is not None
        return self.mixer.weights(mixed)


class Discriminator(nnx.Module):
    """Tells drawn pictures of a class from real ones: above 0 = real.

    Args:
      image_shape, num_classes, width, kind, shrink, attention: as of `Generator`; maps
        of side s, s / 2 and s / 4 have W, 2 W and 4 W channels.

    Reference: Miyato et al., 2018, arXiv:1802.05957 (its plain layers) and Miyato and
    Koyama, 2018, arXiv:1802.05637 (how it knows the class).

    >>> model = Discriminator((8, 8, 1), 3, width=2, kind="none", shrink=2,
    ...                       rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 8, 8, 1)), jnp.array([0, 2])).shape
    (2,)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: int,
        kind: Kind,
        shrink: int,
        attention: Attention = "dot_product",
        rngs: nnx.Rngs,
    ):
        side, channels = image_shape[0], image_shape[2]
        self.shrink, wide = shrink, 4 * width
        sizes = (
            (channels, width, 3, 1),
            (width, wide // 2, 4, 2),
            (wide // 2, wide, 4, 2),
            (wide, wide, 3, 1),
        )
        self.convs = nnx.List(
            [
                Bounded(nnx.Conv(i, o, (k, k), strides=stride, rngs=rngs), rngs)
                for i, o, k, stride in sizes
            ]
        )
        self.mixer = _mixer(kind, width * shrink, side // shrink, attention, rngs)
        self.real = Bounded(nnx.Linear(wide, 1, rngs=rngs), rngs)
        self.classes = Bounded(nnx.Embed(num_classes, wide, rngs=rngs), rngs)

    def __call__(
        self,
        images: jax.Array,
        labels: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps pictures [B, s, s, C] in [−1, 1] and classes [B] to [B]."""
        mode, x = dict(deterministic=deterministic), images
        for index, conv in enumerate(self.convs):
            x = jax.nn.leaky_relu(conv(x, **mode), 0.1)
            if self.mixer is not None and index == SHRINKS.index(self.shrink) + 1:
                x = self.mixer(x, **mode)
        seen = x.sum(axis=(1, 2))
        of_class = (self.classes(labels, **mode) * seen).sum(axis=-1)
        return self.real(seen, **mode)[:, 0] + of_class


class Judge(nnx.Module):
    """A classifier whose last map, averaged, is what pictures are compared by.

    >>> judge = Judge((8, 8, 1), 3, widths=(4, 8), rngs=nnx.Rngs(0))
    >>> features, logits = judge(jnp.zeros((2, 8, 8, 1)))
    >>> features.shape, logits.shape
    ((2, 8), (2, 3))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, ...],
        rngs: nnx.Rngs,
    ):
        depths = (1,) * len(widths)
        self.body = ResNet(image_shape, None, widths=widths, depths=depths, rngs=rngs)
        self.head = nnx.Linear(self.body.out_features, num_classes, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Maps pictures [B, s, s, C] in [−1, 1] to features [B, D], logits [B, K]."""
        features = self.body(images).mean(axis=(1, 2))
        return features, self.head(features)
