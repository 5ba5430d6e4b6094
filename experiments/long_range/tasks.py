"""The tasks of the arena: for each its data, in the size of a preset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from experiments.data import listops, pathfinder, recall
from experiments.data.symbols import SymbolData

Load = Callable[[], SymbolData]
SIZES = ("smoke", "cpu", "paper")
FEW = (32, 8, 16)  # sequences of a smoke run


Sized = dict[str, Load]


def _sizes(make: Callable[..., SymbolData], **sizes: dict[str, Any]) -> Sized:
    """What makes the data of each size."""
    return {size: functools.partial(make, **sizes[size]) for size in SIZES}


def _pathfinder(level: str, side: int) -> Sized:
    """Pathfinder of a difficulty; as many images as the paper has where asked."""
    return _sizes(
        functools.partial(pathfinder.pathfinder, level, side),
        smoke=dict(sizes=FEW),
        cpu=dict(),
        paper=dict(sizes=(160_000, 20_000, 20_000)),
    )


TASKS: Mapping[str, Sized] = {
    "listops": _sizes(
        listops.listops,
        smoke=dict(least=4, most=20, sizes=FEW),
        cpu=dict(),
        paper=dict(least=500, most=2_000, sizes=(96_000, 2_000, 2_000)),
    ),
    "pathfinder": _pathfinder("hard", 32),
    "pathfinder_easy": _pathfinder("easy", 32),
    "pathfinder_intermediate": _pathfinder("intermediate", 32),
    "pathx": _pathfinder("hard", 128),
    "recall": _sizes(
        recall.recall,
        smoke=dict(pairs=(1, 2), keys=4, sizes=FEW),
        cpu=dict(),
        paper=dict(
            pairs=(4, 8, 16, 32, 64, 128), keys=1_024, sizes=(100_000, 3_000, 6_000)
        ),
    ),
    "copying": _sizes(
        recall.copying,
        smoke=dict(length=12, data=2, kinds=4, sizes=FEW),
        cpu=dict(),
        paper=dict(length=1_024, data=16, kinds=16, sizes=(100_000, 3_000, 3_000)),
    ),
    "induction": _sizes(
        recall.induction,
        smoke=dict(length=12, sizes=FEW),
        cpu=dict(),
        paper=dict(length=1_024, sizes=(100_000, 3_000, 3_000)),
    ),
}
"""Name -> size -> what gives the data."""

WHERE_OTHERS = ("listops", "text", "retrieval", "image", "pathfinder")
"""Tasks that published tables have a column for."""
