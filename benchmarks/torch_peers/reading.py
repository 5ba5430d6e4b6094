"""Long sequences in PyTorch: the peer of `experiments.long_range.cells.Reader`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -1


class ReadLoss(nn.Module):
    """Cross-entropy of what is asked of sequences.

    Args:
      model: a peer of `attn_jax.models.Labeller`.
      each: whether positions have labels, or the sequence has one, of the mean.
      bigram: whether a position reads the symbol before it too.
      none: the symbol before the first.
    """

    def __init__(self, model: nn.Module, *, each: bool, bigram: bool, none: int):
        super().__init__()
        self.tower = model
        self.each, self.bigram, self.none = each, bigram, none

    def forward(
        self,
        inputs: Tensor,
        lengths: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of symbols [B, T]; ``groups`` are not read."""
        ids, labels = inputs.long()[..., None], labels.long()
        if self.bigram:
            before = F.pad(ids[:, :-1], (0, 0, 1, 0), value=self.none)
            ids = torch.cat((ids, before), -1)
        real = torch.arange(ids.shape[1])[None] < lengths[:, None]
        ids = ids.masked_fill(~real[..., None], 0)
        x = self.tower.body(self.tower.input(ids), real)
        if not self.each:
            x = x.masked_fill(~real[..., None], 0).sum(1) / real.sum(1, keepdim=True)
        logits = self.tower.head(x)
        loss = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED
        )
        asked = labels != IGNORED
        hits = (logits.detach().argmax(-1) == labels) & asked
        return loss, hits.sum() / asked.sum()
