"""Labels of sequences in PyTorch: the peers of `attn_jax.models.Labeller`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_jax.positions import sinusoidal_1d
from benchmarks.torch_peers.layers import (
    Encoder,
    Mlp,
    Rotation,
    input_of,
    layer_norm,
)
from benchmarks.torch_peers.params import without_second_bias

IGNORED = -1


def _where_real(x: Tensor, real: Tensor) -> Tensor:
    return x.masked_fill(~real[..., None], 0)


class Window(nn.Module):
    """Fully connected over each vector and its neighbours, then residual blocks."""

    def __init__(self, dim: int, depth: int, mlp_dim: int, window: int):
        super().__init__()
        self.window = window
        self.norm = layer_norm(dim)
        self.mix = nn.Linear((2 * window + 1) * dim, dim)
        self.blocks = nn.ModuleList(Mlp(dim, mlp_dim) for _ in range(depth))
        self.norms = nn.ModuleList(layer_norm(dim) for _ in range(depth + 1))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        x = x + self.mix(side_by_side(_where_real(self.norm(x), real), self.window))
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.norms[-1](x)


def side_by_side(x: Tensor, window: int, dilation: int = 1) -> Tensor:
    """Each vector of [B, T, D] with its neighbours beside it, zeros beyond the ends."""
    length, reach = x.shape[1], window * dilation
    padded = F.pad(x, (0, 0, reach, reach))
    starts = (i * dilation for i in range(2 * window + 1))
    return torch.cat([padded[:, i : i + length] for i in starts], -1)


class Convolution(nn.Module):
    """Residual blocks of a 1-D convolution and a position-wise network.

    A convolution is a product with neighbours side by side: at these sizes faster than
    `torch.nn.functional.conv1d`, which wants another order of the axes.
    """

    def __init__(self, dim: int, depth: int, mlp_dim: int, kernel: int, dilations: Any):
        super().__init__()
        self.window = kernel // 2
        self.dilations = tuple(dilations or (1,) * depth)
        self.convolutions = nn.ModuleList(
            nn.Linear(kernel * dim, dim) for _ in range(depth)
        )
        self.blocks = nn.ModuleList(Mlp(dim, mlp_dim) for _ in range(depth))
        for name in ("convolution_norms", "mlp_norms"):
            setattr(self, name, nn.ModuleList(layer_norm(dim) for _ in range(depth)))
        self.norm = layer_norm(dim)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        for dilation, norm, convolution, mlp_norm, block in zip(
            self.dilations,
            self.convolution_norms,
            self.convolutions,
            self.mlp_norms,
            self.blocks,
            strict=True,
        ):
            seen = side_by_side(_where_real(norm(x), real), self.window, dilation)
            x = x + F.gelu(convolution(seen), approximate="tanh")
            x = x + block(mlp_norm(x))
        return self.norm(x)


class Recurrent(nn.Module):
    """Bidirectional GRUs, PyTorch's own; packed where sequences have padding."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(
            without_second_bias(nn.GRU(dim, dim, batch_first=True, bidirectional=True))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(layer_norm(dim) for _ in range(depth + 1))
        self.outs = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(depth))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        lengths, length = real.sum(1), x.shape[1]
        whole = bool((lengths == length).all())
        for norm, layer, out in zip(self.norms, self.layers, self.outs, strict=False):
            h = norm(x)
            if whole:
                h, _ = layer(h)
            else:
                h = nn.utils.rnn.pack_padded_sequence(
                    h, lengths, batch_first=True, enforce_sorted=False
                )
                h, _ = nn.utils.rnn.pad_packed_sequence(
                    layer(h)[0], batch_first=True, total_length=length
                )
            x = x + out(h)
        return self.norms[-1](x)


class Transformer(nn.Module):
    """The encoder, with positions, all keys or a window of them."""

    def __init__(
        self,
        dim: int,
        depth: int,
        mlp_dim: int,
        num_heads: int,
        positions: str,
        max_length: int,
        window: tuple[int, int] | None,
    ):
        super().__init__()
        rotation = None
        if positions == "rope":
            rotation = Rotation(max_length, dim // num_heads)
        self.encoder = Encoder(depth, dim, num_heads, mlp_dim, rotation)
        if positions == "learned":
            add = nn.Module()
            add.table = nn.Parameter(torch.zeros(max_length, dim))
            self.encoder.positions = nn.ModuleDict({"add": add})
        elif positions == "sinusoidal":
            table = torch.tensor(np.asarray(sinusoidal_1d(max_length, dim)))
            self.register_buffer("table", table, persistent=False)
        elif positions not in ("rope", "none"):
            raise ValueError(
                "positions must be rope, learned, sinusoidal or none, got "
                f"{positions!r}: there is no PyTorch peer of it."
            )
        self.positions = positions
        if window is not None:
            places = torch.arange(max_length)
            offset = places[None] - places[:, None]
            inside = (offset >= -window[0]) & (offset <= window[1])
            self.register_buffer("inside", inside, persistent=False)
        self.window = window

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Maps [B, T, D] to [B, T, D]."""
        length = x.shape[1]
        x, mask = _where_real(x, real), real[:, None, None]
        if self.window is not None:
            # A query sees itself at least: padding without a key would give NaN.
            own = torch.eye(length, dtype=torch.bool)
            mask = (self.inside[:length, :length] & mask) | own
        if self.positions == "learned":
            x = x + self.encoder.positions["add"].table[:length]
        elif self.positions == "sinusoidal":
            x = x + self.table[:length]
        return self.encoder(x, mask)


class Labeller(nn.Module):
    """Input layer, body and head."""

    def __init__(
        self,
        inputs: int | tuple[int, ...],
        classes: int,
        dim: int,
        body: nn.Module,
    ):
        super().__init__()
        self.input = input_of(inputs, dim)
        self.body = body
        self.head = nn.Linear(dim, classes)

    def forward(self, inputs: Tensor, real: Tensor) -> Tensor:
        """Maps ids [B, T, K] or vectors [B, T, F] to logits [B, T, classes]."""
        return self.head(self.body(self.input(_where_real(inputs, real)), real))


class LabelLoss(nn.Module):
    """Cross-entropy of real labels; hides words, the first ids, in training.

    Args:
      model: the labeller.
      id_dropout: probability that a word is hidden.
    """

    def __init__(self, model: nn.Module, id_dropout: float):
        super().__init__()
        self.model = model
        self.id_dropout = id_dropout

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of inputs [B, T, K or F] and labels [B, T]."""
        real, labels = labels != IGNORED, labels.long()
        if self.id_dropout:
            hidden = torch.rand(labels.shape) < self.id_dropout
            words = torch.where(hidden, 1, inputs[..., :1].squeeze(-1))
            inputs = torch.cat((words[..., None], inputs[..., 1:]), -1)
        logits = self.model(inputs, real)
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED
        )
        hits = (logits.detach().argmax(-1) == labels) & real
        return loss, hits.sum() / real.sum()


def peer(
    traits: Mapping[str, Any],
    inputs: int | tuple[int, ...],
    classes: int,
    max_length: int,
) -> nn.Module:
    """The peer of the model of a `LabelCell`, its parameters still to be filled in.

    Args:
      traits: fields of the cell by name.
      inputs, classes, max_length: as of the data.

    Raises:
      ValueError: for a model without a peer.
    """
    dim, depth, mlp_dim = (traits[name] for name in ("dim", "depth", "mlp_dim"))
    model, attention = traits["model"], traits["attention"]
    if traits["dropout_rate"] or traits["dtype"] != "float32":
        raise ValueError("traits must have no dropout and be of float32.")
    body: nn.Module
    if model == "window":
        body = Window(dim, depth, mlp_dim, traits["window"])
    elif model == "cnn":
        body = Convolution(dim, depth, mlp_dim, traits["kernel"], traits["dilations"])
    elif model == "gru":
        body = Recurrent(dim, depth)
    elif attention in ("dot_product", "truncated"):
        window = None
        if attention == "truncated":
            window = (traits["left"], traits["right"])
        heads, positions = traits["num_heads"], traits["positions"]
        body = Transformer(dim, depth, mlp_dim, heads, positions, max_length, window)
    else:
        raise ValueError(f"traits: there is no PyTorch peer of {model!r}, {attention}.")
    return Labeller(inputs, classes, dim, body)
