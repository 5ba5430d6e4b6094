"""Sequence labelling: cells, the loss, scoring.

A sequence has a label for each vector, or one for all of it (`SequenceData.one_label`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.models import Labeller
from attn_jax.tools.cost import labeller_cost
from experiments.core import devices, loop, optim
from experiments.core.cell import (
    Cell,
    Count,
    Dtype,
    Rule,
    Share,
    at_least,
    variant_of,
)
from experiments.core.loop import Program, Task, trace_step
from experiments.core.store import ResultsStore
from experiments.data import sequences
from experiments.data.sequences import Batch, Batches, Part, SequenceData

# Training sequences that the accuracy on seen data is read from.
TRAIN_EVAL = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelCell(Cell):
    """A cell that labels sequences.

    Attributes:
      model: a key of `attn_jax.models.BODIES`; "window" with ``window=0`` is the
        fully connected network for each vector.
      n: number of training sequences; None = all.
      tokens: labels a batch, with padding.
      dim, depth, mlp_dim: width, layers and hidden width.
      num_heads, attention, positions: of the "transformer", else None.
      attention_sha256: of the file, where ``attention`` names one.
      left, right: the window of ``attention="truncated"``, in vectors; else None.
      position_options: pairs (name, value) for the position encoding.
      window: neighbours on either side, of "window"; else None.
      kernel: width of a convolution, of "cnn"; else None.
      dilations: of the convolutions of "cnn"; None = 1 each.
      train_length: longest training sequence, others are left out; None = all.
      id_dropout: probability that a token's first id (its word) is hidden in training,
        where the task has an id for unknown words.
      dropout_rate: of the model.
      dtype: dtype of the computation; parameters stay float32.
    """

    n: Annotated[int | None, at_least(1)] = None
    tokens: Count = 2048
    dim: int = 128
    depth: int = 2
    mlp_dim: int = 256
    num_heads: int | None = None
    attention: str | None = None
    attention_sha256: str | None = None
    left: int | None = None
    right: int | None = None
    positions: str | None = None
    position_options: tuple[tuple[str, Any], ...] = ()
    window: int | None = None
    kernel: int | None = None
    dilations: tuple[int, ...] | None = None
    train_length: int | None = None
    id_dropout: Share = 0.0
    dropout_rate: Share = 0.1
    dtype: Dtype = "float32"

    def rules(self) -> Iterator[Rule]:
        wanted = {
            "transformer": {"num_heads", "attention", "positions"},
            "window": {"window"},
            "cnn": {"kernel"},
        }.get(self.model, set())
        for name in ("num_heads", "attention", "positions", "window", "kernel"):
            needed = name in wanted
            words = f"{'given' if needed else 'left out'} for model {self.model!r}"
            yield name, (getattr(self, name) is not None) == needed, words
        words = "left out but for model 'cnn'"
        yield "dilations", self.dilations is None or self.model == "cnn", words
        for name in ("left", "right"):
            given = getattr(self, name) is not None
            words = f"given with attention='truncated' alone, not {self.attention!r}"
            yield name, given == (self.attention == "truncated"), words

    def config(self) -> dict[str, Any]:
        found = super().config() | {"position_options": dict(self.position_options)}
        if self.dilations is None:  # as in records of before there were any
            del found["dilations"]
        return found

    def traits(self) -> Iterator[str]:
        names = "attention positions window dilations left right num_heads"
        for name in names.split():
            if getattr(self, name) is not None:
                yield f"{name}={getattr(self, name)}"
        if self.n is not None:
            yield f"n={self.n}"


def field_of(config: Mapping[str, Any]) -> int | None:
    """How many vectors on either side the model of a cell sees; None = everything.

    >>> field_of(dict(model="cnn", kernel=5, dilations=[1, 1, 1, 0], depth=4))
    6
    >>> field_of(dict(model="transformer", left=2, right=2, depth=3))
    6
    """
    if config["model"] == "cnn":
        dilations = config.get("dilations") or [1] * config["depth"]
        return config["kernel"] // 2 * sum(dilations)
    if config["model"] == "window":
        return config["window"]
    return None if config.get("left") is None else config["left"] * config["depth"]


# What shapes a program: cells that agree in it share the compiled one.
_SHAPE = (
    "model dim depth mlp_dim num_heads attention attention_sha256 left right positions "
    "position_options window kernel dilations dropout_rate dtype"
).split()


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """What a compiled program depends on; cells that agree in it share one."""

    traits: tuple[Any, ...]
    inputs: int | tuple[int, ...]
    num_classes: int
    max_length: int
    hides: bool
    one_label: bool = False


def program_key(cell: LabelCell, data: SequenceData) -> ProgramKey:
    """The key of the programs that train and score a cell."""
    return ProgramKey(
        tuple(getattr(cell, name) for name in _SHAPE),
        data.inputs,
        len(data.class_names),
        data.max_length,
        cell.id_dropout > 0 and data.has_unknown,
        data.one_label,
    )


def build_model(key: ProgramKey, seed: int) -> Labeller:
    """The model of a cell with its initial parameters."""
    traits = dict(zip(_SHAPE, key.traits, strict=True))
    options: dict[str, Any] = dict(depth=traits["depth"])
    if traits["model"] in ("window", "cnn", "transformer"):
        options["mlp_dim"] = traits["mlp_dim"]
    if traits["model"] == "transformer":
        attention = variant_of(traits["attention"], traits["attention_sha256"])
        if traits["attention"] == "truncated":
            attention = attention.bind(left=traits["left"], right=traits["right"])
        options |= dict(
            attention=attention,
            num_heads=traits["num_heads"],
            positions=traits["positions"],
            position_options=dict(traits["position_options"]),
        )
    for name in ("window", "kernel", "dilations"):
        if traits[name] is not None:
            options[name] = traits[name]
    return Labeller(
        key.inputs,
        key.num_classes,
        body=traits["model"],
        dim=traits["dim"],
        max_length=key.max_length,
        pool="mean" if key.one_label else None,
        dropout_rate=traits["dropout_rate"],
        dtype=jnp.dtype(traits["dtype"]) if traits["dtype"] != "float32" else None,
        rngs=nnx.Rngs(seed),
        **options,
    )


@functools.lru_cache(maxsize=64)
def serves_length(key: ProgramKey, length: int) -> bool:
    """Whether the parameters of a model serve sequences of another length as well.

    A table of positions, for one, has a row for each position of training and no more.
    """

    def shapes(key: ProgramKey) -> Any:
        state = nnx.state(nnx.eval_shape(lambda: build_model(key, 0)))
        return jax.tree.map(jnp.shape, nnx.to_pure_dict(state))

    return shapes(key) == shapes(dataclasses.replace(key, max_length=length))


def losses_of(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy at each label, 0 at padding, and which labels are real."""
    real = labels != sequences.IGNORED
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(real, labels, 0)
    )
    return jnp.where(real, loss, 0.0), real


@functools.lru_cache(maxsize=32)
def program_of(key: ProgramKey) -> Program:
    """What cells of a key compute; "predict" gives labels [B, T] and losses [B, T].

    Of one label a sequence both are [B, 1].
    """
    apply, _ = optim.split_model(build_model(key, 0))

    def loss(
        params: Any, batch: Batch, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        hide_rng, dropout_rng = jax.random.split(rng)
        inputs, labels = jnp.asarray(batch.inputs), jnp.asarray(batch.labels)
        if key.hides:  # id 1 of a table is the unknown word
            share = hyper.more["id_dropout"]
            hidden = jax.random.bernoulli(hide_rng, share, labels.shape)
            first = jnp.where(hidden, jnp.ones((), inputs.dtype), inputs[..., 0])
            inputs = inputs.at[..., 0].set(first)
        real = labels != sequences.IGNORED
        logits, moved = optim.training_call(
            apply, params, inputs, real, rng=dropout_rng
        )
        if key.one_label:
            logits, labels = logits[:, None], labels[:, :1]
        losses, real = losses_of(logits, labels)
        count = jnp.maximum(real.sum(), 1).astype(jnp.float32)
        hits = ((jnp.argmax(logits, -1) == labels) & real).sum()
        accuracy = hits.astype(jnp.float32) / count
        return losses.sum() / count, {"accuracy": accuracy, optim.MOVED: moved}

    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits, labels = (
            apply(params, batch.inputs, batch.labels != sequences.IGNORED),
            batch.labels,
        )
        if key.one_label:
            logits, labels = logits[:, None], labels[:, :1]
        found = jnp.argmax(logits, -1).astype(jnp.int32)
        return found, losses_of(logits, labels)[0]

    return Program(
        lambda seed: optim.split_model(build_model(key, seed))[1],
        loss,
        {"predict": predict, "apply": apply},
    )


def training_part(cell: LabelCell, data: SequenceData) -> Part:
    """The training sequences of a cell: not too long, and nested in n for each seed."""
    part = data.train
    if cell.train_length is not None:
        part = part.take(np.flatnonzero(part.lengths <= cell.train_length))
    if cell.n is None:
        return part
    if cell.n > len(part):
        raise ValueError(
            f"n={cell.n} is larger than the training part of {data.name}, which has "
            f"{len(part)} sequences (train_length={cell.train_length})."
        )
    return part.take(subset(len(part), cell.n, cell.seed))


def subset(count: int, n: int, seed: int) -> np.ndarray:
    """Which n of so many training sequences a seed has; nested in n.

    >>> subset(9, 3, 0).tolist() == subset(9, 5, 0)[:3].tolist()
    True
    """
    return np.random.Generator(np.random.PCG64([seed, 1])).permutation(count)[:n]


def scores(part: Part, predicted: list[np.ndarray]) -> dict[str, float]:
    """Accuracy over all labels of a part, and over each of its groups."""
    hits = np.concatenate([p == y for p, y in zip(predicted, part.labels, strict=True)])
    found = {"accuracy": float(hits.mean())}
    for name, masks in part.groups.items():
        mask = np.concatenate(list(masks))
        if mask.any():
            found[f"accuracy_{name}"] = float(hits[mask].mean())
    return found


class LabelTask(Task):
    """Labels the sequences of one task.

    Args:
      data: the sequences.
      keeps_params: whether the parameters of a final cell are kept, for attention
        maps; a function of a module.
    """

    uniform = False

    def __init__(
        self,
        data: SequenceData,
        keeps_params: Callable[[LabelCell], bool] | None = None,
    ):
        self.data = data
        self._keeps_params = keeps_params

    def keeps_params(self, cell: LabelCell) -> bool:
        return self._keeps_params is not None and self._keeps_params(cell)

    def key(self, cell: LabelCell) -> ProgramKey:
        """What the programs of a cell depend on."""
        return program_key(cell, self.data)

    def program_of(self, key: ProgramKey) -> Program:
        """What cells of a key compute."""
        return program_of(key)

    def program(self, cell: LabelCell) -> Program:
        return self.program_of(self.key(cell))

    def batches(self, cell: LabelCell) -> Batches:
        part = training_part(cell, self.data)
        return Batches(part, self.data.lengths, cell.tokens, cell.seed)

    def hyper(self, cell: LabelCell) -> optim.Hyper:
        return optim.hyper_of(cell, id_dropout=cell.id_dropout)

    def predict(
        self,
        cell: LabelCell,
        params: Any,
        part: Part,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[list[np.ndarray], float]:
        """Labels for every sequence of a part, or one each, and the mean loss.

        Sequences are padded to ``lengths``, by default those of the training batches.
        """
        lengths = self.data.lengths if lengths is None else lengths
        key = dataclasses.replace(self.key(cell), max_length=lengths[-1])
        predict = self.program_of(key).more["predict"]
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(part)
        total = 0.0
        for indices, batch in sequences.in_order(part, lengths, cell.tokens):
            rows, losses = devices.call(predict, params, batch)
            total += float(losses.sum())
            for row, index in enumerate(indices):
                found[index] = rows[row, : len(part.labels[index])]
        return found, total / max(1, sum(map(len, found)))

    def trace(self, cell: LabelCell, program: Program) -> None:
        """Traces training and prediction at each padded length."""
        params = jax.eval_shape(lambda: program.initial_params(0))
        first = self.data.train.inputs[0]
        for length in self.data.lengths:
            shape = sequences.rows_of(length, cell.tokens), length
            batch = Batch(
                jax.ShapeDtypeStruct((*shape, first.shape[1]), first.dtype),
                jax.ShapeDtypeStruct(shape, np.int32),
            )
            trace_step(program, self.hyper(cell), batch)
            jax.eval_shape(program.more["predict"], params, batch)

    def costs(self, cell: LabelCell) -> dict[str, Any]:
        """Parameters and FLOPs of the model, and what it learns from."""
        cost = model_cost(self.key(cell))
        part = training_part(cell, self.data)
        return dict(
            params=cost.params,
            input_params=cost.input_params,
            position_params=cost.position_params,
            flops=cost.flops,
            n=len(part),
            train_labels=int(part.lengths.sum()),
            data_sha256=self.data.sha256,
        )

    def score(self, cell: LabelCell, params: Any) -> dict[str, Any]:
        """Accuracy and loss, of training sequences and of those held out."""
        part = training_part(cell, self.data)
        count = min(TRAIN_EVAL, len(part))
        seen = part.take(np.linspace(0, len(part) - 1, count).astype(int))
        predicted, loss = self.predict(cell, params, seen)
        result: dict[str, Any] = {
            "train_accuracy": self._scores(seen, predicted)["accuracy"],
            "train_loss": loss,
        }
        tune = cell.phase == "tune"
        prefix, held_out = (
            ("val", self.data.validation) if tune else ("test", self.data.test)
        )
        if self._knows_less(cell):
            held_out = sequences.known_from(held_out, part)
        predicted, loss = self.predict(cell, params, held_out)
        found = self._scores(held_out, predicted)
        result |= {f"{prefix}_{name}": value for name, value in found.items()}
        result[f"{prefix}_loss"] = loss
        whole, lengths = self.data.whole_test, self.data.whole_lengths
        if (
            not tune
            and whole is not None
            and serves_length(self.key(cell), lengths[-1])
        ):
            predicted, _ = self.predict(cell, params, whole, lengths)
            found = scores(whole, predicted)
            result |= {f"test_whole_{name}": value for name, value in found.items()}
        return result

    def _scores(self, part: Part, predicted: list[np.ndarray]) -> dict[str, float]:
        """`scores`, of one label a sequence where it has one."""
        return scores(part.cut(1) if self.data.one_label else part, predicted)

    def _knows_less(self, cell: LabelCell) -> bool:
        """Whether the vocabulary has words that the cell's training part has not."""
        return self.data.has_unknown and cell.n is not None


def load_params(store: ResultsStore, cell: LabelCell, data: SequenceData) -> Any:
    """The final parameters of a cell, as its program takes them.

    Raises:
      FileNotFoundError, ValueError: as `loop.load_params`, or another task's cell.
    """
    if cell.task != data.name:
        raise ValueError(f"cell: its task is {cell.task!r}, but data is {data.name!r}.")
    like = program_of(program_key(cell, data)).initial_params(cell.seed)
    return loop.load_params(store, cell, like)


class ModelCost(NamedTuple):
    """Parameters, in all and of the input layer and positions; FLOPs of one label."""

    params: int
    input_params: int
    position_params: int
    flops: float


# The length that FLOPs are told for: near that of a sentence, and a crop of speech.
COST_LENGTH = {False: 32, True: 256}


@functools.lru_cache(maxsize=64)
def model_cost(key: ProgramKey) -> ModelCost:
    """What the model of a cell costs, see `attn_jax.tools.cost.labeller_cost`."""
    model = nnx.eval_shape(lambda: build_model(key, 0))
    length = min(COST_LENGTH[isinstance(key.inputs, int)], key.max_length)
    cost = labeller_cost(model, key.inputs, length)
    return ModelCost(*cost)
