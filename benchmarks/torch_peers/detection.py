"""Detectors in PyTorch: the peers of `experiments.detection.model`.

Matching is SciPy's on the host, as in the paper's code (arXiv:2005.12872).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attn_jax.positions import sinusoidal_2d
from benchmarks.torch_peers.decoding import Block
from benchmarks.torch_peers.images import block_of, resnet_parts
from benchmarks.torch_peers.layers import Attention, Encoder, layer_norm
from benchmarks.torch_peers.pairs import Cross
from experiments.detection.boxes import CLASS, DISTANCE, OVERLAP
from experiments.detection.cells import HARD, NEAR, NOTHING
from experiments.detection.model import Centers, Detr


class Backbone(nn.Module):
    """A residual network without its classifier."""

    def __init__(self, model: Any):
        super().__init__()
        self.stem, blocks, self.norm = resnet_parts(model)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, side, side] to [B, F, h, w]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return F.relu(self.norm(x))


class _Set(nn.Module):
    """Self-attention of queries, by the names of ours."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.attend = Attention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class Set(nn.Module):
    """The peer of `Detr` with exact attention.

    Args:
      model: ours, for its sizes.
      size: rows and columns of the last map.
      dim, depth, decoder_depth, mlp_dim, num_heads, dropout_rate: as of ours.
      classes: K.
    """

    def __init__(
        self,
        model: Detr,
        size: tuple[int, int],
        *,
        dim: int,
        depth: int,
        decoder_depth: int,
        mlp_dim: int,
        num_heads: int,
        dropout_rate: float,
        classes: int,
    ):
        super().__init__()
        self.backbone = Backbone(model.backbone)
        self.project = nn.Linear(model.backbone.out_features, dim)
        if depth:
            self.encoder = Encoder(
                depth, dim, num_heads, mlp_dim, dropout_rate=dropout_rate
            )
        table = np.asarray(sinusoidal_2d(*size, dim)) * float(model.positions)
        self.register_buffer("table", torch.tensor(table), persistent=False)
        self.queries = nn.Parameter(torch.zeros(model.queries.shape))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                _Set(dim, num_heads),
                mlp_dim,
                Cross(dim, num_heads),
                dropout_rate,
            )
            for _ in range(decoder_depth)
        )
        self.norm = layer_norm(dim)
        self.classify = nn.Linear(dim, classes + 1)
        self.box = nn.ModuleList(nn.Linear(dim, n) for n in (dim, dim, 4))
        self.encodes = bool(depth)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [L, B, Q, K + 1] and boxes [L, B, Q, 4] of every layer."""
        memory = self.backbone(images).flatten(2).transpose(1, 2)
        memory = self.project(memory) + self.table
        memory = self.encoder(memory) if self.encodes else memory
        x, found = self.queries.expand(len(images), -1, -1), []
        for block in self.blocks:
            x = block(x, memory)
            found.append(self.norm(x))
        told = torch.stack(found)
        hidden = F.relu(self.box[1](F.relu(self.box[0](told))))
        return self.classify(told), self.box[2](hidden).sigmoid()


def overlap(one: Tensor, two: Tensor) -> Tensor:
    """Generalised overlap of boxes [..., 4]."""

    def ends(box: Tensor) -> tuple[Tensor, Tensor]:
        half = box[..., 2:] / 2
        return box[..., :2] - half, box[..., :2] + half

    (low, high), (low_2, high_2) = ends(one), ends(two)
    shared = (torch.minimum(high, high_2) - torch.maximum(low, low_2)).clamp(min=0)
    around = torch.maximum(high, high_2) - torch.minimum(low, low_2)
    inside, outside = shared.prod(-1), around.prod(-1)
    union = one[..., 2:].prod(-1) + two[..., 2:].prod(-1) - inside
    return inside / union - (outside - union) / outside


def box_loss(told: Tensor, there: Tensor) -> Tensor:
    """5 · L1 + 2 · (1 − generalised overlap)."""
    distance = (told - there).abs().sum(-1)
    return DISTANCE * distance + OVERLAP * (1 - overlap(told, there))


class SetLoss(nn.Module):
    """The loss of sets, each matched to what is there.

    Args:
      model: the peer.
      auxiliary: whether all layers count, or the last alone.
    """

    def __init__(self, model: nn.Module, auxiliary: bool):
        super().__init__()
        self.model, self.auxiliary = model, auxiliary

    def forward(self, images: Tensor, there: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """Loss of pictures [B, side, side, C] and items [B, M, 4], [B, M]."""
        logits, boxes = self.model(pixels(images))
        if not self.auxiliary:
            logits, boxes = logits[-1:], boxes[-1:]
        labels, total = labels.long(), torch.zeros(())
        rows = [torch.nonzero(kinds >= 0)[:, 0] for kinds in labels]
        count = sum(map(len, rows))
        for of_class, told in zip(logits, boxes, strict=True):
            chosen = self._chosen(of_class, told, there, labels, rows)
            picture = torch.cat(
                [torch.full((len(q),), i) for i, q in enumerate(chosen)]
            )
            query, item = torch.cat(chosen), torch.cat(rows)
            nothing = of_class.shape[-1] - 1
            target = torch.full(of_class.shape[:2], nothing)
            target[picture, query] = labels[picture, item]
            weight = torch.ones(nothing + 1)
            weight[-1] = NOTHING
            total = total + F.cross_entropy(
                of_class.flatten(0, 1), target.flatten(), weight
            )
            pairs = told[picture, query], there[picture, item]
            total = total + box_loss(*pairs).sum() / count
        return total, None

    @staticmethod
    @torch.no_grad()
    def _chosen(
        logits: Tensor, told: Tensor, there: Tensor, labels: Tensor, rows: list[Tensor]
    ) -> list[Tensor]:
        """Of each picture the queries that stand for its items, in their order."""
        found = []
        for i, items in enumerate(rows):
            true = there[i, items]
            cost = DISTANCE * torch.cdist(true, told[i], p=1)
            cost -= OVERLAP * overlap(told[i][None], true[:, None])
            cost -= CLASS * logits[i].softmax(-1)[:, labels[i, items]].T
            found.append(torch.from_numpy(linear_sum_assignment(cost.numpy())[1]))
        return found


class Map(nn.Module):
    """The peer of `Centers`."""

    def __init__(self, model: Centers, classes: int):
        super().__init__()
        self.backbone = Backbone(model.backbone)
        self.blocks = nn.ModuleList(block_of(block) for block in model.blocks)
        width = model.backbone.out_features
        self.hidden = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, classes, 1)
        self.box = nn.Conv2d(width, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, h, w, K] and boxes [B, h, w, 4]."""
        x = self.backbone(images)
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.hidden(x))
        rows, columns = x.shape[2:]
        within = self.box(x).permute(0, 2, 3, 1).sigmoid()
        places = torch.meshgrid(
            torch.arange(columns), torch.arange(rows), indexing="xy"
        )
        scale = torch.tensor([columns, rows])
        centre = (torch.stack(places, -1) + within[..., :2]) / scale
        boxes = torch.cat((centre, within[..., 2:]), -1)
        return self.classify(x).permute(0, 2, 3, 1), boxes


class CenterLoss(nn.Module):
    """The focal loss of centres, and that of the boxes at them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, there: Tensor, labels: Tensor) -> tuple[Any, ...]:
        """Loss of pictures [B, side, side, C] and items [B, M, 4], [B, M]."""
        logits, boxes = self.model(pixels(images))
        rows, columns, classes = logits.shape[1:]
        picture, item = torch.nonzero(labels >= 0, as_tuple=True)
        true, kinds = there[picture, item], labels.long()[picture, item]
        scale = torch.tensor([columns, rows])
        place = (true[:, :2] * scale).floor().clamp(min=0)
        place = torch.minimum(place, (scale - 1).float())
        spread = (true[:, 2:] * scale / 6).clamp(min=0.5)
        across = (torch.arange(columns) - place[:, :1]) / spread[:, :1]
        along = (torch.arange(rows) - place[:, 1:]) / spread[:, 1:]
        bumps = torch.exp(-0.5 * (across[:, None] ** 2 + along[..., None] ** 2))
        heat = torch.zeros(len(images) * classes, rows, columns)
        at = (picture * classes + kinds)[:, None, None].expand_as(bumps)
        heat = heat.scatter_reduce(0, at, bumps, "amax").unflatten(0, (-1, classes))
        heat = heat.permute(0, 2, 3, 1)
        yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
        each = torch.where(
            heat == 1,
            (HARD * no).exp() * yes,
            (1 - heat) ** NEAR * (HARD * yes).exp() * no,
        )
        x, y = place.long().unbind(-1)
        total = box_loss(boxes[picture, y, x], true).sum() - each.sum()
        return total / len(true), None


def pixels(images: Tensor) -> Tensor:
    """uint8 [B, side, side, C] as float32 [B, C, side, side] in [−1, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
