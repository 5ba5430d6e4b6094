"""What cells of the experiment compute: labels, or the signs of several numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.core import optim
from experiments.core.loop import Batches, Program, Task
from experiments.data.sequences import IGNORED, Batch, SequenceData
from experiments.tasks.labelling import (
    LabelCell,
    LabelTask,
    ProgramKey,
    build_model,
    scores,
)

# Of logits [..., C] and labels: the loss of each; of logits: the label of each.
Losses = Callable[[jax.Array, jax.Array], jax.Array]
Read = Callable[[jax.Array], jax.Array]


def _program(key: ProgramKey, labels: int, losses: Losses, read: Read) -> Program:
    """What learns labels below a number, and nothing of others, such as "none"."""
    apply, _ = optim.split_model(build_model(key, 0))

    def of_known(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        wanted = jnp.asarray(batch.labels)
        known = (wanted >= 0) & (wanted < labels)
        each = losses(logits.astype(jnp.float32), jnp.where(known, wanted, 0))
        return jnp.where(known, each, 0.0), known

    def loss(
        params: Any, batch: Batch, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        real = jnp.asarray(batch.labels) != IGNORED
        inputs = jnp.asarray(batch.inputs)
        logits, moved = optim.training_call(apply, params, inputs, real, rng=rng)
        each, known = of_known(logits, batch)
        count = jnp.maximum(known.sum(), 1).astype(jnp.float32)
        hits = ((read(logits) == batch.labels) & known).sum().astype(jnp.float32)
        return each.sum() / count, {"accuracy": hits / count, optim.MOVED: moved}

    def predict(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, batch.inputs, batch.labels != IGNORED)
        return read(logits), of_known(logits, batch)[0]

    def initial_params(seed: int) -> Any:
        return optim.split_model(build_model(key, seed))[1]

    return Program(initial_params, loss, {"predict": predict})


@functools.lru_cache(maxsize=32)
def known_of(key: ProgramKey) -> Program:
    """Cross-entropy of the labels that a model has a class for."""
    return _program(
        key,
        key.num_classes,
        optax.softmax_cross_entropy_with_integer_labels,
        lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


@functools.lru_cache(maxsize=32)
def signs_of(key: ProgramKey) -> Program:
    """Labels are codes of as many bits as there are logits; mean loss of the bits."""
    places = np.arange(key.num_classes, dtype=np.int32)[None, None]

    def losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
        bits = (labels[..., None] >> places) & 1
        return optax.sigmoid_binary_cross_entropy(logits, bits).mean(axis=-1)

    def codes(logits: jax.Array) -> jax.Array:
        return jnp.where(logits > 0, 1 << places, 0).sum(axis=-1)

    return _program(key, 1 << key.num_classes, losses, codes)


class Known(LabelTask):
    """Labels but the last of their names, "none", which is neither learnt nor scored
    in the group "known".
    """

    def key(self, cell: LabelCell) -> ProgramKey:
        classes = len(self.data.class_names) - 1
        return dataclasses.replace(super().key(cell), num_classes=classes)

    def program_of(self, key: ProgramKey) -> Program:
        return known_of(key)


class Signs(LabelTask):
    """The same for labels that are codes of bits, each of which is learnt by itself."""

    def key(self, cell: LabelCell) -> ProgramKey:
        bits = (len(self.data.class_names) - 1).bit_length() - 1
        return dataclasses.replace(super().key(cell), num_classes=bits)

    def program_of(self, key: ProgramKey) -> Program:
        return signs_of(key)


class Several(Task):
    """Tasks that differ in their data; a cell names its own.

    Args:
      tasks: by the name of their data.
    """

    uniform = False

    def __init__(self, tasks: Mapping[str, LabelTask]):
        self.tasks = tasks

    def program(self, cell: LabelCell) -> Program:
        return self.tasks[cell.task].program(cell)

    def batches(self, cell: LabelCell) -> Batches:
        return self.tasks[cell.task].batches(cell)

    def hyper(self, cell: LabelCell) -> optim.Hyper:
        return self.tasks[cell.task].hyper(cell)

    def costs(self, cell: LabelCell) -> dict[str, Any]:
        return self.tasks[cell.task].costs(cell)

    def trace(self, cell: LabelCell, program: Program) -> None:
        self.tasks[cell.task].trace(cell, program)

    def score(self, cell: LabelCell, params: Any) -> dict[str, Any]:
        return self.tasks[cell.task].score(cell, params)


def one_label(data: SequenceData) -> dict[str, Any]:
    """The label that is the most frequent of the known ones in training, always."""
    train, test = data.train, data.test
    known = zip(train.labels, train.groups["known"], strict=True)
    best = np.bincount(np.concatenate([y[mask] for y, mask in known])).argmax()
    found = scores(test, [np.full_like(y, best) for y in test.labels])
    return {f"test_{name}": value for name, value in found.items()}
