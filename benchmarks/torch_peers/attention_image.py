"""The classifier whose heads are placed by what they look at, in PyTorch.

The peer of `experiments.attention_as_conv.model.AttentionImage`, with the same steps:
where scores are a sum over axes, rows first, then columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_peers.layers import EncoderBlock, layer_norm


class PositionalAttention(nn.Module):
    """Heads that attend by position, with or without content.

    Args:
      grid: rows and columns of the tokens.
      dim, num_heads: width, heads.
      encoding: "quadratic", "gaussian", "relative" or "relative_content".
      key_dim: size of queries and keys, of the last.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        num_heads: int,
        encoding: str,
        key_dim: int | None,
    ):
        super().__init__()
        self.grid, self.num_heads, self.encoding = grid, num_heads, encoding
        self.value = nn.Parameter(torch.zeros(num_heads, dim, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        if encoding in ("quadratic", "gaussian"):
            size = num_heads * (1 if encoding == "quadratic" else 4)
            self.centre = nn.Parameter(torch.zeros(2 * num_heads))
            self.spread = nn.Parameter(torch.zeros(size))
        else:
            rows, columns = (num_heads * (2 * n - 1) for n in grid)
            self.row_table = nn.Parameter(torch.zeros(rows))
            self.column_table = nn.Parameter(torch.zeros(columns))
        if encoding == "relative_content":
            assert key_dim is not None
            self.query = nn.Linear(dim, num_heads * key_dim)
            self.key = nn.Linear(dim, num_heads * key_dim)
        for name, n in zip(("rows", "columns"), grid, strict=True):
            places = torch.arange(n)
            offset = places[None] - places[:, None]
            self.register_buffer(name, offset, persistent=False)

    def _axis_scores(self) -> tuple[Tensor, Tensor]:
        """[N, h, h] and [N, w, w]."""
        if self.encoding != "quadratic":
            height, width = self.grid
            rows = self.row_table.view(self.num_heads, -1)
            columns = self.column_table.view(self.num_heads, -1)
            return rows[:, self.rows + height - 1], columns[:, self.columns + width - 1]
        centres = self.centre.view(self.num_heads, 2)
        alpha = 0.5 * self.spread.square()[:, None, None]
        rows, columns = (
            -alpha * (offset - centres[:, i, None, None]).square()
            for i, offset in enumerate((self.rows, self.columns))
        )
        return rows, columns

    def _scores(self) -> Tensor:
        """[N, T, T]."""
        if self.encoding != "gaussian":
            rows, columns = self._axis_scores()
            pairs = rows[:, :, None, :, None] + columns[:, None, :, None, :]
            return pairs.flatten(3, 4).flatten(1, 2)
        height, width = self.grid
        shape = (height, width, height, width)
        offsets = torch.stack(
            (
                self.rows[:, None, :, None].expand(shape),
                self.columns[None, :, None, :].expand(shape),
            ),
            -1,
        ).view(height * width, height * width, 2)
        factors = self.spread.view(self.num_heads, 2, 2)
        apart = offsets - self.centre.view(self.num_heads, 1, 1, 2)
        turned = apart @ factors[:, None]  # ‖Aᵀ(δ − Δ)‖²
        return -0.5 * turned.square().sum(-1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        batch, length, dim = x.shape
        if self.encoding == "relative_content":
            query, key = (
                m(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
                for m in (self.query, self.key)
            )
            wide = self.value.transpose(0, 1).reshape(dim, -1)
            value = (x @ wide).view(batch, length, self.num_heads, dim).transpose(1, 2)
            scores = self._scores()[None]
            out = F.scaled_dot_product_attention(query, key, value, scores)
            return out.sum(1) + self.bias
        x = x.transpose(0, 1)  # [T, B, D]
        if self.encoding == "gaussian":
            weights = self._scores().softmax(-1)
            tokens = x.reshape(length, batch * dim)
            parts = [
                (weights[h] @ tokens).view(-1, dim) @ self.value[h]
                for h in range(self.num_heads)
            ]
            out = torch.stack(parts).sum(0) + self.bias
            return out.view(length, batch, dim).transpose(0, 1)
        height, width = self.grid
        rows, columns = (scores.softmax(-1) for scores in self._axis_scores())
        tokens = x.reshape(height, width * batch * dim)
        out = self.bias
        for h in range(self.num_heads):
            seen = (rows[h] @ tokens).view(height, width, batch * dim).transpose(0, 1)
            seen = columns[h] @ seen.reshape(width, height * batch * dim)
            out = out + seen.view(-1, dim) @ self.value[h]
        out = out.view(width, height, batch, dim)
        return out.permute(2, 1, 0, 3).reshape(batch, length, dim)


class AttentionImage(nn.Module):
    """Patches, blocks of `PositionalAttention`, average pooling, linear head.

    Args:
      image_shape: (height, width, channels).
      classes: number of labels.
      patch, dim, depth, mlp_dim, num_heads, encoding, key_dim: as of ours.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        patch: int,
        dim: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        encoding: str,
        key_dim: int | None,
    ):
        super().__init__()
        height, width, channels = image_shape
        grid = (height // patch, width // patch)
        self.patch = patch
        self.embed = nn.Linear(patch * patch * channels, dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                dim,
                PositionalAttention(grid, dim, num_heads, encoding, key_dim),
                mlp_dim,
            )
            for _ in range(depth)
        )
        self.norm = layer_norm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images [B, C, height, width] to logits [B, classes]."""
        x = self.embed(patchify(images, self.patch))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images [B, C, height, width] as patches [B, T, P · P · C], row by row."""
    batch, channels, height, width = images.shape
    x = images.permute(0, 2, 3, 1)
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)
