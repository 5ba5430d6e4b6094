"""The tasks of the arena: for each its data, in the size of a preset."""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.data import (
    byte_text,
    images,
    listops,
    lra_release,
    pathfinder,
    recall,
)
from experiments.data.fetch import DataError
from experiments.data.symbols import SymbolData

Load = Callable[[], SymbolData]
Sized = dict[str, Load]
SIZES = ("smoke", "cpu", "paper")
FEW = (32, 8, 16)  # sequences of a smoke run
MANY = (20_000, 1_000, 2_000)  # of a run on a CPU
TOY = 64  # texts of a smoke run


def _sizes(make: Callable[..., SymbolData], **sizes: dict[str, Any]) -> Sized:
    """What makes the data of each size."""
    return {size: functools.partial(make, **sizes[size]) for size in SIZES}


def _pathfinder(level: str, side: int) -> Sized:
    """Pathfinder of a difficulty; as many images as the paper has where asked."""
    return _sizes(
        functools.partial(pathfinder.pathfinder, level, side),
        smoke=dict(sizes=FEW),
        cpu=dict(sizes=MANY),
        paper=dict(sizes=(160_000, 20_000, 20_000)),
    )


def _image(name: str, sizes: tuple[int, int, int]) -> SymbolData:
    return images.pixels(images.load(name), sizes)


def _cifar10() -> SymbolData:
    """CIFAR-10 in grey; where it cannot be had, Fashion-MNIST, and that is said."""
    try:
        return _image("cifar10", (45_000, 5_000, 10_000))
    except DataError as error:
        print(
            f"WARNING: Fashion-MNIST stands in for CIFAR-10: {error}", file=sys.stderr
        )
        return _image("fashion_mnist", (50_000, 5_000, 10_000))


def _toy_text(name: str) -> SymbolData:
    return byte_text.classified(name, byte_text.toy_documents(TOY), 16)


def _toy_retrieval() -> SymbolData:
    toy = byte_text.toy_documents(TOY, translated=True)
    return byte_text.translated("retrieval", toy, 16)


def _texts(name: str, make: Callable[[int], SymbolData], cpu: int, paper: int) -> Sized:
    """Bytes of texts, by their number; smoke runs read toy texts."""
    return dict(
        smoke=functools.partial(_toy_text, name),
        cpu=functools.partial(make, cpu),
        paper=functools.partial(make, paper),
    )


TASKS: Mapping[str, Sized] = {
    "listops": _sizes(
        listops.listops,
        smoke=dict(least=4, most=20, sizes=FEW),
        cpu=dict(sizes=MANY),
        paper=dict(least=500, most=2_000, sizes=(96_000, 2_000, 2_000)),
    ),
    "text": _texts("text", byte_text.spam, 512, 4_096),
    "text_long": _texts("text", byte_text.spam, 1_024, 4_096),
    "language": _texts("language", byte_text.language, 64, 256),
    "retrieval": dict(
        smoke=_toy_retrieval,
        cpu=functools.partial(byte_text.retrieval, 256, sizes=MANY),
        paper=functools.partial(byte_text.retrieval, 512),
    ),
    "image": dict(
        smoke=functools.partial(_image, "digits", (40, 20, 20)),
        cpu=functools.partial(_image, "fashion_mnist", MANY),
        paper=_cifar10,
    ),
    "pathfinder": _pathfinder("hard", 32),
    "pathfinder_easy": _pathfinder("easy", 32),
    "pathfinder_intermediate": _pathfinder("intermediate", 32),
    "pathx": _pathfinder("hard", 128),
    "recall": _sizes(
        recall.recall,
        smoke=dict(pairs=(1, 2), keys=4, sizes=FEW),
        cpu=dict(sizes=MANY),
        paper=dict(
            pairs=(4, 8, 16, 32, 64, 128), keys=1_024, sizes=(100_000, 3_000, 6_000)
        ),
    ),
    "copying": _sizes(
        recall.copying,
        smoke=dict(length=12, data=2, kinds=4, sizes=FEW),
        cpu=dict(sizes=MANY),
        paper=dict(length=1_024, data=16, kinds=16, sizes=(100_000, 3_000, 3_000)),
    ),
    "induction": _sizes(
        recall.induction,
        smoke=dict(length=12, sizes=FEW),
        cpu=dict(sizes=MANY),
        paper=dict(length=1_024, sizes=(100_000, 3_000, 3_000)),
    ),
}
"""Name -> size -> what gives the data."""


def load(name: str, size: str, release: pathlib.Path | None = None) -> SymbolData:
    """The data of a task.

    Args:
      name: in `TASKS`.
      size: in `SIZES`.
      release: folder of the official files, from which the tasks that they hold are
        read; None draws or fetches ours.

    Raises:
      DataError: they cannot be had.
    """
    if release is not None and name in lra_release.TASKS:
        return lra_release.load(name, release)
    return TASKS[name][size]()
