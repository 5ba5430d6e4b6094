"""Sequence to sequence in PyTorch: the peer of `attn_jax.models.EncoderDecoder`."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_jax.positions import sinusoidal_1d
from benchmarks.torch_peers.decoding import Block, Causal
from benchmarks.torch_peers.layers import Encoder, layer_norm

IGNORED = -1


class Cross(nn.Module):
    """Attention of tokens to a memory."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.memory = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Maps [B, T, D] to [B, T, D]; the mask is bool [B, 1, 1, S]."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = map(heads, self.memory(memory).chunk(2, -1))
        h = F.scaled_dot_product_attention(heads(self.query(x)), key, value, mask)
        return self.out(h.transpose(1, 2).flatten(2))


class _Writer(nn.Module):
    """The decoder's parameters, by the names of ours."""

    def __init__(self, symbols: int, dim: int, blocks: list[Block]):
        super().__init__()
        self.embed = nn.Embedding(symbols, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = layer_norm(dim)


class EncoderDecoder(nn.Module):
    """The Transformer: pre-norm, sinusoidal positions, a tied output table.

    Args:
      source, target: symbols there are.
      dim, depth, num_heads, mlp_dim, dropout_rate: as of ours.
      length: the longest sequence.
    """

    def __init__(
        self,
        source: int,
        target: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        dropout_rate: float,
        length: int,
    ):
        super().__init__()
        self.scale = math.sqrt(dim)
        self.embed = nn.Embedding(source, dim)
        self.encoder = Encoder(
            depth, dim, num_heads, mlp_dim, dropout_rate=dropout_rate
        )
        blocks = [
            Block(
                dim,
                Causal(dim, num_heads),
                mlp_dim,
                Cross(dim, num_heads),
                dropout_rate,
            )
            for _ in range(depth)
        ]
        self.decoder = _Writer(target, dim, blocks)
        self.dropout = nn.Dropout(dropout_rate)
        table = torch.tensor(np.asarray(sinusoidal_1d(length, dim)))
        self.register_buffer("table", table, persistent=False)

    def forward(self, source: Tensor, target: Tensor, real: Tensor) -> Tensor:
        """Logits [B, T, O] of what comes after each target symbol."""
        mask, table = real[:, None, None], self.table[: source.shape[1]]
        x = (self.scale * self.embed(source)).masked_fill(~real[..., None], 0)
        # Ours drops before positions in the encoder, behind them in the decoder.
        memory = self.encoder(self.dropout(x) + table, mask)
        memory = memory.masked_fill(~real[..., None], 0)
        y = self.scale * self.decoder.embed(target) + self.table[: target.shape[1]]
        y = self.dropout(y)
        for block in self.decoder.blocks:
            y = block(y, memory, mask)
        return self.decoder.norm(y) @ self.decoder.embed.weight.T


class PairLoss(nn.Module):
    """Cross-entropy of what is asked for, labels smoothed.

    Args:
      model: the peer.
      padding: the source symbol that is none.
      label_smoothing: share of each label that is spread over all symbols.
    """

    def __init__(self, model: nn.Module, padding: int, label_smoothing: float):
        super().__init__()
        self.model = model
        self.padding, self.smoothing = padding, label_smoothing

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of pairs [B, L, 2] and labels [B, L]."""
        source, before = inputs.long().unbind(-1)
        labels = labels.long()
        logits = self.model(source, before, source != self.padding)
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
        )
        asked = labels != IGNORED
        hits = ((logits.detach().argmax(-1) == labels) & asked).sum()
        return loss, hits / asked.sum()
