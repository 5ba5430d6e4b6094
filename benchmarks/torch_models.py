"""The ViT, the ResNet and the training step of the experiments, in PyTorch.

The peers of `attn_jax.models` and `experiments.core.optim`: the same parameters
(`from_nnx` copies them), the same numbers, written as PyTorch runs them fastest on a
CPU. Not a library: only what the measured models use is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx
from torch import Tensor, nn

from attn_jax import models
from attn_jax.positions import sinusoidal_2d

# Flax's LayerNorm; PyTorch's default is 1e-5.
_LAYER_NORM_EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        batch, length, dim = x.shape
        heads = (batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Position-wise feed-forward network; `jax.nn.gelu` is the tanh form."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class EncoderBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=_LAYER_NORM_EPSILON)
        self.attention = Attention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=_LAYER_NORM_EPSILON)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Pre-norm blocks and a final layer normalisation."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, num_heads, mlp_dim) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=_LAYER_NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


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
        batch, channels, height, width = images.shape
        p = self.patch
        x = images.permute(0, 2, 3, 1)
        x = x.reshape(batch, height // p, p, width // p, p, channels)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
        x = self.embed(x)
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


# ------------------------------------------------------- parameters, both ways


def flat_params(params: Any) -> dict[str, np.ndarray]:
    """The arrays of an nnx module or of its parameters' dictionary, by dotted path."""
    if isinstance(params, nnx.Module):
        params = nnx.to_pure_dict(nnx.state(params, nnx.Param))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        ".".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in leaves
    }


def _place(path: str) -> tuple[str, int | None]:
    """Where a parameter of ours lies in the peer: (name, third of the fused qkv)."""
    *parents, leaf = path.split(".")
    third = None
    if parents and parents[-1] in ("query", "key", "value"):
        third = ("query", "key", "value").index(parents[-1])
        parents[-1] = "qkv"
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    return ".".join([*parents, leaf]), third


def _to_torch(path: str, value: np.ndarray) -> np.ndarray:
    """A parameter of ours in PyTorch's layout."""
    parent, leaf = path.split(".")[-2:]
    if leaf == "kernel" and value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if leaf == "kernel":
        rows = value.shape[0] * (value.shape[1] if parent == "out" else 1)
        return value.reshape(rows, -1).T
    return value.reshape(-1) if leaf == "bias" else value


def _vit(model: models.ViT, flat: Mapping[str, np.ndarray]) -> ViT:
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


def _resnet(model: models.ResNet) -> ResNet:
    if model.max_pool:
        raise ValueError(
            "model: the PyTorch peer has no max-pooling; use max_pool=False."
        )

    def size(conv: models.StdConv) -> tuple[int, int, int, int]:
        kernel, _, width, features = conv.kernel.shape
        return width, features, kernel, conv.stride

    blocks = [
        ResidualBlock(
            [
                (*size(conv), norm.num_groups)
                for norm, conv in zip(block.norms, block.convs, strict=True)
            ],
            size(block.projection) if block.project else None,
        )
        for block in model.blocks
    ]
    norm = nn.GroupNorm(model.norm.num_groups, model.head.in_features)
    return ResNet(StdConv(*size(model.stem)), blocks, norm, model.head.out_features)


def from_nnx(model: nnx.Module) -> nn.Module:
    """The PyTorch peer of a `ViT` or `ResNet`, with a copy of its parameters.

    Args:
      model: of `attn_jax.models`; a ViT must have dot-product attention.

    Raises:
      ValueError: for another model, or one with max-pooling.
    """
    flat = flat_params(model)
    peer: nn.Module
    if isinstance(model, models.ViT):
        peer = _vit(model, flat)
    elif isinstance(model, models.ResNet):
        peer = _resnet(model)
    else:
        raise ValueError(
            f"model must be a ViT or a ResNet, got {type(model).__name__}: there is no "
            "PyTorch peer of it."
        )
    parts: dict[str, list[np.ndarray]] = {}
    for path in sorted(flat, key=lambda path: (_place(path)[1] or 0, path)):
        parts.setdefault(_place(path)[0], []).append(_to_torch(path, flat[path]))
    state = {
        name: torch.tensor(np.concatenate(values) if len(values) > 1 else values[0])
        for name, values in parts.items()
    }
    peer.load_state_dict(state)
    return peer


# -------------------------------------------------------------- training step


class Recipe(NamedTuple):
    """The numbers of a recipe for images as Python floats."""

    learning_rate: float
    weight_decay: float
    warmup: float
    updates: float
    label_smoothing: float
    clip_norm: float
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts: ours decays what has two axes.

    Flax keeps the biases of query, key and value as [heads, head_dim], so they decay.
    """
    return parameter.ndim > 1 or name.endswith("qkv.bias")


class TrainStep:
    """One update: normalise, flip, loss, gradients, clip, AdamW, schedule.

    Args:
      model: from `from_nnx`; changed in place.
      recipe: hyper-parameters.
      flip: mirror each image left-right with probability 1/2.
      channels_last: keep images and activations as [B, height, width, C] in memory.
      compile: run the model, its loss and its gradient through `torch.compile`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        flip: bool = True,
        channels_last: bool = False,
        compile: bool = False,
    ):
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.train()
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=self.layout)
        self.recipe = recipe
        self.flip = flip
        self.mean = torch.tensor(recipe.pixel_mean).view(1, -1, 1, 1)
        self.std = torch.tensor(recipe.pixel_std).view(1, -1, 1, 1)
        self.step = 0
        named = list(self.model.named_parameters())
        self.parameters = [p for _, p in named]
        self.optimizer = torch.optim.AdamW(
            [
                dict(
                    params=[p for n, p in named if _decays(n, p)],
                    weight_decay=recipe.weight_decay,
                ),
                dict(
                    params=[p for n, p in named if not _decays(n, p)], weight_decay=0.0
                ),
            ],
            lr=recipe.learning_rate,
            fused=True,
        )
        self._loss: Callable[..., tuple[Tensor, Tensor]] = (
            torch.compile(self._forward) if compile else self._forward
        )

    def _forward(
        self, images: Tensor, labels: Tensor, flipped: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of uint8 images [B, height, width, C]."""
        x = images.permute(0, 3, 1, 2).float().div(255.0)
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.layout)
        if flipped is not None:
            x = torch.where(flipped, x.flip(-1), x)
        logits = self.model(x)
        loss = F.cross_entropy(
            logits, labels, label_smoothing=self.recipe.label_smoothing
        )
        hits = logits.detach().argmax(-1) == labels
        return loss, hits.float().mean()

    def learning_rate(self) -> float:
        """Linear warm-up to the peak, then a cosine to zero."""
        r = self.recipe
        warm = (self.step + 1) / max(r.warmup, 1.0)
        progress = (self.step - r.warmup) / max(r.updates - r.warmup, 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return r.learning_rate * min(warm, cosine)

    def gradients(
        self, images: np.ndarray, labels: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss and leaves its gradient in the parameters' ``grad``."""
        flipped = torch.rand(len(images), 1, 1, 1) < 0.5 if self.flip else None
        loss, accuracy = self._loss(
            torch.from_numpy(images), torch.from_numpy(labels), flipped
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), accuracy

    def update(self) -> None:
        """Clips the gradients and applies them."""
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm, foreach=True)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Does one update; returns loss and accuracy.

        Args:
          images: uint8 [B, height, width, C].
          labels: int64 [B].
        """
        result = self.gradients(images, labels)
        self.update()
        return result
