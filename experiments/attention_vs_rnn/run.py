"""Plans and runs the cells of the experiment."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax import positions
from attn_jax.nn.decoder import Decoder, DecoderFunctions, decoder_functions
from attn_jax.tools.cost import count_flops
from experiments.attention_vs_rnn import tasks
from experiments.attention_vs_rnn.logistic_mixture import (
    logistic_mixture_init,
    logistic_mixture_log_prob,
    logistic_mixture_sample,
)
from experiments.attention_vs_rnn.presets import MODELS, Experiment
from experiments.attention_vs_rnn.tasks import START, SYMBOLS, CopyBatch
from experiments.core import identity, train, trial
from experiments.core.cell import Runtime
from experiments.core.driver import Plan
from experiments.core.loop import StopSignal
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore
from experiments.core.studies import Study
from experiments.data.images import Dataset, load

# Images scored at once, and sequences of the copy task.
EVAL_BATCH = {"images": 50, "copy": 64}

# Tokens of a chunk of linear attention's parallel form: for speed alone.
LINEAR_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class DecoderCell:
    """One (task, model, seed, hyper-parameters): all that can change its numbers.

    Attributes:
      task: "copy" or the name of the images.
      model: a key of `MODELS`.
      seed: draws the initial parameters, the batches and Reformer's rotations.
      updates: number of optimiser steps.
      phase: "tune" is scored on the validation part, "final" on the test part, once.
      batch_size: sequences an update.
      length: symbols of a sequence.
      dim, depth, num_heads: width, layers, heads.
      chunk_size, num_rounds: of Reformer, else None.
      components: logistics of a pixel's mixture; None for "copy".
      height: rows of an image; None for "copy".
      test_size: sequences that are scored.
      samples, completions: pictures that the first seed draws; 0 for "copy".
      learning_rate, weight_decay, warmup, clip_norm: of AdamW and its schedule.
      differs: what of the data is not as committed records had it, see
        `experiments.core.identity`.
    """

    task: str
    model: str
    seed: int
    updates: int
    batch_size: int
    length: int
    dim: int
    depth: int
    num_heads: int
    learning_rate: float
    test_size: int
    phase: Literal["tune", "final"] = "final"
    chunk_size: int | None = None
    num_rounds: int | None = None
    components: int | None = None
    height: int | None = None
    samples: int = 0
    completions: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip_norm: float = 1.0
    differs: identity.Differs = ()

    def __post_init__(self) -> None:
        trial.check_recipe(self)
        if self.model not in MODELS:
            raise ValueError(
                f"model must be one of {', '.join(MODELS)}, got {self.model!r}."
            )
        for name in ("chunk_size", "num_rounds"):
            if (getattr(self, name) is not None) != (self.model == "reformer"):
                raise ValueError(
                    f"{name} is for model='reformer' and needed there, got "
                    f"{getattr(self, name)!r} with model={self.model!r}."
                )

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary, which the results store hashes."""
        return identity.config_of(self)

    @property
    def label(self) -> str:
        """A short name for progress lines."""
        phase = trial.phase_label(self)
        return f"{self.task} {self.model} seed={self.seed} {phase}"


class Shape(NamedTuple):
    """What a compiled program depends on; cells that agree in it share one."""

    model: str
    length: int
    dim: int
    depth: int
    num_heads: int
    chunk_size: int | None
    num_rounds: int | None
    components: int | None
    height: int | None

    @classmethod
    def of(cls, cell: DecoderCell) -> Shape:
        """The shape of a cell."""
        return cls(*(getattr(cell, name) for name in cls._fields))


def build(shape: Shape, seed: int) -> Decoder:
    """The decoder of a cell with its initial parameters."""
    options: dict[str, Any] = {}
    if shape.model == "linear":
        options = dict(chunk_size=LINEAR_CHUNK)
    if shape.chunk_size is not None:
        # A bucket holds about half a chunk.
        buckets = 2 * max(1, shape.length // shape.chunk_size)
        options = dict(
            chunk_size=shape.chunk_size,
            num_rounds=shape.num_rounds,
            num_buckets=buckets,
        )
    if shape.components is None:
        symbols = outputs = SYMBOLS + 1
        table: Any = "sinusoidal"
        bias = None
    else:
        assert shape.height is not None
        symbols, outputs = START + 1, 3 * shape.components
        width = shape.length // shape.height
        grid = positions.sinusoidal_2d(shape.height, width, shape.dim)
        table = np.asarray(grid)
        bias = logistic_mixture_init(shape.components)
    return Decoder(
        symbols,
        outputs,
        mixer=MODELS[shape.model],
        dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        max_length=shape.length,
        options=options,
        positions=table,
        head_bias=bias,
        rngs=nnx.Rngs(seed),
    )


def copy_losses(
    functions: DecoderFunctions, params: Any, batch: CopyBatch, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy [B, T − 1], hits bool [B, T − 1] and which of them count."""
    logits = functions.apply(params, jnp.asarray(batch.tokens)[:, :-1], rng)
    wanted = jnp.asarray(batch.tokens)[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return losses, jnp.argmax(logits, -1) == wanted, jnp.asarray(batch.counted)[:, 1:]


def pixel_bits(
    functions: DecoderFunctions, params: Any, pixels: jax.Array
) -> jax.Array:
    """Bits of every pixel, [B, T] of values [B, T]."""
    pixels = jnp.asarray(pixels).astype(jnp.int32)  # `START` is no number of uint8
    start = jnp.full((pixels.shape[0], 1), START, pixels.dtype)
    shifted = jnp.concatenate([start, pixels[:, :-1]], axis=1)
    outputs = functions.apply(params, shifted)
    return logistic_mixture_log_prob(outputs, pixels) / -math.log(2.0)


class Programs(NamedTuple):
    """Jitted functions of a decoder."""

    functions: DecoderFunctions
    initial_params: Callable[[int], Any]
    step: trial.Step
    score: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def programs(shape: Shape) -> Programs:
    """Builds, once for each shape, the functions that train and score."""
    functions, _ = decoder_functions(build(shape, 0))

    def copy_loss(
        params: Any, batch: CopyBatch, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses, hits, counted = copy_losses(functions, params, batch, rng)
        count = counted.sum().astype(losses.dtype)
        accuracy = (hits & counted).sum().astype(losses.dtype) / count
        loss = jnp.where(counted, losses, 0.0).sum() / count
        return loss, {"accuracy": accuracy}

    def pixel_loss(
        params: Any, pixels: jax.Array, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        return pixel_bits(functions, params, pixels).mean(), {}

    def score_copy(params: Any, batch: CopyBatch) -> Any:
        losses, hits, counted = copy_losses(functions, params, batch, None)
        whole = (hits | ~counted).all(axis=1)
        return (
            jnp.where(counted, losses, 0.0).sum(),
            (hits & counted).sum(),
            counted.sum(),
            whole.sum(),
        )

    def score_pixels(params: Any, pixels: jax.Array) -> jax.Array:
        return pixel_bits(functions, params, pixels).mean(axis=1)

    copies = shape.components is None
    return Programs(
        functions,
        lambda seed: decoder_functions(build(shape, seed))[1],
        jax.jit(trial.make_step(copy_loss if copies else pixel_loss), donate_argnums=0),
        jax.jit(score_copy if copies else score_pixels),
    )


@functools.lru_cache(maxsize=32)
def model_cost(shape: Shape) -> dict[str, Any]:
    """Parameters, and FLOPs of the forward pass of one token of a whole sequence."""
    functions, params = decoder_functions(build(shape, 0))
    tokens = jax.ShapeDtypeStruct((1, shape.length), jnp.int32)
    flops = count_flops(functions.apply, params, tokens).total
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return dict(params=count, flops=flops / shape.length)


class _DecoderRunner(trial.Runner):
    """What the runners of both tasks share."""

    def costs(self, cell: DecoderCell) -> dict[str, Any]:
        return dict(model_cost(Shape.of(cell)))

    def _job(self, cell: DecoderCell, batch: Callable[[int], Any]) -> trial.Job:
        program = programs(Shape.of(cell))
        return trial.Job(program.initial_params(cell.seed), program.step, batch)


class CopyRunner(_DecoderRunner):
    """Trains and scores decoders that copy."""

    def start(self, cell: DecoderCell) -> trial.Job:
        return self._job(
            cell,
            lambda step: tasks.copy_batch(
                "train",
                cell.seed,
                step,
                batch_size=cell.batch_size,
                length=cell.length,
            ),
        )

    def result(self, cell: DecoderCell, params: Any) -> dict[str, Any]:
        part = "val" if cell.phase == "tune" else "test"
        score = programs(Shape.of(cell)).score
        size = min(EVAL_BATCH["copy"], cell.test_size)
        sums = np.zeros(4)
        rounds = -(-cell.test_size // size)
        for index in range(rounds):
            batch = tasks.copy_batch(
                part, 0, index, batch_size=size, length=cell.length
            )
            sums += [float(x) for x in score(params, batch)]
        loss, hits, count, whole = sums
        return {
            f"{part}_loss": loss / count,
            f"{part}_accuracy": hits / count,
            f"{part}_whole": whole / (rounds * size),
        }


class ImageRunner(_DecoderRunner):
    """Trains and scores decoders of pixels, and draws pictures with the first seed."""

    def __init__(self, dataset: Dataset, *arguments: Any):
        super().__init__(*arguments)
        self.dataset = dataset
        self.parts = tasks.image_parts(dataset)

    def start(self, cell: DecoderCell) -> trial.Job:
        chosen = self.parts[0]

        def batch(step: int) -> np.ndarray:
            rows = train.batch_positions(
                len(chosen), seed=cell.seed, step=step, batch_size=cell.batch_size
            )
            return tasks.flat_images(self.dataset.train_images[chosen[rows]])

        return self._job(cell, batch)

    def _bits(self, cell: DecoderCell, params: Any, images: np.ndarray) -> float:
        pixels = tasks.flat_images(images[: cell.test_size])
        size = min(EVAL_BATCH["images"], len(pixels))
        found = []
        for begin in range(0, len(pixels), size):
            rows = pixels[begin : begin + size]
            padded = np.pad(rows, ((0, size - len(rows)), (0, 0)))
            bits = programs(Shape.of(cell)).score(params, padded)
            found.append(np.asarray(bits)[: len(rows)])
        return float(np.concatenate(found).mean())

    def result(self, cell: DecoderCell, params: Any) -> dict[str, Any]:
        images = self.dataset.train_images[self.parts[1]]
        found: dict[str, Any] = dict(
            val_bits=self._bits(cell, params, images),
            data_sha256=self.dataset.sha256,
        )
        if cell.phase == "tune":
            return found
        test = self.dataset.test_images
        found["test_bits"] = self._bits(cell, params, test)
        if cell.seed == 0:
            found |= self._pictures(cell, params)
        return found

    def _pictures(self, cell: DecoderCell, params: Any) -> dict[str, str]:
        """Samples, and test images whose lower half is drawn."""
        functions = programs(Shape.of(cell)).functions
        rng = jax.random.key(cell.seed)
        start = jnp.full((cell.samples, 1), START, jnp.int32)
        drawn = functions.generate(
            params, start, cell.length, rng, logistic_mixture_sample
        )
        truth = tasks.flat_images(self.dataset.test_images[: cell.completions])
        known = truth[:, : cell.length // 2]
        prompt = np.concatenate([np.full((len(truth), 1), START), known], axis=1)
        rest = functions.generate(
            params,
            jnp.asarray(prompt, jnp.int32),
            cell.length - known.shape[1],
            rng,
            logistic_mixture_sample,
        )
        completed = np.concatenate([known, np.asarray(rest)], axis=1)
        return dict(
            samples=tasks.pack(np.asarray(drawn)),
            completions=tasks.pack(completed),
            completed=tasks.pack(truth),
        )


def cell_of(experiment: Experiment, task: str, model: str, **sizes: Any) -> DecoderCell:
    """The cell of a model; images give their name and the sizes."""
    copies = task == "copy"
    reformer = model == "reformer"
    part = "copy" if copies else "image"
    common = {
        name: getattr(experiment, f"{part}_{field}")
        for name, field in (
            ("updates", "updates"),
            ("batch_size", "batch"),
            ("depth", "depth"),
            ("learning_rate", "rate"),
            ("test_size", "test"),
        )
    }
    if copies:
        sizes = dict(length=experiment.copy_length)
    else:
        sizes |= dict(
            components=experiment.components,
            samples=experiment.samples,
            completions=experiment.completions,
        )
    return DecoderCell(
        task=task,
        model=model,
        seed=0,
        phase="tune",
        dim=experiment.dim,
        num_heads=experiment.num_heads,
        chunk_size=experiment.chunk_size if reformer else None,
        num_rounds=experiment.num_rounds if reformer else None,
        **common,
        **sizes,
    )


def _studies(
    experiment: Experiment, task: str, models: tuple[str, ...], **sizes: Any
) -> dict[str, Study]:
    metric = "val_accuracy" if task == "copy" else "val_bits"
    found = {}
    for model in models:
        cell = cell_of(experiment, task, model, **sizes)
        found[model] = Study(
            model,
            (cell,),
            cell.updates,
            experiment.seeds,
            metric=metric,
            minimise=task != "copy",
        )
    return found


def make_plans(experiment: Experiment) -> list[Plan]:
    """Loads the images and plans the cells of both tasks, or of one.

    Raises:
      DataError: the images cannot be had.
    """
    plans = []
    if experiment.task in ("both", "copy"):
        length = experiment.copy_length
        plans.append(
            Plan(
                "copy",
                f"copy: sequences of {length} symbols, words of {length // 4} to "
                f"{(length - 2) // 2 - 1} out of {SYMBOLS}, drawn anew",
                _studies(experiment, "copy", experiment.copy_models),
                tasks.copy_baselines(),
                CopyRunner,
            )
        )
    if experiment.task in ("both", "images"):
        dataset = load("fashion_mnist")
        height, width, _ = dataset.image_shape
        task, differs = identity.of_images(dataset)
        sizes = dict(length=height * width, height=height, differs=differs)
        floors = tasks.image_baselines(dataset, experiment.image_test)
        made_of = identity.differs(
            task, data_sha256=dataset.sha256, image_test=experiment.image_test
        )

        def runner(
            store: ResultsStore, runtime: Runtime, progress: Progress, stop: StopSignal
        ) -> trial.Runner:
            return ImageRunner(dataset, store, runtime, progress, stop)

        plans.append(
            Plan(
                task,
                dataset.describe(),
                _studies(experiment, task, experiment.image_models, **sizes),
                floors,
                runner,
                dict.fromkeys(floors, made_of),
            )
        )
    return plans
