"""Work in a process of its own: `python -m benchmarks.serve` does it once it is asked.

Processes take turns, or work at the same time, by a pipe: a line with seconds on stdin
is answered by how often the work was done in them (once at least), and how long that
took. Of the benchmarks this imports nothing: `--before COMMIT` puts this one file into
a checkout of an earlier commit.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_CLASSES = 10
STEPS_PER_CALL = 4
HOST_BATCHES = 32
NUMBERS: Mapping[str, float] = dict(
    learning_rate=1e-3,
    weight_decay=0.05,
    warmup=1000.0,
    updates=100_000.0,
    label_smoothing=0.1,
    clip_norm=1.0,
)


# ----------------------------------------------------------------- the processes


class Served:
    """A process that does some work whenever this is called.

    Args:
      kind, arguments: in `KINDS`, and what its function takes, as JSON can tell it.
      folder: the checkout whose code does it.
      cores: the processor cores that it may use; None for all.
      variables: of its environment, beside those of this process.
    """

    def __init__(
        self,
        kind: str,
        *arguments: Any,
        folder: pathlib.Path = ROOT,
        cores: Sequence[int] | None = None,
        **variables: str,
    ):
        asked = json.dumps([kind, *arguments, cores])
        self._what = f"{kind} in {folder}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve", asked],
            cwd=folder,
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, seconds: float = 0.0) -> None:
        """Let it work once at least, and for so long; `finish` waits for the end."""
        print(seconds, file=self._process.stdin, flush=True)

    def finish(self) -> float:
        """How often a second the work was done."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise RuntimeError(f"{self._what} ended with status {status}")
        return float(line)

    def __call__(self) -> None:
        self.start()
        self.finish()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


# ---------------------------------------------------------------------- the work


def attention(length: int, backward: bool) -> Call:
    """Exact attention of 4,096 tokens, 8 heads of 64, float32."""
    import jax
    import jax.numpy as jnp

    import attn_jax

    shape = (4096 // length, length, 8, 64)
    arrays = [jax.random.normal(k, shape) for k in jax.random.split(jax.random.key(0))]
    query, key, value = *arrays, arrays[0] + 1.0

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attn_jax.dot_product_attention(query, key, value)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(query, key, value)))

    jitted = jax.jit(jax.grad(loss, argnums=(0, 1, 2)) if backward else attend)
    return lambda: jax.block_until_ready(jitted(query, key, value))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a batch size.

    Attributes:
      model: "vit", "resnet" or "hybrid".
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

    def build(self) -> Any:
        """The model with its initial parameters, always the same."""
        from flax import nnx

        from attn_jax import models

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
        from flax import nnx

        model: Any = nnx.eval_shape(self.build)
        if self.model == "vit":
            tokens = model.grid[0] * model.grid[1]
            what = f"{tokens} tokens, d {model.dim}, {len(model.encoder.blocks)} blocks"
        else:
            side = "x".join(map(str, self.image_shape))
            what = f"{self.size}, {side}"
        return f"train step, {self.model} {what}, batch {self.batch}"

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Noise with random labels; enough of it not to be learnt by heart at once."""
        import numpy as np

        rng = np.random.default_rng(0)
        shape = (HOST_BATCHES, self.batch, *self.image_shape)
        images = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, NUM_CLASSES, shape[:2])
        return itertools.cycle(zip(images, labels, strict=True))


def _harness() -> Any:
    """What the experiments train by: here, and at an earlier commit."""
    import numpy as np

    try:
        from experiments.core import devices, memory, optim
        from experiments.tasks import images
    except ImportError:
        train: Any = importlib.import_module("experiments.common.train")
        return types.SimpleNamespace(
            **vars(train),
            keep_freed_memory=importlib.import_module(
                "experiments.common.memory"
            ).keep_freed_memory,
            recipe=lambda **numbers: train.Hyper(
                **{name: np.asarray(x, np.float32) for name, x in numbers.items()}
            ),
            step=lambda apply: train.make_train_step(
                apply, NUM_CLASSES, train.Augment(flip=True)
            ),
        )

    def step(apply: Any) -> Any:
        augment = images.Augment(flip=True)
        return optim.make_step(images.image_loss(apply, NUM_CLASSES, augment))

    return types.SimpleNamespace(
        **(vars(devices) | vars(images) | vars(memory) | vars(optim) | dict(step=step))
    )


def train(setting: Setting) -> Call:
    """Some updates as the experiments do them on a CPU, one dispatch each."""
    import jax
    import numpy as np

    ours = _harness()
    apply, params = ours.split_model(setting.build())
    channels = setting.image_shape[-1]
    hyper = ours.recipe(
        **NUMBERS,
        mixup=0,
        pixel_mean=np.full(channels, 0.5),
        pixel_std=np.full(channels, 0.25),
    )
    mesh = ours.data_mesh()
    step = jax.jit(ours.step(apply), donate_argnums=0)
    state = ours.put(ours.init_state(params, hyper), mesh)
    rng = ours.put(jax.random.key(0), mesh)
    batches = setting.batches()

    def call() -> None:
        nonlocal state
        for images, labels in itertools.islice(batches, STEPS_PER_CALL):
            batch = ours.Batch(images, labels.astype(np.int32))
            state, _ = step(state, ours.put(batch, mesh, "data"), rng)
        jax.block_until_ready(state)

    return call


def _train(fields: dict[str, Any]) -> Call:
    """`train` of a setting's fields, as JSON has them."""
    overrides = tuple(
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in fields["overrides"]
    )
    _harness().keep_freed_memory()
    shape = tuple(fields["image_shape"])
    return train(Setting(**fields | dict(image_shape=shape, overrides=overrides)))


KINDS: Mapping[str, Callable[..., Call]] = dict(attention=attention, train=_train)


def main(asked: str) -> int:
    """Does the work once, and again for each line that comes."""
    kind, *arguments, cores = json.loads(asked)
    if cores is not None:
        os.sched_setaffinity(0, cores)
    call = KINDS[kind](*arguments)
    call()
    for line in sys.stdin:
        done, began = 0, time.perf_counter()
        while not done or time.perf_counter() - began < float(line):
            call()
            done += 1
        print(done / (time.perf_counter() - began), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
