"""What is run (`Cell`) and how (`Runtime`).

A cell is one training run and everything that can change its numbers; its hash names
its result file. A runtime is where and how fast, and changes no number beyond
rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pathlib
from typing import Annotated, Any, Literal

import tyro

from experiments.core.identity import Differs, config_of


@dataclasses.dataclass(frozen=True)
class Cell:
    """One (model, attention, N, seed, hyper-parameters).

    Attributes:
      task: name of the data.
      model, size: see `attn_jax.models`.
      attention: attention variant of the model; None is its default.
      attention_sha256: of the file, where ``attention`` names one: an edited
        variant is another cell.
      patch: side of the ViT's patches in pixels; None for other models.
      n: number of training images.
      seed: draws the subset, the initial parameters and the order of the batches.
      phase: "tune" trains without the validation split and is scored on it; "final"
        trains on all n images and reads the test set, once.
      protocol: how ``updates`` came from n, see `protocol_updates`.
      updates: number of optimiser steps.
      batch_size: images a step, over all devices.
      learning_rate: peak of the schedule.
      weight_decay: of AdamW, on matrices alone.
      warmup: share of the updates that warm up.
      clip_norm: largest global norm of a gradient.
      label_smoothing: share of the label spread over all classes.
      mixup: α of the Beta distribution; 0 = off.
      crop: pixels of padding before a random crop; 0 = off.
      flip: random left-right flips.
      dropout_rate: of the model.
      dtype: of the computation; parameters stay float32.
      validation_fraction, validation_maximum: size of the validation split.
      differs: what of the data is not as committed records had it, see
        `experiments.core.identity`.
    """

    task: str
    model: str
    size: str
    n: int
    seed: int
    updates: int
    attention: str | None = None
    attention_sha256: str | None = None
    patch: int | None = None
    phase: Literal["tune", "final"] = "final"
    protocol: str = "updates"
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    crop: int = 0
    flip: bool = False
    dropout_rate: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    validation_fraction: float = 0.2
    validation_maximum: int = 5000
    differs: Differs = ()

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("n", self.n >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("updates", self.updates >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "above 0, finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more, finite"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm > 0, "above 0 (inf = no clipping)"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("mixup", 0 <= self.mixup < math.inf, "0 or more"),
            ("crop", self.crop >= 0, "0 or more pixels"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)"),
            ("phase", self.phase in ("tune", "final"), "'tune' or 'final'"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("validation_fraction", 0 < self.validation_fraction < 1, "in (0, 1)"),
            ("validation_maximum", self.validation_maximum >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary, which the results store hashes."""
        return config_of(self)

    @property
    def label(self) -> str:
        """A short name for progress lines."""
        model = f"{self.model}-{self.size}"
        if self.attention is not None:
            model += f"[{self.attention}]"
        label = f"{self.task} {model} n={self.n} seed={self.seed} {self.phase}"
        return label + (f" ({self._tried})" if self.phase == "tune" else "")

    @property
    def _tried(self) -> str:
        """The hyper-parameters, as far as they are on."""
        parts = [f"learning rate {self.learning_rate:g}"]
        for name in "weight_decay label_smoothing crop mixup dropout_rate".split():
            if getattr(self, name):
                parts.append(f"{name.replace('_', ' ')} {getattr(self, name):g}")
        return ", ".join(parts)


class EditedError(ValueError):
    """The file of an attention variant is not what it was when the run began."""


def attention_digest(attention: str | None) -> str | None:
    """SHA-256 of the file that ``"path/file.py:function"`` names, else None."""
    if attention is None or ".py:" not in attention:
        return None
    path = pathlib.Path(attention.rpartition(":")[0]).expanduser()
    if not path.is_file():
        raise ValueError(f"attention: no such file: {path} (from {attention!r}).")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def protocol_updates(
    protocol: str,
    *,
    n: int,
    n_max: int,
    updates: int,
    epochs: float,
    batch_size: int,
    max_epochs: float | None,
    min_updates: int = 1,
) -> int:
    """Number of optimiser steps that a protocol gives to n training images.

    "updates": the same number of steps for every n, as ViT's Figure 4
    (arXiv:2010.11929). "epochs": ``epochs`` passes at n = n_max and ``epochs · n_max
    / n`` (rounded to whole passes of whole batches) at smaller n, as ConViT's Table 2
    (arXiv:2103.10697). ``max_epochs`` caps the passes of either, but never below
    ``min_updates``: without it, the smallest sets are seen thousands of times.

    >>> protocol_updates("updates", n=100, n_max=1000, updates=50, epochs=0,
    ...                  batch_size=10, max_epochs=3)
    30
    >>> protocol_updates("epochs", n=100, n_max=1000, updates=0, epochs=2,
    ...                  batch_size=10, max_epochs=None)
    200
    """
    per_epoch = n / batch_size
    if protocol == "updates":
        steps = float(updates)
    elif protocol == "epochs":
        per_epoch = max(1, n // batch_size)
        steps = round(epochs * n_max / n) * per_epoch
    else:
        raise ValueError(f"protocol must be 'updates' or 'epochs', got {protocol!r}.")
    if max_epochs is not None:
        cap = max(min_updates, math.ceil(max_epochs * per_epoch))
        steps = min(steps, cap)
    return max(1, int(steps))


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Where and how cells run; no number depends on it beyond rounding."""

    out: Annotated[pathlib.Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the results; by default one named after the preset."""
    shard: str = "1/1"
    """Which part of the cells this process takes, "i/n": one machine each."""
    workers: int = 0
    """Processes that share the cells on this machine, each on cores of its own.
    0: one a core on CPU (small models gain more from it than from threads), else 1."""
    vmap_seeds: bool = False
    """Train all seeds of a cell at once, where the device has room."""
    steps_per_dispatch: int = 0
    """Steps that one call of the compiled program does. 0: 1 on CPU, else 16."""
    device_data: bool = True
    """Keep the training images on the devices; off: send each batch."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    log_every: int = 50
    """Updates between two points of a curve; each is checked for NaN."""
    tensorboard: bool = False
    """Write TensorBoard event files under OUT/tensorboard."""
    distributed: bool = False
    """Join processes of several hosts by jax.distributed before anything else. The
    cluster is detected where JAX can, else named by the next three."""
    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    """Number of processes of the cluster."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("workers", self.workers >= 0, "0 or more"),
            ("steps_per_dispatch", self.steps_per_dispatch >= 0, "0 or more"),
            ("checkpoint_seconds", self.checkpoint_seconds >= 0, "0 or more"),
            ("log_every", self.log_every >= 1, "at least 1"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )
        for name in ("coordinator", "num_processes", "process_id"):
            if not self.distributed and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} was given without distributed: "
                    "add --distributed, or leave it out."
                )
        if self.distributed and self.workers > 1:
            raise ValueError(
                f"workers must be 1 with --distributed, got {self.workers}: there, "
                "each process of the cluster is started by itself."
            )
