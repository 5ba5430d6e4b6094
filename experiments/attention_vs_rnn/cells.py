"""Cells of decoders: what mixes tokens, losses of both tasks, scores, pictures."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax import VARIANTS, positions
from attn_jax.nn.decoder import Decoder, DecoderFunctions, decoder_functions
from attn_jax.tools.cost import count_flops
from experiments.attention_vs_rnn import data
from experiments.attention_vs_rnn.data import START, SYMBOLS, CopyBatch
from experiments.attention_vs_rnn.logistic_mixture import (
    logistic_mixture_init,
    logistic_mixture_log_prob,
    logistic_mixture_sample,
)
from experiments.core import devices
from experiments.core.cell import Amount, Cell, Count, Rule, variant_of
from experiments.core.loop import Batches, Indexed, Program, Task, in_epochs
from experiments.data.images import Dataset, pack

MODELS: Mapping[str, str] = {
    "softmax": "blockwise",
    "linear": "linear",
    "reformer": "reformer",
    "lstm": "lstm",
}
"""Models by name, and what mixes tokens in them: an attention variant that has a step,
or an LSTM. A model may also be ``path/file.py:function``, of one's own."""

# Images scored at once, and sequences of the copy task.
EVAL_BATCH = {"images": 50, "copy": 64}

# Tokens of a chunk of linear attention's parallel form: for speed alone.
LINEAR_CHUNK = 32


def known_model(name: str) -> bool:
    """Whether there is such a model, or its name is of a file."""
    with_step = name in VARIANTS and VARIANTS[name].step is not None
    return name in MODELS or with_step or ".py:" in name


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderCell(Cell):
    """One (task, model, seed, hyper-parameters).

    Attributes:
      task: "copy" or the name of the images.
      model: a key of `MODELS`, or ``path/file.py:function``.
      attention_sha256: of that file: an edited one is another cell.
      batch_size: sequences an update.
      length: symbols of a sequence.
      dim, depth, num_heads: width, layers, heads.
      chunk_size, num_rounds: of Reformer, else None.
      components: logistics of a pixel's mixture; None for "copy".
      height: rows of an image; None for "copy".
      test_size: sequences that are scored.
      samples, completions: pictures that the first seed draws; 0 for "copy".
    """

    attention_sha256: str | None = None
    batch_size: Count
    length: Count
    dim: Count
    depth: Count
    num_heads: Count
    test_size: Count
    chunk_size: int | None = None
    num_rounds: int | None = None
    components: int | None = None
    height: int | None = None
    samples: int = 0
    completions: int = 0
    weight_decay: Amount = 0.01

    def rules(self) -> Iterator[Rule]:
        known = f"one of {', '.join(MODELS)}, a variant with a step, or path/file.py:fn"
        yield "model", known_model(self.model), known
        for name in ("chunk_size", "num_rounds"):
            given = getattr(self, name) is not None
            words = f"given for model='reformer' alone, not {self.model!r}"
            yield name, given == (self.model == "reformer"), words

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary; a digest only where there is a file."""
        found = super().config()
        if self.attention_sha256 is None:
            del found["attention_sha256"]
        return found

    @property
    def attention(self) -> str | None:
        """The model, where it is an attention of one's own."""
        return None if self.model in MODELS else self.model


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
    attention_sha256: str | None = None

    @classmethod
    def of(cls, cell: DecoderCell) -> Shape:
        """The shape of a cell."""
        return cls(*(getattr(cell, name) for name in cls._fields))


def mixer_of(shape: Shape) -> Any:
    """What mixes tokens in a decoder: a variant with its options, or "lstm"."""
    name = MODELS.get(shape.model, shape.model)
    if name == "lstm":
        return name
    variant = variant_of(name, shape.attention_sha256)
    if name == "linear":
        return variant.bind(chunk_size=LINEAR_CHUNK)
    if shape.chunk_size is not None:
        # A bucket holds about half a chunk.
        buckets = 2 * max(1, shape.length // shape.chunk_size)
        return variant.bind(
            chunk_size=shape.chunk_size,
            num_rounds=shape.num_rounds,
            num_buckets=buckets,
        )
    return variant


def build(shape: Shape, seed: int) -> Decoder:
    """The decoder of a cell with its initial parameters."""
    table: Any = "sinusoidal"
    bias = None
    symbols = outputs = SYMBOLS + 1
    if shape.components is not None:
        assert shape.height is not None
        symbols, outputs = START + 1, 3 * shape.components
        width = shape.length // shape.height
        with jax.ensure_compile_time_eval():  # also where the rehearsal traces this
            grid = positions.sinusoidal_2d(shape.height, width, shape.dim)
            table = np.asarray(grid)
        bias = logistic_mixture_init(shape.components)
    return Decoder(
        symbols,
        outputs,
        mixer=mixer_of(shape),
        dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        max_length=shape.length,
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


@functools.lru_cache(maxsize=16)
def program_of(shape: Shape) -> Program:
    """What cells of a shape compute; "score" gives numbers of each sequence [B]."""
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
        return (
            jnp.where(counted, losses, 0.0).sum(axis=1),
            (hits & counted).sum(axis=1),
            counted.sum(axis=1),
            (hits | ~counted).all(axis=1),
        )

    def score_pixels(params: Any, pixels: jax.Array) -> jax.Array:
        return pixel_bits(functions, params, pixels).mean(axis=1)

    copies = shape.components is None
    return Program(
        lambda seed: decoder_functions(build(shape, seed))[1],
        copy_loss if copies else pixel_loss,
        {"score": score_copy if copies else score_pixels, "functions": functions},
    )


@functools.lru_cache(maxsize=32)
def model_cost(shape: Shape) -> dict[str, Any]:
    """Parameters, and FLOPs of the forward pass of one token of a whole sequence."""
    functions, params = decoder_functions(build(shape, 0))
    tokens = jax.ShapeDtypeStruct((1, shape.length), jnp.int32)
    flops = count_flops(functions.apply, params, tokens).total
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return dict(params=count, flops=flops / shape.length)


class _DecoderTask(Task):
    """What both tasks share."""

    def program(self, cell: DecoderCell) -> Program:
        return program_of(Shape.of(cell))

    def trace(self, cell: DecoderCell, program: Program) -> None:
        """Traces a step, and scoring."""
        super().trace(cell, program)
        params = jax.eval_shape(lambda: program.initial_params(0))
        jax.eval_shape(program.more["score"], params, self.batches(cell)[0])

    def costs(self, cell: DecoderCell) -> dict[str, Any]:
        return dict(model_cost(Shape.of(cell)))


class _CopyBatches:
    """Sequences to copy, drawn anew for every update."""

    def __init__(self, cell: DecoderCell):
        self._cell = cell

    def __getitem__(self, step: int) -> CopyBatch:
        size = dict(batch_size=self._cell.batch_size, length=self._cell.length)
        return data.copy_batch("train", self._cell.seed, step, **size)


class CopyTask(_DecoderTask):
    """Decoders that copy."""

    def batches(self, cell: DecoderCell) -> Batches:
        return _CopyBatches(cell)

    def score(self, cell: DecoderCell, params: Any) -> dict[str, Any]:
        part = "val" if cell.phase == "tune" else "test"
        score = self.program(cell).more["score"]
        size = min(EVAL_BATCH["copy"], cell.test_size)
        sums = np.zeros(4)
        rounds = -(-cell.test_size // size)
        for index in range(rounds):
            batch = data.copy_batch(part, 0, index, batch_size=size, length=cell.length)
            sums += [float(x.sum()) for x in devices.call(score, params, batch)]
        loss, hits, count, whole = (float(x) for x in sums)
        return {
            f"{part}_loss": loss / count,
            f"{part}_accuracy": hits / count,
            f"{part}_whole": whole / (rounds * size),
        }


class PixelTask(_DecoderTask):
    """Decoders of pixels, which draw pictures with the first seed."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.parts = data.image_parts(dataset)
        self._pixels = dataset.train_images.reshape(len(dataset.train_images), -1)

    def trace(self, cell: DecoderCell, program: Program) -> None:
        super().trace(cell, program)
        # A step that fails must not wait for the pictures, when training is over.
        params = jax.eval_shape(lambda: program.initial_params(0))
        draw = functools.partial(self._draw, cell, count=2)
        jax.eval_shape(draw, params, np.full((1, 1), START, np.int32))

    def _draw(self, cell: DecoderCell, params: Any, prompt: Any, count: int) -> Any:
        """The pixels [n, count] that follow a prompt [n, P]."""
        functions: DecoderFunctions = self.program(cell).more["functions"]
        start, rng = jnp.asarray(prompt, jnp.int32), jax.random.key(cell.seed)
        return functions.generate(params, start, count, rng, logistic_mixture_sample)

    def batches(self, cell: DecoderCell) -> Indexed:
        chosen = self.parts[0]
        rows = in_epochs(cell, len(chosen))
        return Indexed(self._pixels, lambda step: chosen[rows(step)])

    def _bits(self, cell: DecoderCell, params: Any, images: np.ndarray) -> float:
        pixels = data.flat_images(images[: cell.test_size])
        size = min(EVAL_BATCH["images"], len(pixels))
        score, found = self.program(cell).more["score"], []
        for begin in range(0, len(pixels), size):
            rows = pixels[begin : begin + size]
            padded = np.pad(rows, ((0, size - len(rows)), (0, 0)))
            found.append(devices.call(score, params, padded)[: len(rows)])
        return float(np.concatenate(found).mean())

    def score(self, cell: DecoderCell, params: Any) -> dict[str, Any]:
        images = self.dataset.train_images[self.parts[1]]
        found: dict[str, Any] = dict(
            val_bits=self._bits(cell, params, images),
            data_sha256=self.dataset.sha256,
        )
        if cell.phase == "tune":
            return found
        found["test_bits"] = self._bits(cell, params, self.dataset.test_images)
        if cell.seed == 0:
            found |= self._pictures(cell, params)
        return found

    def _pictures(self, cell: DecoderCell, params: Any) -> dict[str, str]:
        """Samples, and test images whose lower half is drawn."""

        def draw(prompt: np.ndarray, count: int) -> np.ndarray:
            return np.asarray(self._draw(cell, params, prompt, count))

        drawn = draw(np.full((cell.samples, 1), START), cell.length)
        truth = data.flat_images(self.dataset.test_images[: cell.completions])
        known = truth[:, : cell.length // 2]
        prompt = np.concatenate([np.full((len(truth), 1), START), known], axis=1)
        rest = draw(prompt, cell.length - known.shape[1])
        return dict(
            samples=pack(drawn),
            completions=pack(np.concatenate([known, rest], axis=1)),
            completed=pack(truth),
        )
