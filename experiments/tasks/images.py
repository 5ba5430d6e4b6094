"""Classification of images: subsets, augmentation, the loss, scoring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.core import devices, optim
from experiments.core.cell import Cell, Count, Dtype, Natural
from experiments.core.loop import Indexed, Program, Task, in_epochs
from experiments.data.images import Dataset, normalize_stats
from experiments.data.splits import balanced_subset, train_validation_split

Array = jax.Array | np.ndarray


class Batch(NamedTuple):
    """Images uint8 [B, height, width, C] and labels int32 [B]."""

    image: Array
    label: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCell(Cell):
    """A cell that is trained on images.

    Attributes:
      n: number of training images.
      batch_size: images a step, over all devices.
      crop: pixels of padding before a random crop; 0 = off.
      flip: random left-right flips.
      dtype: of the computation; parameters stay float32.
    """

    n: Count
    batch_size: Count = 64
    crop: Natural = 0
    flip: bool = False
    dtype: Dtype = "float32"


@dataclasses.dataclass(frozen=True)
class Augment:
    """What is done to training images; each choice compiles its own program.

    Attributes:
      flip: mirror left-right with probability 1/2.
      crop: pad by so many pixels and cut at a random offset; 0 = off.
      mixup: blend pairs of images and labels, λ ~ Beta(α, α), α in the recipe
        (Zhang et al., arXiv:1710.09412).
      dropout: pass an rng to the model, for dropout or random attention. (One that
        has an `AttentionState` gets it anyway.)
      alone: the model never draws: augmentation has the key of a step for itself.
    """

    flip: bool = False
    crop: int = 0
    mixup: bool = False
    dropout: bool = False
    alone: bool = False


def normalize(images: Array, hyper: optim.Hyper) -> jax.Array:
    """Pixels 0..255 to float32 of mean 0 and deviation 1 on the training subset."""
    pixels = jnp.asarray(images).astype(jnp.float32) / 255.0
    mean, std = hyper.more["pixel_mean"], hyper.more["pixel_std"]
    return (pixels - _channels(mean)) / _channels(std)


def _channels(x: Array) -> jax.Array:
    """[C] as [1, 1, 1, C]."""
    return jax.lax.expand_dims(x, (0, 1, 2))


def augment(
    images: jax.Array,
    labels: jax.Array,
    rng: jax.Array,
    hyper: optim.Hyper,
    choice: Augment,
) -> tuple[jax.Array, jax.Array]:
    """Augments normalised images [B, h, w, C] and one-hot labels [B, classes]."""
    flip_rng, crop_rng, lam_rng, pair_rng = jax.random.split(rng, 4)
    batch, height, width, _ = images.shape
    if choice.flip:
        flipped = jax.random.bernoulli(flip_rng, 0.5, (batch, 1, 1, 1))
        images = jnp.where(flipped, images[:, :, ::-1], images)
    if choice.crop:
        pad = choice.crop
        dark = _channels((0.0 - hyper.more["pixel_mean"]) / hyper.more["pixel_std"])
        padded = jnp.pad(images - dark, ((0, 0), (pad, pad), (pad, pad), (0, 0))) + dark
        corner = jax.random.randint(crop_rng, (batch, 2), 0, 2 * pad + 1)
        images = jax.vmap(
            lambda image, at: jax.lax.dynamic_slice(
                image, (at[0], at[1], 0), (height, width, image.shape[-1])
            )
        )(padded, corner)
    if choice.mixup:
        alpha = hyper.more["mixup"]
        lam = jax.random.beta(lam_rng, alpha, alpha)
        pair = jax.random.permutation(pair_rng, batch)
        images = lam * images + (1.0 - lam) * images[pair]
        labels = lam * labels + (1.0 - lam) * labels[pair]
    return images, labels


def image_loss(apply: optim.Apply, num_classes: int, choice: Augment) -> optim.LossFn:
    """Cross-entropy of augmented images, as `optim.make_step` takes it."""

    def loss(
        params: Any, batch: Batch, rng: jax.Array, hyper: optim.Hyper
    ) -> tuple[jax.Array, dict[str, Any]]:
        augment_rng, dropout_rng = (
            (rng, None) if choice.alone else jax.random.split(rng)
        )
        images = normalize(batch.image, hyper)
        labels = jax.nn.one_hot(batch.label, num_classes, dtype=jnp.float32)
        images, labels = augment(images, labels, augment_rng, hyper, choice)
        smoothing = hyper.more["label_smoothing"]
        labels = labels * (1.0 - smoothing) + smoothing / num_classes
        draws = choice.dropout or getattr(apply, "has_state", False)
        logits, moved = optim.training_call(
            apply, params, images, rng=dropout_rng if draws else None
        )
        logits = logits.astype(jnp.float32)
        hits = jnp.argmax(logits, -1) == jnp.argmax(labels, -1)
        accuracy = jnp.mean(hits.astype(jnp.float32))
        found = optax.softmax_cross_entropy(logits, labels).mean()
        return found, {"accuracy": accuracy, optim.MOVED: moved}

    return loss


def image_program(
    build: Callable[[int], Any],
    split: Callable[[Any], tuple[optim.Apply, Any]],
    num_classes: int,
    choice: Augment,
) -> Program:
    """The program of a model.

    Args:
      build: seed -> the model.
      split: the model -> (apply, parameters), such as `optim.split_model`.
      num_classes: how many classes there are.
      choice: what is done to training images.
    """
    apply, _ = split(build(0))

    def evaluate(trained: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """(hits, summed loss) of the images that count."""
        params, hyper = trained
        images, labels, valid = batch
        logits = apply(params, normalize(images, hyper)).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        hits = (jnp.argmax(logits, -1) == labels).astype(jnp.float32)
        return jnp.sum(hits * valid), jnp.sum(loss * valid)

    return Program(
        lambda seed: split(build(seed))[1],
        image_loss(apply, num_classes, choice),
        {"apply": apply, "evaluate": evaluate},
    )


class ImageTask(Task):
    """Trains on nested class-balanced subsets and scores on held-out images.

    Args:
      dataset: the images.
    """

    unit = "images"
    eval_batch = 1000  # images of one call when scoring
    train_eval = 5000  # training images that the accuracy on seen data is of

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self._all = Batch(dataset.train_images, dataset.train_labels)

    def validation_size(self, cell: Any) -> tuple[float, int]:
        """(share of the subset, most images) of the validation part."""
        return 0.2, 5000

    def parts(self, cell: ImageCell) -> tuple[np.ndarray, np.ndarray | None]:
        """Indices of the images to train on, and of the validation part in tuning."""
        labels, classes = self.dataset.train_labels, self.dataset.num_classes
        subset = balanced_subset(labels, cell.n, seed=cell.seed, num_classes=classes)
        if cell.phase == "final":
            return subset, None
        fraction, maximum = self.validation_size(cell)
        return train_validation_split(
            labels, subset, fraction=fraction, maximum=maximum, seed=cell.seed
        )

    def batches(self, cell: ImageCell) -> Indexed:
        chosen, _ = self.parts(cell)
        positions = in_epochs(cell, len(chosen))
        return Indexed(self._all, lambda step: chosen[positions(step)])

    def hyper(self, cell: Any) -> optim.Hyper:
        mean, std = normalize_stats(self.dataset.train_images[self.parts(cell)[0]])
        return optim.hyper_of(
            cell,
            label_smoothing=getattr(cell, "label_smoothing", 0.0),
            mixup=getattr(cell, "mixup", 0.0),
            pixel_mean=mean,
            pixel_std=std,
        )

    def trace(self, cell: ImageCell, program: Program) -> None:
        """Traces a step, and scoring."""
        super().trace(cell, program)
        rows = np.arange(min(self.eval_batch, len(self.dataset.train_labels)))
        batch = jax.tree.map(lambda x: x[rows], self._all)
        valid = np.ones(len(rows), np.float32)
        trained = program.initial_params(0), self.hyper(cell)
        jax.eval_shape(program.more["evaluate"], trained, (*batch, valid))

    def score(self, cell: ImageCell, params: Any) -> dict[str, Any]:
        """Accuracy and loss; the test images are read in the phase "final" alone."""
        chosen, validation = self.parts(cell)
        dataset, trained = self.dataset, (params, self.hyper(cell))
        evaluate = self.program(cell).more["evaluate"]

        def measure(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
            # One shape whatever the number: each would compile a program, which takes
            # longer than the images that it leaves out.
            devices_ = jax.device_count()
            size = math.ceil(self.eval_batch / devices_) * devices_
            totals = np.zeros(2)
            for begin in range(0, len(labels), size):
                part = slice(begin, begin + size)
                count = len(labels[part])
                fill = ((0, size - count), *((0, 0),) * 3)
                valid = (np.arange(size) < count).astype(np.float32)
                batch = np.pad(images[part], fill), np.pad(labels[part], fill[:1])
                totals += devices.call(evaluate, trained, (*batch, valid))
            hits, loss = totals / len(labels)
            return float(hits), float(loss)

        seen = chosen[: self.train_eval]
        train = measure(dataset.train_images[seen], dataset.train_labels[seen])
        prefix, images, labels = "test", dataset.test_images, dataset.test_labels
        if validation is not None:
            prefix = "val"
            images = dataset.train_images[validation]
            labels = dataset.train_labels[validation]
        accuracy, loss = measure(images, labels)
        return {
            f"{prefix}_accuracy": accuracy,
            f"{prefix}_loss": loss,
            "train_accuracy": train[0],
        }
