"""Figures of the arena that are no lines: dots of speed, spans, examples of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core.plots import (
    Board,
    Standing,
    Style,
    Styles,
    save_figure,
    standings,
    subplots,
)
from experiments.core.report import Group, Row
from experiments.data import pathfinder

SPEED = "speed.json"  # what `experiments.long_range.speed` writes into a folder


def speed(
    found: Mapping[str, Any],
    scores: Mapping[str, float],
    styles: Styles,
    path: Any,
    tasks: Sequence[str],
) -> list[str]:
    """Draws accuracy against speed, a dot a model, its size the memory.

    Args:
      found: what was measured: "models", name -> seconds and bytes of an update.
      scores: name -> mean test accuracy over the tasks.
      styles: of the names.
      path: PNG file to write.
      tasks: what the mean is over.

    Returns:
      The names that were drawn.
    """
    known = {name: m for name, m in found["models"].items() if name in scores}
    if len(known) < 2:
        return []
    most = max(m["bytes"] for m in known.values())
    figure, ((axes,),) = subplots((7.6, 4.6), dpi=120)
    for name, measured in known.items():
        x, y = found["batch_size"] / measured["seconds"], scores[name]
        area = 30 + 900 * measured["bytes"] / most
        color = styles[name].color
        axes.scatter([x], [y], s=area, color=color, alpha=0.45, linewidth=0)
        axes.plot([x], [y], ".", color=color, markersize=4)
        axes.annotate(name, (x, y), (6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(
        f"sequences a second, trained on one core, T = {found['length']:,} (log scale)",
        fontsize=9,
    )
    axes.set_ylabel(f"mean test accuracy over {len(tasks)} tasks", fontsize=9)
    axes.set_title(
        f"Accuracy, speed and memory (largest dot: {most / 2**20:,.0f} MiB)",
        fontsize=10,
        loc="left",
    )
    axes.margins(0.12)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
    return list(known)


def spans(rows: Mapping[str, Row], path: Any) -> None:
    """Draws how far attention looks, a line a task.

    Args:
      rows: of exact attention, by the name of the data.
      path: PNG file to write.
    """
    one = Style("#0072B2", "o", "-")
    board = Board(
        "How far exact attention looks",
        "mean distance of query and key by the weights, symbols",
        [Standing.of(name, row.scores("span")) for name, row in rows.items()],
    )
    standings([board], path, Styles(rows, given=dict.fromkeys(rows, one)))


def examples(group: Group) -> list[str]:
    """Draws some images of Pathfinder: above joined, below not."""
    levels = [
        level
        for level in pathfinder.LEVELS
        if any(f"pathfinder32_{level}" == row.config["task"] for row in group.rows)
    ]
    if not levels:
        return []
    canvas, each = pathfinder.CANVASES[32], 3
    figure, grid = subplots(
        (1.5 * each * len(levels), 3.5), 2, each * len(levels), dpi=120
    )
    for place, level in enumerate(levels):
        random = np.random.Generator(np.random.PCG64([0, 24]))
        found = pathfinder.draw(random, 120, pathfinder.LEVELS[level], canvas)
        images = pathfinder.ink(found, canvas)
        for row, label in enumerate((1, 0)):
            some = np.flatnonzero(found.labels == label)[:each]
            for column, index in enumerate(some):
                axes = grid[row, place * each + column]
                axes.imshow(images[index], cmap="gray", interpolation="nearest")
                if not column:
                    axes.set_title(f"{level}, {label}", fontsize=8, loc="left")
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    save_figure(figure, group.folder / "pathfinder.png")
    return ["![examples: above joined, below not](pathfinder.png)"]
