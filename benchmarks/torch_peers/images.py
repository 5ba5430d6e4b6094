"""The ViT, the ResNet and the hybrid in PyTorch, and their loss.

The peers of `attn_jax.models`: the same parameters and the same numbers, written as
PyTorch runs them fastest on a CPU. Not a library: only what the measured models use is
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from attn_jax import models
from attn_jax.positions import sinusoidal_2d
from benchmarks.torch_peers.attention_image import patchify
from benchmarks.torch_peers.layers import Encoder
from benchmarks.torch_peers.params import Flat, fill, flat_params


class LearnedPositions(nn.Module):
    """A trained position table [T, D]."""

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(length, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        return x + self.table


class ViT(nn.Module):
    """The peer of `attn_jax.models.ViT` with dot-product attention, no dropout."""

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
        positions: str,
    ):
        super().__init__()
        height, width, channels = image_shape
        self.patch = patch
        self.positions = positions
        grid = (height // patch, width // patch)
        self.embed = nn.Linear(patch * patch * channels, dim)
        if positions == "learned":
            self.learned_positions = LearnedPositions(grid[0] * grid[1], dim)
        elif positions == "sincos2d":
            table = torch.tensor(np.asarray(sinusoidal_2d(*grid, dim)))
            self.register_buffer("sinusoids", table, persistent=False)
        self.encoder = Encoder(depth, dim, num_heads, mlp_dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, height, width] to logits [B, classes]."""
        x = self.embed(patchify(images, self.patch))
        if self.positions == "learned":
            x = self.learned_positions(x)
        elif self.positions == "sincos2d":
            x = x + self.sinusoids
        return self.head(self.encoder(x).mean(1))


class StdConv(nn.Module):
    """Convolution with standardised weights; pads as XLA's "SAME" does.

    For a stride of 2 and an even side that is one row below and none above, which
    `torch.nn.functional.conv2d` cannot express: such input is padded beforehand.
    """

    def __init__(self, in_features: int, out_features: int, kernel: int, stride: int):
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(out_features, in_features, kernel, kernel)
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, height, width] to [B, C_out, ⌈height/s⌉, ⌈width/s⌉]."""
        kernel = self.weight.shape[-1]
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        norm = centred.square().sum((1, 2, 3), keepdim=True)
        weight = centred * torch.rsqrt(norm + 1e-8)

        def total(side: int) -> int:
            return max(
                (math.ceil(side / self.stride) - 1) * self.stride + kernel - side, 0
            )

        rows, columns = total(x.shape[2]), total(x.shape[3])
        if rows % 2 or columns % 2:
            low_r, low_c = rows // 2, columns // 2
            x = F.pad(x, (low_c, columns - low_c, low_r, rows - low_r))
            rows = columns = 0
        return F.conv2d(
            x, weight, stride=self.stride, padding=(rows // 2, columns // 2)
        )


class ResidualBlock(nn.Module):
    """Pre-activation residual block; ``sizes``: (in, out, kernel, stride, groups)."""

    def __init__(
        self,
        sizes: list[tuple[int, int, int, int, int]],
        projection: tuple[int, int, int, int] | None,
    ):
        super().__init__()
        self.norms = nn.ModuleList(
            nn.GroupNorm(groups, width) for width, _, _, _, groups in sizes
        )
        self.convs = nn.ModuleList(StdConv(*size[:4]) for size in sizes)
        self.projection = None if projection is None else StdConv(*projection)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, height, width] to [B, C_out, height/s, width/s]."""
        h = F.relu(self.norms[0](x))
        residual = x if self.projection is None else self.projection(h)
        h = self.convs[0](h)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            h = conv(F.relu(norm(h)))
        return residual + h


class ResNet(nn.Module):
    """The peer of `attn_jax.models.ResNet` without max-pooling."""

    def __init__(
        self,
        stem: StdConv,
        blocks: list[ResidualBlock],
        norm: nn.GroupNorm,
        classes: int,
    ):
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(norm.num_channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, height, width] to logits [B, classes]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Hybrid(nn.Module):
    """The peer of `attn_jax.models.Hybrid` with dot-product attention, no dropout."""

    def __init__(
        self,
        stem: Sequence[tuple[StdConv, nn.GroupNorm]],
        grid: tuple[int, int],
        encoder: Encoder,
        dim: int,
        classes: int,
    ):
        super().__init__()
        self.convs = nn.ModuleList(conv for conv, _ in stem)
        self.norms = nn.ModuleList(norm for _, norm in stem)
        self.embed = nn.Linear(stem[-1][1].num_channels, dim)
        table = torch.tensor(np.asarray(sinusoidal_2d(*grid, dim)))
        self.register_buffer("sinusoids", table, persistent=False)
        self.encoder = encoder
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, height, width] to logits [B, classes]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = self.embed(x.flatten(2).transpose(1, 2)) + self.sinusoids
        return self.head(self.encoder(x).mean(1))


def _vit(model: models.ViT, flat: Flat) -> ViT:
    block = model.encoder.blocks[0]
    _, num_heads, _ = flat["encoder.blocks.0.attention.query.kernel"].shape
    return ViT(
        (model.grid[0] * model.patch, model.grid[1] * model.patch, model.channels),
        model.head.out_features,
        patch=model.patch,
        dim=model.dim,
        depth=len(model.encoder.blocks),
        num_heads=num_heads,
        mlp_dim=block.mlp.expand.out_features,
        positions=model.positions,
    )


def _size(conv: models.StdConv) -> tuple[int, int, int, int]:
    kernel, _, width, features = conv.kernel.shape
    return width, features, kernel, conv.stride


def _groups(norm: Any) -> int:
    if not isinstance(norm, models.GroupNorm):
        raise ValueError("model: the PyTorch peer has group norms; use norm='group'.")
    return norm.num_groups


def block_of(block: Any) -> ResidualBlock:
    """The peer of a residual block."""
    return ResidualBlock(
        [
            (*_size(conv), _groups(norm))
            for norm, conv in zip(block.norms, block.convs, strict=True)
        ],
        _size(block.projection) if block.project else None,
    )


def resnet_parts(
    model: models.ResNet,
) -> tuple[StdConv, list[ResidualBlock], nn.GroupNorm]:
    """The peers of the stem, the blocks and the last norm.

    Raises:
      ValueError: with max-pooling, or norms by position.
    """
    if model.max_pool:
        raise ValueError(
            "model: the PyTorch peer has no max-pooling; use max_pool=False."
        )

    blocks = [block_of(block) for block in model.blocks]
    norm = nn.GroupNorm(_groups(model.norm), model.out_features)
    return StdConv(*_size(model.stem)), blocks, norm


def _resnet(model: models.ResNet) -> ResNet:
    assert model.head is not None
    return ResNet(*resnet_parts(model), model.head.out_features)


def _hybrid(model: models.Hybrid, flat: Flat) -> Hybrid:
    _, num_heads, _ = flat["encoder.blocks.0.attention.query.kernel"].shape
    blocks = model.encoder.blocks
    stem = [
        (StdConv(*_size(conv)), nn.GroupNorm(norm.num_groups, conv.kernel.shape[-1]))
        for conv, norm in zip(model.convs, model.norms, strict=True)
    ]
    mlp_dim = blocks[0].mlp.expand.out_features
    encoder = Encoder(len(blocks), model.dim, num_heads, mlp_dim)
    return Hybrid(stem, model.grid, encoder, model.dim, model.head.out_features)


def from_nnx(model: nnx.Module) -> nn.Module:
    """The PyTorch peer of an image model, with a copy of its parameters.

    Args:
      model: of `attn_jax.models`; with attention, it must be dot-product attention.

    Raises:
      ValueError: for another model, or one with max-pooling.
    """
    flat = flat_params(model)
    if isinstance(model, models.ViT):
        return fill(_vit(model, flat), flat)
    if isinstance(model, models.ResNet):
        return fill(_resnet(model), flat)
    if isinstance(model, models.Hybrid):
        return fill(_hybrid(model, flat), flat)
    raise ValueError(
        f"model must be a ViT, a ResNet or a Hybrid, got {type(model).__name__}: there "
        "is no PyTorch peer of it."
    )


class ImageLoss(nn.Module):
    """Cross-entropy of a classifier of images: normalise, flip, smooth the labels.

    Args:
      model: maps images [B, C, height, width] to logits.
      pixel_mean, pixel_std: of each channel.
      label_smoothing: share of the label spread over all classes.
      flip: mirror each image left-right with probability 1/2.
      channels_last: keep images and activations as [B, height, width, C] in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        pixel_mean: Any,
        pixel_std: Any,
        label_smoothing: float,
        *,
        flip: bool = True,
        channels_last: bool = False,
    ):
        super().__init__()
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        for name, values in (("mean", pixel_mean), ("std", pixel_std)):
            values = torch.tensor(np.asarray(values, np.float32)).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.label_smoothing = label_smoothing
        self.flip = flip

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of uint8 images [B, height, width, C] and labels [B]."""
        x = images.permute(0, 3, 1, 2).float().div(255.0)
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.layout)
        if self.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        logits, labels = self.model(x), labels.long()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        hits = logits.detach().argmax(-1) == labels
        return loss, hits.float().mean()
