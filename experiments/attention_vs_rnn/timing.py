"""How attention and a train step take longer with the length of a sequence.

`python -m experiments.attention_vs_rnn.timing FOLDER` writes timing.json, which
the report reads: time and memory of attention on long sequences, forward and backward;
and the time of a train step over the length. Times are medians on one core, of the
processor's time, which other programs on the machine do not lengthen.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from attn_jax import VARIANTS
from attn_jax.tools import bench as benchmarking
from attn_jax.tools.bench import size_text
from experiments.attention_vs_rnn.cells import Shape, program_of
from experiments.attention_vs_rnn.data import CopyBatch
from experiments.attention_vs_rnn.speed import TIMING
from experiments.core import optim
from experiments.core.engine import available_cores
from experiments.core.measure import (
    Folder,
    measures,
    median_of,
    one_core,
    repeated,
)

CLOCK = time.process_time

# Above these a program of the scaling figure is not run.
MOST_BYTES = 8 * 2**30
MOST_SECONDS = 20.0

SCALING = ("dot_product", "blockwise", "linear", "reformer")


def shape_of(model: str, sizes: Mapping[str, Any]) -> Shape:
    """The shape of a model with these sizes."""
    reformer = model == "reformer"
    return Shape(
        model=model,
        chunk_size=32 if reformer else None,
        num_rounds=1 if reformer else None,
        **sizes,
    )


# ------------------------------------------------------------------ scaling


def scaling(lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Time and memory of causal attention, forward and backward, 8 heads of 32."""
    rows = []
    for name in SCALING:
        slowest: tuple[float, int] | None = None
        for length in lengths:
            setting = benchmarking.Setting(
                (length,), heads=8, head_dim=32, batch=1, causal=True
            )
            attend = setting.of_variant(VARIANTS[name])
            made = benchmarking.attention(
                attend, *setting.inputs(length), backward=True
            )
            row: dict[str, Any] = dict(
                name=name,
                length=length,
                flops=made.flops.total,
                temp_bytes=made.temp_bytes,
            )
            rows.append(row)
            if made.temp_bytes and made.temp_bytes > MOST_BYTES:
                row["skipped"] = f"needs {size_text(made.temp_bytes)}"
                break
            if slowest and slowest[1]:
                expected = slowest[0] * made.flops.total / slowest[1]
                if expected > MOST_SECONDS:
                    row["skipped"] = f"would take some {expected:.0f} s"
                    break
            few = 1 if slowest and slowest[0] > 1.0 else repeats
            row["seconds"] = median_of(made.call, few, clock=CLOCK)
            slowest = row["seconds"], made.flops.total
            print(f"{name} N={length:,}: {row['seconds']:.3f} s", flush=True)
    return rows


def train_steps(
    lengths: Sequence[int], sizes: Mapping[str, Any], batch: int, repeats: int
) -> list[dict[str, Any]]:
    """Seconds of one train step over the length."""
    rows = []
    for model in ("softmax", "linear", "lstm"):
        for length in lengths:
            more = dict(length=length, components=None, height=None)
            program = program_of.__wrapped__(shape_of(model, dict(sizes, **more)))
            hyper = optim.recipe(
                learning_rate=1e-3,
                weight_decay=0.01,
                warmup=10,
                updates=100,
                clip_norm=1,
            )
            state = optim.init_state(program.initial_params(0), hyper)
            tokens = np.ones((batch, length), np.int32)
            data, rng = CopyBatch(tokens, tokens > 0), jax.random.key(0)
            call = repeated(program.loss, state, data, rng)
            seconds = median_of(call, repeats, clock=CLOCK)
            rows.append(dict(model=model, length=length, batch=batch, seconds=seconds))
            print(f"{model} T={length}: {seconds:.3f} s", flush=True)
    return rows


# --------------------------------------------------------------------- main


def measure(
    folder: Folder = pathlib.Path("runs/attention_vs_rnn/cpu"), *, smoke: bool = False
) -> dict[str, Any]:
    """Times attention and train steps over the length.

    Args:
      folder: of the results.
      smoke: tiny sizes, as a test of the program.
    """
    if not smoke:
        one_core()
    powers = range(3, 4) if smoke else range(9, 16)
    small = dict(dim=64, depth=2, num_heads=4)
    if smoke:
        small = dict(dim=8, depth=1, num_heads=2)
    steps = (8,) if smoke else (64, 128, 256, 512, 1024, 2048)
    repeats = 1 if smoke else 3
    return dict(
        scaling=scaling([2**power for power in powers], repeats),
        train_steps=train_steps(steps, small, 2 if smoke else 8, repeats),
        train_sizes=small,
        cores=len(available_cores()),
        clock="processor",
    )


main = measures(TIMING, measure)

if __name__ == "__main__":
    sys.exit(main())
