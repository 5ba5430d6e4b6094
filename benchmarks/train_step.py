"""Training speed of our ViT and ResNet against the same models in PyTorch.

`python -m benchmarks.train_step` times the training step of the experiments (flip,
label smoothing, clipping, AdamW, schedule; uint8 batches from the host) side by side
with PyTorch's, eager and compiled, from the same initial parameters. All take turns on
all cores; ours is timed once more with the batch split over one host device a core.
`tests/test_torch_peers.py` shows that both compute the same.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from attn_jax import models
from attn_jax._program import program
from benchmarks.timing import Call, alternate, summarize
from experiments.core import devices, optim
from experiments.core.memory import keep_freed_memory
from experiments.tasks.images import Augment, Batch, image_loss

TORCH = importlib.util.find_spec("torch") is not None

NUM_CLASSES = 10
STEPS_PER_CALL = 4
SPLIT = "ours, a device a core"
HOST_BATCHES = 32
NUMBERS: Mapping[str, float] = dict(
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup=1000.0,
    updates=100_000.0,
    label_smoothing=0.1,
    clip_norm=1.0,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a batch size.

    Attributes:
      model: "vit" or "resnet".
      image_shape: (height, width, channels).
      batch: images of one update.
      size: a name in ``attn_jax.models.SIZES[model]``.
      overrides: what differs from that size.
    """

    model: str
    image_shape: tuple[int, int, int]
    batch: int
    size: str = "mu"
    overrides: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nnx.Module:
        """The model with its initial parameters, always the same."""
        return models.build(
            self.model,
            self.size,
            image_shape=self.image_shape,
            num_classes=NUM_CLASSES,
            overrides=dict(self.overrides),
            rngs=nnx.Rngs(0),
        )

    @property
    def title(self) -> str:
        """For a table."""
        model: Any = nnx.eval_shape(self.build)
        if self.model == "vit":
            tokens = model.grid[0] * model.grid[1]
            what = f"{tokens} tokens, d {model.dim}, {len(model.encoder.blocks)} blocks"
        else:
            side = "x".join(map(str, self.image_shape))
            what = f"{self.size}, {side}"
        return f"train step, {self.model} {what}, batch {self.batch}"


def settings(
    model: str | None = None,
    *,
    size: str = "mu",
    batches: Sequence[int] = (64, 128),
    smoke: bool = False,
) -> list[Setting]:
    """What is measured.

    A ViT of size `mu` of 16, 49 and 64 tokens and widths 64, 128 and 192, and the
    ResNet of the experiments. Another size is measured as it is.

    Args:
      model: "vit" or "resnet"; None takes both.
      size: a name in ``attn_jax.models.SIZES[model]``.
      batches: images of one update.
      smoke: the smallest setting of each model alone, with a batch of 2.
    """
    small, colour = (28, 28, 1), (32, 32, 3)
    shape = small if size.startswith("mu") else colour
    chosen = []
    for family in ("vit", "resnet") if model is None else (model,):
        for batch in (2,) if smoke else batches:
            chosen.append(Setting(family, shape, batch, size))
            if family != "vit" or size != "mu" or smoke:
                continue
            for image_shape, patch, dim, heads in (
                (small, 4, 128, 4),
                (colour, 4, 192, 6),
            ):
                wide = dict(patch=patch, dim=dim, num_heads=heads, mlp_dim=4 * dim)
                chosen.append(
                    Setting(family, image_shape, batch, size, tuple(wide.items()))
                )
    return chosen


def _batches(setting: Setting) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Noise with random labels; enough of it not to be learnt by heart at once."""
    rng = np.random.default_rng(0)
    shape = (HOST_BATCHES, setting.batch, *setting.image_shape)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, NUM_CLASSES, shape[:2])
    return itertools.cycle(zip(images, labels, strict=True))


def ours(setting: Setting) -> Call:
    """Some updates as the experiments do them on a CPU, one dispatch each."""
    apply, params = optim.split_model(setting.build())
    channels = setting.image_shape[-1]
    hyper = optim.recipe(
        **NUMBERS,
        mixup=0,
        pixel_mean=np.full(channels, 0.5),
        pixel_std=np.full(channels, 0.25),
    )
    mesh = devices.data_mesh()
    step = jax.jit(
        optim.make_step(image_loss(apply, NUM_CLASSES, Augment(flip=True))),
        donate_argnums=0,
    )
    state = devices.put(optim.init_state(params, hyper), mesh)
    rng = devices.put(jax.random.key(0), mesh)
    batches = _batches(setting)

    def call() -> None:
        nonlocal state
        for images, labels in itertools.islice(batches, STEPS_PER_CALL):
            batch = Batch(images, labels.astype(np.int32))
            state, _ = step(state, devices.put(batch, mesh, "data"), rng)
        jax.block_until_ready(state)

    return call


def split_ours(setting: Setting, devices: int) -> Call:
    """The same as `ours` with the batch split over host devices, one a core.

    A process of its own does it and takes turns with this one by a pipe: how many
    devices there are is fixed when JAX starts, and would change the other rows.
    """
    asked = json.dumps(dataclasses.asdict(setting))
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.train_step", "--serve", asked],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(child.kill)

    def call() -> None:
        assert child.stdin is not None and child.stdout is not None
        print("go", file=child.stdin, flush=True)
        if child.stdout.readline() != "done\n":
            raise RuntimeError(f"it ended with status {child.wait()}")

    return call


def _serve(asked: str) -> int:
    """Does some updates for each line that comes."""
    fields = json.loads(asked)
    for name in ("image_shape", "overrides"):
        fields[name] = tuple(fields[name])
    call = ours(Setting(**fields))
    for _ in sys.stdin:
        call()
        print("done", flush=True)
    return 0


def peer(
    setting: Setting, *, channels_last: bool = False, compile: bool = False
) -> Call:
    """The same updates in PyTorch."""
    from benchmarks import torch_models

    channels = setting.image_shape[-1]
    step = torch_models.TrainStep(
        torch_models.from_nnx(setting.build()),
        torch_models.Recipe(
            **NUMBERS, pixel_mean=(0.5,) * channels, pixel_std=(0.25,) * channels
        ),
        channels_last=channels_last,
        compile=compile,
    )
    batches = _batches(setting)

    def call() -> None:
        for images, labels in itertools.islice(batches, STEPS_PER_CALL):
            step(images, labels)

    return call


def alternatives(setting: Setting, *, compile: bool = True) -> dict[str, Call]:
    """Ours and PyTorch's ways to do some updates; each has been called once.

    Each call continues from the state that the one before left. A way that fails here,
    as `torch.compile` does without a C++ compiler, is left out and said so.

    Args:
      setting: model and batch size.
      compile: also `torch.compile`, which takes up to a minute.
    """
    calls = {"ours": ours(setting)}
    calls["ours"]()
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    if jax.default_backend() == "cpu" and cores > 1 and setting.batch % cores == 0:
        calls[SPLIT] = split_ours(setting, cores)
        calls[SPLIT]()
    if not TORCH:
        print("PyTorch is not installed: its rows are left out (see `make bench`).")
        return calls
    import torch

    for compiled, last in itertools.product(
        (False, True) if compile else (False,),
        (False, True) if setting.model == "resnet" else (False,),
    ):
        name = "torch compile" if compiled else "torch eager"
        name += " channels_last" if last else ""
        # One compiled program must not count as a recompilation of another's.
        torch.compiler.reset()
        call = peer(setting, channels_last=last, compile=compiled)
        try:
            call()
        except Exception as error:  # whatever its compiler raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} is left out: {reason}")
            continue
        calls[name] = call
    return calls


def compare(
    setting: Setting, *, rounds: int = 7, seconds: float = 0.4, compile: bool = True
) -> list[dict[str, Any]]:
    """Times a setting: the rows of `benchmarks.timing.summarize`, images/s added.

    Ratios are against the faster of PyTorch's ways (against ours, where there is
    none), which is the first row.
    """
    figures = alternate(
        alternatives(setting, compile=compile), rounds=rounds, seconds=seconds
    )
    peers = [name for name in figures if not name.startswith("ours")] or ["ours"]
    base = min(peers, key=lambda name: statistics.median(figures[name]))
    figures = {base: figures.pop(base)} | figures
    per_step = {
        name: [value / STEPS_PER_CALL for value in values]
        for name, values in figures.items()
    }
    rows = summarize(per_step, base)
    for row in rows:
        row["images_per_second"] = 1e3 * setting.batch / row["milliseconds"]
    return rows


@program
def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__
    )
    parser.add_argument("--model", choices=("vit", "resnet"), help="default: both")
    parser.add_argument(
        "--batch", type=int, action="append", help="default: 64 and 128"
    )
    parser.add_argument("--size", default="mu", help="of attn_jax.models.SIZES")
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument("--smoke", action="store_true", help="tiny batch, a test")
    parser.add_argument("--json", type=pathlib.Path, help="where the table is stored")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    keep_freed_memory()
    if options.serve:
        return _serve(options.serve)
    rounds, seconds = (1, 0.0) if options.smoke else (7, 0.4)
    tables: dict[str, list[dict[str, Any]]] = {}
    for setting in settings(
        options.model,
        size=options.size,
        batches=options.batch or (64, 128),
        smoke=options.smoke,
    ):
        rows = compare(
            setting,
            rounds=rounds,
            seconds=seconds,
            compile=not (options.smoke or options.no_compile),
        )
        print(f"\n{setting.title} (x > 1: faster than {rows[0]['name']})")
        for row in rows:
            print(
                f"  {row['name']:<30}{row['images_per_second']:9.0f} images/s   "
                f"x {row['ratio']:.2f} ({row['ratio_low']:.2f} to "
                f"{row['ratio_high']:.2f})",
                flush=True,
            )
        tables[setting.title] = rows
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
