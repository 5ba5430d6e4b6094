"""What a cell of the arena computes: symbols in, labels out, whatever is in between."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.models import Labeller, build
from attn_jax.nn.encoder import zero_head
from attn_jax.tools.cost import call_cost
from experiments.core import devices, optim
from experiments.core.cell import (
    Cell,
    Count,
    Dtype,
    Natural,
    Rule,
    Share,
    variant_of,
)
from experiments.core.loop import Batches, Indexed, Program, Task, in_epochs
from experiments.data.sequences import IGNORED
from experiments.data.symbols import Fold, SymbolData
from experiments.tasks.attention import mean_distances, traced_weights

# Models that are no attention, and how `Labeller` makes them.
BODIES: Mapping[str, Mapping[str, Any]] = {
    "gru": {},
    "s4d": {},
    "cnn": dict(kernel=5, dilations=(1, 4, 16, 64)),
}
SOFTMAX = "softmax"  # a name for exact attention, however it is computed
SPANS = 16  # sequences that the span of attention is of
TRAIN_EVAL = 1_000  # training sequences that the accuracy on seen data is of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongCell(Cell):
    """A cell that reads sequences of symbols.

    Attributes:
      model: the row of a table: "softmax", the name or file of another variant, or a
        key of `BODIES`.
      batch_size: sequences of an update, or pairs of them.
      dim, depth, mlp_dim: width, layers and hidden width.
      num_heads, positions: of an attention model, else None.
      attention: the variant, by name or file; None for the models of `BODIES`.
      attention_sha256: of the file, where ``attention`` names one.
      bigram: whether a position reads the symbol before it too, by a table of its own.
      pretrain_updates: the first updates restore masked symbols of the training
        sequences, the others learn the task; 0 = none.
      masked: share of the symbols that is masked in them.
      dtype: dtype of the computation; parameters stay float32.
    """

    batch_size: Count = 32
    dim: Count = 64
    depth: Count = 2
    mlp_dim: Count = 128
    num_heads: int | None = None
    attention: str | None = None
    attention_sha256: str | None = None
    positions: str | None = None
    bigram: bool = False
    pretrain_updates: Natural = 0
    masked: Share = 0.0
    dtype: Dtype = "float32"

    def rules(self) -> Iterator[Rule]:
        attends = self.model not in BODIES
        words = f"{'given' if attends else 'left out'} for model {self.model!r}"
        for name in ("num_heads", "attention", "positions"):
            yield name, (getattr(self, name) is not None) == attends, words
        if self.num_heads is not None:
            words = f"a multiple of num_heads={self.num_heads}"
            yield "dim", self.dim % self.num_heads == 0, words
        words = f"less than updates={self.updates}"
        yield "pretrain_updates", self.pretrain_updates < self.updates, words
        words = f"above 0 with pretrain_updates={self.pretrain_updates}, else 0"
        yield "masked", (self.masked > 0) == (self.pretrain_updates > 0), words
        alone = not (self.pretrain_updates and (self.bigram or self.model == "cnn"))
        yield "pretrain_updates", alone, "0 with bigram, and for the model 'cnn'"

    def config(self) -> dict[str, Any]:
        found = super().config()
        if not self.pretrain_updates:  # as in records of before there was any
            del found["pretrain_updates"], found["masked"]
        return found

    def traits(self) -> Iterator[str]:
        yield f"dim={self.dim}"
        if self.pretrain_updates:
            yield f"pretrained for {self.pretrain_updates}"


class PairHead(nnx.Module):
    """Logits of two sequences from what was pooled of each.

    logits = W₂ gelu(W₁ [x₁; x₂; x₁ · x₂; x₁ − x₂] + b₁) + b₂.

    Args:
      dim: size D of x₁ and of x₂.
      hidden: size of the hidden layer.
      classes: number of logits.

    Reference: Tay et al., Long Range Arena, arXiv:2011.04006, section 2.2.3.

    >>> PairHead(4, 8, 2, dtype=None, rngs=nnx.Rngs(0))(jnp.ones((3, 2, 4))).shape
    (3, 2)
    """

    def __init__(
        self, dim: int, hidden: int, classes: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.expand = nnx.Linear(4 * dim, hidden, dtype=dtype, rngs=rngs)
        self.contract = zero_head(hidden, classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, 2, D] to [B, classes]."""
        one, two = x[:, 0], x[:, 1]
        both = jnp.concatenate([one, two, one * two, one - two], axis=-1)
        return self.contract(jax.nn.gelu(self.expand(both)))


class Reader(nnx.Module):
    """Input table, body and head on symbols; of pairs, the same weights read both.

    Args:
      shape: of the model and the data.
      rngs: of the parameters.
    """

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(BODIES.get(shape.model, {}))
        dtype = None if shape.dtype == "float32" else jnp.dtype(shape.dtype)
        depth = len(options.get("dilations", ())) or shape.depth
        if shape.model not in ("gru", "s4d"):
            options["mlp_dim"] = shape.mlp_dim
        if shape.attention is not None:
            options |= dict(
                attention=variant_of(shape.attention, shape.attention_sha256),
                num_heads=shape.num_heads,
                positions=shape.positions,
            )
        self.tower = Labeller(
            (shape.symbols + shape.pretrains, *[shape.symbols + 1] * shape.bigram),
            shape.classes,
            body=shape.model if shape.attention is None else "transformer",
            dim=shape.dim,
            depth=depth,
            max_length=shape.length,
            pool=None if shape.each else "mean",
            dtype=dtype,
            rngs=rngs,
            **options,
        )
        self.pairs, self.bigram, self.none = shape.pairs, shape.bigram, shape.symbols
        if shape.pairs:
            self.tower.head = PairHead(  # type: ignore[assignment]
                shape.dim, shape.mlp_dim, shape.classes, dtype=dtype, rngs=rngs
            )

        if shape.pretrains:
            self.restore = nnx.Linear(shape.dim, shape.symbols, dtype=dtype, rngs=rngs)

    def tokens(
        self, inputs: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Ids [B, T, 1 or 2] of the tables, and bool [B, T], which are real.

        Of pairs the first axis is 2B.
        """
        length = inputs.shape[-1]
        ids = inputs.reshape(-1, length, 1).astype(jnp.int32)
        if self.bigram:
            first = jnp.full_like(ids[:, :1], self.none)
            before = jnp.concatenate([first, ids[:, :-1]], axis=1)
            ids = jnp.concatenate([ids, before], axis=-1)
        return ids, jnp.arange(length)[None] < lengths.reshape(-1, 1)

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        restore: bool = False,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps symbols [B, T] or [B, 2, T] to logits [B, classes] or [B, T, classes].

        Args:
          inputs: of any integer dtype.
          lengths: int [B] or [B, 2], how many of the T are real.
          restore: asks for the symbols instead, logits [B, T, K], of pairs [2B, T, K].
          deterministic: whether randomness is off.
          rngs: stream "dropout", where it is on.
        """
        ids, real = self.tokens(inputs, lengths)
        more: Any = dict(deterministic=deterministic, rngs=rngs)
        if restore:
            return self.restore(self.tower.features(ids, real, pool=False, **more))
        if not self.pairs:
            return self.tower(ids, real, **more)
        pooled = self.tower.features(ids, real, **more)
        return self.tower.head(pooled.reshape(-1, 2, pooled.shape[-1]))


class ImageReader(nnx.Module):
    """A residual network on the image that a sequence of grey levels was read from.

    Args:
      shape: of the model and the data, with a grid.
      rngs: of the parameters.
    """

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        assert shape.grid is not None
        self.grid, self.levels = shape.grid, shape.symbols
        dtype = None if shape.dtype == "float32" else jnp.dtype(shape.dtype)
        self.network = build(
            "resnet",
            "mu",
            image_shape=(*shape.grid, 1),
            num_classes=shape.classes,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: jax.Array,
        lengths: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps grey levels [B, T] to logits [B, classes]; see `Reader`."""
        del lengths, deterministic, rngs
        images = inputs.reshape(-1, *self.grid, 1).astype(jnp.float32)
        return self.network(2.0 * images / (self.levels - 1) - 1.0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled program depends on; cells that agree in it share one."""

    model: str
    dim: int
    depth: int
    mlp_dim: int
    num_heads: int | None
    attention: str | None
    attention_sha256: str | None
    positions: str | None
    bigram: bool
    dtype: str
    symbols: int
    classes: int
    length: int
    each: bool
    pairs: bool
    grid: tuple[int, int] | None
    pretrains: bool = False

    @classmethod
    def of(cls, cell: LongCell, data: SymbolData) -> Shape:
        """Of a cell on its data."""
        found = (cell, data)
        names = [field.name for field in dataclasses.fields(cls)][:-1]
        traits = {n: getattr(found[not hasattr(cell, n)], n) for n in names}
        return cls(**traits, pretrains=cell.pretrain_updates > 0)


def build_model(shape: Shape, seed: int) -> Reader | ImageReader:
    """The model of a shape with its initial parameters."""
    kind = ImageReader if shape.model == "cnn" and shape.grid else Reader
    return kind(shape, rngs=nnx.Rngs(seed))


def spans_of(shape: Shape, params: Any, part: Fold) -> list[list[float]]:
    """How far each head of exact attention looks, in symbols, by layer.

    The mean distance of query and key by the weights, over the sequences of a part.
    """
    shape = dataclasses.replace(shape, attention="dot_product", attention_sha256=None)
    graphdef, *states = nnx.split(build_model(shape, 0), nnx.Param, ...)
    structure, rest = jax.tree.structure(states[0]), states[1]

    @jax.jit
    def spans(leaves: list[jax.Array], rest: Any, inputs: Any, lengths: Any) -> Any:
        trained = jax.tree.unflatten(structure, leaves)
        model: Any = nnx.merge(graphdef, trained, rest)
        ids, real = model.tokens(inputs, lengths)
        x, encoder = model.tower.input(ids), model.tower.body.encoder
        weights = traced_weights(encoder, x, real)
        return jnp.stack([mean_distances(w, real) for w in weights])

    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    found = [
        spans(leaves, rest, part.inputs[row : row + 1], part.lengths[row : row + 1])
        for row in range(len(part.labels))  # one by one: weights are [T, T]
    ]
    return np.mean(found, axis=0).tolist()


def losses_of(
    logits: jax.Array, labels: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy where something is asked, 0 elsewhere; hits; and where it is."""
    asked = labels != IGNORED
    each = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(asked, labels, 0)
    )
    hits = (jnp.argmax(logits, axis=-1) == labels) & asked
    return jnp.where(asked, each, 0.0), hits, asked


def mean_of(
    found: tuple[jax.Array, jax.Array, jax.Array], moved: Any
) -> tuple[jax.Array, dict[str, Any]]:
    """The mean loss of what was asked, and the accuracy."""
    each, hits, asked = found
    count = jnp.maximum(asked.sum(), 1).astype(jnp.float32)
    accuracy = hits.sum().astype(jnp.float32) / count
    return each.sum() / count, {"accuracy": accuracy, optim.MOVED: moved}


@functools.lru_cache(maxsize=32)
def program_of(shape: Shape) -> Program:
    """What cells of a shape compute.

    "predict" gives of each sequence its hits, what was asked and the summed loss, [B].
    """
    apply, _ = optim.split_model(build_model(shape, 0))

    def task_loss(
        params: Any, batch: Fold, rng: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        logits, moved = optim.training_call(
            apply,
            params,
            jnp.asarray(batch.inputs),
            jnp.asarray(batch.lengths),
            rng=rng,
        )
        return mean_of(losses_of(logits, jnp.asarray(batch.labels)), moved)

    def restore_loss(
        params: Any, batch: Fold, rng: jax.Array, share: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        mask_rng, rng = jax.random.split(rng)
        x, lengths = jnp.asarray(batch.inputs).astype(jnp.int32), batch.lengths
        flat, sizes = x.reshape(-1, x.shape[-1]), jnp.asarray(lengths).reshape(-1, 1)
        hidden = jax.random.bernoulli(mask_rng, share, flat.shape)
        hidden &= jnp.arange(x.shape[-1])[None] < sizes
        wanted = jnp.where(hidden, flat, IGNORED)
        hidden = hidden.reshape(x.shape)
        seen = jnp.where(hidden, shape.symbols, x)
        logits, moved = optim.training_call(apply, params, seen, lengths, True, rng=rng)
        return mean_of(losses_of(logits, wanted), moved)

    def loss(
        params: Any, batch: Any, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        if not shape.pretrains:
            return task_loss(params, batch, rng)
        fold, first = batch
        return jax.lax.cond(
            first[0],
            lambda: restore_loss(params, fold, rng, hyper.more["masked"]),
            lambda: task_loss(params, fold, rng),
        )

    def predict(params: Any, batch: Fold) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = apply(params, batch.inputs, batch.lengths)
        found = losses_of(logits, batch.labels)
        each, hits, asked = (x.reshape(len(x), -1).sum(axis=1) for x in found)
        return hits, asked, each

    def initial_params(seed: int) -> Any:
        return optim.split_model(build_model(shape, seed))[1]

    return Program(initial_params, loss, {"predict": predict, "apply": apply})


@functools.lru_cache(maxsize=64)
def cost_of(shape: Shape) -> dict[str, Any]:
    """Parameters, and FLOPs of one example's forward pass."""
    model = nnx.eval_shape(lambda: build_model(shape, 0))
    lead = (1, 2) if shape.pairs else (1,)
    inputs = jax.ShapeDtypeStruct((*lead, shape.length), jnp.int32)
    lengths = jax.ShapeDtypeStruct(lead, jnp.int32)
    cost = call_cost(model, inputs, lengths)
    return dict(params=cost.params, flops=cost.flops)


@dataclasses.dataclass(frozen=True)
class Staged:
    """Batches with, for each row, whether the update is one of the first."""

    whole: Indexed
    first: int

    def __getitem__(self, step: int) -> tuple[Fold, np.ndarray]:
        batch = self.whole[step]
        return batch, np.full(len(batch.labels), step < self.first)


class LongTask(Task):
    """Reads the sequences of some tasks; a cell names its own.

    Args:
      data: by name.
    """

    unit = "sequences"

    def __init__(self, data: Mapping[str, SymbolData]):
        self.data = dict(data)

    def shape(self, cell: LongCell) -> Shape:
        """What the program of a cell depends on."""
        return Shape.of(cell, self.data[cell.task])

    def program(self, cell: LongCell) -> Program:
        return program_of(self.shape(cell))

    def batches(self, cell: LongCell) -> Batches:
        train = self.data[cell.task].train
        found = Indexed(train, in_epochs(cell, len(train.labels)))
        if cell.pretrain_updates:
            return Staged(found, cell.pretrain_updates)
        return found

    def hyper(self, cell: LongCell) -> optim.Hyper:
        if not cell.pretrain_updates:
            return super().hyper(cell)
        first, masked = cell.pretrain_updates, cell.masked
        return optim.hyper_of(cell, first_updates=first, masked=masked)

    def costs(self, cell: LongCell) -> dict[str, Any]:
        return cost_of(dataclasses.replace(self.shape(cell), dtype="float32"))

    def predict(self, cell: LongCell, params: Any, part: Fold) -> np.ndarray:
        """Of each sequence of a part its hits, what was asked and the loss, [n, 3]."""
        predict, size = self.program(cell).more["predict"], cell.batch_size
        found = []
        for begin in range(0, len(part.labels), size):
            some = part.take(slice(begin, begin + size))
            count = len(some.labels)
            if count < size:  # one shape, one program; what is asked twice counts once
                some = some.take(np.arange(size) % count)
            rows = np.stack(devices.call(predict, params, some), axis=1)
            found.append(rows[:count])
        return np.concatenate(found)

    def score(self, cell: LongCell, params: Any) -> dict[str, Any]:
        """Accuracy and loss, of training sequences and of those held out."""
        data = self.data[cell.task]
        rows = self.predict(cell, params, data.train.take(slice(TRAIN_EVAL)))
        result: dict[str, Any] = {"train_accuracy": _share(rows)}
        prefix, part = ("val", data.validation)
        if cell.phase == "final":
            prefix, part = ("test", data.test)
        rows = self.predict(cell, params, part)
        result[f"{prefix}_accuracy"] = _share(rows)
        result[f"{prefix}_loss"] = float(rows[:, 2].sum() / rows[:, 1].sum())
        if cell.phase == "final" and cell.model == SOFTMAX:
            spans = spans_of(self.shape(cell), params, part.take(slice(SPANS)))
            result |= dict(span=float(np.mean(spans)), spans=spans)
        if data.group:
            for value in np.unique(part.groups).tolist():
                some = rows[part.groups == value]
                result[f"{prefix}_accuracy_{data.group}_{value}"] = _share(some)
        return result


def _share(rows: np.ndarray) -> float:
    """Hits of what was asked."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())
