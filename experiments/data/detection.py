"""Where is what: pictures of several items, with a class and a box for each.

Fashion-MNIST items in several sizes on a dark canvas, composed here: the items are
photographs, the arrangement is artificial, so say it in every report. Boxes are tight:
the rows and columns in which an item has a pixel above `INK`. Scene i of a part is a
function of the settings and of i alone, so a smaller set is the beginning of a larger
one. Scenes of the test part are made of test images, those of the validation part of
the last tenth of the training images, which no training scene shows.

Pictures of one's own are read in the format of COCO (Lin et al., 2014,
arXiv:1405.0312).

Letters: n scenes, M the most items of a scene, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data import images as image_sets
from experiments.data.fetch import DataError, DataSet, seal
from experiments.data.images import Dataset
from experiments.data.scenes import resize
from experiments.data.splits import check_int

NO_ITEM = -1
INK = 32  # of 255; what is darker belongs to no item
ROOM = 64  # places that are tried for an item before it is left out
SIZES = (16, 20, 24, 32, 40)
# Streams of random numbers: the parts of a task share no scene.
_PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Scenes:
    """Pictures and what is in them.

    Attributes:
      images: uint8 [n, side, side, C].
      boxes: float32 [n, M, 4]: centre (x, y), width and height, as shares of the side.
      labels: int32 [n, M]; `NO_ITEM` for rows that hold none, which come last.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: np.ndarray | slice) -> Scenes:
        """Some of the scenes."""
        return Scenes(self.images[rows], self.boxes[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Detection(DataSet):
    """A task of detection.

    Attributes:
      class_names: one a label.
      train, validation, test: the parts.
    """

    class_names: tuple[str, ...]
    train: Scenes
    validation: Scenes
    test: Scenes

    def contents(self) -> str:
        parts = (self.train, self.validation, self.test)
        counts = [
            f"{len(part):,} {name} ({int((part.labels != NO_ITEM).sum()):,} items)"
            for name, part in zip(_PARTS, parts, strict=True)
        ]
        side = self.train.images.shape[1]
        return (
            f"{' + '.join(counts)} pictures of {side}x{side}, "
            f"{len(self.class_names)} classes"
        )


def make_scenes(
    dataset: Dataset,
    n: int,
    *,
    part: str,
    side: int = 96,
    most: int = 6,
    sizes: Sequence[int] = SIZES,
    overlap: bool = False,
    seed: int = 0,
) -> Scenes:
    """Composes the first n scenes of a part.

    A scene has 1 to ``most`` items, each number as often; classes, pictures, sizes and
    places are drawn at random. An item that finds no place is left out, so crowded
    scenes have a few less.

    Args:
      dataset: where the items come from: its test images for the test part, the last
        tenth of its training images for the validation part.
      n: how many scenes.
      part: "train", "validation" or "test".
      side: pixels a side of the canvas.
      most: the most items M of a scene.
      sizes: pixels a side that items are resized to, by area averaging.
      overlap: whether boxes may overlap; the brighter pixel is seen.
      seed: another seed gives other scenes.

    Raises:
      ValueError: an argument is out of range.

    >>> from experiments.data.images import load
    >>> scenes = make_scenes(load("digits"), 3, part="train", side=32, sizes=(8, 12))
    >>> scenes.images.shape, scenes.boxes.shape, bool((scenes.labels[:, 0] >= 0).all())
    ((3, 32, 32, 1), (3, 6, 4), True)
    """
    check_int("n", n, 1)
    check_int("most", most, 1)
    check_int("seed", seed, 0)
    if part not in _PARTS:
        raise ValueError(f"part must be one of {', '.join(_PARTS)}, got {part!r}.")
    if not sizes or not 4 <= min(sizes) <= max(sizes) <= side:
        raise ValueError(
            f"sizes must be numbers of pixels from 4 to side={side}, got {sizes!r}."
        )
    items, classes = dataset.train_images, dataset.train_labels
    held = len(items) - len(items) // 10
    rows = slice(held) if part == "train" else slice(held, None)
    items, classes = items[rows], classes[rows]
    if part == "test":
        items, classes = dataset.test_images, dataset.test_labels
    draws = []
    for i in range(n):
        rng = np.random.Generator(np.random.PCG64([seed, _PARTS.index(part), i]))
        count = int(rng.integers(1, most + 1))
        picks = rng.integers(len(items), size=count)
        kinds = rng.integers(len(sizes), size=count)
        draws.append((picks, kinds, rng.random((count, ROOM, 2))))
    picked, sized = (np.concatenate([d[k] for d in draws]) for k in (0, 1))
    cut: list[np.ndarray] = [np.zeros(0)] * len(picked)
    for index, size in enumerate(sizes):
        members = np.flatnonzero(sized == index)
        used, inverse = np.unique(picked[members], return_inverse=True)
        small = [_cut(x) for x in resize(items[used], size)]
        for member, at in zip(members, inverse, strict=True):
            cut[member] = small[at]

    found = Scenes(
        np.zeros((n, side, side, items.shape[-1]), np.uint8),
        np.zeros((n, most, 4), np.float32),
        np.full((n, most), NO_ITEM, np.int32),
    )
    first = 0
    for i, (picks, _, places) in enumerate(draws):
        taken: list[tuple[int, int, int, int]] = []
        for k, pick in enumerate(picks):
            item = cut[first + k]
            box = _place(places[k], item.shape[:2], side, [] if overlap else taken)
            if box is not None:
                top, left, bottom, right = box
                canvas = found.images[i, top:bottom, left:right]
                np.maximum(canvas, item, out=canvas)
                found.boxes[i, len(taken)] = (
                    (left + right) / 2 / side,
                    (top + bottom) / 2 / side,
                    (right - left) / side,
                    (bottom - top) / side,
                )
                found.labels[i, len(taken)] = classes[pick]
                taken.append(box)
        first += len(picks)
    return found


def _cut(item: np.ndarray) -> np.ndarray:
    """The rectangle of an item that has ink; all of it where there is none."""
    ink = item.max(axis=-1) > INK
    if not ink.any():
        return item
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    places: np.ndarray,
    size: tuple[int, ...],
    side: int,
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of the first place that touches nothing taken."""
    corners = (places * (side + 1 - np.array(size))).astype(int)
    for top, left in corners.tolist():
        bottom, right = top + size[0], left + size[1]
        if all(
            bottom <= t or b <= top or right <= x or y <= left for t, x, b, y in taken
        ):
            return top, left, bottom, right
    return None


@functools.lru_cache(maxsize=4)
def compose(
    items: str = "fashion_mnist",
    *,
    pool: int = 20_000,
    held: int = 1_000,
    side: int = 96,
    most: int = 6,
    sizes: tuple[int, ...] = SIZES,
    overlap: bool = False,
) -> Detection:
    """The task of composed scenes.

    Args:
      items: name of a set of images, see `experiments.data.images.load`.
      pool: training scenes.
      held: validation scenes, and as many test scenes.
      side, most, sizes, overlap: see `make_scenes`.

    Raises:
      DataError: the images cannot be had.
      ValueError: an argument is out of range.
    """
    dataset = image_sets.load(items)
    parts = [
        make_scenes(
            dataset,
            count,
            part=part,
            side=side,
            most=most,
            sizes=sizes,
            overlap=overlap,
        )
        for part, count in (("train", pool), ("validation", held), ("test", held))
    ]
    name = (
        f"scenes-{side}px-{most}items-{'-'.join(map(str, sizes))}"
        f"{'-overlap' * overlap}-pool{pool}{f'-{items}' * (items != 'fashion_mnist')}"
    )
    source = f"composed of {dataset.name} ({dataset.source})"
    return _task(name, source, dataset.class_names, parts)


def _task(
    name: str, source: str, classes: Sequence[str], parts: Sequence[Scenes]
) -> Detection:
    arrays = [a for part in parts for a in (part.images, part.boxes, part.labels)]
    return Detection(name, source, seal(*arrays), tuple(classes), *parts)


# ------------------------------------------------------------------ COCO


def load_coco(
    folder: pathlib.Path, *, side: int, most: int, pool: int, held: int
) -> Detection:
    """Pictures in the format of COCO, resized to squares.

    Looks for ``annotations/instances_train*.json`` and ``instances_val*.json`` with the
    pictures in ``train*/`` and ``val*/`` beside ``annotations``. Crowds are left out,
    and so are pictures without an item or with more than ``most``. Validation pictures
    are the last of the training part; the test part is "val".

    Args:
      folder: that has ``annotations``.
      side: pixels a side that pictures are resized to, whatever their shape.
      most: the most items of a picture.
      pool: the most training pictures.
      held: the most validation pictures, and test pictures.

    Raises:
      DataError: a file is missing or is not of that format.
    """
    train, classes = _coco_part(folder, "train", side, most, pool + held)
    test, others = _coco_part(folder, "val", side, most, held)
    if classes != others:
        raise DataError(f"{folder}: the training and test parts have other categories")
    cut = max(1, len(train) - held)
    parts = [train.take(slice(0, cut)), train.take(slice(cut, None)), test]
    if not all(len(part) for part in parts):
        raise DataError(f"{folder}: two training pictures and a test picture are least")
    return _task(f"coco-{side}px-{most}items", str(folder.name), classes, parts)


def _coco_part(
    folder: pathlib.Path, part: str, side: int, most: int, limit: int
) -> tuple[Scenes, tuple[str, ...]]:
    from PIL import Image

    files = sorted(folder.glob(f"annotations/instances_{part}*.json"))
    if not files:
        raise DataError(f"{folder}/annotations holds no instances_{part}*.json")
    try:
        found = json.loads(files[0].read_text(encoding="utf-8"))
        categories = sorted(found["categories"], key=lambda c: c["id"])
        number = {c["id"]: i for i, c in enumerate(categories)}
        boxes: dict[int, list[tuple[int, list[float]]]] = {}
        for item in found["annotations"]:
            if not item.get("iscrowd") and min(item["bbox"][2:]) > 0:
                at = number[item["category_id"]], [float(x) for x in item["bbox"]]
                boxes.setdefault(item["image_id"], []).append(at)
        listed = [
            x for x in found["images"] if 1 <= len(boxes.get(x["id"], ())) <= most
        ]
        listed = sorted(listed, key=lambda x: x["id"])[:limit]
        names = tuple(c["name"] for c in categories)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{files[0]} is not in COCO's format: {error!r}") from error
    pictures = folder / files[0].stem.removeprefix("instances_")
    made = Scenes(
        np.zeros((len(listed), side, side, 3), np.uint8),
        np.zeros((len(listed), most, 4), np.float32),
        np.full((len(listed), most), NO_ITEM, np.int32),
    )
    for i, entry in enumerate(listed):
        path = pictures / entry["file_name"]
        try:
            with Image.open(path) as picture:
                width, height = picture.size
                small = picture.convert("RGB").resize(
                    (side, side), Image.Resampling.BOX
                )
                made.images[i] = np.asarray(small)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        for k, (label, (x, y, w, h)) in enumerate(boxes[entry["id"]]):
            scaled = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            made.boxes[i, k], made.labels[i, k] = scaled, label
    return made, names


def load_detection(task: str, **settings: Any) -> Detection:
    """Loads a task: "scenes", "toy_scenes" of scikit-learn's digits, or "coco:DIR".

    Args:
      task: its name.
      settings: of `compose`, as far as the task has them.

    Raises:
      DataError: the data cannot be had.
      ValueError: there is no such task.
    """
    if task.startswith("coco:"):
        folder = pathlib.Path(task.removeprefix("coco:")).expanduser()
        own = {k: v for k, v in settings.items() if k not in ("sizes", "overlap")}
        return load_coco(folder, **own)
    if task not in ("scenes", "toy_scenes"):
        raise ValueError(f"task must be scenes, toy_scenes or coco:DIR, got {task!r}.")
    items = "fashion_mnist" if task == "scenes" else "digits"
    return compose(items, **settings)
