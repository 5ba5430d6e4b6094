"""Trains and scores sequence labellers: cells, the pure train step, and the runner.

As in `experiments.core.loop`, a cell that was interrupted goes on from its newest
checkpoint to the numbers that an uninterrupted run would have had.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax.models import Labeller, labeller_cost
from attn_jax.variants import resolve
from experiments.core import train, trial
from experiments.core.cell import EditedError, attention_digest
from experiments.core.identity import Differs, config_of
from experiments.core.rehearsal import does_not_run
from experiments.core.store import ResultsStore
from experiments.data import sequences
from experiments.data.sequences import Batch, Batches, Part, SequenceData

# Training sequences that the accuracy on seen data is read from.
TRAIN_EVAL = 2000


@dataclasses.dataclass(frozen=True)
class LabelCell:
    """One (task, model, N, seed, hyper-parameters): all that can change its numbers.

    Attributes:
      task: name of the data.
      model: a key of `attn_jax.models.BODIES`; "window" with ``window=0`` is the
        fully connected network for each vector.
      n: number of training sequences; None = all.
      seed: draws the subset, the initial parameters and the order of the batches.
      phase: "tune" is scored on the validation part; "final" on the test part, once.
      updates: number of optimiser steps.
      tokens: labels a batch, with padding.
      dim, depth, mlp_dim: width, layers and hidden width.
      num_heads, attention, positions: of the "transformer", else None.
      attention_sha256: of the file, where ``attention`` names one.
      left, right: the window of ``attention="truncated"``, in vectors; else None.
      position_options: pairs (name, value) for the position encoding.
      window: neighbours on either side, of "window"; else None.
      kernel: width of a convolution, of "cnn"; else None.
      train_length: longest training sequence, others are left out; None = all.
      id_dropout: probability that a token's first id (its word) is hidden in training,
        where the task has an id for unknown words.
      dropout_rate: of the model.
      learning_rate, weight_decay, warmup, clip_norm: of AdamW and its schedule.
      dtype: dtype of the computation; parameters stay float32.
      differs: what of the data is not as committed records had it, see
        `experiments.core.identity`.
    """

    task: str
    model: str
    seed: int
    updates: int
    n: int | None = None
    phase: Literal["tune", "final"] = "final"
    tokens: int = 2048
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
    train_length: int | None = None
    id_dropout: float = 0.0
    dropout_rate: float = 0.1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    differs: Differs = ()

    def __post_init__(self) -> None:
        trial.check_recipe(self)
        for name, ok, expected in (
            ("n", self.n is None or self.n >= 1, "at least 1, or none for all"),
            ("tokens", self.tokens >= 1, "at least 1"),
            ("id_dropout", 0 <= self.id_dropout < 1, "in [0, 1)"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "in [0, 1)"),
        ):
            if not ok:
                raise ValueError(
                    f"{name} must be {expected}, got {getattr(self, name)!r}."
                )
        wanted = {
            "transformer": {"num_heads", "attention", "positions"},
            "window": {"window"},
            "cnn": {"kernel"},
        }.get(self.model, set())
        for name in ("num_heads", "attention", "positions", "window", "kernel"):
            given = getattr(self, name) is not None
            if given != (name in wanted):
                raise ValueError(
                    f"{name} must be {'given' if name in wanted else 'left out'} for "
                    f"model {self.model!r}, got {getattr(self, name)!r}."
                )
        for name in ("left", "right"):
            given = getattr(self, name) is not None
            if given != (self.attention == "truncated"):
                raise ValueError(
                    f"{name} is for attention='truncated' and needed there, got "
                    f"{getattr(self, name)!r} with attention={self.attention!r}."
                )

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary, which the results store hashes."""
        found = config_of(self)
        found["position_options"] = dict(self.position_options)
        return found

    @property
    def label(self) -> str:
        """A short name for progress lines."""
        parts = [self.task, self.model]
        for name in ("attention", "positions", "window", "left", "right", "num_heads"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name)}")
        if self.n is not None:
            parts.append(f"n={self.n}")
        return " ".join([*parts, f"seed={self.seed}", trial.phase_label(self)])


class Hyper(NamedTuple):
    """Numbers of a recipe that the compiled step takes as data."""

    learning_rate: train.Array
    weight_decay: train.Array
    warmup: train.Array
    updates: train.Array
    clip_norm: train.Array
    id_dropout: train.Array


# What shapes a program: cells that agree in it share the compiled one.
_SHAPE = (
    "model dim depth mlp_dim num_heads attention attention_sha256 left right positions "
    "position_options window kernel dropout_rate dtype"
).split()


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """What a compiled program depends on; cells that agree in it share one."""

    traits: tuple[Any, ...]
    inputs: int | tuple[int, ...]
    num_classes: int
    max_length: int
    hides: bool


def program_key(cell: LabelCell, data: SequenceData) -> ProgramKey:
    """The key of the programs that train and score a cell."""
    return ProgramKey(
        tuple(getattr(cell, name) for name in _SHAPE),
        data.inputs,
        len(data.class_names),
        data.max_length,
        cell.id_dropout > 0 and data.has_unknown,
    )


def build_model(key: ProgramKey, seed: int) -> Labeller:
    """The model of a cell with its initial parameters."""
    traits = dict(zip(_SHAPE, key.traits, strict=True))
    options: dict[str, Any] = dict(depth=traits["depth"])
    if traits["model"] in ("window", "cnn", "transformer"):
        options["mlp_dim"] = traits["mlp_dim"]
    if traits["model"] == "transformer":
        attention: Any = traits["attention"]
        if attention_digest(attention) != traits["attention_sha256"]:
            raise EditedError(
                f"attention: the file of {attention!r} was edited since the run began; "
                "run the same command again."
            )
        if attention == "truncated":
            attention = resolve(attention).bind(
                left=traits["left"], right=traits["right"]
            )
        options |= dict(
            attention=attention,
            num_heads=traits["num_heads"],
            positions=traits["positions"],
            position_options=dict(traits["position_options"]),
        )
    for name in ("window", "kernel"):
        if traits[name] is not None:
            options[name] = traits[name]
    return Labeller(
        key.inputs,
        key.num_classes,
        body=traits["model"],
        dim=traits["dim"],
        max_length=key.max_length,
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


def _losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy at each label, 0 at padding, and which labels are real."""
    real = labels != sequences.IGNORED
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.where(real, labels, 0)
    )
    return jnp.where(real, loss, 0.0), real


def make_train_step(apply: train.Apply, *, hides: bool) -> trial.Step:
    """Returns the pure ``train_step(state, batch, rng) -> (state, metrics)``."""

    def loss_fn(
        params: Any, batch: Batch, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        hide_rng, dropout_rng = jax.random.split(rng)
        inputs, labels = jnp.asarray(batch.inputs), jnp.asarray(batch.labels)
        if hides:  # id 1 of a table is the unknown word
            hidden = jax.random.bernoulli(hide_rng, hyper.id_dropout, labels.shape)
            first = jnp.where(hidden, jnp.ones((), inputs.dtype), inputs[..., 0])
            inputs = inputs.at[..., 0].set(first)
        real = labels != sequences.IGNORED
        logits, moved = train.training_call(
            apply, params, inputs, real, rng=dropout_rng
        )
        losses, real = _losses(logits, labels)
        count = jnp.maximum(real.sum(), 1).astype(jnp.float32)
        hits = ((jnp.argmax(logits, -1) == labels) & real).sum()
        accuracy = hits.astype(jnp.float32) / count
        return losses.sum() / count, {"accuracy": accuracy, train.MOVED: moved}

    return trial.make_step(loss_fn)


class Programs(NamedTuple):
    """Jitted functions of a model."""

    initial_params: Callable[[int], Any]
    step: Callable[..., tuple[train.TrainState, dict[str, jax.Array]]]
    predict: Callable[..., tuple[jax.Array, jax.Array]]
    apply: Callable[..., jax.Array]


@functools.lru_cache(maxsize=8)
def programs(key: ProgramKey) -> Programs:
    """Builds, once for each key, the functions that train and predict."""
    apply, _ = train.split_model(build_model(key, 0))

    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Labels [B, T] and losses [B, T]."""
        logits = apply(params, batch.inputs, batch.labels != sequences.IGNORED)
        return jnp.argmax(logits, -1).astype(jnp.int32), _losses(logits, batch.labels)[
            0
        ]

    return Programs(
        lambda seed: train.split_model(build_model(key, seed))[1],
        jax.jit(make_train_step(apply, hides=key.hides), donate_argnums=0),
        jax.jit(predict),
        apply,
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
    order = np.random.Generator(np.random.PCG64([cell.seed, 1])).permutation(len(part))
    return part.take(order[: cell.n])


def scores(part: Part, predicted: list[np.ndarray]) -> dict[str, float]:
    """Accuracy over all labels of a part, and over each of its groups."""
    hits = np.concatenate([p == y for p, y in zip(predicted, part.labels, strict=True)])
    found = {"accuracy": float(hits.mean())}
    for name, masks in part.groups.items():
        mask = np.concatenate(list(masks))
        if mask.any():
            found[f"accuracy_{name}"] = float(hits[mask].mean())
    return found


class LabelRunner(trial.Runner):
    """Trains cells of one task; parameters are kept for attention maps of them.

    Args:
      data: the task.
      store, runtime, progress, stop, save_params: as of `trial.Runner`.
    """

    def __init__(self, data: SequenceData, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.data = data

    def predict(
        self,
        cell: LabelCell,
        params: Any,
        part: Part,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[list[np.ndarray], float]:
        """Labels for every sequence of a part, and the mean loss.

        Sequences are padded to ``lengths``, by default those of the training batches.
        """
        lengths = self.data.lengths if lengths is None else lengths
        key = dataclasses.replace(program_key(cell, self.data), max_length=lengths[-1])
        program = programs(key)
        found: list[np.ndarray] = [np.zeros(0, np.int32)] * len(part)
        total = 0.0
        for indices, batch in sequences.in_order(part, lengths, cell.tokens):
            predict = train.on_mesh(program.predict, batch, self.mesh)
            labels, losses = predict(params, train.place_batch(batch, self.mesh))
            rows, total = np.asarray(labels), total + float(losses.sum())
            for row, index in enumerate(indices):
                found[index] = rows[row, : len(part.labels[index])]
        return found, total / max(1, int(part.lengths.sum()))

    def rehearse(self, cells: Sequence[LabelCell]) -> None:
        """Traces training and prediction with each attention, at each padded length.

        Raises:
          ValueError: one does not run; of a user's file, with file and line.
        """
        known = set()
        for cell in cells:
            if cell.attention is None:
                continue
            # What a built-in can do is tested; of a user's, each shape is tried.
            own = ".py:" in cell.attention
            traits = cell.attention, cell.attention_sha256, cell.left is None
            key = (program_key(cell, self.data), cell.tokens) if own else traits
            if key in known:
                continue
            known.add(key)
            try:
                self._trace(cell)
            except Exception as error:
                model = f"the {cell.model} with positions={cell.positions!r}"
                raise does_not_run(cell.attention, model, error) from error

    def _trace(self, cell: LabelCell) -> None:
        program = programs(program_key(cell, self.data))
        hyper = Hyper(*trial.hyper_of(cell), np.asarray(cell.id_dropout, np.float32))
        params = jax.eval_shape(lambda: program.initial_params(0))
        state = jax.eval_shape(lambda p: train.init_state(p, hyper), params)
        first = self.data.train.inputs[0]
        for length in self.data.lengths:
            shape = sequences.rows_of(length, cell.tokens), length
            batch = Batch(
                jax.ShapeDtypeStruct((*shape, first.shape[1]), first.dtype),
                jax.ShapeDtypeStruct(shape, np.int32),
            )
            jax.eval_shape(program.step, state, batch, jax.random.key(0))
            jax.eval_shape(program.predict, params, batch)

    def start(self, cell: LabelCell) -> trial.Job:
        """How a cell is trained."""
        part = training_part(cell, self.data)
        batches = Batches(part, self.data.lengths, cell.tokens, cell.seed)
        program = programs(program_key(cell, self.data))
        hyper = Hyper(*trial.hyper_of(cell), np.asarray(cell.id_dropout, np.float32))
        params = program.initial_params(cell.seed)
        return trial.Job(params, program.step, batches.__getitem__, hyper=hyper)

    def costs(self, cell: LabelCell) -> dict[str, Any]:
        """Parameters and FLOPs of the model, and what it learns from."""
        cost = model_cost(program_key(cell, self.data))
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

    def result(self, cell: LabelCell, params: Any) -> dict[str, Any]:
        """Accuracy and loss, of training sequences and of those held out."""
        part = training_part(cell, self.data)
        count = min(TRAIN_EVAL, len(part))
        seen = part.take(np.linspace(0, len(part) - 1, count).astype(int))
        predicted, loss = self.predict(cell, params, seen)
        result: dict[str, Any] = {
            "train_accuracy": scores(seen, predicted)["accuracy"],
            "train_loss": loss,
        }
        tune = cell.phase == "tune"
        prefix, held_out = (
            ("val", self.data.validation) if tune else ("test", self.data.test)
        )
        if self._knows_less(cell):
            held_out = sequences.known_from(held_out, part)
        predicted, loss = self.predict(cell, params, held_out)
        found = scores(held_out, predicted)
        result |= {f"{prefix}_{name}": value for name, value in found.items()}
        result[f"{prefix}_loss"] = loss
        whole, lengths = self.data.whole_test, self.data.whole_lengths
        if (
            not tune
            and whole is not None
            and serves_length(program_key(cell, self.data), lengths[-1])
        ):
            predicted, _ = self.predict(cell, params, whole, lengths)
            found = scores(whole, predicted)
            result |= {f"test_whole_{name}": value for name, value in found.items()}
        return result

    def _knows_less(self, cell: LabelCell) -> bool:
        """Whether the vocabulary has words that the cell's training part has not."""
        return self.data.has_unknown and cell.n is not None


def load_params(store: ResultsStore, cell: LabelCell, data: SequenceData) -> Any:
    """The final parameters of a cell, as its program takes them.

    Raises:
      FileNotFoundError, ValueError: as `trial.load_params`, or another task's cell.
    """
    if cell.task != data.name:
        raise ValueError(f"cell: its task is {cell.task!r}, but data is {data.name!r}.")
    like = programs(program_key(cell, data)).initial_params(cell.seed)
    return trial.load_params(store, cell, like)


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
    """What the model of a cell costs, see `attn_jax.models.labeller_cost`."""
    model = nnx.eval_shape(lambda: build_model(key, 0))
    length = min(COST_LENGTH[isinstance(key.inputs, int)], key.max_length)
    cost = labeller_cost(model, key.inputs, length)
    return ModelCost(*cost)
