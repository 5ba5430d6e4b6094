"""What several peers are made of: the pre-norm encoder, and a loss as a module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Flax's LayerNorm; PyTorch's default is 1e-5.
LAYER_NORM_EPSILON = 1e-6


def layer_norm(dim: int) -> nn.LayerNorm:
    """Flax's."""
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPSILON)


class Rotation(nn.Module):
    """Turns queries and keys by their positions, as `attn_jax.positions.rotary`."""

    def __init__(self, length: int, head_dim: int, max_wavelength: float = 10_000.0):
        super().__init__()
        rates = max_wavelength ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        angles = torch.arange(length).double()[:, None] * rates
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., T, H] to the same."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack(
            (first * cos - second * sin, first * sin + second * cos), -1
        ).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, dim: int, num_heads: int, rotation: Rotation | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.rotation = rotation

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; a mask is bool, or is added to the scores."""
        batch, length, dim = x.shape
        heads = (batch, length, 3, self.num_heads, dim // self.num_heads)
        qkv = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)
        if self.rotation is None:
            q, k, v = qkv.unbind(0)
        else:
            (q, k), v = self.rotation(qkv[:2]).unbind(0), qkv[2]
        h = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(h.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    """Position-wise feed-forward network; `jax.nn.gelu` is the tanh form."""

    def __init__(self, dim: int, hidden_dim: int, dropout_rate: float = 0.0):
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.contract = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., D] to [..., D]."""
        hidden = F.gelu(self.expand(x), approximate="tanh")
        return self.contract(self.dropout(hidden))


class EncoderBlock(nn.Module):
    """Pre-norm block."""

    def __init__(
        self, dim: int, attention: nn.Module, mlp_dim: int, dropout_rate: float = 0.0
    ):
        super().__init__()
        self.attention_norm = layer_norm(dim)
        self.attention = attention
        self.mlp_norm = layer_norm(dim)
        self.mlp = Mlp(dim, mlp_dim, dropout_rate)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, *more: Tensor | None) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; attention reads the rest."""
        x = x + self.dropout(self.attention(self.attention_norm(x), *more))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Encoder(nn.Module):
    """Pre-norm blocks and a final layer normalisation."""

    def __init__(
        self,
        depth: int,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        rotation: Rotation | None = None,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim, Attention(dim, num_heads, rotation), mlp_dim, dropout_rate
            )
            for _ in range(depth)
        )
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Ids(nn.Module):
    """The sum of K rows of tables that lie behind one another, an id each."""

    def __init__(self, sizes: tuple[int, ...], dim: int):
        super().__init__()
        self.embed = nn.EmbeddingBag(sum(sizes), dim, mode="sum")
        starts = torch.tensor((0, *sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps ids [..., K] to [..., D]."""
        rows = ids + self.starts
        return self.embed(rows.flatten(0, -2)).unflatten(0, ids.shape[:-1])


class Vectors(nn.Module):
    """Vectors by one linear map."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(features, dim)

    def forward(self, vectors: Tensor) -> Tensor:
        """Maps [..., F] to [..., D]."""
        return self.linear(vectors)


def input_of(sizes: int | tuple[int, ...], dim: int) -> nn.Module:
    """The input layer of a labeller, for vectors or ids."""
    return Vectors(sizes, dim) if isinstance(sizes, int) else Ids(tuple(sizes), dim)
