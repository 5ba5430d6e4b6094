"""The data of the experiment: natural image sets, and scenes composed of them."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Literal

from experiments.data import images as data
from experiments.data.images import Dataset
from experiments.data.scenes import chance_level, make_scenes, num_labels

_SHAPES = {
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "digits": ((8, 8, 1), 10),
}

#: What the name of a task says of composed scenes.
SCENES_NAME = re.compile(
    r"scenes-(?P<rule>\w+)-(?P<grid>\d+)x\d+-(?P<cells>\d+)cells-"
    r"(?P<classes>\d+)classes-(?P<item>\d+)px"
)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Composed scenes: items on a grid, a label that relates far-apart parts."""

    rule: Literal["pointer", "match"] = "pointer"
    """"pointer": the centre item's class says which rim cell's class is the label.
    "match": the label is the rim cell that shows the same class as the centre."""
    grid: int = 3
    """Cells a side, odd."""
    item: int = 14
    """Pixels a side of one item."""
    cells: int = 4
    """Rim cells that hold an item."""
    item_classes: int | None = None
    """Classes that items are drawn from; by default all."""
    pool: int = 100_000
    """Training scenes of which subsets are drawn."""
    test: int = 10_000
    """Test scenes, composed of test images alone."""

    def __post_init__(self) -> None:
        for name in ("pool", "test"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"scenes.{name} must be at least 1, got {getattr(self, name)!r}."
                )


def load_task(task: str, scenes: Scenes, *, allow_fallback: bool = False) -> Dataset:
    """Loads a data set by name, or composes scenes of its items.

    Args:
      task: a name that `experiments.data.images.load` takes, or "scenes", made of
        Fashion-MNIST.
      scenes: how scenes are composed.
      allow_fallback: fall back to scikit-learn's digits where Fashion-MNIST cannot
        be had.

    Raises:
      DataError, ValueError: see `experiments.data.images.load` and `make_scenes`.
    """
    if task != "scenes":
        return data.load(task, allow_fallback=allow_fallback)
    items = data.load("fashion_mnist", allow_fallback=allow_fallback)
    parts = {}
    for split, count in (("train", scenes.pool), ("test", scenes.test)):
        parts[split] = make_scenes(
            items,
            count,
            split=split,
            task=scenes.rule,
            grid=scenes.grid,
            item=scenes.item,
            cells=scenes.cells,
            item_classes=scenes.item_classes,
        )
    classes = scenes.item_classes or items.num_classes
    labels = num_labels(scenes.rule, cells=scenes.cells, item_classes=classes)
    chance = chance_level(scenes.rule, cells=scenes.cells, item_classes=classes)
    name = task_name(task, scenes)
    if items.name != "fashion_mnist":  # the fallback
        name += f"-{items.name}"
    digest = hashlib.sha256(items.sha256.encode())
    for images, targets in parts.values():
        digest.update(images.tobytes())
        digest.update(targets.tobytes())
    return Dataset(
        name=name,
        source=f"composed of {items.name} ({items.source}); guessing gives "
        f"{chance:.3f}",
        train_images=parts["train"][0],
        train_labels=parts["train"][1],
        test_images=parts["test"][0],
        test_labels=parts["test"][1],
        class_names=tuple(str(i) for i in range(labels)),
        sha256=digest.hexdigest(),
    )


def task_name(task: str, scenes: Scenes) -> str:
    """The name under which cells of a task are stored: all that makes its data.

    >>> task_name("scenes", Scenes())
    'scenes-pointer-3x3-4cells-10classes-14px'
    """
    if task != "scenes":
        return task
    classes = scenes.item_classes or 10
    name = (
        f"scenes-{scenes.rule}-{scenes.grid}x{scenes.grid}-{scenes.cells}cells-"
        f"{classes}classes-{scenes.item}px"
    )
    default = Scenes()
    if (scenes.pool, scenes.test) != (default.pool, default.test):
        name += f"-pool{scenes.pool}-test{scenes.test}"
    return name


def shape_of(task: str) -> tuple[tuple[int, int, int], int] | None:
    """Shape of a task's images and number of its classes, without its data.

    None for a file of one's own, which alone knows.

    >>> shape_of("scenes-pointer-3x3-4cells-10classes-14px")
    ((42, 42, 1), 10)
    """
    found = SCENES_NAME.match(task)
    if found is None:
        return _SHAPES.get(task)
    if task.endswith("-digits"):  # the fallback
        return None
    grid, item, cells, classes = (
        int(found[name]) for name in ("grid", "item", "cells", "classes")
    )
    labels = num_labels(found["rule"], cells=cells, item_classes=classes)
    return (grid * item, grid * item, 1), labels


def test_size(task: str) -> int | None:
    """Number of a task's test images, without its data; None where it alone knows.

    >>> test_size("scenes-pointer-3x3-4cells-10classes-14px")
    10000
    """
    if SCENES_NAME.match(task):
        own = re.search(r"-test(\d+)", task)
        return int(own[1]) if own else Scenes().test
    return 10_000 if task in ("fashion_mnist", "cifar10", "cifar100") else None
