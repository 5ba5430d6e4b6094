"""The official files of Long Range Arena, for one who has them.

`lra_release` (7.7 GB) has three of the five tasks: ListOps, Retrieval, and Pathfinder
in its sizes. Text is IMDb and Image is CIFAR-10, which are data sets of their own.

Source: Tay et al., 2020, arXiv:2011.04006. Of Pathfinder the files give no split: ours
is 80, 10 and 10 %, drawn once.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data import listops
from experiments.data.byte_text import as_bytes
from experiments.data.fetch import DataError, seal
from experiments.data.pathfinder import LEVELS
from experiments.data.splits import in_three, random_bits
from experiments.data.symbols import Fold, SymbolData

FOLDERS = dict(
    zip(
        LEVELS,
        ("curv_baseline", "curv_contour_length_9", "curv_contour_length_14"),
        strict=True,
    )
)
EMPTY = "curv_baseline/imgs/0/sample_172.png"  # an empty file of the 32 x 32 images

# Task -> (where it lies in the release, its other settings).
TASKS: Mapping[str, tuple[str, Any]] = {
    "listops": ("listops-1000", 2_000),
    "retrieval": ("tsv_data", 4_000),
    "pathfinder": ("pathfinder32", "hard"),
    "pathfinder_intermediate": ("pathfinder32", "intermediate"),
    "pathfinder_easy": ("pathfinder32", "easy"),
    "pathx": ("pathfinder128", "hard"),
}


def load(task: str, release: pathlib.Path) -> SymbolData:
    """Reads a task of the official release.

    Args:
      task: a name in `TASKS`.
      release: the folder ``lra_release``, or one around it.

    Raises:
      ValueError: the release has no such task.
      DataError: the folder or a file is not there, or is something else.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    name, more = TASKS[task]
    found = sorted(release.glob(f"**/{name}")) if release.is_dir() else []
    if not found:
        raise DataError(f"{release} has no folder {name}: it is no lra_release")
    try:
        if task == "listops":
            return _listops(found[0], more)
        if task == "retrieval":
            return _retrieval(found[0], more)
        return _pathfinder(task, found[0] / FOLDERS[more])
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise DataError(f"{found[0]} cannot be read as {task}: {error!r}") from error


def _data(
    task: str,
    folder: pathlib.Path,
    parts: Sequence[Fold],
    symbols: int,
    classes: int,
    grid: tuple[int, int] | None = None,
) -> SymbolData:
    train, validation, test = parts
    return SymbolData(
        f"{task}_official_{train.inputs.shape[-1]}",
        str(folder),
        seal(*(x for part in parts for x in part)),
        symbols,
        classes,
        train,
        validation,
        test,
        grid=grid,
    )


def _listops(folder: pathlib.Path, length: int) -> SymbolData:
    number = {token: i for i, token in enumerate(listops.TOKENS)}
    parts = []
    for part in ("train", "val", "test"):
        lines = (folder / f"basic_{part}.tsv").read_text("utf-8").splitlines()[1:]
        rows = [line.split("\t") for line in lines if line]
        codes = [
            bytes(number[t] for t in source.split() if t not in "()")
            for source, _ in rows
        ]
        labels = np.array([int(target) for _, target in rows])
        x, lengths = as_bytes(codes, length)
        parts.append(Fold.of(x, labels, lengths))
    return _data("listops", folder, parts, len(listops.TOKENS), 10)


def _retrieval(folder: pathlib.Path, length: int) -> SymbolData:
    parts = []
    for part in ("train", "eval", "test"):
        labels: list[int] = []
        texts: list[bytes] = []
        with (folder / f"new_aan_pairs.{part}.tsv").open(encoding="utf-8") as file:
            for line in file:
                label, _, _, one, two = line.rstrip("\n").split("\t")
                labels.append(int(float(label)))
                texts += [one.encode(), two.encode()]
        x, lengths = as_bytes(texts, length)
        pairs = x.reshape(-1, 2, length), lengths.reshape(-1, 2)
        parts.append(Fold.of(pairs[0], np.array(labels), pairs[1]))
    return _data("retrieval", folder, parts, 256, 2)


def _pathfinder(task: str, folder: pathlib.Path) -> SymbolData:
    from matplotlib.image import imread

    files = sorted((folder / "metadata").glob("*.npy"), key=lambda p: int(p.stem))
    images, labels = [], []
    for line in (x for file in files for x in file.read_text().splitlines()):
        place, name, _, label = line.split()[:4]
        path = folder / place / name
        if not path.as_posix().endswith(EMPTY):
            grey = np.asarray(imread(path), np.float32)
            images.append(np.rint(255 * grey.reshape(*grey.shape[:2], -1)[..., 0]))
            labels.append(int(label))
    x = np.stack(images).astype(np.uint8)
    rows = in_three(random_bits(0, 29).random_raw(len(x)))
    flat, y = x.reshape(len(x), -1), np.array(labels)
    parts = [Fold.of(flat[part], y[part]) for part in rows]
    return _data(task, folder, parts, 256, 2, (x.shape[1], x.shape[2]))
