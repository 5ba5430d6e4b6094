"""Training speed of one process on all cores, against one process a core.

`python -m benchmarks.workers MODEL SECONDS` trains a model of size `mu` on noise in
this process and prints images per second; `compare` starts such processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import models
from experiments.core import optim
from experiments.tasks import images

IMAGE_SHAPE, NUM_CLASSES, BATCH = (28, 28, 1), 10, 64
AUGMENT = images.Augment(flip=True)


def measure(model: str, seconds: float) -> float:
    """Images a second of the experiment's training step, after compilation."""
    module = models.build(
        model, "mu", image_shape=IMAGE_SHAPE, num_classes=NUM_CLASSES, rngs=nnx.Rngs(0)
    )
    apply, params = optim.split_model(module)
    hyper = optim.recipe(
        learning_rate=1e-3,
        weight_decay=0.05,
        warmup=100,
        updates=1000,
        clip_norm=1,
        label_smoothing=0,
        mixup=0,
        pixel_mean=np.zeros(1),
        pixel_std=np.ones(1),
    )
    step = jax.jit(
        optim.make_step(images.image_loss(apply, NUM_CLASSES, AUGMENT)),
        donate_argnums=0,
    )
    batch = images.Batch(
        jnp.zeros((BATCH, *IMAGE_SHAPE), jnp.uint8), jnp.zeros(BATCH, jnp.int32)
    )
    rng = jax.random.key(0)
    state, _ = step(optim.init_state(params, hyper), batch, rng)
    jax.block_until_ready(state)
    print("ready", flush=True)
    sys.stdin.readline()
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            state, _ = step(state, batch, rng)
        jax.block_until_ready(state)
        done += 5
    return done * BATCH / (time.perf_counter() - began)


def _together(model: str, shares: list[list[int]], seconds: float) -> float:
    """Images a second of processes that run at the same time, each on its cores."""
    command = [sys.executable, "-m", "benchmarks.workers", model, str(seconds)]
    processes = []
    for cores in shares:
        variables = os.environ | {"BENCHMARK_CORES": ",".join(map(str, cores))}
        processes.append(
            subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate()[0])
    return sum(float(output) for output in outputs)


def compare(model: str, *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images a second of both ways, alternating, one figure a round."""
    cores = sorted(os.sched_getaffinity(0))
    ways = {
        "one process, all cores": [cores],
        "one process a core": [[core] for core in cores],
    }
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, shares in ways.items():
            figures[name].append(_together(model, shares, seconds))
    return figures


if __name__ == "__main__":
    os.sched_setaffinity(0, map(int, os.environ["BENCHMARK_CORES"].split(",")))
    print(measure(sys.argv[1], float(sys.argv[2])))
