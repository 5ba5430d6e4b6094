"""Pre-activation residual network in the manner of BiT, the convolutional peer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attn_jax.attention import _checks
from attn_jax.nn.encoder import check_images, zero_head

Norm = Literal["group", "channel"]


def standardize_kernel(kernel: jax.Array, *, epsilon: float = 1e-8) -> jax.Array:
    """Weight standardisation, ``ŵ = (w − mean) / √(n · var + ε)`` per output channel.

    n is the fan-in, so that a standardised kernel keeps the variance of
    independent inputs.

    Args:
      kernel: [k, k, C_in, C_out].
      epsilon: keeps a constant kernel finite.

    Returns:
      [k, k, C_in, C_out], each output channel of mean 0 and squared norm 1.

    Reference: Qiao et al., Micro-Batch Training with Batch-Channel Normalization
    and Weight Standardization, arXiv:1903.10520.

    >>> w = standardize_kernel(jax.random.normal(jax.random.key(0), (3, 3, 4, 2)))
    >>> bool(abs((w ** 2).sum((0, 1, 2)) - 1).max() < 1e-4)
    True
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    norm = jnp.sum(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
    return centred * lax.rsqrt(norm + epsilon)


class StdConv(nnx.Module):
    """Convolution with standardised weights, without bias, "SAME" padding.

    Args:
      in_features, out_features: channels.
      kernel_size: side of the square kernel.
      stride: step in both directions.

    >>> conv = StdConv(3, 8, kernel_size=3, stride=2, rngs=nnx.Rngs(0))
    >>> conv(jnp.ones((1, 8, 8, 3))).shape
    (1, 4, 4, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_size: int,
        stride: int = 1,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (kernel_size, kernel_size, in_features, out_features)
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.kernel_size = kernel_size
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, height, width, C_in] to [B, ⌈height/s⌉, ⌈width/s⌉, C_out]."""
        dtype = self.dtype or x.dtype
        return lax.conv_general_dilated(
            x.astype(dtype),
            standardize_kernel(self.kernel[...]).astype(dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nnx.Module):
    """Group normalisation, ``(x − mean_g) / √(var_g + ε) · scale + bias``.

    The numbers are those of `flax.nnx.GroupNorm`. Sums run over pixels first and
    over the channels of a group after, and the normalisation is one multiply-add:
    on CPU the gradient of this form costs a fraction of the five-dimensional
    reshape's (`make bench` measures it).

    Args:
      features: number of channels C.
      num_groups: number of groups; must divide C.
      epsilon: added to the variance.
      dtype: dtype of the result; statistics are float32.

    Raises:
      ValueError: if the groups do not divide the channels.

    Reference: Wu and He, Group Normalization, arXiv:1803.08494.

    >>> GroupNorm(8, num_groups=2)(jnp.ones((1, 4, 4, 8))).shape
    (1, 4, 4, 8)
    """

    def __init__(
        self,
        features: int,
        *,
        num_groups: int,
        epsilon: float = 1e-5,
        dtype: jax.typing.DTypeLike | None = None,
    ):
        if num_groups < 1 or features % num_groups:
            raise ValueError(
                f"`num_groups` must divide `features`, but they are {num_groups} and "
                f"{features}."
            )
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.num_groups = num_groups
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, height, width, C] to the same shape."""
        batch, height, width, channels = x.shape
        size = channels // self.num_groups
        wide = x.astype(jnp.float32)

        def group_mean(a: jax.Array) -> jax.Array:
            per_channel = jnp.sum(a, axis=(1, 2))
            grouped = per_channel.reshape(batch, self.num_groups, size)
            mean = jnp.sum(grouped, axis=-1) / (height * width * size)
            return jnp.repeat(mean, size, axis=-1)

        mean = group_mean(wide)
        variance = jnp.maximum(group_mean(jnp.square(wide)) - jnp.square(mean), 0.0)
        gain = lax.rsqrt(variance + self.epsilon) * self.scale[...][None]
        shift = self.bias[...][None] - mean * gain
        y = wide * gain[:, None, None] + shift[:, None, None]
        return y.astype(self.dtype or x.dtype)


def _groups(features: int) -> int:
    """At most 32 groups, as BiT has, of at least 4 channels."""
    size = max(4, features // 32)
    while features % size:
        size += 1
    return features // size


def _make_norm(
    norm: Norm,
    features: int,
    *,
    dtype: jax.typing.DTypeLike | None,
    rngs: nnx.Rngs,
) -> GroupNorm | nnx.LayerNorm:
    """Normalisation of so many channels, over the image or at each position."""
    _checks.check_choice("norm", norm, get_args(Norm))
    if norm == "channel":
        return nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
    return GroupNorm(features, num_groups=_groups(features), dtype=dtype)


class ResidualBlock(nnx.Module):
    """Pre-activation block, ``x + conv(relu(norm(conv(relu(norm(x))))))``.

    Args:
      in_features: channels of the input.
      features: channels of the block's convolutions.
      stride: of the block (on its 3x3 convolution, the first one of a plain block).
      bottleneck: 1x1, 3x3, 1x1 with four times as many output channels, instead of
        two convolutions of ``kernel``.
      kernel: side of the two; 1 sees no neighbour.
      norm: "group" shares two numbers a group over the whole image; "channel"
        normalises the channels of each position by themselves.
      dtype, rngs: as in `StdConv`.

    Reference: He et al., Identity Mappings in Deep Residual Networks,
    arXiv:1603.05027; Kolesnikov et al., Big Transfer, arXiv:1912.11370.

    >>> block = ResidualBlock(8, 16, stride=2, rngs=nnx.Rngs(0))
    >>> block(jnp.ones((1, 8, 8, 8))).shape
    (1, 4, 4, 16)
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        stride: int = 1,
        bottleneck: bool = False,
        kernel: int = 3,
        norm: Norm = "group",
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        kernels = (1, 3, 1) if bottleneck else (kernel, kernel)
        widths = (features, features, 4 * features) if bottleneck else (features,) * 2
        strided = 1 if bottleneck else 0
        norms, convs, width = [], [], in_features
        for i, (kernel_size, out_features) in enumerate(
            zip(kernels, widths, strict=True)
        ):
            norms.append(_make_norm(norm, width, dtype=dtype, rngs=rngs))
            convs.append(
                StdConv(
                    width,
                    out_features,
                    kernel_size=kernel_size,
                    stride=stride if i == strided else 1,
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            width = out_features
        self.norms = nnx.List(norms)
        self.convs = nnx.List(convs)
        self.out_features = width
        self.project = stride != 1 or in_features != width
        if self.project:
            self.projection = StdConv(
                in_features, width, kernel_size=1, stride=stride, dtype=dtype, rngs=rngs
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, height, width, C_in] to [B, height/stride, width/stride, C_out]."""
        h = jax.nn.relu(self.norms[0](x))
        residual = self.projection(h) if self.project else x
        h = self.convs[0](h)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            h = conv(jax.nn.relu(norm(h)))
        return residual + h


class ResNet(nnx.Module):
    """Pre-activation ResNet with group normalisation and weight standardisation.

    Args:
      image_shape: (height, width, channels) of the images.
      num_classes: number of labels; None = no classifier, but the last map.
      widths: channels of each stage; every stage but the first halves the image.
      depths: residual blocks of each stage.
      bottleneck, kernel, norm: see `ResidualBlock`.
      stem_kernel, stem_stride: of the first convolution: 3 and 1 for small images,
        3 and 2 for the smallest models, 7 and 2 for large images.
      max_pool: 3x3 max-pooling of stride 2 after the stem, for large images.

    Raises:
      ValueError: if ``widths`` and ``depths`` differ in length.

    Reference: Kolesnikov et al., Big Transfer, arXiv:1912.11370.

    >>> model = ResNet((8, 8, 1), 10, widths=(8, 16), depths=(1, 1), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)
    >>> model.receptive_field()
    13
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int | None,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        bottleneck: bool = False,
        kernel: int = 3,
        norm: Norm = "group",
        stem_kernel: int = 3,
        stem_stride: int = 1,
        max_pool: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        if len(widths) != len(depths) or not widths:
            raise ValueError(
                "`widths` and `depths` must have one entry a stage, but are "
                f"{tuple(widths)} and {tuple(depths)}."
            )
        self.channels = image_shape[2]
        self.max_pool = max_pool
        self.stem = StdConv(
            self.channels,
            widths[0],
            kernel_size=stem_kernel,
            stride=stem_stride,
            dtype=dtype,
            rngs=rngs,
        )
        features = widths[0]
        blocks = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                block = ResidualBlock(
                    features,
                    width,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=bottleneck,
                    kernel=kernel,
                    norm=norm,
                    dtype=dtype,
                    rngs=rngs,
                )
                features = block.out_features
                blocks.append(block)
        self.blocks = nnx.List(blocks)
        self.norm = _make_norm(norm, features, dtype=dtype, rngs=rngs)
        self.out_features = features
        head = functools.partial(zero_head, features, dtype=dtype, rngs=rngs)
        self.head = None if num_classes is None else head(num_classes)

    def receptive_field(self) -> int:
        """Side, in pixels, of the square that one output position depends on.

        Taken before the average pooling, along convolutions alone. Group normalisation
        shares two numbers a group over the whole image, so that with norm="group" an
        output depends on all of it a little; with several such norms a network whose
        convolutions see 11 pixels has learnt what lies 20 apart
        (`experiments.data_scaling`, scenes).
        """
        field, jump = self.stem.kernel_size, self.stem.stride
        if self.max_pool:
            field, jump = field + 2 * jump, 2 * jump
        for block in self.blocks:
            for conv in block.convs:
                field += (conv.kernel_size - 1) * jump
                jump *= conv.stride
        return field

    def __call__(
        self,
        images: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps images [B, height, width, C] to logits [B, classes].

        Without a classifier to the last map, [B, height/s, width/s, out_features].

        ``deterministic`` and ``rngs`` are taken so that all models are called
        alike; the network has no randomness.
        """
        check_images(images, self.channels)
        x = self.stem(images)
        if self.max_pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu(self.norm(x))
        return x if self.head is None else self.head(jnp.mean(x, axis=(1, 2)))
