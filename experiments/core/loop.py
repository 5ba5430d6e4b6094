"""The one training loop: a group of cells, trained, scored and stored.

A `Task` says what its cells compute, on which batches, and how they are scored. The
loop does the rest: a mesh of all devices, several seeds at once, several steps a
dispatch, signals, checkpoints, curves, TensorBoard, records. A cell that was
interrupted continues from its newest checkpoint to the result that an uninterrupted run
would have had, bit for bit. A loss that is not finite ends the cell with a record that
says where; what fails in a cell becomes a record too.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
import functools
import math
import pathlib
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.core import devices, optim
from experiments.core.cell import Cell, EditedError, Runtime
from experiments.core.checkpoint import CheckpointError, Checkpoints
from experiments.core.devices import agree, agree_any
from experiments.core.observe import Progress
from experiments.core.rehearsal import does_not_run
from experiments.core.signals import Interrupted, Stop
from experiments.core.store import ResultsStore, SchemaError, StoreError

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What cells of one shape compute; make each once (``functools.lru_cache``).

    Attributes:
      initial_params: seed -> parameters, a pytree of arrays.
      loss: ``loss(params, batch, rng, hyper) -> (loss, metrics)``, see
        `experiments.core.optim.make_step`.
      more: functions that the task scores by, by name.
    """

    initial_params: Callable[[int], PyTree]
    loss: optim.LossFn
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Batches(Protocol):
    """The batch of every update, a pytree of arrays; a function of its number alone."""

    def __getitem__(self, step: int, /) -> PyTree: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed:
    """Batches whose rows are taken from arrays that the devices may keep.

    Attributes:
      data: pytree of arrays with a common leading axis.
      where: step -> int [B], the rows of its batch.
    """

    data: PyTree
    where: Callable[[int], np.ndarray]

    def __getitem__(self, step: int) -> PyTree:
        rows = self.where(step)
        return jax.tree.map(lambda x: x[rows], self.data)


class Task(abc.ABC):
    """What an experiment says of its cells; picklable, so that workers get a copy.

    Attributes:
      splits: whether the leading axis of a batch is split over the devices; else each
        has all of it.
      uniform: whether the batches of all seeds have the same shapes, so that seeds can
        be trained at once.
      scans: whether several steps may be one dispatch; not where a batch is large and
        already there, such as a whole graph.
      unit: what ``cell.batch_size`` counts, for the rate in a record; None has none.
    """

    splits = True
    uniform = True
    scans = True
    unit: str | None = None

    @abc.abstractmethod
    def program(self, cell: Any) -> Program:
        """What is computed; the same object for cells that can share it."""

    @abc.abstractmethod
    def batches(self, cell: Any) -> Batches:
        """What it is trained on."""

    @abc.abstractmethod
    def score(self, cell: Any, params: PyTree) -> dict[str, Any]:
        """Metrics of a trained cell: "val_…" in the phase "tune", else "test_…"."""

    def initial_params(self, cell: Any) -> PyTree:
        """The parameters that training begins with."""
        return self.program(cell).initial_params(cell.seed)

    def first_params(self, cell: Any, store: ResultsStore) -> PyTree:
        """The same, of what a cell before it has left in the store; see `Study.after`.

        By default none has, and they are `initial_params`.
        """
        return self.initial_params(cell)

    def hyper(self, cell: Any) -> optim.Hyper:
        """The numbers that a step reads as data."""
        return optim.hyper_of(cell)

    def costs(self, cell: Any) -> dict[str, Any]:
        """What is known of a cell however its training ends: parameters, FLOPs …"""
        return {}

    def observe(self, cell: Any, params: PyTree) -> dict[str, Any]:
        """Numbers or lists that are stored at step 0 and at every point of a curve."""
        return {}

    def keeps_params(self, cell: Any) -> bool:
        """Whether the final parameters are kept; see `load_params`."""
        return False

    def rehearse(self, cells: Sequence[Any]) -> None:
        """Traces the models of cells on the shapes of their run, each shape once.

        Raises:
          ValueError: one cannot serve, or an attention of a user's fails in it; the
            message says where.
        """
        seen: set[Any] = set()
        for cell in cells:
            attention = getattr(cell, "attention", None)
            if attention is None:
                program = self.program(cell)
                if id(program) not in seen:
                    jax.eval_shape(lambda p=program: p.initial_params(0))
                seen.add(id(program))
                continue
            try:
                program = self.program(cell)
                # What a built-in can do is tested; of a user's, each shape is tried.
                key = id(program) if ".py:" in attention else attention
                if key not in seen:
                    self.trace(cell, program)
                seen.add(key)
            except Exception as error:
                inside = "model" if cell.model == attention else cell.model
                raise does_not_run(attention, f"the {inside}", error) from error

    def trace(self, cell: Any, program: Program) -> None:
        """Traces a step on the first batch; a task whose shapes vary does on each."""
        trace_step(program, self.hyper(cell), self.batches(cell)[0])


def trace_step(program: Program, hyper: optim.Hyper, batch: PyTree) -> None:
    """Traces a train step, computing nothing."""
    params = jax.eval_shape(lambda: program.initial_params(0))
    state = jax.eval_shape(lambda p: optim.init_state(p, hyper), params)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    jax.eval_shape(optim.make_step(program.loss), state, batch, jax.random.key(0))


def ends_the_run(error: Exception) -> bool:
    """Whether an error is not the matter of one cell: the next would have it too."""
    from experiments.data.fetch import DataError

    if isinstance(error, OSError):
        full = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE
        return isinstance(error, StoreError) or error.errno in full
    return isinstance(error, Interrupted | SchemaError | DataError | EditedError)


def store_failure(
    store: ResultsStore, config: Mapping[str, Any], error: Exception, began: float
) -> dict[str, Any]:
    """Stores that a cell failed, and how; the next run tries it again."""
    return store.put(
        config,
        status="failed",
        metrics=dict(
            error=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        ),
        wall_time_s=time.monotonic() - began,
    )


def _lost(signum: int, error: CheckpointError) -> StoreError:
    return StoreError(
        f"stopped by {signal.Signals(signum).name}, and what this cell has done is "
        f"lost: {error}. Free some space and run the same command again."
    )


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(tree)]


def _stack(trees: Sequence[PyTree]) -> PyTree:
    stack = jnp.stack if isinstance(jax.tree.leaves(trees)[0], jax.Array) else np.stack
    return jax.tree.map(lambda *leaves: stack(leaves), *trees)


@functools.lru_cache(maxsize=32)
def _compiled(
    program: Program,
    mesh: Mesh,
    *,
    splits: bool,
    seeds: bool,
    indexed: bool,
    many: bool,
) -> Callable[..., tuple[optim.TrainState, dict[str, jax.Array]]]:
    """``steps(state, source, where, rng)``, jitted, takes over the memory of its state.

    With ``indexed``, ``source`` is all data and ``where`` says which rows make the
    batch; else ``source`` is the batch. With ``many`` the batch has a leading axis of
    steps, with ``seeds`` all but indexed data have one before it.
    """
    step = optim.make_step(program.loss)

    def one(state: Any, source: PyTree, where: Any, rng: Any) -> Any:
        batch = source
        if indexed:
            batch = jax.tree.map(lambda x: jnp.take(x, where, axis=0), source)
        if splits and not seeds:  # of several seeds, each device has all rows
            batch = devices.evenly(batch, mesh)
        return step(state, batch, rng)

    def steps(state: Any, source: PyTree, where: Any, rng: Any) -> Any:
        if not many:  # XLA:CPU runs the body of a loop on one core
            return one(state, source, where, rng)
        if indexed:
            return jax.lax.scan(lambda s, at: one(s, source, at, rng), state, where)
        return jax.lax.scan(lambda s, b: one(s, b, None, rng), state, source)

    if seeds:
        axes = (0, None if indexed else 0, 0 if indexed else None, 0)
        steps = jax.vmap(steps, in_axes=axes)
    return jax.jit(steps, donate_argnums=0)


class Trainer:
    """Trains cells of one task, one group of seeds at a time.

    Args:
      task: what its cells are.
      store: where the records go.
      runtime: how to run.
      progress: who is told.
      stop: asked between steps whether to save and end.
    """

    def __init__(
        self,
        task: Task,
        store: ResultsStore,
        runtime: Runtime,
        progress: Progress,
        stop: Stop,
    ):
        self.task, self.store, self.runtime = task, store, runtime
        self.progress, self.stop = progress, stop
        self.mesh = devices.data_mesh()
        on_cpu = jax.default_backend() == "cpu"
        self.steps_per_dispatch = runtime.steps_per_dispatch or (1 if on_cpu else 16)
        self._placed: tuple[Any, PyTree] = (None, None)

    def has(self, cell: Cell) -> bool:
        """Whether a cell has a record; process 0 answers for a whole cluster."""
        return bool(agree(int(self.store.get(cell.config()) is not None)))

    def run(self, cells: Sequence[Cell]) -> bool:
        """Runs cells that differ in their seed alone; several are trained at once.

        Returns:
          True when their records are in the store, and be it that they failed; False
          when another process is at work on one of them.

        Raises:
          Interrupted: a signal came; what was done is saved.
          StoreError: the folder cannot be written.
        """
        with contextlib.ExitStack() as claims:
            claimed = 1
            for cell in cells if jax.process_index() == 0 else ():
                claim = self.store.claim(cell.config())
                claimed = claimed and int(claims.enter_context(claim))
            if not agree(claimed):
                return False
            missing = [cell for cell in cells if not self.has(cell)]
            if missing:
                self._try(missing)
        return True

    def _try(self, cells: list[Cell]) -> None:
        began = time.monotonic()
        try:
            _Run(self, cells).run()
        except Exception as error:
            if ends_the_run(error) or jax.process_count() > 1:
                raise  # of a cluster, others would wait for this process for ever
            for cell in cells:
                if not self.has(cell):
                    record = store_failure(self.store, cell.config(), error, began)
                    self.progress.finish(cell.label, record)

    def source(self, data: PyTree) -> PyTree:
        """Data on the devices, once for all cells that take batches from it."""
        if self._placed[0] is not data:
            self._placed = data, devices.put(data, self.mesh)
        return self._placed[1]


class _Run:
    """One group of cells on its way to their records."""

    def __init__(self, trainer: Trainer, cells: list[Cell]):
        self.cells, self.first, self.trainer = cells, cells[0], trainer
        self.task, self.runtime, self.mesh = trainer.task, trainer.runtime, trainer.mesh
        self.store, self.progress, self.stop = (
            trainer.store,
            trainer.progress,
            trainer.stop,
        )
        self.vmapped = len(cells) > 1
        if self.task.splits and hasattr(self.first, "batch_size"):
            devices.check_batch_size(self.first.batch_size, self.mesh)
        self.program = self.task.program(self.first)
        self.batches = [self.task.batches(cell) for cell in cells]
        states = [
            optim.init_state(
                self.task.first_params(cell, self.store), self.task.hyper(cell)
            )
            for cell in cells
        ]
        rngs = [jax.random.key(cell.seed) for cell in cells]
        state = _stack(states) if self.vmapped else states[0]
        self.rng = jnp.stack(rngs) if self.vmapped else rngs[0]
        self.state = devices.put(state, self.mesh)
        if jax.process_count() == 1:
            self.rng = devices.put(self.rng, self.mesh)
        configs = [cell.config() for cell in cells]
        whole = configs[0] if len(configs) == 1 else {"cells": configs}
        self.checkpoints = Checkpoints(self.store.checkpoint_dir(whole))
        self.step, self.spent = 0, 0.0
        # Curves and what was observed, of every cell; metrics since the last point.
        self.curves: dict[str, list[Any]] = {"step": []}
        self.seen: list[dict[str, list[Any]]] = [{} for _ in cells]
        self.window: list[Mapping[str, Any]] = []

    # ------------------------------------------------------------ checkpoints

    def _restore(self) -> bool:
        """Takes over the newest checkpoint; a damaged one is set aside, and said."""
        if not agree(int(self.checkpoints.folder.is_dir())):
            return False
        restored, failed = None, ""
        try:
            restored = self.checkpoints.restore(self.state)
        except CheckpointError as error:
            failed = str(error)
        if agree_any(int(bool(failed))):
            if jax.process_index() == 0:
                kept = self.checkpoints.set_aside()
                reason = failed or f"another process cannot read {kept}"
                self.progress.say(
                    f"warning: {reason}; it is kept as {kept.name}, the cell starts "
                    "anew"
                )
            agree(0)  # none goes on before the folder is out of the way
            return False
        if restored is None:
            return False
        state, kept_progress = restored
        # Orbax's arrays may share memory with its own buffers; donation needs ours.
        self.state = jax.tree.map(jnp.copy, state)
        for name in ("step", "spent", "curves", "seen"):
            setattr(self, name, kept_progress[name])
        if kept_progress["window"]:
            items = kept_progress["window"].items()
            self.window = [{k: np.asarray(v, np.float32) for k, v in items}]
        return True

    def _save(self, signum: int = 0) -> None:
        names = self.window[0] if self.window else ()
        progress = dict(
            step=self.step,
            spent=self.spent + time.monotonic() - self.began,
            curves=self.curves,
            seen=self.seen,
            window={name: self._gathered(name).tolist() for name in names},
        )
        try:
            self.checkpoints.save(self.step, self.state, progress)
        except CheckpointError as error:
            if signum:
                raise _lost(signum, error) from error
            self.progress.say(f"warning: {error}; the run goes on without it")

    # --------------------------------------------------------------- training

    def _gathered(self, name: str) -> np.ndarray:
        """The metric of every step since the last point, [cells, steps]."""
        count = len(self.cells)
        parts = [np.asarray(m[name]).reshape(count, -1) for m in self.window]
        return np.concatenate(parts, axis=1)

    def _params(self, row: int, *, final: bool = False) -> PyTree:
        """The parameters of one cell, or what its training came to."""
        params = optim.final_params(self.state) if final else self.state.params
        return jax.tree.map(lambda x: x[row], params) if self.vmapped else params

    def _observe(self) -> None:
        for row, (cell, seen) in enumerate(zip(self.cells, self.seen, strict=True)):
            found = self.task.observe(cell, self._params(row))
            if found:
                seen.setdefault("observed_at", []).append(self.step)
            for name, value in found.items():
                seen.setdefault(name, []).append(value)

    def _dispatch(self, most: int) -> int:
        """Does up to ``most`` steps whose batches have one shape; returns how many."""
        first: Any = self.batches[0]
        indexed = self.runtime.device_data and all(
            isinstance(b, Indexed) and b.data is first.data for b in self.batches
        )
        get = (
            (lambda b, k: b.where(k).astype(np.int32))
            if indexed
            else (lambda b, k: b[k])
        )
        steps: list[PyTree] = []
        for k in range(self.step, self.step + most):
            items = [get(batches, k) for batches in self.batches]
            if steps and _shapes(items[0]) != _shapes(steps[0][0]):
                break
            steps.append(items)
        many, splits = len(steps) > 1, self.task.splits
        rows = [
            _stack([s[i] for s in steps]) if many else steps[0][i]
            for i in range(len(self.cells))
        ]
        batch = _stack(rows) if self.vmapped else rows[0]
        # A batch made on the devices is there.
        if splits:
            batch = devices.place(batch, self.mesh, int(self.vmapped) + int(many))
        else:
            batch = devices.put(batch, self.mesh)
        source, where = (batch, None)
        if indexed:
            source, where = self.trainer.source(first.data), batch
        step = _compiled(
            self.program,
            self.mesh,
            splits=splits,
            seeds=self.vmapped,
            indexed=indexed,
            many=many,
        )
        self.state, metrics = step(self.state, source, where, self.rng)
        self.window.append(metrics)
        if len(self.window) > 1:  # else a signal would wait for all that is queued
            jax.block_until_ready(self.window[-2])
        return len(steps)

    def _point(self, writers: Sequence[Any]) -> bool:
        """A point of every curve; False where no cell's loss is finite any more."""
        means = {
            name: self._gathered(name).astype(np.float64).mean(1)
            for name in self.window[0]
        }
        self.window = []
        self.curves["step"].append(self.step)
        for name, values in means.items():
            self.curves.setdefault(name, []).append([float(x) for x in values])
            for writer, value in zip(writers, values, strict=False):
                writer.add_scalar(f"train/{name}", float(value), self.step)
        self.progress.update(self.step, float(means["loss"][0]))
        if not np.isfinite(means["loss"]).any():
            return False
        self._observe()
        return True

    def run(self) -> None:
        """Trains, scores and stores."""
        resumed = self._restore()
        label = self.first.label
        label += f" (x{len(self.cells)} seeds)" if self.vmapped else ""
        updates, every = self.first.updates, self.runtime.log_every
        self.progress.begin(label, updates, self.step)
        self.began = saved = time.monotonic()
        timed: tuple[int, float] | None = None
        with contextlib.ExitStack() as closing:
            writers = self._tensorboard(closing)
            if not resumed:
                self._observe()
            while self.step < updates:
                to_point = every - self.step % every
                most = self.trainer.steps_per_dispatch if self.task.scans else 1
                most = min(most, to_point, updates - self.step)
                self.step += self._dispatch(most)
                if self.step % every == 0 or self.step == updates:
                    timed = timed or (self.step, time.monotonic())
                    if not self._point(writers):
                        break
                elif jax.process_count() > 1:
                    continue  # processes agree at points alone
                if self.step < updates:
                    signum = agree_any(self.stop.signum or 0)
                    due = time.monotonic() - saved >= self.runtime.checkpoint_seconds
                    if signum or agree(int(due)):
                        self._save(signum)
                        saved = time.monotonic()
                    if signum:
                        raise Interrupted(signum)
            jax.block_until_ready(self.state)
            rate = None
            if timed is not None and self.step > timed[0]:
                passed = max(time.monotonic() - timed[1], 1e-9)
                rate = (self.step - timed[0]) * len(self.cells) / passed
            alone = jax.process_count() == 1  # a cluster's processes stop together
            try:
                with self.stop.at_once() if alone else contextlib.nullcontext():
                    scores = [self._score(row) for row in range(len(self.cells))]
            except Interrupted as interrupted:
                self._save(interrupted.signum)
                raise
            for row, found in enumerate(scores):
                self._store(row, found, rate, writers)
        if jax.process_index() == 0:
            self.checkpoints.clear()
        agree(0)  # the records are there before any process looks for them

    def _broken(self, row: int) -> int | None:
        """The point at which the loss of a cell was not finite."""
        losses = zip(self.curves["step"], self.curves["loss"], strict=True)
        return next((at for at, x in losses if not math.isfinite(x[row])), None)

    def _score(self, row: int) -> dict[str, Any]:
        """Metrics of a cell; none where it diverged."""
        params = self._params(row, final=True)
        if self._broken(row) is not None or not devices.all_finite(params):
            return {}
        found = self.task.score(self.cells[row], params)
        numbers = [x for x in found.values() if isinstance(x, float)]
        return found if all(map(math.isfinite, numbers)) else {}

    def _store(
        self,
        row: int,
        found: dict[str, Any],
        rate: float | None,
        writers: Sequence[Any],
    ) -> None:
        cell = self.cells[row]
        result = self.task.costs(cell) | {"updates": self.step}
        if rate is not None:
            result["updates_per_s"] = rate
            if self.task.unit:
                result[f"{self.task.unit}_per_s"] = rate * cell.batch_size  # type: ignore[attr-defined]
        result |= found
        if not found:  # if no loss told, the last update did it
            broken = self._broken(row)
            result["diverged_at"] = self.step if broken is None else broken
        for writer in writers[row : row + 1]:
            for name, value in found.items():
                if isinstance(value, float):
                    writer.add_scalar(name, value, self.step)
        if jax.process_index() != 0:
            return
        if found and cell.phase == "final" and self.task.keeps_params(cell):
            _keep(params_file(self.store, cell), self._params(row, final=True))
        curves = {
            name: values if name == "step" else [value[row] for value in values]
            for name, values in self.curves.items()
        }
        record = self.store.put(
            cell.config(),
            status="done" if found else "diverged",
            metrics=result,
            curves=curves | self.seen[row],
            wall_time_s=(self.spent + time.monotonic() - self.began) / len(self.cells),
        )
        self.progress.finish(cell.label, record)

    def _tensorboard(self, closing: contextlib.ExitStack) -> list[Any]:
        if not self.runtime.tensorboard or jax.process_index() != 0:
            return []
        from tensorboardX import SummaryWriter

        root = self.store.folder / "tensorboard"
        writers = [
            SummaryWriter(str(root / self.store.path(cell.config()).stem))
            for cell in self.cells
        ]
        for writer in writers:
            closing.callback(writer.close)
        return writers


# ------------------------------------------------------------------ parameters


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
    if [leaf.shape for leaf in leaves] != _shapes(like):
        raise ValueError(
            f"{path} holds parameters of other shapes than the cell's model has: "
            "another version made it; run the cell again in a new folder."
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# ------------------------------------------------------------------ order of rows


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def batch_positions(n: int, *, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Positions 0..n-1 of the examples of one step, a pure function of its arguments.

    Epochs are permutations laid end to end, so every example occurs equally often
    (± 1) and a batch may cross from one epoch into the next.

    >>> batch_positions(4, seed=0, step=0, batch_size=4).tolist() == sorted(range(4))
    False
    >>> sorted(batch_positions(4, seed=0, step=5, batch_size=4).tolist())
    [0, 1, 2, 3]
    """
    start, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        low = max(start - epoch * n, 0)
        high = min(stop - epoch * n, n)
        parts.append(_permutation(seed, epoch, n)[low:high])
    return np.concatenate(parts)


def in_epochs(cell: Any, n: int) -> Callable[[int], np.ndarray]:
    """`batch_positions` of a cell with a ``batch_size``, as `Indexed` takes it."""
    return lambda step: batch_positions(
        n, seed=cell.seed, step=step, batch_size=cell.batch_size
    )
