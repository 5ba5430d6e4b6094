"""Decoders in PyTorch, in parallel and token by token: peers of `nn.Decoder`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.torch_peers.layers import Mlp, layer_norm
from benchmarks.torch_peers.params import without_second_bias

LEAST_LOG_SCALE = -7.0


class Causal(nn.Module):
    """Causal attention: query, key and value by one map, and an output map.

    Args:
      dim, num_heads: width, heads.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each [B, N, T, H]."""
        qkv = self.project(x).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def _merged(self, heads: Tensor) -> Tensor:
        return self.out(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        out = F.scaled_dot_product_attention(*self._heads(x), is_causal=True)
        return self._merged(out)

    def state(self, batch: int, length: int) -> Any:
        """Room for the keys and values of so many tokens."""
        shape = (2, batch, self.num_heads, length, self.out.in_features)
        return torch.zeros(*shape[:-1], shape[-1] // self.num_heads)

    def step(self, state: Any, position: int, x: Tensor) -> tuple[Any, Tensor]:
        """The token [B, D] at a position: writes to the cache in place."""
        query, key, value = self._heads(x[:, None])
        state[0, :, :, position], state[1, :, :, position] = (
            key[:, :, 0],
            value[:, :, 0],
        )
        keys, values = state[:, :, :, : position + 1]
        out = F.scaled_dot_product_attention(query, keys, values)
        return state, self._merged(out)[:, 0]


class Linear(Causal):
    """Linear attention with elu + 1, its chunks side by side, as ours.

    Args:
      dim, num_heads: width, heads.
      chunk: tokens of a chunk.
    """

    def __init__(self, dim: int, num_heads: int, chunk: int):
        super().__init__(dim, num_heads)
        self.chunk = chunk

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        length = x.shape[1]
        query, key, value = self._heads(x)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        value = F.pad(value, (0, 1), value=1.0)
        missing = -length % self.chunk
        query, key, value = (
            F.pad(a, (0, 0, 0, missing)).unflatten(2, (-1, self.chunk))
            for a in (query, key, value)
        )
        added = key.transpose(-1, -2) @ value
        before = added.cumsum(2) - added
        scores = (query @ key.transpose(-1, -2)).tril()
        out = (scores @ value + query @ before).flatten(2, 3)[:, :, :length]
        return self._merged(out[..., :-1] / out[..., -1:])

    def state(self, batch: int, length: int) -> Any:
        """Sums of key and value products, and of keys."""
        size = self.out.in_features // self.num_heads
        return torch.zeros(batch, self.num_heads, size, size + 1)

    def step(self, state: Any, position: int, x: Tensor) -> tuple[Any, Tensor]:
        """The token [B, D] at a position."""
        query, key, value = self._heads(x[:, None])
        query, key = F.elu(query) + 1, F.elu(key) + 1
        value = F.pad(value, (0, 1), value=1.0)
        state = state + key.transpose(-1, -2) @ value
        out = query @ state
        return state, self._merged(out[..., :-1] / out[..., -1:])[:, 0]


class Lstm(nn.Module):
    """PyTorch's LSTM and a map back to the width.

    Args:
      dim, hidden_dim: width, hidden units.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.recurrence = without_second_bias(
            nn.LSTM(dim, hidden_dim, batch_first=True)
        )
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        return self.out(self.recurrence(x)[0])

    def state(self, batch: int, length: int) -> Any:
        """The carry, zeros."""
        zeros = torch.zeros(1, batch, self.recurrence.hidden_size)
        return zeros, zeros

    def step(self, state: Any, position: int, x: Tensor) -> tuple[Any, Tensor]:
        """The next token [B, D]."""
        out, state = self.recurrence(x[:, None], state)
        return state, self.out(out[:, 0])


class Block(nn.Module):
    """Pre-norm block; an LSTM has no feed-forward network.

    Args:
      dim, mix, mlp_dim: width, what mixes tokens, hidden width.
      cross: what reads a memory, or None.
      dropout_rate: of what each part adds, and of hidden units.
    """

    def __init__(
        self,
        dim: int,
        mix: nn.Module,
        mlp_dim: int,
        cross: nn.Module | None = None,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        self.norm = layer_norm(dim)
        self.mix = mix
        if cross is not None:
            self.cross_norm = layer_norm(dim)
            self.cross = cross
        self.reads = cross is not None
        self.has_mlp = not isinstance(mix, Lstm)
        if self.has_mlp:
            self.mlp_norm = layer_norm(dim)
            self.mlp = Mlp(dim, mlp_dim, dropout_rate)
        self.dropout = nn.Dropout(dropout_rate)

    def _finish(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mlp(self.mlp_norm(x))) if self.has_mlp else x

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Maps [B, T, D] to [B, T, D], with a memory [B, S, D] and its mask."""
        x = x + self.dropout(self.mix(self.norm(x)))
        if self.reads:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory, mask))
        return self._finish(x)

    def step(self, state: Any, position: int, x: Tensor) -> tuple[Any, Tensor]:
        """The token [B, D] at a position."""
        state, h = self.mix.step(state, position, self.norm(x))
        return state, self._finish(x + h)


class Decoder(nn.Module):
    """Output t says what comes after symbols 0 … t.

    Args:
      model: "softmax", "linear" or "lstm".
      symbols, outputs: of the input, and the size of an output.
      dim, depth, num_heads: width, layers, heads.
      table: positions [T, D], added to the input.
      chunk: of linear attention.
    """

    def __init__(
        self,
        model: str,
        symbols: int,
        outputs: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        table: np.ndarray,
        chunk: int,
    ):
        super().__init__()
        makers = {
            "softmax": lambda: Causal(dim, num_heads),
            "linear": lambda: Linear(dim, num_heads, chunk),
            "lstm": lambda: Lstm(dim, 5 * dim // 4),
        }
        if model not in makers:
            raise ValueError(f"model: there is no PyTorch peer of {model!r}.")
        self.embed = nn.Embedding(symbols, dim)
        self.register_buffer("table", torch.tensor(table), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dim, makers[model](), 4 * dim) for _ in range(depth)
        )
        self.norm = layer_norm(dim)
        self.head = nn.Linear(dim, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens [B, T] to outputs [B, T, O]."""
        x = self.embed(tokens) + self.table[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def init_state(self, batch: int, length: int) -> list[Any]:
        """The state of every block before the first token."""
        return [block.mix.state(batch, length) for block in self.blocks]

    def step(self, state: list[Any], position: int, token: Tensor) -> Tensor:
        """The output [B, O] after a token [B] at a position; changes the state."""
        x = self.embed(token) + self.table[position]
        for index, block in enumerate(self.blocks):
            state[index], x = block.step(state[index], position, x)
        return self.head(self.norm(x))

    @torch.inference_mode()
    def stepwise(self, tokens: Tensor) -> Tensor:
        """What `forward` gives, token by token."""
        state = self.init_state(*tokens.shape)
        return torch.stack(
            [self.step(state, i, token) for i, token in enumerate(tokens.t())], 1
        )

    @torch.inference_mode()
    def generate(self, start: Tensor, length: int) -> Tensor:
        """So many pixels [B, T] after a first token [B], drawn one by one."""
        state, token, found = self.init_state(len(start), length), start, []
        for position in range(length):
            token = sample(self.step(state, position, token))
            found.append(token)
        return torch.stack(found, 1)


class CopyLoss(nn.Module):
    """Cross-entropy of the symbols that count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of tokens [B, T] of which some count."""
        tokens, counted = tokens.long(), counted[:, 1:]
        logits, wanted = self.model(tokens[:, :-1]), tokens[:, 1:]
        losses = F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none"
        )
        count = counted.sum()
        hits = ((logits.detach().argmax(-1) == wanted) & counted).sum()
        return (losses.view(wanted.shape) * counted).sum() / count, hits / count


class PixelLoss(nn.Module):
    """Bits a pixel under a mixture of logistics.

    Args:
      model: the decoder.
      start: the symbol before the first pixel.
    """

    def __init__(self, model: nn.Module, start: int):
        super().__init__()
        self.model = model
        self.start = start

    def forward(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Mean bits of uint8 pixels [B, T]."""
        pixels = pixels.long()
        outputs = self.model(F.pad(pixels[:, :-1], (1, 0), value=self.start))
        return log_prob(outputs, pixels).mean() / -math.log(2.0), None


def _mixture(outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, mean, log_scale = outputs.chunk(3, -1)
    return logits.log_softmax(-1), mean, log_scale.clamp(min=LEAST_LOG_SCALE)


def log_prob(outputs: Tensor, value: Tensor, largest: int = 255) -> Tensor:
    """As `logistic_mixture_log_prob` of the experiment."""
    log_weight, mean, log_scale = _mixture(outputs)
    value = value[..., None]
    precision = (-log_scale).exp()
    centred = 2.0 * value / largest - 1.0 - mean
    upper = F.logsigmoid((centred + 1.0 / largest) * precision)
    lower = F.logsigmoid((1.0 / largest - centred) * precision)
    width = (-torch.expm1(-(2.0 / largest) * precision)).log()
    first, last = value == 0, value == largest
    each = log_weight + upper.masked_fill(last, 0) + lower.masked_fill(first, 0)
    return (each + width.masked_fill(first | last, 0)).logsumexp(-1)


def sample(outputs: Tensor, largest: int = 255) -> Tensor:
    """As `logistic_mixture_sample` of the experiment."""
    log_weight, mean, log_scale = _mixture(outputs)
    which = torch.multinomial(log_weight.exp(), 1)
    mean, log_scale = (x.gather(-1, which)[..., 0] for x in (mean, log_scale))
    x = mean + log_scale.exp() * torch.rand(mean.shape).logit()
    return ((x.clamp(-1.0, 1.0) + 1.0) * (largest / 2)).round().long()
