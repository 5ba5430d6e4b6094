"""The training step of the experiments in PyTorch: loss, gradients, clipped AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Recipe(NamedTuple):
    """The numbers of `experiments.core.optim.Hyper` as Python floats."""

    learning_rate: float
    weight_decay: float
    warmup: float
    updates: float
    clip_norm: float

    @classmethod
    def of(cls, hyper: Any) -> Recipe:
        """Those of a step of ours."""
        return cls(*(float(getattr(hyper, name)) for name in cls._fields))


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts: ours decays what has two axes.

    Flax keeps the biases of query, key and value as [heads, head_dim], so they decay.
    """
    return parameter.ndim > 1 or name.endswith("qkv.bias")


class TrainStep:
    """One update: loss, gradients, clip, AdamW, schedule.

    Args:
      loss: maps a batch to (loss, what else is told of it); changed in place.
      recipe: hyper-parameters.
      compile: run the loss and its gradient through `torch.compile`.
    """

    def __init__(self, loss: nn.Module, recipe: Recipe, *, compile: bool = False):
        self.loss = loss
        self.recipe = recipe
        self.step = 0
        named = [(n, p) for n, p in loss.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in named:
            groups[_decays(name, parameter)].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=params, weight_decay=decays * recipe.weight_decay)
                for decays, params in groups.items()
                if params
            ],
            lr=recipe.learning_rate,
            fused=True,
        )
        self._loss: Callable[..., tuple[Tensor, Any]] = (
            torch.compile(loss) if compile else loss
        )

    def learning_rate(self) -> float:
        """Linear warm-up to the peak, then a cosine to zero."""
        r = self.recipe
        warm = (self.step + 1) / max(r.warmup, 1.0)
        progress = (self.step - r.warmup) / max(r.updates - r.warmup, 1.0)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
        return r.learning_rate * min(warm, cosine)

    def gradients(self, *batch: np.ndarray) -> tuple[Tensor, Any]:
        """Computes the loss and leaves its gradient in the parameters' ``grad``."""
        loss, more = self._loss(*map(torch.from_numpy, batch))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), more

    def norm(self) -> float:
        """Of all gradients together."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return float(nn.utils.get_total_norm(grads))

    def update(self) -> None:
        """Clips the gradients and applies them."""
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm, foreach=True)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1

    def __call__(self, *batch: np.ndarray) -> tuple[Tensor, Any]:
        """Does one update with the arrays of a batch; returns the loss and the rest."""
        result = self.gradients(*batch)
        self.update()
        return result
