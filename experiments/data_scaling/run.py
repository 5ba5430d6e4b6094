"""Plans the cells of the experiment, runs them, shares them among workers."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from attn_jax.models import SIZES, default_patch
from experiments.core import identity
from experiments.core.cell import (
    Cell,
    Runtime,
    attention_digest,
    protocol_updates,
)
from experiments.core.loop import (
    Interrupted,
    Runner,
    StopSignal,
    agree,
    agree_any,
    check,
    ends_the_run,
    interruptible,
    store_failure,
)
from experiments.core.observe import Progress
from experiments.core.store import ResultsStore, shard
from experiments.core.train import data_mesh
from experiments.core.workers import WORKER_VARIABLE, status_file
from experiments.data.images import Dataset
from experiments.data.splits import balanced_subset
from experiments.data_scaling.presets import Experiment, family_size
from experiments.data_scaling.tasks import load_task

# Most training images of a baseline whose time grows with the square of N.
BASELINE_CAPS = {"rbf_svm": 60_000}


@dataclasses.dataclass(frozen=True)
class Unit:
    """All cells of one (model, N): a grid to tune, then the seeds; or a baseline."""

    model: str
    n: int
    grid: tuple[Cell, ...] = ()
    baseline: tuple[dict[str, Any], ...] = ()

    def cells(self, seeds: int) -> int:
        """Number of records of a finished unit."""
        return len(self.grid) + seeds if self.grid else len(self.baseline)


def updates_of(experiment: Experiment, n: int) -> int:
    """Number of optimiser steps of a cell with n training images."""
    return protocol_updates(
        experiment.protocol,
        n=n,
        n_max=max(experiment.ns),
        updates=experiment.updates,
        epochs=experiment.epochs,
        batch_size=experiment.batch_size,
        max_epochs=experiment.max_epochs,
        min_updates=experiment.min_updates,
    )


def _patch(
    experiment: Experiment, model: str, size: str, image_shape: tuple[int, int, int]
) -> int | None:
    """The ViT's patch: the one asked for, which must fit, else near the size's."""
    if model != "vit":
        return None
    if experiment.patch is None:
        return default_patch(image_shape, SIZES["vit"][size]["patch"])
    height, width, _ = image_shape
    if height % experiment.patch or width % experiment.patch:
        raise ValueError(
            f"patch must divide the images of {height} x {width} pixels, got "
            f"{experiment.patch}."
        )
    return experiment.patch


def plan(
    experiment: Experiment,
    task: str,
    image_shape: tuple[int, int, int],
    differs: identity.Differs = (),
) -> list[Unit]:
    """The units of an experiment, the largest N first, so that workers end together.

    Args:
      experiment: what to run.
      task: name under which the cells are stored.
      image_shape: (height, width, channels) of its images.
      differs: what of the data is not as committed records had it.

    Raises:
      ValueError: a value no cell can have.
    """
    units = []
    for n in sorted(experiment.ns, reverse=True):
        updates = updates_of(experiment, n)
        for name in experiment.models:
            model, size = family_size(name, experiment.size)
            attention = experiment.attention if model == "vit" else None
            grid = getattr(experiment, model)
            cells = tuple(
                Cell(
                    task=task,
                    model=model,
                    size=size,
                    attention=attention,
                    attention_sha256=attention_digest(attention),
                    patch=_patch(experiment, model, size, image_shape),
                    n=n,
                    seed=0,
                    phase="tune",
                    protocol=experiment.protocol,
                    updates=min(updates, experiment.tune_updates),
                    batch_size=experiment.batch_size,
                    warmup=experiment.warmup,
                    clip_norm=experiment.clip_norm,
                    flip=experiment.flip,
                    dtype=experiment.dtype,
                    differs=differs,
                    **point,
                )
                for point in grid.points()
            )
            units.append(Unit(name, n, grid=cells))
        for baseline in experiment.baselines:
            if n > BASELINE_CAPS.get(baseline, n):
                continue  # it would be fitted to a smaller N's subset once more
            configs = tuple(
                identity.with_differs(
                    dict(task=task, model=baseline, n=n, seed=seed, phase="baseline"),
                    differs,
                )
                for seed in range(experiment.seeds)
            )
            units.append(Unit(baseline, n, baseline=configs))
    return units


def check_data(experiment: Experiment, dataset: Dataset) -> None:
    """Raises ValueError, before anything runs, where the data cannot serve."""
    have = len(dataset.train_labels)
    for n in experiment.ns:
        if n > have:
            raise ValueError(
                f"ns: N={n} is larger than the training set of {dataset.name}, which "
                f"has {have} images: use --ns with numbers up to {have}."
            )
        if n < 2 * dataset.num_classes:
            raise ValueError(
                f"ns: N={n} leaves no validation split for {dataset.num_classes} "
                f"classes: use at least {2 * dataset.num_classes}."
            )


def best_point(unit: Unit, store: ResultsStore) -> int:
    """Index of the grid point of a unit with the best validation accuracy.

    Of equals, the first in the grid. Diverged ones, and those without a record, count
    as accuracy 0.
    """
    if len(unit.grid) == 1:
        return 0

    def score(cell: Cell) -> float:
        record = store.get(cell.config())
        return (record and record["metrics"].get("val_accuracy")) or 0.0

    scores = [score(cell) for cell in unit.grid]
    return scores.index(max(scores))


class Work:
    """What there is to do in a folder, for one worker.

    Args:
      experiment: what to run.
      units: this worker's share of the plan.
      dataset: the data.
      store: where records go.
      runner: trains.
      progress: who is told.
      stop: asked whether to end.
    """

    def __init__(
        self,
        experiment: Experiment,
        units: Sequence[Unit],
        dataset: Dataset,
        store: ResultsStore,
        runner: Runner,
        progress: Progress,
        stop: StopSignal,
    ):
        self.experiment = experiment
        self.units = list(units)
        self.dataset = dataset
        self.store = store
        self.runner = runner
        self.progress = progress
        self.stop = stop

    def run(self) -> None:
        """Works until every cell has a record.

        Cells that another process has in hand are left to it and asked for again.

        Raises:
          Interrupted: a signal came.
        """
        while True:
            busy = acted = False
            for unit in self.units:
                for step in self._baselines, self._tune, self._final:
                    ran, waits = step(unit)
                    acted, busy = acted or ran, busy or waits
                    if waits:
                        break
            if not busy:
                return
            if not acted:
                time.sleep(0.5)

    def _check_stop(self) -> None:
        signum = agree_any(self.stop.signum or 0)
        if signum:
            raise Interrupted(signum)

    def _each(self, groups: Sequence[Sequence[Cell]]) -> tuple[bool, bool]:
        """Runs groups that have no record; returns (ran one, another is running)."""
        ran = waits = False
        for cells in groups:
            self._check_stop()
            if all([self.runner.has(cell) for cell in cells]):
                continue
            if self.runner.run(cells):
                ran = True
            else:
                waits = True
        return ran, waits

    def _tune(self, unit: Unit) -> tuple[bool, bool]:
        if len(unit.grid) < 2:
            return False, False  # nothing to choose
        return self._each([(cell,) for cell in unit.grid])

    def _final(self, unit: Unit) -> tuple[bool, bool]:
        if not unit.grid:
            return False, False
        best = agree(best_point(unit, self.store))
        cells = final_cells(unit, best, self.experiment)
        if self.runner.runtime.vmap_seeds:
            return self._each([cells])
        return self._each([(cell,) for cell in cells])

    def _baselines(self, unit: Unit) -> tuple[bool, bool]:
        ran = waits = False
        for config in unit.baseline if jax.process_index() == 0 else ():
            if self.stop.signum is not None:
                break
            if self.store.get(config) is not None:
                continue
            with self.store.claim(config) as claimed:
                if not claimed:
                    waits = True
                    continue
                if self.store.get(config) is None:
                    self._baseline(config)
                ran = True
        self._check_stop()
        return bool(agree(int(ran))), bool(agree(int(waits)))

    def _baseline(self, config: dict[str, Any]) -> None:
        from experiments.data_scaling.baselines import fit_baseline

        label = f"{config['task']} {config['model']} n={config['n']} "
        label += f"seed={config['seed']}"
        self.progress.begin(label, 1)
        began = time.monotonic()
        labels = self.dataset.train_labels

        def measure() -> dict[str, Any]:
            subset = balanced_subset(labels, config["n"], seed=config["seed"])
            return fit_baseline(
                config["model"],
                self.dataset.train_images[subset],
                labels[subset],
                self.dataset.test_images,
                self.dataset.test_labels,
                seed=config["seed"],
            )

        cluster = jax.process_count() > 1
        try:
            metrics = measure() if cluster else interruptible(measure, self.stop)
        except Exception as error:
            if ends_the_run(error) or cluster:
                raise
            record = store_failure(self.store, config, error, began)
        else:
            record = self.store.put(
                config,
                status="done",
                metrics=metrics,
                wall_time_s=time.monotonic() - began,
            )
        self.progress.finish(label, record)


def final_cells(unit: Unit, best: int, experiment: Experiment) -> tuple[Cell, ...]:
    """The cells of all seeds, with what the validation split chose."""
    cell = unit.grid[best]
    updates = updates_of(experiment, unit.n)
    return tuple(
        dataclasses.replace(cell, phase="final", updates=updates, seed=seed)
        for seed in range(experiment.seeds)
    )


def possible(units: Sequence[Unit], experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Configs of all records there may be, whatever the validation split chooses."""
    for unit in units:
        yield from unit.baseline
        yield from (cell.config() for cell in unit.grid)
        for best in range(len(unit.grid)):
            cells = final_cells(unit, best, experiment)
            yield from (cell.config() for cell in cells)


def count_done(
    units: Sequence[Unit], store: ResultsStore, experiment: Experiment
) -> int:
    """How many cells of a plan have a record."""
    done = 0
    for unit in units:
        done += sum(store.get(config) is not None for config in unit.baseline)
        grid = unit.grid if len(unit.grid) > 1 else ()
        found = [store.get(cell.config()) is not None for cell in grid]
        done += sum(found)
        if unit.grid and all(found):
            cells = final_cells(unit, best_point(unit, store), experiment)
            done += sum(store.get(cell.config()) is not None for cell in cells)
    return done


def count_cells(units: Sequence[Unit], experiment: Experiment) -> int:
    """How many cells a plan has."""
    total = 0
    for unit in units:
        total += len(unit.baseline)
        if unit.grid:
            total += experiment.seeds + (len(unit.grid) if len(unit.grid) > 1 else 0)
    return total


def prepare(
    experiment: Experiment, runtime: Runtime
) -> tuple[Experiment, Dataset, list[Unit]]:
    """Loads the data and plans this process's share.

    Returns:
      (experiment, data, units). The experiment is the one given, unless digits stand
      in for what it asked for: then without the N they have not, and without flips.

    Raises:
      DataError, ValueError: the data cannot be had or cannot serve; a bad value.
    """
    dataset = load_task(
        experiment.task, experiment.scenes, allow_fallback=experiment.allow_fallback
    )
    if dataset.name == "digits" != experiment.task and experiment.task != "scenes":
        experiment = fit_to_fallback(experiment, dataset)
    check_data(experiment, dataset)
    # Data that stood in for what was asked for is stored under its own name.
    task, differs = identity.of_images(dataset)
    units = plan(experiment, task, dataset.image_shape, differs)
    return experiment, dataset, shard(units, runtime.shard)


def fit_to_fallback(experiment: Experiment, dataset: Dataset) -> Experiment:
    """The experiment less what digits cannot serve; says what was left out."""
    have = len(dataset.train_labels)
    fitting = tuple(n for n in experiment.ns if n <= have)
    dropped = [n for n in experiment.ns if n > have]
    if dropped and os.environ.get(WORKER_VARIABLE) is None:
        print(f"left out, more than the {have} images there are: N = {dropped}")
    return dataclasses.replace(experiment, ns=fitting or (have,), flip=False)


def check_cells(units: Sequence[Unit], dataset: Dataset) -> None:
    """Raises ValueError, before anything runs, for a model that cannot be built."""
    mesh = data_mesh()
    seen = set()
    for cell in (cell for unit in units for cell in unit.grid):
        traits = (cell.model, cell.dropout_rate > 0)
        if traits not in seen:
            seen.add(traits)
            check(cell, dataset, mesh)


def work(
    experiment: Experiment,
    runtime: Runtime,
    dataset: Dataset,
    units: Sequence[Unit],
    store: ResultsStore,
    worker: tuple[int, int] | None,
) -> None:
    """Runs a share of the cells in this process.

    Raises:
      Interrupted: a signal came; the run in progress is saved.
    """
    done = count_done(units, store, experiment)
    total = count_cells(units, experiment)
    status = status_file(store, worker[0]) if worker else None
    quiet = jax.process_index() != 0
    with (
        StopSignal(os.getppid() if worker else None) as stop,
        Progress(
            total, done, status_file=status, live=False if quiet else None
        ) as progress,
    ):
        if done and worker is None and not quiet:
            progress.say(f"{done} of {total} cells were done before.")
        runner = Runner(dataset, store, runtime, progress, stop)
        Work(experiment, units, dataset, store, runner, progress, stop).run()
