"""Trains cells: what the runners of all experiments but data scaling have in common.

A cell is described by a frozen dataclass of the experiment's own. Its runner says how
one is started and how it is scored; the loop, with checkpoints, signals, records of a
loss that is not finite, and the parameters that are kept, is here. A cell that was
interrupted goes on from its newest checkpoint to the numbers that an uninterrupted run
would have had.
"""

from __future__ import annotations

import abc
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.core import train
from experiments.core.cell import Runtime
from experiments.core.checkpoint import CheckpointError, Checkpoints
from experiments.core.loop import (
    Interrupted,
    StopSignal,
    ends_the_run,
    lost,
    store_failure,
)
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore

PyTree = Any


class Cell(Protocol):
    """What the loop reads of a cell; an experiment's own has more fields."""

    @property
    def seed(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def clip_norm(self) -> float: ...
    @property
    def phase(self) -> str: ...
    @property
    def label(self) -> str: ...
    def config(self) -> dict[str, Any]: ...


def check_recipe(cell: Cell) -> None:
    """Raises ValueError for a value that no cell can have; for ``__post_init__``."""
    for name, ok, expected in (
        ("seed", cell.seed >= 0, "0 or more"),
        ("updates", cell.updates >= 1, "at least 1"),
        ("learning_rate", 0 < cell.learning_rate < math.inf, "above 0, finite"),
        ("weight_decay", 0 <= cell.weight_decay < math.inf, "0 or more, finite"),
        ("warmup", 0 <= cell.warmup < 1, "in [0, 1)"),
        ("clip_norm", cell.clip_norm > 0, "above 0"),
        ("phase", cell.phase in ("tune", "final"), "'tune' or 'final'"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {getattr(cell, name)!r}.")


def phase_label(cell: Cell) -> str:
    """The phase for a progress line; of a tuning cell, also what it tries."""
    tried = f" (learning rate {cell.learning_rate:g})" if cell.phase == "tune" else ""
    return cell.phase + tried


class Hyper(NamedTuple):
    """Numbers of a recipe that the compiled step takes as data, not as constants."""

    learning_rate: train.Array
    weight_decay: train.Array
    warmup: train.Array
    updates: train.Array
    clip_norm: train.Array


def hyper_of(cell: Cell) -> Hyper:
    """The recipe of a cell: warm-up in updates, the rest as it is there."""
    warmup = max(1.0, cell.warmup * cell.updates)
    numbers = (cell.learning_rate, cell.weight_decay, warmup)
    rest = (cell.updates, cell.clip_norm)
    return Hyper(*(np.asarray(value, np.float32) for value in numbers + rest))


# loss_fn(params, batch, rng, hyper) -> (loss, metrics)
LossFn = Callable[[PyTree, Any, jax.Array, Any], tuple[jax.Array, dict[str, jax.Array]]]
Step = Callable[
    [train.TrainState, Any, jax.Array], tuple[train.TrainState, dict[str, jax.Array]]
]


def make_step(loss_fn: LossFn) -> Step:
    """Returns the pure ``train_step(state, batch, rng) -> (state, metrics)``.

    Clipped AdamW with linear warm-up and a cosine to zero, as of
    `experiments.core.train.optimizer`, whose numbers are in ``state.hyper``.

    Args:
      loss_fn: ``loss_fn(params, batch, rng, hyper)`` gives the loss and scalars by
        name. ``rng`` is the run's key with the number of the update folded in. The
        state that `train.training_call` returned as moved goes into the metrics under
        `train.MOVED`: the step takes it over into the parameters.

    Returns:
      The step; its metrics are those of ``loss_fn`` and "loss".
    """

    def train_step(
        state: train.TrainState, batch: Any, rng: jax.Array
    ) -> tuple[train.TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(rng, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, rng, state.hyper
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax: float ** int
            updates, opt_state = train.optimizer(state.hyper).update(
                grads, state.opt_state, state.params
            )
        moved = metrics.pop(train.MOVED, {})
        params = train.move(optax.apply_updates(state.params, updates), moved)
        state = train.TrainState(state.step + 1, params, opt_state, state.hyper)
        return state, {"loss": loss, **metrics}

    return train_step


class Job(NamedTuple):
    """How a cell is trained.

    Attributes:
      params: its initial parameters, a pytree of arrays.
      step: a compiled step of `make_step` that takes over the memory of its state.
      batch: what update k reads, host arrays; a function of k alone.
      split: whether the leading axis of a batch is split over the devices; else each
        has all of it.
      hyper: the numbers of the recipe; None = `hyper_of` the cell.
    """

    params: PyTree
    step: Step
    batch: Callable[[int], Any]
    split: bool = True
    hyper: Any = None


class Runner(abc.ABC):
    """Trains and scores cells.

    Args:
      store: where the records go.
      runtime: how to run.
      progress: who is told.
      stop: asked between steps whether to save and end.
      save_params: whether the parameters of a final cell are kept; see `load_params`.
    """

    def __init__(
        self,
        store: ResultsStore,
        runtime: Runtime,
        progress: Progress,
        stop: StopSignal,
        save_params: Callable[[Any], bool] = lambda cell: False,
    ):
        self.store, self.runtime = store, runtime
        self.progress, self.stop, self.save_params = progress, stop, save_params
        self.mesh = train.data_mesh()

    @abc.abstractmethod
    def start(self, cell: Any) -> Job:
        """How a cell is trained."""

    @abc.abstractmethod
    def result(self, cell: Any, params: PyTree) -> dict[str, Any]:
        """Metrics of a trained cell: "val_…" in the phase "tune", else "test_…"."""

    def costs(self, cell: Any) -> dict[str, Any]:
        """What is known of a cell however its training ends: parameters, FLOPs …"""
        return {}

    def observe(self, cell: Any, params: PyTree) -> dict[str, Any]:
        """Numbers or lists that are stored at step 0 and at every point of a curve."""
        return {}

    def has(self, cell: Any) -> bool:
        """Whether a cell has a record."""
        return self.store.get(cell.config()) is not None

    def run(self, cell: Any) -> bool:
        """Runs a cell that has no record.

        Returns:
          True when its record is in the store, and be it that it failed; False when
          another process is at work on it.

        Raises:
          Interrupted: a signal came; what was done is saved.
          StoreError: the folder cannot be written.
        """
        with self.store.claim(cell.config()) as claimed:
            if not claimed:
                return False
            if not self.has(cell):
                began = time.monotonic()
                try:
                    self._run(cell)
                except Exception as error:
                    if ends_the_run(error):
                        raise
                    record = store_failure(self.store, cell.config(), error, began)
                    self.progress.finish(cell.label, record)
        return True

    def rehearse(self, cells: Sequence[Any]) -> None:  # noqa: B027
        """Traces what is a user's own in the training of cells, on their shapes.

        Raises:
          ValueError: it does not run; the message says where.
        """

    def _run(self, cell: Any) -> None:
        job = self.start(cell)
        hyper = hyper_of(cell) if job.hyper is None else job.hyper
        state = train.put(train.init_state(job.params, hyper), self.mesh)
        rng = train.put(jax.random.key(cell.seed), self.mesh)
        checkpoints = Checkpoints(self.store.checkpoint_dir(cell.config()))
        step, spent = 0, 0.0
        curves: dict[str, list[Any]] = {"step": []}
        waiting: list[Mapping[str, Any]] = []  # metrics since the last point
        restored = self._restored(checkpoints, state)
        if restored is not None:
            state, progress = restored
            step, spent, curves = (progress[k] for k in ("step", "spent", "curves"))
            waiting = progress.get("waiting", [])
            state = jax.tree.map(jnp.copy, state)  # donation needs memory of our own
        else:
            self._observe(cell, 0, state, curves)
        self.progress.begin(cell.label, cell.updates, step)
        began = saved = time.monotonic()
        times: list[tuple[int, float]] = []
        diverged = None

        def save(signum: int) -> None:
            kept = [{name: float(x) for name, x in m.items()} for m in waiting]
            passed = spent + time.monotonic() - began
            progress = dict(step=step, spent=passed, curves=curves, waiting=kept)
            self._save(checkpoints, state, progress, signum)

        while step < cell.updates:
            batch, train_step = job.batch(step), job.step
            if job.split:
                train_step = train.on_mesh(job.step, batch, self.mesh, donate=0)
                batch = train.place_batch(batch, self.mesh)
            else:
                batch = train.put(batch, self.mesh)
            state, metrics = train_step(state, batch, rng)
            waiting.append(metrics)
            step += 1
            if len(waiting) > 1:  # else a signal would wait for all that is queued
                jax.block_until_ready(waiting[-2])
            if step % self.runtime.log_every == 0 or step == cell.updates:
                means = {
                    name: float(np.mean([float(m[name]) for m in waiting]))
                    for name in waiting[0]
                }
                waiting = []
                times.append((step, time.monotonic()))
                curves["step"].append(step)
                for name, value in means.items():
                    curves.setdefault(name, []).append(value)
                self.progress.update(step, means["loss"])
                if not math.isfinite(means["loss"]):
                    diverged = step
                    break
                self._observe(cell, step, state, curves)
            if step < cell.updates:
                signum = self.stop.signum or 0
                due = time.monotonic() - saved >= self.runtime.checkpoint_seconds
                if signum or due:
                    save(signum)
                    saved = time.monotonic()
                if signum:
                    raise Interrupted(signum)
        result = self.costs(cell) | {"updates": step}
        found: dict[str, Any] | None = None
        if diverged is None and train.all_finite(state.params):
            try:
                with self.stop.at_once():
                    found = self.result(cell, state.params)
            except Interrupted as interrupted:
                save(interrupted.signum)
                raise
        numbers = [x for x in (found or {}).values() if isinstance(x, float)]
        if found is not None and all(map(math.isfinite, numbers)):
            result |= found
            if cell.phase == "final" and self.save_params(cell):
                _keep(params_file(self.store, cell), state.params)
        else:  # if no loss told, the last update did it
            diverged = step if diverged is None else diverged
            result["diverged_at"] = diverged
        if len(times) > 1:
            (first, start), (last, end) = times[0], times[-1]
            result["updates_per_s"] = (last - first) / max(end - start, 1e-9)
        record = self.store.put(
            cell.config(),
            status="done" if diverged is None else "diverged",
            metrics=result,
            curves=curves,
            wall_time_s=spent + time.monotonic() - began,
        )
        self.progress.finish(cell.label, record)
        checkpoints.clear()

    def _observe(
        self,
        cell: Any,
        step: int,
        state: train.TrainState,
        curves: dict[str, list[Any]],
    ) -> None:
        seen = self.observe(cell, state.params)
        if seen:
            curves.setdefault("observed_at", []).append(step)
        for name, value in seen.items():
            curves.setdefault(name, []).append(value)

    def _save(
        self,
        checkpoints: Checkpoints,
        state: train.TrainState,
        progress: dict[str, Any],
        signum: int,
    ) -> None:
        try:
            checkpoints.save(progress["step"], state, progress)
        except CheckpointError as error:
            if signum:
                raise lost(signum, error) from error
            self.progress.say(f"warning: {error}; the run goes on without it")

    def _restored(
        self, checkpoints: Checkpoints, state: train.TrainState
    ) -> tuple[train.TrainState, dict[str, Any]] | None:
        if not checkpoints.folder.is_dir():
            return None
        try:
            return checkpoints.restore(state)
        except CheckpointError as error:
            kept = checkpoints.set_aside()
            self.progress.say(
                f"warning: {error}; it is kept as {kept.name}, the cell starts anew"
            )
            return None


def params_file(store: ResultsStore, cell: Cell) -> pathlib.Path:
    """Where the final parameters of a cell are kept."""
    return store.folder / "params" / f"{store.path(cell.config()).stem}.npz"


def _keep(path: pathlib.Path, params: PyTree) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *[np.asarray(leaf) for leaf in jax.tree.leaves(params)])


def load_params(store: ResultsStore, cell: Cell, like: PyTree) -> PyTree:
    """The final parameters of a cell, where they were kept.

    Args:
      store: where the cell was run.
      cell: whose parameters.
      like: parameters of the same structure and shapes, such as the initial ones.

    Raises:
      FileNotFoundError: they were not kept, or the cell has not been run here.
      ValueError: they have other shapes.
    """
    path = params_file(store, cell)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the parameters of this cell were not kept; run it anew."
        )
    with np.load(path) as file:
        leaves = [file[name] for name in file.files]
    wanted = [leaf.shape for leaf in jax.tree.leaves(like)]
    if [leaf.shape for leaf in leaves] != wanted:
        raise ValueError(
            f"{path} holds parameters of other shapes than the cell's model has: "
            "another version made it; run the cell again in a new folder."
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
