"""Graph networks in PyTorch: attention on edges by `index_add_`, molecules by a mask.

The peers of `experiments.graphs.model`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_peers.layers import (
    Encoder,
    Ids,
    Mlp,
    Vectors,
    layer_norm,
)


class EdgeAttention(nn.Module):
    """GATv2: every node reads those that its edges come from.

    Args:
      dim, num_heads, head_dim: width, heads and their size.
      num_kinds: kinds of edges that each head adds a number for; 0 for none.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, num_kinds: int):
        super().__init__()
        self.sizes = (2, num_heads, head_dim)
        self.project = nn.Linear(dim, 2 * num_heads * head_dim)
        self.out = nn.Linear(num_heads * head_dim, dim)
        self.of_heads = nn.ParameterDict(
            {"score": nn.Parameter(torch.zeros(num_heads, head_dim))}
        )
        if num_kinds:
            self.of_kinds = nn.Parameter(torch.zeros(num_heads, num_kinds))

    def forward(
        self, x: Tensor, senders: Tensor, receivers: Tensor, kinds: Tensor
    ) -> Tensor:
        """Maps nodes [N, D] to [N, D]."""
        query, key = self.project(x).view(len(x), *self.sizes).unbind(1)
        sent = key.index_select(0, senders)  # [E, heads, H]
        hidden = F.leaky_relu(query.index_select(0, receivers) + sent, 0.2)
        logits = (hidden * self.of_heads["score"]).sum(-1)
        if hasattr(self, "of_kinds"):
            logits = logits + self.of_kinds.t().index_select(0, kinds)
        with torch.no_grad():
            top = logits.new_full((len(x), logits.shape[1]), -torch.inf)
            places = receivers.long()[:, None].expand_as(logits)
            top.scatter_reduce_(0, places, logits, "amax")
        weights = (logits - top.index_select(0, receivers)).exp()
        total = weights.new_zeros(top.shape).index_add_(0, receivers, weights)
        mixed = torch.zeros_like(query)
        mixed = mixed.index_add_(0, receivers, weights[..., None] * sent)
        return self.out((mixed / total[..., None]).flatten(1))


class GraphBlock(nn.Module):
    """Pre-norm block."""

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, num_kinds: int, mlp_dim: int
    ):
        super().__init__()
        self.attention_norm = layer_norm(dim)
        self.attention = EdgeAttention(dim, num_heads, head_dim, num_kinds)
        self.mlp_norm = layer_norm(dim)
        self.mlp = Mlp(dim, mlp_dim)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """Maps nodes [N, D] to [N, D]."""
        x = x + self.attention(self.attention_norm(x), *edges)
        return x + self.mlp(self.mlp_norm(x))


class GraphEncoder(nn.Module):
    """Blocks and a layer normalisation."""

    def __init__(self, depth: int, dim: int, *sizes: int):
        super().__init__()
        self.blocks = nn.ModuleList(GraphBlock(dim, *sizes) for _ in range(depth))
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """Maps nodes [N, D] to [N, D]."""
        for block in self.blocks:
            x = block(x, *edges)
        return self.norm(x)


class GraphLabeller(nn.Module):
    """Labels of nodes, some of which are read.

    Args:
      features, classes: sizes of a node's vector and of an output.
      dim, depth, num_heads, head_dim, num_kinds, mlp_dim: of the encoder.
      reads_labels: whether known labels are read.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        num_kinds: int,
        mlp_dim: int,
        reads_labels: bool,
    ):
        super().__init__()
        self.input = Vectors(features, dim)
        if reads_labels:
            self.given = nn.Embedding(classes, dim)
        sizes = num_heads, head_dim, num_kinds, mlp_dim
        self.encoder = GraphEncoder(depth, dim, *sizes)
        self.head = nn.Linear(dim, classes)


class NodeLoss(nn.Module):
    """Cross-entropy of the training nodes whose label is not read in this update.

    Args:
      model: the labeller.
      shown: share of the training labels that is read.
    """

    def __init__(self, model: GraphLabeller, shown: float):
        super().__init__()
        self.model = model
        self.shown = shown

    def forward(
        self,
        nodes: Tensor,
        senders: Tensor,
        receivers: Tensor,
        kinds: Tensor,
        labels: Tensor,
        train: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of one graph."""
        model, right = self.model, labels[train].long()
        x = model.input(nodes)
        show = torch.rand(len(train)) < self.shown
        if hasattr(model, "given"):
            rows = model.given(right) * show[:, None]
            x = x.index_add(0, train, rows)
        x = model.encoder(x, senders, receivers, kinds)
        logits = model.head(x.index_select(0, train))
        weights = (~show).float()
        weights = weights / weights.sum().clamp(min=1.0)
        losses = F.cross_entropy(logits, right, reduction="none")
        hits = (logits.detach().argmax(-1) == right).float()
        return (losses * weights).sum(), (hits * weights).sum()


class GraphRegressor(nn.Module):
    """One number for a whole graph.

    Args:
      inputs: rows of the tables of a node's ids.
      dim, depth, num_heads, mlp_dim: of the encoder.
      sees_edges: whether attention sees edges alone.
      pair_sizes: kinds of each id of a pair, for a bias; empty for none.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        sees_edges: bool,
        pair_sizes: Sequence[int],
    ):
        super().__init__()
        self.input = Ids(tuple(inputs), dim)
        self.encoder = Encoder(depth, dim, num_heads, mlp_dim)
        self.pair_sizes = tuple(pair_sizes)
        if pair_sizes:
            positions = nn.Module()
            table = torch.zeros(depth, sum(pair_sizes), num_heads)
            positions.table = nn.Parameter(table)
            self.encoder.positions = positions
            starts = torch.tensor((0, *pair_sizes[:-1])).cumsum(0)
            self.register_buffer("starts", starts, persistent=False)
        self.sees_edges = sees_edges
        self.hidden = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, 1)

    def forward(self, atoms: Tensor, pairs: Tensor, real: Tensor) -> Tensor:
        """Maps atoms [B, T, K'], pairs [B, T, T, K] and bool [B, T] to [B]."""
        mask = real[:, None, None]
        if self.sees_edges:
            loops = torch.eye(atoms.shape[1], dtype=torch.bool)
            mask = mask & ((pairs[..., 0] > 0) | loops)[:, None]
        x = self.input(atoms.masked_fill(~real[..., None], 0))
        if self.pair_sizes:
            # One-hot and a product: its backward pass is no scatter into few rows.
            hot = F.one_hot(pairs + self.starts, sum(self.pair_sizes)).sum(-2).float()
            for block, table in zip(
                self.encoder.blocks, self.encoder.positions.table, strict=True
            ):
                bias = (hot @ table).permute(0, 3, 1, 2)
                x = block(x, bias.masked_fill(~mask, -torch.inf))
            x = self.encoder.norm(x)
        else:
            x = self.encoder(x, mask)
        total = x.masked_fill(~real[..., None], 0).sum(1)
        count = real.sum(1, keepdim=True)
        both = torch.cat((total / count, total / 16.0), -1)
        return self.head(F.gelu(self.hidden(both), approximate="tanh"))[:, 0]


class MoleculeLoss(nn.Module):
    """Squared error of the molecules that count.

    Args:
      model: the regressor.
      columns: which ids of a pair the model reads.
    """

    def __init__(self, model: GraphRegressor, columns: Sequence[int]):
        super().__init__()
        self.model = model
        self.columns = list(columns)

    def forward(
        self, atoms: Tensor, pairs: Tensor, real: Tensor, target: Tensor, weight: Tensor
    ) -> tuple[Tensor, None]:
        """Mean over molecules [B]."""
        pairs = pairs.long()
        pairs = pairs if self.model.sees_edges else pairs[..., self.columns]
        errors = self.model(atoms.long(), pairs, real) - target
        return (errors.square() * weight).sum() / weight.sum().clamp(min=1.0), None
