"""Speed and memory on long sequences.

Long Range Arena's second table, here: a training step of a Transformer that classifies
bytes, with each attention variant in the same encoder, at T = 1K, 2K, 3K and 4K. Steps
a second and peak memory are relative to the Transformer with dense attention, in one
run; beside them stand the ratios of the paper, and our exact blockwise attention, which
computes what the dense one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax import VARIANTS, Variant, positions
from attn_jax.nn.encoder import Encoder
from attn_jax.tools import bench as benchmarking
from benchmarks.timing import (
    Effort,
    alternate,
    ratio_of,
    target,
    too_large,
)
from experiments.core.optim import move, split_model, training_call

LENGTHS = (1024, 2048, 3072, 4096)
DENSE = "dot_product"
BLOCKWISE = "blockwise"

# Steps a second relative to the Transformer at 1K, 2K, 3K and 4K, and gigabytes a
# device at 4K where the Transformer takes 9.48: arXiv:2011.04006, table 2 (text, batch
# 32, 4x4 TPU v3).
PAPER: Mapping[str, tuple[float, float, float, float, float]] = {
    "dot_product": (1.0, 1.0, 1.0, 1.0, 9.48),
    "block_local": (1.1, 1.7, 3.2, 5.3, 1.37),
    "linformer": (1.2, 1.9, 3.7, 5.5, 0.99),
    "reformer": (0.5, 0.4, 0.7, 0.8, 2.28),
    "sinkhorn": (1.1, 1.6, 2.9, 3.8, 1.48),
    "synthesizer_dense": (1.1, 1.2, 2.9, 1.4, 6.99),
    "bigbird": (0.9, 0.8, 1.2, 1.1, 2.88),
    "linear": (1.1, 1.9, 3.7, 5.6, 1.03),
    "performer": (1.2, 1.9, 3.8, 5.7, 1.06),
}
PAPER_DENSE_GB = 9.48
TARGETS = ("block_local", "linformer", "linear", "performer")

# Smaller than the defaults: the rank of Long Range Arena's text configuration, and
# about H log H features for heads of 32, as the Performer's paper asks for.
SETTINGS = {
    "linformer, rank 32": VARIANTS["linformer"].bind(rank=32),
    "performer, 128 features": VARIANTS["performer"].bind(num_features=128),
}


class ByteClassifier(nnx.Module):
    """Bytes, sinusoidal positions, a Transformer encoder, the mean, two classes.

    Args:
      length: T.
      attention: any variant.
      dim, depth, num_heads, mlp_dim: sizes of the encoder.
      rngs: source of randomness.
    """

    def __init__(
        self,
        length: int,
        attention: str | Variant,
        *,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        mlp_dim: int = 128,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(256, dim, rngs=rngs)
        self.encoder = Encoder(
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            attention=attention,
            max_length=length,
            rngs=rngs,
        )
        self.head = nnx.Linear(dim, 2, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps bytes [B, T] to logits [B, 2]."""
        x = self.embed(tokens)
        x = x + positions.sinusoidal_1d(x.shape[1], x.shape[2])[None]
        x = self.encoder(x, deterministic=deterministic, rngs=rngs)
        return self.head(x.mean(axis=1))


def train_step(
    attention: str | Variant, length: int, batch: int, depth: int = 2
) -> benchmarking.Program:
    """The compiled training step of a variant: loss, gradients, AdamW."""
    model = ByteClassifier(length, attention, depth=depth, rngs=nnx.Rngs(0))
    apply, params = split_model(model)
    optimizer = optax.adamw(1e-4)
    opt_state = optimizer.init(params)
    tokens = np.random.default_rng(0).integers(0, 256, (batch, length), np.int32)
    labels = np.arange(batch, dtype=np.int32) % 2

    def step(params: Any, opt_state: Any, tokens: Any, labels: Any, rng: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, moved = training_call(apply, params, tokens, rng=rng)
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return each.mean(), moved

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax: float ** int
            updates, new_state = optimizer.update(grads, opt_state, params)
        return value, move(optax.apply_updates(params, updates), moved), new_state

    rng = jax.random.key(0)
    return benchmarking.program(step, params, opt_state, tokens, labels, rng)


def table(
    names: Sequence[str], length: int, batch: int, effort: Effort
) -> dict[str, Any]:
    """All variants at one length, in turn, each relative to the dense one."""
    rows: dict[str, dict[str, Any]] = {}
    calls = {}
    for name in names:
        effort.say(f"long_range, T = {length:,}, {name} ...")
        depth = 1 if effort.smoke else 2
        made = train_step(SETTINGS.get(name, name), length, batch, depth)
        row = rows[name] = dict(
            name=name, temp_bytes=made.temp_bytes, peak_bytes=made.peak_bytes
        )
        large = too_large(made.peak_bytes)
        if large:
            row["skipped"] = f"not run: it {large}"
        else:
            calls[name] = made.call
    figures = alternate(calls, rounds=effort.rounds, seconds=effort.seconds)
    for base in (DENSE, BLOCKWISE):
        for found in benchmarking.summarize(figures, base):
            row = rows[found["name"]]
            row["milliseconds"] = found["milliseconds"]
            row.setdefault("against", {})[base] = ratio_of(found)
    dense = rows[DENSE]["peak_bytes"]
    for row in rows.values():
        if dense and row["peak_bytes"]:
            row["memory_share"] = row["peak_bytes"] / dense
    return dict(
        title=f"T = {length:,}, batch {batch}",
        short=f"{length // 1024}K",
        length=length,
        rows=list(rows.values()),
    )


def small(effort: Effort) -> dict[str, Any]:
    """The variants that targets are set for, with smaller settings of two of them."""
    names = [DENSE, BLOCKWISE, "block_local", "linear", *SETTINGS]
    made = group(effort, names[:2] if effort.smoke else names)
    return made | dict(
        title="Long Range Arena's efficiency table, smaller settings",
        about="As the table before, in a run of its own: Linformer with the rank of "
        "Long Range Arena's text configuration, and Performer with about H log H "
        "features, beside `block_local` and `linear` as they are.",
    )


def group(effort: Effort, names: Sequence[str] | None = None) -> dict[str, Any]:
    """All variants at all lengths, and what was to be reached."""
    lengths = (32,) if effort.smoke else LENGTHS
    if names is None:
        names = [DENSE, BLOCKWISE, "linear"] if effort.smoke else list(VARIANTS)
    tables = [table(names, length, 1, effort.at_most(3)) for length in lengths]
    last = {row["name"]: row for row in tables[-1]["rows"]}
    targets = []
    for name in (name for name in (*TARGETS, *SETTINGS) if name in last):
        against, share = last[name]["against"], last[name].get("memory_share")
        speed = f"{name}: steps a second at 4K over dense attention"
        told = f"over blockwise {against[BLOCKWISE][0]:.2f}"
        targets.append(target(speed, 5.0, 5.0, against[DENSE][0], told))
        memory = f"{name}: peak memory of dense attention at 4K over its own"
        told = f"share {share:.3f}" if share else "-"
        reached = 1 / share if share else None
        targets.append(target(memory, 1 / 0.15, 1 / 0.15, reached, told))
    return dict(
        title="Long Range Arena's efficiency table",
        about="One training step (loss, gradients, AdamW) of a Transformer that "
        "classifies bytes: 2 layers, width 64, 2 heads, feed-forward 128, float32, "
        "one sequence a step, all variants with their default options. Above 1 is "
        "faster than the Transformer with dense attention of the same length. Paper: "
        "arXiv:2011.04006, table 2, 32 sequences on 16 TPU v3 cores; its share of "
        "memory is of the Transformer's 9.48 GB at 4K.",
        tables=[],
        targets=targets,
        long_range=tables,
        paper={name: list(figures) for name, figures in PAPER.items()},
        paper_dense_gb=PAPER_DENSE_GB,
    )
