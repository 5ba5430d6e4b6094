"""`python -m benchmarks`: times our code against its peers and stores the table.

Nothing here is a test: it reports, on the machine that it runs on, how much faster or
slower ours is. Peers: Flax's GroupNorm, `jax.nn.dot_product_attention`, and PyTorch's
scaled_dot_product_attention where PyTorch is installed (`make bench` installs it).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attn_jax
from attn_jax.models import GroupNorm
from attn_jax.multihead import Implementation
from benchmarks import workers
from benchmarks.timing import Call, alternate, summarize

try:
    import torch
except ImportError:  # the comparison with it is left out, and said so
    torch = None


def jax_call(fn: Callable[..., Any], *arguments: Any) -> Call:
    """A jitted call that waits for its result."""
    jitted = jax.jit(fn)
    return lambda: jax.block_until_ready(jitted(*arguments))


def group_norm(batch: int, side: int, channels: int) -> tuple[dict[str, Call], str]:
    """Forward and backward of group normalisation, groups of 4 channels."""
    groups = channels // 4
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    ours = GroupNorm(channels, num_groups=groups)
    flax_norm = nnx.GroupNorm(
        channels, num_groups=groups, epsilon=1e-5, rngs=nnx.Rngs(0)
    )

    def gradient(module: nnx.Module) -> Call:
        graphdef, state = nnx.split(module)

        def loss(state: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(nnx.merge(graphdef, state)(x)))

        return jax_call(jax.grad(loss, argnums=(0, 1)), state, x)

    return {"flax.nnx.GroupNorm": gradient(flax_norm), "ours": gradient(ours)}, (
        "flax.nnx.GroupNorm"
    )


def attention(length: int, tokens: int, backward: bool) -> tuple[dict[str, Call], str]:
    """Exact attention, 8 heads of 64, ``tokens`` queries in all."""
    shape = (max(1, tokens // length), length, 8, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, shape) for key in keys)

    def ours(implementation: Implementation | None) -> Callable[..., jax.Array]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attn_jax.dot_product_attention(
                q, k, v, implementation=implementation
            )

        return run

    def call(fn: Callable[..., jax.Array]) -> Call:
        if not backward:
            return jax_call(fn, q, k, v)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(fn(q, k, v)))

        return jax_call(jax.grad(loss, argnums=(0, 1, 2)), q, k, v)

    calls = {
        "jax.nn": call(jax.nn.dot_product_attention),
        "ours, reference": call(ours("reference")),
        "ours, blockwise": call(ours("blockwise")),
        "ours, default": call(ours(None)),
    }
    if torch is not None:
        calls["torch SDPA"] = _torch_attention(np.asarray(q), backward)
    return calls, "jax.nn"


def _torch_attention(q: np.ndarray, backward: bool) -> Call:
    tensors = [
        torch.tensor(q.transpose(0, 2, 1, 3).copy(), requires_grad=backward)
        for _ in range(3)
    ]
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        with torch.no_grad():
            return attend(*tensors)

    def both() -> Any:
        return torch.autograd.grad(attend(*tensors).square().sum(), tensors)

    return both if backward else forward


def benchmarks(smoke: bool) -> Mapping[str, tuple[dict[str, Call], str]]:
    """All comparisons: title -> (alternatives, base)."""
    tokens = 256 if smoke else 4096
    lengths = (64,) if smoke else (256, 1024, 4096)
    batch = 2 if smoke else 64
    table = {
        f"GroupNorm gradient [{batch}, 14, 14, 20]": group_norm(batch, 14, 20),
        f"GroupNorm gradient [{batch}, 7, 7, 40]": group_norm(batch, 7, 40),
    }
    for length in lengths:
        for backward in (False, True):
            what = "forward + backward" if backward else "forward"
            title = f"attention {what}, T = {length}, {tokens} tokens, 8 x 64"
            table[title] = attention(length, tokens, backward)
    return table


def show(title: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints a table, the base first, and returns its rows."""
    print(f"\n{title} (x > 1: faster than {rows[0]['name']})")
    for row in rows:
        print(
            f"  {row['name']:<24}{row['milliseconds']:10.3f} ms   x {row['ratio']:.2f} "
            f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
            flush=True,
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs all comparisons; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a test")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON file (default: benchmarks/results.json)"
    )
    options = parser.parse_args(argv)
    out = options.out or pathlib.Path(__file__).parent / "results.json"
    rounds, seconds = (1, 0.0) if options.smoke else (7, 0.2)
    if torch is None:
        print("PyTorch is not installed: its rows are left out (see `make bench`).")
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, (calls, base) in benchmarks(options.smoke).items():
        rows = summarize(alternate(calls, rounds=rounds, seconds=seconds), base)
        tables[title] = show(title, rows)
    if hasattr(os, "sched_getaffinity"):
        for model in ("vit",) if options.smoke else ("vit", "resnet"):
            title = f"training {model}-mu, batch 64"
            speeds = workers.compare(
                model, rounds=min(rounds, 3), seconds=0.1 if options.smoke else 4.0
            )
            times = {name: [1 / v for v in values] for name, values in speeds.items()}
            tables[title] = show(title, summarize(times, "one process, all cores"))
    record = dict(
        command="python -m benchmarks" + (" --smoke" if options.smoke else ""),
        machine=dict(
            platform=platform.machine(),
            cores=len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            device=jax.devices()[0].device_kind,
        ),
        versions=dict(
            jax=jax.__version__,
            flax=flax.__version__,
            torch=None if torch is None else torch.__version__,
        ),
        tables=tables,
    )
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nStored in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
