"""Cells of the experiment, how they are trained and scored, and their order."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attn_jax import models
from experiments.attention_as_conv.model import AttentionImage
from experiments.attention_as_conv.presets import Experiment
from experiments.core import identity, train, trial
from experiments.core.driver import Plan
from experiments.core.studies import Study
from experiments.data import images as data
from experiments.data import splits
from experiments.data.images import Dataset
from experiments.data_scaling.baselines import CAPS, fit_baseline

# Images a step of scoring, of the training part that accuracy is told of, of the
# validation part, and of the test part that attention maps are averaged over.
EVAL_BATCH = 500
TRAIN_EVAL = 1_000
VALIDATION = 2_000
MAP_IMAGES = 64

# Committed floors of more images than this were fitted to a part of so many.
EARLIER_CAP = 10_000


@dataclasses.dataclass(frozen=True)
class ImageCell:
    """One (model, start, N, seed, hyper-parameters): all that can change its numbers.

    Attributes:
      task: name of the data.
      model: an encoding of `attn_jax.models.PositionalAttention`, or "resnet".
      n: number of training images.
      seed: draws the subset, the initial parameters and the order of the images.
      phase: "tune" is scored on the validation part; "final" on the test part, once.
      updates: number of optimiser steps.
      batch_size: images a step.
      start, patch, dim, depth, mlp_dim, num_heads: of
        `attn_jax.models.AttentionImage`, else None.
      alpha: of ``start="convolution"``, else None.
      key_dim: of "relative_content", else None.
      widths, stem_stride: of the "resnet", else None.
      learning_rate, weight_decay, warmup, clip_norm: of AdamW and its schedule.
      flip, crop: what is done to training images.
      dtype: dtype of the computation; parameters stay float32.
      differs: what of the data is not as committed records had it, see
        `experiments.core.identity`.
    """

    task: str
    model: str
    n: int
    seed: int
    updates: int
    phase: Literal["tune", "final"] = "final"
    batch_size: int = 32
    start: str | None = None
    patch: int | None = None
    dim: int | None = None
    depth: int | None = None
    mlp_dim: int | None = None
    num_heads: int | None = None
    alpha: float | None = None
    key_dim: int | None = None
    widths: tuple[int, ...] | None = None
    stem_stride: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip_norm: float = 1.0
    flip: bool = True
    crop: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    differs: identity.Differs = ()

    def __post_init__(self) -> None:
        trial.check_recipe(self)
        for name in ("n", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)!r}."
                )

    def config(self) -> dict[str, Any]:
        """The cell as a plain dictionary, which the results store hashes."""
        return identity.config_of(self)

    @property
    def label(self) -> str:
        """A short name for progress lines."""
        start = f" {self.start}" if self.start else ""
        phase = trial.phase_label(self)
        return f"{self.model}{start} n={self.n} seed={self.seed} {phase}"


# What shapes a program: cells that agree in it share the compiled one. Where heads
# start is not in it.
_SHAPE = (
    "model patch dim depth mlp_dim num_heads key_dim widths stem_stride flip crop dtype"
).split()


def build_model(
    cell: ImageCell,
    image_shape: tuple[int, int, int],
    num_classes: int,
    **more: Any,
) -> nnx.Module:
    """The model of a cell with its initial parameters."""
    dtype = jnp.dtype(cell.dtype) if cell.dtype != "float32" else None
    rngs = nnx.Rngs(cell.seed)
    if cell.model == "resnet":
        assert cell.widths is not None
        return models.build(
            "resnet",
            "mu",
            image_shape=image_shape,
            num_classes=num_classes,
            overrides=dict(
                widths=cell.widths,
                depths=(1,) * len(cell.widths),
                stem_stride=cell.stem_stride,
            ),
            dtype=dtype,
            rngs=rngs,
        )
    names = "patch dim depth mlp_dim num_heads start".split()
    options: dict[str, Any] = {name: getattr(cell, name) for name in names}
    if cell.start == "convolution":
        options["alpha"] = cell.alpha
    if cell.key_dim is not None:
        options["key_dim"] = cell.key_dim
    return AttentionImage(
        image_shape,
        num_classes,
        encoding=cell.model,  # type: ignore[arg-type]
        dtype=dtype,
        rngs=rngs,
        **options,
        **more,
    )


class Program(NamedTuple):
    """Jitted functions of a model.

    Attributes:
      step: a train step, see `experiments.core.trial.make_step`.
      evaluate: (state, batch, valid) -> (hits, summed loss).
      merge: parameters -> the module.
    """

    step: trial.Step
    evaluate: Callable[..., tuple[jax.Array, jax.Array]]
    merge: Callable[[Any], Any]


def _split(model: nnx.Module) -> tuple[Callable[[Any], Any], Any]:
    """Splits a module into ``merge(params)`` and its parameters, plain dictionaries."""
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)

    def merge(params: Any) -> Any:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        return nnx.merge(graphdef, params, rest)

    return merge, nnx.to_pure_dict(variables)


def make_loss(
    merge: Callable[[Any], Any], num_classes: int, choice: train.Augment
) -> trial.LossFn:
    """Cross-entropy of augmented images, as `trial.make_step` takes it."""

    def loss_fn(
        params: Any, batch: train.Batch, rng: jax.Array, hyper: train.Hyper
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        images = train.normalize(batch.image, hyper)
        labels = jax.nn.one_hot(batch.label, num_classes, dtype=jnp.float32)
        images, labels = train.augment(images, labels, rng, hyper, choice)
        logits = merge(params)(images).astype(jnp.float32)
        hits = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        loss = optax.softmax_cross_entropy(logits, labels).mean()
        return loss, {"accuracy": jnp.mean(hits.astype(jnp.float32))}

    return loss_fn


def _example(shape: tuple[Any, ...]) -> ImageCell:
    """A cell whose model has a shape."""
    traits = dict(zip(_SHAPE, shape, strict=True))
    start = None if traits["model"] == "resnet" else "random"
    return ImageCell(task="", n=1, seed=0, updates=1, start=start, **traits)


@functools.lru_cache(maxsize=16)
def _program(
    shape: tuple[Any, ...], image_shape: tuple[int, int, int], num_classes: int
) -> Program:
    cell = _example(shape)
    merge, _ = _split(build_model(cell, image_shape, num_classes))
    choice = train.Augment(flip=cell.flip, crop=cell.crop)
    step = trial.make_step(make_loss(merge, num_classes, choice))
    evaluate = train.make_eval_step(lambda params, images: merge(params)(images))
    return Program(jax.jit(step, donate_argnums=0), jax.jit(evaluate), merge)


def program_of(cell: ImageCell, dataset: Dataset) -> Program:
    """The compiled functions of a cell's model, shared among cells of one shape."""
    shape = tuple(getattr(cell, name) for name in _SHAPE)
    return _program(shape, dataset.image_shape, dataset.num_classes)


class ImageRunner(trial.Runner):
    """Trains and scores cells of one set of images."""

    def __init__(self, dataset: Dataset, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.dataset = dataset

    def _parts(self, cell: ImageCell) -> tuple[np.ndarray, np.ndarray | None]:
        """Indices of the images to train on, and of the validation part in tuning."""
        labels, classes = self.dataset.train_labels, self.dataset.num_classes
        subset = splits.balanced_subset(
            labels, cell.n, seed=cell.seed, num_classes=classes
        )
        if cell.phase == "final":
            return subset, None
        return splits.train_validation_split(
            labels, subset, fraction=0.2, maximum=VALIDATION, seed=cell.seed
        )

    def _hyper(self, cell: ImageCell, images: np.ndarray) -> train.Hyper:
        mean, std = data.normalize_stats(self.dataset.train_images[images])
        plain = trial.hyper_of(cell)._asdict()
        none = np.zeros((), np.float32)
        return train.Hyper(
            **plain,
            label_smoothing=none,
            mixup=none,
            pixel_mean=np.asarray(mean, np.float32),
            pixel_std=np.asarray(std, np.float32),
        )

    def start(self, cell: ImageCell) -> trial.Job:
        """How a cell is trained."""
        chosen, _ = self._parts(cell)

        def batch(step: int) -> train.Batch:
            where = chosen[
                train.batch_positions(
                    len(chosen), seed=cell.seed, step=step, batch_size=cell.batch_size
                )
            ]
            return train.Batch(
                self.dataset.train_images[where], self.dataset.train_labels[where]
            )

        model = build_model(cell, self.dataset.image_shape, self.dataset.num_classes)
        return trial.Job(
            _split(model)[1],
            program_of(cell, self.dataset).step,
            batch,
            hyper=self._hyper(cell, chosen),
        )

    def costs(self, cell: ImageCell) -> dict[str, Any]:
        """Parameters, and FLOPs of an image's forward pass."""
        shape = tuple(getattr(cell, name) for name in _SHAPE)
        dataset = self.dataset
        cost = model_cost(shape, dataset.image_shape, dataset.num_classes)
        return dict(params=cost.params, flops=cost.flops, data_sha256=dataset.sha256)

    def observe(self, cell: ImageCell, params: Any) -> dict[str, Any]:
        """Where the heads look and how widely, of encodings that have centres."""
        if cell.model not in ("quadratic", "gaussian"):
            return {}
        model = program_of(cell, self.dataset).merge(params)
        return dict(
            centres=_rounded(model.centres()), precisions=_rounded(model.precisions())
        )

    def result(self, cell: ImageCell, params: Any) -> dict[str, Any]:
        """Accuracy and loss; for seed 0 also attention maps of the middle token."""
        chosen, validation = self._parts(cell)
        hyper = self._hyper(cell, chosen)
        dataset = self.dataset
        seen = chosen[:TRAIN_EVAL]
        accuracy, _ = self._score(
            cell, params, hyper, dataset.train_images[seen], dataset.train_labels[seen]
        )
        found: dict[str, Any] = {"train_accuracy": accuracy}
        if validation is not None:
            images, labels = dataset.train_images, dataset.train_labels
            images, labels, prefix = images[validation], labels[validation], "val"
        else:
            images, labels = dataset.test_images, dataset.test_labels
            prefix = "test"
        accuracy, loss = self._score(cell, params, hyper, images, labels)
        found |= {f"{prefix}_accuracy": accuracy, f"{prefix}_loss": loss}
        if cell.phase == "final" and cell.seed == 0 and cell.model != "resnet":
            found |= self._maps(cell, params, hyper)
        return found

    def _score(
        self,
        cell: ImageCell,
        params: Any,
        hyper: train.Hyper,
        images: np.ndarray,
        labels: np.ndarray,
    ) -> tuple[float, float]:
        """Accuracy and mean loss on some images."""
        program = program_of(cell, self.dataset)
        state = train.TrainState(jnp.zeros((), jnp.int32), params, (), hyper)
        size = math.ceil(EVAL_BATCH / self.mesh.size) * self.mesh.size
        totals = np.zeros(2)
        for begin in range(0, len(labels), size):
            part = slice(begin, begin + size)
            count = len(labels[part])
            fill = ((0, size - count), *((0, 0),) * 3)
            batch = train.Batch(
                np.pad(images[part], fill), np.pad(labels[part], fill[:1])
            )
            valid = (np.arange(size) < count).astype(np.float32)
            batch, valid = train.put((batch, valid), self.mesh, "data")
            totals += [float(x) for x in program.evaluate(state, batch, valid)]
        hits, loss = totals / len(labels)
        return hits, loss

    def _maps(self, cell: ImageCell, params: Any, hyper: train.Hyper) -> dict[str, Any]:
        """Attention of the middle token, [layers][heads][rows][columns].

        With content it is the mean over images, and "content_share" tells how far an
        image's own map is from it: half the summed difference, in [0, 1], averaged.
        """
        model = program_of(cell, self.dataset).merge(params)
        rows, columns = model.grid
        query = rows // 2, columns // 2
        if cell.model != "relative_content":
            return dict(maps=_rounded(model.attention_maps(query), 4))
        images = train.normalize(self.dataset.test_images[:MAP_IMAGES], hyper)
        maps = np.asarray(model.attention_maps(query, images))
        mean = maps.mean(axis=0)
        apart = 0.5 * np.abs(maps - mean).sum(axis=(-2, -1))
        return dict(maps=_rounded(mean, 4), content_share=float(apart.mean()))


def _rounded(values: Any, digits: int = 3) -> list[Any]:
    """Nested lists of numbers that stay short as text."""
    return np.round(np.asarray(values, np.float64), digits).tolist()


@functools.lru_cache(maxsize=16)
def model_cost(
    shape: tuple[Any, ...], image_shape: tuple[int, int, int], num_classes: int
) -> models.Cost:
    """Parameters and FLOPs of a model's shape, see `attn_jax.models.cost`."""
    cell = dataclasses.replace(_example(shape), dtype="float32")
    model = nnx.eval_shape(lambda: build_model(cell, image_shape, num_classes))
    return models.cost(model, image_shape)


def flops_of(
    config: Mapping[str, Any], image_shape: tuple[int, int, int], num_classes: int
) -> float:
    """FLOPs of one image in the model of a stored config."""
    values = (config[name] for name in _SHAPE)
    shape = tuple(tuple(v) if isinstance(v, list) else v for v in values)
    return model_cost(shape, image_shape, num_classes).flops


# ----------------------------------------------------------------- the plan


def cell_of(
    experiment: Experiment,
    task: str,
    model: str,
    start: str | None,
    n: int,
    differs: identity.Differs = (),
) -> ImageCell:
    """The cell of a model, before a learning rate is chosen."""
    own: dict[str, Any]
    if model == "resnet":
        own = dict(
            widths=experiment.resnet_widths,
            stem_stride=experiment.resnet_stem_stride,
        )
    else:
        names = "patch dim depth mlp_dim num_heads".split()
        own = {name: getattr(experiment, name) for name in names}
        own["start"] = start
        if start == "convolution":
            own["alpha"] = experiment.alpha
        if model == "relative_content":
            own["key_dim"] = experiment.key_dim
    return ImageCell(
        task=task,
        model=model,
        n=n,
        seed=0,
        phase="tune",
        updates=min(experiment.updates, experiment.tune_updates),
        batch_size=experiment.batch_size,
        weight_decay=experiment.weight_decay,
        crop=experiment.crop,
        dtype=experiment.dtype,
        differs=differs,
        **own,
    )


def make_studies(
    experiment: Experiment, task: str, differs: identity.Differs = ()
) -> dict[str, Study]:
    """The studies, those that others take their learning rate from first."""
    largest = max(experiment.ns)
    wanted: list[tuple[str, str | None, int]] = []
    if "encodings" in experiment.parts:
        for model in experiment.models:
            start = None if model == "resnet" else "random"
            wanted.append((model, start, largest))
    if "starts" in experiment.parts:
        for n in sorted(experiment.ns, reverse=True):
            for model, start in (
                ("quadratic", "random"),
                ("quadratic", "convolution"),
                ("resnet", None),
            ):
                wanted.append((model, start, n))
    studies: dict[str, Study] = {}
    for model, start, n in dict.fromkeys(wanted):
        rates = experiment.resnet_rates
        if model != "resnet":
            rates = experiment.learning_rates
        cell = cell_of(experiment, task, model, start, n, differs)
        name = " ".join(filter(None, (model, start)))
        content = model == "relative_content"
        studies[f"{name} n={n}"] = Study(
            f"{name} n={n}",
            tuple(dataclasses.replace(cell, learning_rate=rate) for rate in rates),
            experiment.content_updates if content else experiment.updates,
            experiment.seeds,
            tuned_by=None if n == largest else studies[f"{name} n={largest}"],
        )
    return studies


def make_baselines(
    experiment: Experiment, dataset: Dataset
) -> dict[str, Callable[[], dict[str, Any]]]:
    """The trivial baselines, on the very subsets that the networks see."""

    def measure(model: str, n: int, seed: int) -> dict[str, Any]:
        chosen = splits.balanced_subset(
            dataset.train_labels, n, seed=seed, num_classes=dataset.num_classes
        )
        return {"baseline": model} | fit_baseline(
            model,
            dataset.train_images[chosen],
            dataset.train_labels[chosen],
            dataset.test_images,
            dataset.test_labels,
            seed=seed,
        )

    return {
        f"{model} n={n} seed={seed}": functools.partial(measure, model, n, seed)
        for model in experiment.baselines
        for n in experiment.ns
        for seed in range(experiment.seeds)
    }


def floor_differs(name: str, differs: identity.Differs) -> identity.Differs:
    """What a baseline is made of, as far as committed records had it otherwise."""
    model, n, _ = name.split(" ")
    size = int(n.removeprefix("n="))
    if model == "majority" or size <= EARLIER_CAP:
        return differs
    return (*differs, ("fitted_to", min(size, CAPS[model])))


def make_plans(experiment: Experiment) -> list[Plan]:
    """Loads the images and plans the cells.

    Raises:
      DataError: the data cannot be had.
      ValueError: a setting does not fit the data.
    """
    dataset = data.load(experiment.task, allow_fallback=experiment.allow_fallback)
    for n in experiment.ns:
        if n > len(dataset.train_labels):
            raise ValueError(
                f"ns must be at most {len(dataset.train_labels)}, the training images "
                f"of {dataset.name}, got {n}."
            )
    height, width, _ = dataset.image_shape
    if height % experiment.patch or width % experiment.patch:
        raise ValueError(
            f"patch must divide images of {height} x {width} pixels, got "
            f"{experiment.patch}."
        )
    task, differs = identity.of_images(dataset)
    floors = make_baselines(experiment, dataset)
    return [
        Plan(
            task,
            dataset.describe(),
            make_studies(experiment, task, differs),
            floors,
            functools.partial(ImageRunner, dataset),
            {name: floor_differs(name, differs) for name in floors},
        )
    ]
