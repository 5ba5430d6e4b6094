"""Whole molecules: one number each, from atoms as one-hot nodes and bonds as edges."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.nn.positional import num_parameters
from experiments.core import devices, optim
from experiments.core.loop import Program, Task
from experiments.data import molecules
from experiments.data.molecules import Molecules
from experiments.graphs.cells import MoleculeCell
from experiments.graphs.model import GraphRegressor

# Padded numbers of atoms; a batch holds molecules of one of them.
LENGTHS = (16, 32, 128)

# Rows of a batch are a multiple of this, whatever the number of devices.
_ROWS = 8

# Training molecules that the error on seen data is read from.
_SEEN = 1_000


class Batch(NamedTuple):
    """Molecules padded to one number of atoms T.

    Attributes:
      atoms: int8 [B, T, 8].
      pairs: int8 [B, T, T, 2].
      real: bool [B, T], True = an atom.
      target: float32 [B], standardised.
      weight: float32 [B], 0 for a row that fills the batch up.
    """

    atoms: Any
    pairs: Any
    real: Any
    target: Any
    weight: Any


class Parts:
    """Molecules, padded, with the parts of the split.

    Args:
      data: the molecules.
      split: number of the split; another one draws other parts.

    Raises:
      ValueError: if one has more atoms than the longest of `LENGTHS`.
    """

    def __init__(self, data: Molecules, split: int = 0):
        self.data, self.split = data, split
        self.train, self.validation, self.test = molecules.split_molecules(
            data, seed=split
        )
        self._others: dict[int, Parts] = {split: self}
        if data.lengths.max() > LENGTHS[-1]:
            raise ValueError(
                f"data: molecules may have at most {LENGTHS[-1]} atoms, got one of "
                f"{data.lengths.max()}."
            )
        self.bucket = np.searchsorted(LENGTHS, data.lengths)

    def at(self, split: int) -> Parts:
        """The same molecules with the parts of another split."""
        if split not in self._others:
            self._others[split] = Parts(self.data, split)
        return self._others[split]

    def part(self, phase: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices to train on and to score: the test part is for "final" alone."""
        if phase == "tune":
            return self.train, self.validation
        return np.sort(np.concatenate([self.train, self.validation])), self.test

    def scale(self, phase: str) -> tuple[float, float]:
        """Mean and deviation of the targets that are trained on."""
        targets = self.data.targets[self.part(phase)[0]]
        return float(targets.mean()), float(targets.std())

    def batch(self, indices: np.ndarray, rows: int, phase: str) -> Batch:
        """Molecules of one bucket, filled up to a number of rows."""
        length = LENGTHS[int(self.bucket[indices].max())]
        atoms = np.zeros((rows, length, len(molecules.ATOM_SIZES)), np.int8)
        pairs = np.zeros((rows, length, length, len(molecules.PAIR_SIZES)), np.int8)
        real = np.zeros((rows, length), bool)
        real[len(indices) :, 0] = True  # an empty molecule has no mean
        target, weight = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        mean, deviation = self.scale(phase)
        for row, index in enumerate(indices):
            graph = self.data.graphs[index]
            count = len(graph.atoms)
            atoms[row, :count] = graph.atoms
            pairs[row, :count, :count] = graph.pairs
            real[row, :count] = True
        target[: len(indices)] = (self.data.targets[indices] - mean) / deviation
        weight[: len(indices)] = 1.0
        return Batch(atoms, pairs, real, target, weight)

    def rows(self, bucket: int, batch_atoms: int) -> int:
        """Molecules of a batch of a bucket."""
        return max(_ROWS, batch_atoms // LENGTHS[bucket] // _ROWS * _ROWS)


class Epochs:
    """Batches in random order: every molecule once, then all of them again.

    Args:
      task: the molecules.
      indices: which of them.
      batch_atoms: atoms a batch, with padding.
      seed: another seed gives another order.
      phase: whose targets are standardised.
    """

    def __init__(
        self,
        task: Parts,
        indices: np.ndarray,
        batch_atoms: int,
        seed: int,
        phase: str,
    ):
        self.task, self.indices, self.seed = task, indices, seed
        self.batch_atoms, self.phase = batch_atoms, phase
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])
        self.size = len(self._order(0))

    def _order(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        mixed = rng.permutation(self.indices)
        found = []
        for bucket in range(len(LENGTHS)):
            members = mixed[self.task.bucket[mixed] == bucket]
            rows = self.task.rows(bucket, self.batch_atoms)
            found += [members[i : i + rows] for i in range(0, len(members), rows)]
        return [found[i] for i in rng.permutation(len(found))]

    def __getitem__(self, k: int) -> Batch:
        """The batch of update k."""
        epoch, place = divmod(k, self.size)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        indices = self._epoch[1][place]
        bucket = int(self.task.bucket[indices[0]])
        rows = self.task.rows(bucket, self.batch_atoms)
        return self.task.batch(indices, rows, self.phase)


_SHAPE = "sees pairs dim depth num_heads mlp_dim dropout_rate".split()
_COLUMNS: Mapping[str, tuple[int, ...]] = {
    "none": (),
    "bond": (0,),
    "path": (1,),
    "both": (0, 1),
}


@functools.lru_cache(maxsize=16)
def _program(shape: tuple[Any, ...]) -> Program:
    traits = dict(zip(_SHAPE, shape, strict=True))
    columns = list(_COLUMNS[traits.pop("pairs")])

    def build(seed: int) -> GraphRegressor:
        pair_sizes = [molecules.PAIR_SIZES[i] for i in columns]
        return GraphRegressor(
            molecules.ATOM_SIZES, pair_sizes=pair_sizes, rngs=nnx.Rngs(seed), **traits
        )

    apply, _ = optim.split_model(build(0))

    def outputs(params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
        atoms = jnp.asarray(batch.atoms).astype(jnp.int32)
        given = jnp.asarray(batch.pairs).astype(jnp.int32)
        bonded = given[..., 0] > 0 if traits["sees"] == "edges" else None
        pairs = given[..., jnp.asarray(columns)] if columns else None
        return apply(params, atoms, batch.real, bonded, pairs, rng=rng)

    def loss(
        params: Any, batch: Batch, rng: jax.Array, hyper: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        errors = outputs(params, batch, rng) - batch.target
        total = jnp.maximum(jnp.asarray(batch.weight).sum(), 1.0)
        return (errors**2 * batch.weight).sum() / total, {}

    def predict(params: Any, batch: Batch) -> jax.Array:
        return outputs(params, batch, None)

    return Program(
        lambda seed: optim.split_model(build(seed))[1],
        loss,
        {
            "predict": predict,
            "params": num_parameters(nnx.eval_shape(lambda: build(0))),
        },
    )


class MoleculeTask(Task):
    """Predicts a number of each molecule.

    Args:
      parts: the molecules and their parts.
    """

    uniform = False

    def __init__(self, parts: Parts):
        self.parts = parts

    def program(self, cell: MoleculeCell) -> Program:
        return _program(tuple(getattr(cell, name) for name in _SHAPE))

    def batches(self, cell: MoleculeCell) -> Epochs:
        if cell.data != self.parts.data.sha256:
            raise ValueError(
                f"data: the cell is of {cell.data}, but these molecules are "
                f"{self.parts.data.sha256}."
            )
        parts = self.parts.at(cell.split)
        chosen = parts.part(cell.phase)[0]
        return Epochs(parts, chosen, cell.batch_atoms, cell.seed, cell.phase)

    def costs(self, cell: MoleculeCell) -> dict[str, Any]:
        """Number of parameters, and what was trained on."""
        count = len(self.parts.at(cell.split).part(cell.phase)[0])
        return {"params": self.program(cell).more["params"], "n": count}

    def predict(
        self, cell: MoleculeCell, params: Any, indices: np.ndarray
    ) -> np.ndarray:
        """The numbers of some molecules, in their unit."""
        parts = self.parts.at(cell.split)
        mean, deviation = parts.scale(cell.phase)
        predict = self.program(cell).more["predict"]
        found = np.zeros(len(indices))
        for bucket in range(len(LENGTHS)):
            at = np.flatnonzero(parts.bucket[indices] == bucket)
            rows = parts.rows(bucket, cell.batch_atoms)
            for start in range(0, len(at), rows):
                some = at[start : start + rows]
                batch = parts.batch(indices[some], rows, cell.phase)
                numbers = devices.call(predict, params, batch)
                found[some] = numbers[: len(some)] * deviation + mean
        return found

    def score(self, cell: MoleculeCell, params: Any) -> dict[str, Any]:
        """Errors on the held-out part and on some that were seen."""
        seen, held_out = self.parts.at(cell.split).part(cell.phase)
        prefix = "val" if cell.phase == "tune" else "test"
        found = self.predict(cell, params, held_out)
        result = errors(found, self.parts.data.targets[held_out], prefix)
        some = seen[np.linspace(0, len(seen) - 1, min(_SEEN, len(seen))).astype(int)]
        again = self.predict(cell, params, some)
        result["train_rmse"] = errors(again, self.parts.data.targets[some], "train")[
            "train_rmse"
        ]
        return result


def errors(found: np.ndarray, right: np.ndarray, prefix: str) -> dict[str, Any]:
    """Root mean square error, mean absolute error and R².

    >>> errors(np.array([1.0, 2.0]), np.array([1.0, 4.0]), "test")["test_mae"]
    1.0
    """
    rmse = float(np.sqrt(np.mean((found - right) ** 2)))
    return {
        f"{prefix}_rmse": rmse,
        f"{prefix}_mae": float(np.mean(np.abs(found - right))),
        f"{prefix}_r2": 1.0 - rmse**2 / float(np.var(right)),
    }


# --- Baselines ---------------------------------------------------------------------

# Strengths of ridge regression that are tried on the validation part.
_ALPHAS = (3.0, 10.0, 30.0, 100.0, 300.0)


def baselines(
    task: Parts, trees: int, splits: int | None = None
) -> Mapping[str, Callable[[], dict[str, Any]]]:
    """What needs no network, by name.

    Args:
      task: the molecules.
      trees: of the random forests.
      splits: how many splits each is measured on, the first ones, by names such as
        "mean split=0"; by default on the task's alone, by its plain name.
    """
    if splits is not None:
        return {
            f"{name} split={split}": functools.partial(_named, measure, name, split)
            for split in range(splits)
            for name, measure in baselines(task.at(split), trees).items()
        }
    return {
        "mean": functools.partial(_mean, task),
        "ridge": functools.partial(_ridge, task),
        "forest": functools.partial(_forest, task, trees),
    }


def _named(
    measure: Callable[[], dict[str, Any]], name: str, split: int
) -> dict[str, Any]:
    """The errors on one of several splits, and which."""
    return measure() | {"baseline": name, "split": split}


def _mean(task: Parts) -> dict[str, Any]:
    """The mean of the training part for all."""
    targets = task.data.targets
    right = targets[task.test]
    return errors(np.full(len(right), task.scale("final")[0]), right, "test")


def _ridge(task: Parts) -> dict[str, Any]:
    """Ridge regression on Morgan counts."""
    from sklearn.linear_model import Ridge

    return _chosen(
        task, {f"alpha = {alpha:g}": Ridge(alpha=alpha) for alpha in _ALPHAS}
    )


def _forest(task: Parts, trees: int) -> dict[str, Any]:
    """A random forest on Morgan counts; a third of the columns at each split."""
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(trees, max_features=1 / 3, random_state=0, n_jobs=1)
    return _chosen(task, {f"{trees} trees": model})


def _chosen(task: Parts, models: Mapping[str, Any]) -> dict[str, Any]:
    """Errors of the model that is best on the validation part."""
    from threadpoolctl import threadpool_limits

    counts, targets = molecules.morgan_counts(task.data.smiles), task.data.targets
    found: dict[str, dict[str, Any]] = {}

    def fitted(name: str, phase: str) -> dict[str, Any]:
        seen, held_out = task.part(phase)
        model = models[name].fit(counts[seen], targets[seen])
        prefix = "val" if phase == "tune" else "test"
        return errors(model.predict(counts[held_out]), targets[held_out], prefix)

    with threadpool_limits(1):
        if len(models) > 1:
            found = {name: fitted(name, "tune") for name in models}
            best = min(found, key=lambda name: found[name]["val_rmse"])
        else:
            (best,) = models
        return found.get(best, {}) | fitted(best, "final") | {"chosen": best}
