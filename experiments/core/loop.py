"""Runs cells: builds the model, trains it, scores it, stores the record.

A cell that was interrupted continues from its newest checkpoint to the result that
an uninterrupted run would have had, bit for bit. A loss that is not finite ends the
cell with a record that says where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attn_jax import models
from attn_jax.variants import Variant, resolve
from experiments.core import train
from experiments.core.cell import Cell, EditedError, Runtime, attention_digest
from experiments.core.checkpoint import CheckpointError, Checkpoints
from experiments.core.observe import Progress
from experiments.core.rehearsal import does_not_run
from experiments.core.store import Record, ResultsStore, SchemaError, StoreError
from experiments.data.fetch import DataError
from experiments.data.images import Dataset, normalize_stats
from experiments.data.splits import balanced_subset, train_validation_split

Result = TypeVar("Result")

EVAL_BATCH = 1000
TRAIN_EVAL = 5000


class Interrupted(Exception):
    """SIGTERM or Ctrl-C came; the run in progress is saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag while the context lasts.

    A signal that follows within `GRACE` seconds is the same request once more: who
    signals a whole process group reaches a worker twice, directly and by its parent.
    A later one acts as usual, so that a hung run can be ended.

    Args:
      parent: process whose end counts as SIGTERM, so that a worker does not outlive
        a run that was killed; None watches nobody.
    """

    GRACE = 2.0

    def __init__(self, parent: int | None = None) -> None:
        self._signum: int | None = None
        self._since = 0.0
        self._parent = parent
        self._before: dict[int, Any] = {}
        self._raises = False

    @property
    def signum(self) -> int | None:
        """The signal that came last, or None."""
        if self._signum is None and self._parent is not None:
            if os.getppid() != self._parent:
                self._signum = signal.SIGTERM
        return self._signum

    def _handle(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._since = signum, now
            if self._raises:
                raise Interrupted(signum)
        elif now - self._since > self.GRACE:
            self._restore(signum)
            signal.raise_signal(signum)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal does not wait to be asked for here.

        Raises:
          Interrupted: it came.
        """
        signum = self.signum
        if signum is not None:
            raise Interrupted(signum)
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _restore(self, signum: int) -> None:
        handler = self._before[signum]  # None: it was not set from Python
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> StopSignal:
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._before[signum] = signal.getsignal(signum)
            signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for signum in self._before:
            self._restore(signum)


def interruptible(function: Callable[[], Result], stop: StopSignal) -> Result:
    """Calls a function of minutes that a signal may end, also one that runs in C.

    It runs in a thread. What is left of it after a signal is given up with the process.

    Raises:
      Interrupted: a signal came.
    """
    found: list[Result] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if stop.signum is not None and thread.is_alive():
            raise Interrupted(stop.signum)
    if failed:
        raise failed[0]
    return found[0]


def ends_the_run(error: Exception) -> bool:
    """Whether an error is not the matter of one cell: the next would have it too."""
    if isinstance(error, OSError):
        full = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EPIPE
        return isinstance(error, StoreError) or error.errno in full
    return isinstance(error, Interrupted | SchemaError | DataError | EditedError)


def store_failure(
    store: ResultsStore,
    config: Mapping[str, Any],
    error: Exception,
    began: float,
) -> Record:
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


def at_once(stop: StopSignal) -> contextlib.AbstractContextManager[None]:
    """`StopSignal.at_once`; not on a cluster, whose processes stop together."""
    return stop.at_once() if jax.process_count() == 1 else contextlib.nullcontext()


def lost(signum: int, error: CheckpointError) -> StoreError:
    """What to say where a run has to end and cannot be saved."""
    return StoreError(
        f"stopped by {signal.Signals(signum).name}, and what this cell has done is "
        f"lost: {error}. Free some space and run the same command again."
    )


def agree(value: int) -> int:
    """Process 0's value, on every process of a cluster."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree_any(value: int) -> int:
    """The largest value of all processes, on every process of a cluster."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


@dataclasses.dataclass(frozen=True)
class _ProgramKey:
    """What a compiled program depends on; cells that agree in it share one."""

    model: str
    size: str
    attention: str | None
    attention_sha256: str | None
    patch: int | None
    dropout_rate: float
    dtype: str
    augment: train.Augment
    image_shape: tuple[int, int, int]
    num_classes: int
    vmapped: bool
    device_data: bool
    mesh: Mesh

    @classmethod
    def of(
        cls, cell: Cell, dataset: Dataset, mesh: Mesh, vmapped: bool, device_data: bool
    ) -> _ProgramKey:
        return cls(
            model=cell.model,
            size=cell.size,
            attention=cell.attention,
            attention_sha256=cell.attention_sha256,
            patch=cell.patch,
            dropout_rate=cell.dropout_rate,
            dtype=cell.dtype,
            augment=train.Augment(
                flip=cell.flip,
                crop=cell.crop,
                mixup=cell.mixup > 0,
                dropout=cell.dropout_rate > 0 or _is_random(cell),
            ),
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
            vmapped=vmapped,
            device_data=device_data,
            mesh=mesh,
        )


@functools.lru_cache(maxsize=64)
def _variant(attention: str, digest: str | None) -> Variant:
    """The variant as its file was when the run began, however it is edited later."""
    variant = resolve(attention)
    if attention_digest(attention) != digest:
        raise EditedError(
            f"attention: the file of {attention!r} was edited while the run was "
            "starting; run the same command again."
        )
    return variant


def _is_random(cell: Cell) -> bool:
    if cell.attention is None:
        return False
    return _variant(cell.attention, cell.attention_sha256).stochastic


def build_model(key: _ProgramKey, seed: int) -> nnx.Module:
    """The model of a cell with its initial parameters."""
    return models.build(
        key.model,
        key.size,
        image_shape=key.image_shape,
        num_classes=key.num_classes,
        attention=None
        if key.attention is None
        else _variant(key.attention, key.attention_sha256),
        overrides={} if key.patch is None else {"patch": key.patch},
        dropout_rate=key.dropout_rate,
        dtype=jnp.dtype(key.dtype) if key.dtype != "float32" else None,
        rngs=nnx.Rngs(seed),
    )


@functools.lru_cache(maxsize=64)
def model_cost(key: _ProgramKey) -> models.Cost:
    """Parameters and forward FLOPs an image, see `attn_jax.models.cost`."""
    plain = dataclasses.replace(key, dtype="float32")
    return models.cost(build_model(plain, 0), key.image_shape)


def check(cell: Cell, dataset: Dataset, mesh: Mesh) -> None:
    """Traces a cell's model, so that what it cannot do shows before anything runs.

    With an attention of one's own the whole step is traced, and scoring, on the shapes
    of the run.

    Raises:
      ValueError: the model, its attention or its batch size cannot serve; the message
        names the setting.
    """
    train.check_batch_size(cell.batch_size, mesh)

    def key_of() -> _ProgramKey:
        return _ProgramKey.of(cell, dataset, mesh, False, True)

    def forward() -> jax.Array:
        key = key_of()
        apply, params = train.split_model(build_model(key, 0))
        images = jnp.zeros((1, *key.image_shape))
        rng = jax.random.key(0) if cell.dropout_rate else None
        return apply(params, images, rng=rng)

    if cell.attention is None:
        jax.eval_shape(forward)
        return
    try:
        _trace(key_of(), cell, dataset)
    except Exception as error:
        raise does_not_run(cell.attention, repr(cell.model), error) from error


def _trace(key: _ProgramKey, cell: Cell, dataset: Dataset) -> None:
    """Traces training and scoring on the shapes of a run."""
    program = programs(key)
    hyper = _hyper(cell, dataset, _Split(np.arange(1), None))
    params = jax.eval_shape(lambda: program.initial_params(0))
    state = jax.eval_shape(lambda p: train.init_state(p, hyper), params)
    data = train.Batch(dataset.train_images, dataset.train_labels)
    data = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data)
    where = jax.ShapeDtypeStruct((1, cell.batch_size), np.int32)
    jax.eval_shape(program.step, state, data, where, jax.random.key(0))
    rows = math.ceil(EVAL_BATCH / key.mesh.size) * key.mesh.size
    at = jax.ShapeDtypeStruct((rows,), np.int32)
    valid = jax.ShapeDtypeStruct((rows,), np.float32)
    jax.eval_shape(program.evaluate, state, data, at, valid)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions of a model; all take and give pytrees on the mesh."""

    initial_params: Callable[[int], Any]
    step: Callable[..., tuple[train.TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]


@functools.lru_cache(maxsize=16)
def programs(key: _ProgramKey) -> Programs:
    """Builds, once for each key, the jitted training and evaluation functions.

    ``step(state, source, where, rng)`` does k steps. With the data on the device,
    ``source`` is the whole `Batch` of images and ``where`` int32 [k, B] says which
    make each batch; without, ``source`` holds [k, B] images and ``where`` is None.
    """
    apply, _ = train.split_model(build_model(key, 0))
    train_step = train.make_train_step(apply, key.num_classes, key.augment)
    # What devices cannot share evenly: XLA fills it up with rows that count nothing.
    # Of several seeds at once, each device then has all rows.
    uneven = None if key.vmapped else NamedSharding(key.mesh, PartitionSpec("data"))
    eval_step = train.make_eval_step(apply)

    def batch_of(source: train.Batch, where: jax.Array | None) -> train.Batch:
        if where is None:
            return source
        return jax.tree.map(lambda x: jnp.take(x, where, axis=0), source)

    def steps(
        state: train.TrainState,
        source: train.Batch,
        where: jax.Array | None,
        rng: jax.Array,
    ) -> tuple[train.TrainState, dict[str, jax.Array]]:
        def one(
            state: train.TrainState, item: Any
        ) -> tuple[train.TrainState, dict[str, jax.Array]]:
            batch = item if where is None else batch_of(source, item)
            if uneven and jax.tree.leaves(batch)[0].shape[0] % key.mesh.size:
                batch = jax.lax.with_sharding_constraint(batch, uneven)
            return train_step(state, batch, rng)

        items = source if where is None else where
        count = jax.tree.leaves(items)[0].shape[0]
        if count == 1:  # XLA:CPU runs the body of a loop on one core
            state, metrics = one(state, jax.tree.map(lambda x: x[0], items))
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(one, state, items)

    def evaluate(
        state: train.TrainState, data: train.Batch, where: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return eval_step(state, batch_of(data, where), valid)

    def initial_params(seed: int) -> Any:
        _, params = train.split_model(build_model(key, seed))
        return params

    if key.vmapped:
        data_axis = None if key.device_data else 0
        index_axis = 0 if key.device_data else None
        steps = jax.vmap(steps, in_axes=(0, data_axis, index_axis, 0))
        evaluate = jax.vmap(evaluate, in_axes=(0, None, 0, 0))
    return Programs(
        initial_params,
        jax.jit(steps, donate_argnums=0),
        jax.jit(evaluate),
    )


@dataclasses.dataclass(frozen=True)
class _Split:
    """Indices of one cell's images in the training set."""

    train: np.ndarray
    validation: np.ndarray | None


def split_of(cell: Cell, dataset: Dataset) -> _Split:
    """The nested subset of a cell, and its validation split while tuning."""
    labels = dataset.train_labels
    subset = balanced_subset(
        labels, cell.n, seed=cell.seed, num_classes=dataset.num_classes
    )
    if cell.phase == "final":
        return _Split(subset, None)
    return _Split(
        *train_validation_split(
            labels,
            subset,
            fraction=cell.validation_fraction,
            maximum=cell.validation_maximum,
            seed=cell.seed,
        )
    )


def _hyper(cell: Cell, dataset: Dataset, split: _Split) -> train.Hyper:
    mean, std = normalize_stats(dataset.train_images[split.train])
    numbers: dict[str, float] = dict(
        learning_rate=cell.learning_rate,
        weight_decay=cell.weight_decay,
        warmup=max(1.0, cell.warmup * cell.updates),
        updates=cell.updates,
        label_smoothing=cell.label_smoothing,
        mixup=cell.mixup,
        clip_norm=cell.clip_norm,
    )
    return train.Hyper(
        **{name: np.asarray(value, np.float32) for name, value in numbers.items()},
        pixel_mean=np.asarray(mean, np.float32),
        pixel_std=np.asarray(std, np.float32),
    )


def _evaluate(
    program: Programs,
    state: train.TrainState,
    data: Callable[[np.ndarray], tuple[train.Batch, np.ndarray]],
    indices: Sequence[np.ndarray],
    mesh: Mesh,
    vmapped: bool,
) -> list[tuple[float, float]]:
    """(accuracy, mean loss) of each cell on its own ``indices`` of ``data``.

    ``data`` gives images that hold those asked for, and where among them these are.
    """
    size = len(indices[0])
    # One shape whatever the size: each would compile a program, which takes longer
    # than the images that it leaves out.
    batch = math.ceil(EVAL_BATCH / mesh.size) * mesh.size
    axes = (None, "data") if vmapped else ("data",)
    totals = np.zeros((len(indices), 2))
    for start in range(0, size, batch):
        where = np.zeros((len(indices), batch), np.int32)
        valid = np.zeros((len(indices), batch), np.float32)
        for row, chosen in enumerate(indices):
            part = chosen[start : start + batch]
            where[row, : len(part)] = part
            valid[row, : len(part)] = 1.0
        if not vmapped:
            where, valid = where[0], valid[0]
        images, where = data(where)
        result = program.evaluate(
            state, images, train.put(where, mesh, *axes), train.put(valid, mesh, *axes)
        )
        totals += np.stack([np.atleast_1d(np.asarray(x)) for x in result], axis=-1)
    return [(float(hits / size), float(loss / size)) for hits, loss in totals]


class Runner:
    """Trains cells of one data set, one group of seeds at a time.

    Args:
      dataset: where the images come from.
      store: where the records go.
      runtime: how to run.
      progress: who is told.
      stop: asked between steps whether to save and end.
    """

    def __init__(
        self,
        dataset: Dataset,
        store: ResultsStore,
        runtime: Runtime,
        progress: Progress,
        stop: StopSignal,
    ):
        self.dataset = dataset
        self.store = store
        self.runtime = runtime
        self.progress = progress
        self.stop = stop
        self.mesh = train.data_mesh()
        on_cpu = jax.default_backend() == "cpu"
        self.steps_per_dispatch = runtime.steps_per_dispatch or (1 if on_cpu else 16)

    @functools.cached_property
    def _train_data(self) -> train.Batch:
        data = train.Batch(self.dataset.train_images, self.dataset.train_labels)
        return train.put(data, self.mesh)

    @functools.cached_property
    def _test_data(self) -> train.Batch:
        data = train.Batch(self.dataset.test_images, self.dataset.test_labels)
        return train.put(data, self.mesh)

    def run(self, cells: Sequence[Cell]) -> bool:
        """Runs cells that differ in their seed alone; several are trained at once.

        Returns:
          True when their records are in the store; False when another process is
          at work on one of them.

        Raises:
          Interrupted: a signal came; what was done is saved.
          ValueError: a cell asks for what the data or the devices cannot give.
        """
        cells = list(cells)
        with contextlib.ExitStack() as claims:
            primary = jax.process_index() == 0
            claimed = 1
            if primary:
                for cell in cells:
                    claim = self.store.claim(cell.config())
                    claimed = claimed and int(claims.enter_context(claim))
            if not agree(claimed):
                return False
            missing = [cell for cell in cells if not self.has(cell)]
            if missing:
                self._try(missing)
        return True

    def _try(self, cells: list[Cell]) -> None:
        """Runs cells; what fails in them becomes a record, not the end of the run."""
        began = time.monotonic()
        try:
            self._run(cells)
        except Exception as error:
            if ends_the_run(error) or jax.process_count() > 1:
                raise  # of a cluster, others would wait for this process for ever
            for cell in cells:
                if not self.has(cell):
                    record = store_failure(self.store, cell.config(), error, began)
                    self.progress.finish(cell.label, record)

    def has(self, cell: Cell) -> bool:
        """Whether a cell has a record; process 0 answers for a whole cluster."""
        return bool(agree(int(self.store.get(cell.config()) is not None)))

    def _checkpoints(self, cells: Sequence[Cell]) -> Checkpoints:
        """Checkpoints of a cell, or of a group of cells that are trained at once."""
        configs = [cell.config() for cell in cells]
        whole = configs[0] if len(configs) == 1 else {"cells": configs}
        return Checkpoints(self.store.checkpoint_dir(whole))

    def _restored(
        self, checkpoints: Checkpoints, state: train.TrainState
    ) -> tuple[train.TrainState, dict[str, Any]] | None:
        """What the newest checkpoint holds; a damaged one is set aside, and said."""
        if not agree(int(checkpoints.folder.is_dir())):
            return None
        restored, failed = None, ""
        try:
            restored = checkpoints.restore(state)
        except CheckpointError as error:
            failed = str(error)
        if not agree_any(int(bool(failed))):
            return restored
        if jax.process_index() == 0:
            kept = checkpoints.set_aside()
            reason = failed or f"another process cannot read {checkpoints.folder}"
            self.progress.say(
                f"warning: {reason}; it is kept as {kept.name}, the cell starts anew"
            )
        agree(0)  # none goes on before the folder is out of the way
        return None

    def _batches(
        self, cells: Sequence[Cell], splits: Sequence[_Split], step: int, count: int
    ) -> tuple[train.Batch, jax.Array | None]:
        vmapped = len(cells) > 1
        where = np.stack(
            [
                [
                    split.train[
                        train.batch_positions(
                            len(split.train),
                            seed=cell.seed,
                            step=k,
                            batch_size=cell.batch_size,
                        )
                    ]
                    for k in range(step, step + count)
                ]
                for cell, split in zip(cells, splits, strict=True)
            ]
        ).astype(np.int32)
        where = where if vmapped else where[0]
        axes: tuple[str | None, ...] = (None,) * (where.ndim - 1) + ("data",)
        if where.shape[-1] % self.mesh.size:
            axes = ()  # the program splits it, see `programs`
        if self.runtime.device_data:
            return self._train_data, train.put(where, self.mesh, *axes)
        batch = train.Batch(
            self.dataset.train_images[where], self.dataset.train_labels[where]
        )
        return train.put(batch, self.mesh, *axes), None

    def _run(self, cells: list[Cell]) -> None:
        first = cells[0]
        train.check_batch_size(first.batch_size, self.mesh)
        vmapped = len(cells) > 1
        key = _ProgramKey.of(
            first, self.dataset, self.mesh, vmapped, self.runtime.device_data
        )
        program = programs(key)
        splits = [split_of(cell, self.dataset) for cell in cells]
        states = [
            train.init_state(
                program.initial_params(cell.seed), _hyper(cell, self.dataset, split)
            )
            for cell, split in zip(cells, splits, strict=True)
        ]
        rngs = [jax.random.key(cell.seed) for cell in cells]
        if vmapped:
            state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            rng = jnp.stack(rngs)
        else:
            state, rng = states[0], rngs[0]
        state = train.put(state, self.mesh)
        if jax.process_count() == 1:
            rng = train.put(rng, self.mesh)

        checkpoints = self._checkpoints(cells)
        step, spent = 0, 0.0
        curves: dict[str, list[Any]] = {"step": [], "loss": [], "accuracy": []}
        window: list[Mapping[str, train.Array]] = []
        restored = self._restored(checkpoints, state)
        if restored is not None:
            state, progress = restored
            step, spent, curves = (progress[k] for k in ("step", "spent", "curves"))
            if progress["window"]:
                names = progress["window"].items()
                window = [{k: np.asarray(v, np.float32) for k, v in names}]
            # Orbax's arrays may share memory with its own buffers; donation needs ours.
            state = jax.tree.map(jnp.copy, state)

        def gathered(name: str) -> np.ndarray:
            """The metric of every step since the last point, [cells, steps]."""
            parts = [np.asarray(m[name]).reshape(len(cells), -1) for m in window]
            return np.concatenate(parts, axis=1)

        def save() -> None:
            names = ("loss", "accuracy") if window else ()
            progress = dict(
                step=step,
                spent=spent + time.monotonic() - began,
                curves=curves,
                window={name: gathered(name).tolist() for name in names},
            )
            checkpoints.save(step, state, progress)

        def try_to_save(signum: int) -> None:
            try:
                save()
            except CheckpointError as error:
                if signum:
                    raise lost(signum, error) from error
                self.progress.say(f"warning: {error}; the run goes on without it")

        label = first.label if not vmapped else f"{first.label} (x{len(cells)} seeds)"
        self.progress.begin(label, first.updates, step)
        writers = self._tensorboard(cells)
        began = saved = time.monotonic()
        timed: tuple[int, float] | None = None
        while step < first.updates:
            count = min(
                self.steps_per_dispatch,
                self.runtime.log_every - step % self.runtime.log_every,
                first.updates - step,
            )
            source, where = self._batches(cells, splits, step, count)
            state, metrics = program.step(state, source, where, rng)
            window.append(metrics)
            step += count
            if len(window) > 1:  # else a signal would wait for all that is queued
                jax.block_until_ready(window[-2])
            at_point = step % self.runtime.log_every == 0 or step == first.updates
            if at_point:
                means = {name: gathered(name).mean(1) for name in ("loss", "accuracy")}
                window = []
                timed = timed or (step, time.monotonic())
                curves["step"].append(step)
                for name, values in means.items():
                    curves[name].append([float(x) for x in values])
                    for row, writer in enumerate(writers):
                        writer.add_scalar(f"train/{name}", float(values[row]), step)
                self.progress.update(step, float(means["loss"][0]))
                if not np.isfinite(means["loss"]).any():
                    break
            elif jax.process_count() > 1:
                continue  # processes agree at points alone
            if step < first.updates:
                signum = agree_any(self.stop.signum or 0)
                due = time.monotonic() - saved >= self.runtime.checkpoint_seconds
                if signum or agree(int(due)):
                    try_to_save(signum)
                    saved = time.monotonic()
                if signum:
                    for writer in writers:
                        writer.close()
                    raise Interrupted(signum)

        jax.block_until_ready(state)
        ended = time.monotonic()
        rate: float | None = None
        if timed is not None and step > timed[0]:
            images = (step - timed[0]) * first.batch_size * len(cells)
            rate = images / max(ended - timed[1], 1e-9)
        try:
            with at_once(self.stop):
                scores = self._scores(cells, splits, program, state, vmapped)
        except Interrupted as interrupted:
            try_to_save(interrupted.signum)
            for writer in writers:
                writer.close()
            raise
        finite = [
            train.all_finite(
                jax.tree.map(lambda x, row=row: x[row], state.params)
                if vmapped
                else state.params
            )
            for row in range(len(cells))
        ]
        wall = spent + time.monotonic() - began
        cost = model_cost(key)
        for row, cell in enumerate(cells):
            loss = [values[row] for values in curves["loss"]]
            broken = next(
                (
                    at
                    for at, x in zip(curves["step"], loss, strict=True)
                    if not math.isfinite(x)
                ),
                None,
            )
            known = all(map(math.isfinite, scores[row].values()))
            if broken is None and not (known and finite[row]):
                broken = step  # the last update did it
            result: dict[str, Any] = dict(
                params=cost.params,
                flops=cost.flops,
                updates=step,
                images_per_s=rate,
                data_sha256=self.dataset.sha256,
            )
            receptive_field = self._receptive_field(key)
            if receptive_field is not None:
                result["receptive_field"] = receptive_field
            if broken is None:
                result |= scores[row]
            else:
                result["diverged_at"] = broken
            for writer in writers[row : row + 1]:
                for name, value in scores[row].items() if broken is None else ():
                    writer.add_scalar(name, value, step)
                writer.close()
            if jax.process_index() == 0:
                record = self.store.put(
                    cell.config(),
                    status="done" if "diverged_at" not in result else "diverged",
                    metrics=result,
                    curves=dict(
                        step=curves["step"],
                        loss=loss,
                        accuracy=[values[row] for values in curves["accuracy"]],
                    ),
                    wall_time_s=wall / len(cells),
                )
                self.progress.finish(cell.label, record)
        if jax.process_index() == 0:
            checkpoints.clear()
        agree(0)  # the records are there before any process looks for them

    def _scores(
        self,
        cells: Sequence[Cell],
        splits: Sequence[_Split],
        program: Programs,
        state: train.TrainState,
        vmapped: bool,
    ) -> list[dict[str, float]]:
        """The validation score while tuning; else the test score, read here alone."""

        def evaluate(
            part: str, indices: Sequence[np.ndarray]
        ) -> list[tuple[float, float]]:
            data = functools.partial(self._images, part)
            return _evaluate(program, state, data, indices, self.mesh, vmapped)

        train_scores = evaluate("train", [s.train[:TRAIN_EVAL] for s in splits])
        if cells[0].phase == "tune":
            held_out = [s.validation for s in splits if s.validation is not None]
            prefix, scores = "val", evaluate("train", held_out)
        else:
            whole = np.arange(len(self.dataset.test_labels))
            prefix, scores = "test", evaluate("test", [whole] * len(cells))
        return [
            {
                f"{prefix}_accuracy": accuracy,
                f"{prefix}_loss": loss,
                "train_accuracy": train_accuracy,
            }
            for (accuracy, loss), (train_accuracy, _) in zip(
                scores, train_scores, strict=True
            )
        ]

    def _images(self, part: str, where: np.ndarray) -> tuple[train.Batch, np.ndarray]:
        """Images of a part that hold those at ``where``, and their places in them."""
        if self.runtime.device_data:
            return self._train_data if part == "train" else self._test_data, where
        flat = where.ravel()
        images = getattr(self.dataset, f"{part}_images")[flat]
        labels = getattr(self.dataset, f"{part}_labels")[flat]
        batch = train.put(train.Batch(images, labels), self.mesh)
        return batch, np.arange(flat.size, dtype=np.int32).reshape(where.shape)

    def _receptive_field(self, key: _ProgramKey) -> int | None:
        if key.model != "resnet":
            return None
        model = nnx.eval_shape(lambda: build_model(key, 0))
        assert isinstance(model, models.ResNet)
        return model.receptive_field()

    def _tensorboard(self, cells: Sequence[Cell]) -> list[Any]:
        if not self.runtime.tensorboard or jax.process_index() != 0:
            return []
        from tensorboardX import SummaryWriter

        root = self.store.folder / "tensorboard"
        return [
            SummaryWriter(str(root / self.store.path(cell.config()).stem))
            for cell in cells
        ]
