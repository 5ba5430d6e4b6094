"""Composed scenes: a task without end, made of real images, whose label is a relation.

Small items from an image set stand on a grid. Which class is where is drawn at
random; the label needs the item in the centre *and* one on the rim:

* ``pointer``: the class of the centre item is the number of a rim cell, and the
  class of the item in that cell is the label;
* ``match``: the label is the number of the rim cell whose item is of the same class
  as the centre item.

Rim cells are numbered clockwise from the top left. The classes on the rim are as
equally frequent as they can be in every scene, so that counting items tells nothing:
a model that does not relate the centre to the rim stays at :func:`chance_level`.

Scene i is a function of the seed and i alone, whatever n and start are: there are as
many scenes as one likes, a smaller set is the beginning of a larger one, and scenes of
the test split are made of test images only.

The items are photographs, the arrangement is artificial: say so in every report.
"""

from __future__ import annotations

import math

import numpy as np

from experiments.data.images import Dataset
from experiments.data.splits import check_int

TASKS = ("pointer", "match")
_SPLITS = ("train", "test")
# One random number a scene from each stream; vectors take a range of streams.
_PERMUTE, _SHUFFLE, _TARGET, _PICK = 0, 1 << 16, 2 << 16, 3 << 16


def make_scenes(
    dataset: Dataset,
    n: int,
    *,
    split: str,
    task: str,
    grid: int = 3,
    item: int = 14,
    cells: int = 8,
    item_classes: int | None = None,
    seed: int = 0,
    start: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Make the scenes ``start .. start+n-1`` of an endless sequence.

    Args:
      dataset: where the items come from.
      n: how many scenes.
      split: ``train`` or ``test``: which images of the dataset serve as items.
      task: ``pointer`` or ``match``.
      grid: cells a side, odd.
      item: pixels a side of one item; images are resized to it by area averaging.
      cells: how many rim cells hold an item, evenly spread, the outermost ring first;
        the others stay black. ``pointer`` needs as many classes in the dataset,
        ``match`` as many item_classes.
      item_classes: the classes ``0..item_classes-1`` occur on the rim; by default all.
      seed: another seed gives other scenes.
      start: number of the first scene.

    Returns:
      ``(images, labels)``, uint8 [n, grid*item, grid*item, C] and int32 [n].

    Raises:
      ValueError: an argument is out of range, or a class has no image.
    """
    classes = dataset.num_classes if item_classes is None else item_classes
    _check_task(task, cells, classes)
    check_int("n", n, 1)
    check_int("start", start, 0)
    check_int("seed", seed, 0)
    check_int("item", item, 1)
    places = _rim(grid)
    if cells > len(places):
        raise ValueError(
            f"cells={cells} is too many: a grid of {grid}x{grid} has {len(places)} "
            "cells besides the centre"
        )
    if classes > dataset.num_classes:
        raise ValueError(
            f"item_classes={classes} is too many: {dataset.name} has "
            f"{dataset.num_classes} classes"
        )
    if task == "pointer" and cells > dataset.num_classes:
        raise ValueError(
            f"cells={cells} is too many for task 'pointer': the centre item's class "
            f"names the cell, and {dataset.name} has {dataset.num_classes} classes"
        )
    if split not in _SPLITS:
        raise ValueError(f"split must be one of {_SPLITS}, got {split!r}")
    if split == "train":
        images, image_labels = dataset.train_images, dataset.train_labels
    else:
        images, image_labels = dataset.test_images, dataset.test_labels

    random = _Random(seed, split, start, n)
    rim = _rim_classes(random, cells, classes)
    target = random.below(_TARGET, cells)
    pointed = np.take_along_axis(rim, target[:, None], axis=1)[:, 0]
    centre, labels = (target, pointed) if task == "pointer" else (pointed, target)

    shown = np.concatenate([centre[:, None], rim], axis=1)
    picked = _pick_images(random, shown, image_labels, split)
    used, inverse = np.unique(picked, return_inverse=True)
    items = resize(images[used], item)
    inverse = inverse.reshape(picked.shape)
    channels = images.shape[-1]
    scenes = np.zeros((n, grid, item, grid, item, channels), np.uint8)
    middle = (grid // 2, grid // 2)
    spread = [places[k * _ring_room(grid, cells) // cells] for k in range(cells)]
    for column, (y, x) in enumerate([middle, *spread]):
        scenes[:, y, :, x] = items[inverse[:, column]]
    side = grid * item
    return scenes.reshape(n, side, side, channels), labels.astype(np.int32)


def num_labels(task: str, *, cells: int, item_classes: int) -> int:
    """Number of different labels of a task.

    Raises:
      ValueError: the task is unknown, or the numbers do not suit it.

    >>> num_labels("pointer", cells=8, item_classes=10)
    10
    >>> num_labels("match", cells=8, item_classes=10)
    8
    """
    _check_task(task, cells, item_classes)
    return item_classes if task == "pointer" else cells


def chance_level(task: str, *, cells: int, item_classes: int) -> float:
    """Highest accuracy without relating the centre item to the rim.

    For ``pointer`` it is ⌈cells / item_classes⌉ / cells: read all rim items perfectly
    and name the most frequent class. For ``match`` it is 1 / cells. (Always giving the
    same answer scores ``1 / num_labels``, which is never more.)

    Raises:
      ValueError: the task is unknown, or the numbers do not suit it.

    >>> chance_level("pointer", cells=8, item_classes=10)
    0.125
    >>> chance_level("pointer", cells=8, item_classes=2)
    0.5
    """
    _check_task(task, cells, item_classes)
    if task == "pointer":
        return math.ceil(cells / item_classes) / cells
    return 1 / cells


def span(*, grid: int, item: int, cells: int) -> int:
    """Pixels a side of the smallest square with the centre and any one rim item in it.

    A unit whose receptive field is narrower cannot see the two items whole.

    >>> span(grid=3, item=14, cells=8)
    28
    """
    places = _rim(grid)
    check_int("item", item, 1)
    if not 1 <= cells <= len(places):
        raise ValueError(f"cells must be in 1..{len(places)}, got {cells}")
    return (grid // 2 + 1) * item


def _check_task(task: str, cells: int, item_classes: int) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    check_int("cells", cells, 2)
    check_int("item_classes", item_classes, 2)
    if task == "match" and cells > item_classes:
        raise ValueError(
            f"cells={cells} is too many for task 'match' with {item_classes} item "
            "classes: all rim items must differ in class"
        )


def _rim(grid: int) -> list[tuple[int, int]]:
    """Cells besides the centre: outermost ring first, each clockwise from top left."""
    check_int("grid", grid, 3)
    if grid % 2 == 0:
        raise ValueError(f"grid must be odd, to have a centre, got {grid}")
    cells = []
    for low in range(grid // 2):
        high = grid - 1 - low
        side = range(high - low)
        cells += [(low, low + k) for k in side]
        cells += [(low + k, high) for k in side]
        cells += [(high, high - k) for k in side]
        cells += [(high - k, low) for k in side]
    return cells


def _ring_room(grid: int, cells: int) -> int:
    """Over how many cells of the rim to spread: whole rings, as few as have room."""
    room = 0
    for low in range(grid // 2):
        room += 4 * (grid - 1 - 2 * low)
        if room >= cells:
            break
    return room


class _Random:
    """Random numbers for scenes ``start..start+n-1``, each by its own number alone."""

    def __init__(self, seed: int, split: str, start: int, n: int) -> None:
        key = np.random.SeedSequence([int(seed), _SPLITS.index(split)])
        self._key = key.generate_state(1, np.uint64)[0]
        self._base = _mix(np.arange(start, start + n, dtype=np.uint64) ^ self._key)

    def bits(self, stream: int, width: int) -> np.ndarray:
        """uint64 [n, width] from the streams ``stream..stream+width-1``."""
        streams = _mix(np.arange(stream, stream + width, dtype=np.uint64) + self._key)
        return _mix(self._base[:, None] ^ streams)

    def below(self, stream: int, bound: int) -> np.ndarray:
        """int64 [n], uniform in ``0..bound-1``."""
        return _scale(self.bits(stream, 1)[:, 0], np.uint64(bound)).astype(np.int64)

    def shuffles(self, stream: int, width: int) -> np.ndarray:
        """int64 [n, width], each row a permutation of ``0..width-1``."""
        return np.argsort(self.bits(stream, width), axis=1, kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64, a bijection that scatters every bit of its input."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scale(bits: np.ndarray, bound: np.ndarray | np.uint64) -> np.ndarray:
    """Map uint64 to ``0..bound-1``, evenly up to bound / 2**32."""
    return ((bits >> np.uint64(32)) * bound) >> np.uint64(32)


def _rim_classes(random: _Random, cells: int, classes: int) -> np.ndarray:
    """int64 [n, cells]: every class as often as any other, give or take one."""
    dealt = random.shuffles(_PERMUTE, classes)[:, np.arange(cells) % classes]
    return np.take_along_axis(dealt, random.shuffles(_SHUFFLE, cells), axis=1)


def _pick_images(
    random: _Random, shown: np.ndarray, labels: np.ndarray, split: str
) -> np.ndarray:
    """int64 [n, 1+cells]: which image shows each class; the centre's on no rim cell."""
    order = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[order], np.arange(shown.max() + 2))
    first, counts = first[:-1], np.diff(first)
    if not counts[np.unique(shown)].all():
        absent = np.unique(shown)[counts[np.unique(shown)] == 0].tolist()
        raise ValueError(f"the {split} split has no image of class {absent[0]}")
    room = counts[shown].astype(np.uint64)
    place = _scale(random.bits(_PICK, shown.shape[1]), room).astype(np.int64)
    # One image on the centre and on the rim would let pixels do for classes.
    same = (shown[:, 1:] == shown[:, :1]) & (place[:, 1:] == place[:, :1])
    place[:, 1:] = np.where(same, place[:, 1:] + 1, place[:, 1:]) % counts[shown[:, 1:]]
    return order[first[shown] + place]


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [n, H, W, C] to [n, size, size, C] by exact area averaging.

    >>> resize(np.array([[[[0], [2]], [[4], [6]]]], np.uint8), 1).tolist()
    [[[[3]]]]
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    rows, columns = _overlaps(height, size), _overlaps(width, size)
    # Whole numbers that float32 holds exactly, so that the sum needs no order.
    exact = np.float32 if 255 * height * width < 2**24 else np.float64
    rows, columns = rows.astype(exact), columns.astype(exact)
    out = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    for begin in range(0, len(images), 4096):
        part = np.moveaxis(images[begin : begin + 4096], -1, 1).astype(exact)
        sums = rows @ part @ columns.T
        mean = np.floor(sums / exact(height * width) + exact(0.5))
        out[begin : begin + 4096] = np.moveaxis(mean, 1, -1)
    return out


def _overlaps(old: int, new: int) -> np.ndarray:
    """How much of each old pixel lies in each new one, [new, old]; rows sum to old."""
    low = np.maximum(np.arange(new)[:, None] * old, np.arange(old) * new)
    high = np.minimum(np.arange(1, new + 1)[:, None] * old, np.arange(1, old + 1) * new)
    return np.maximum(high - low, 0)
