"""Pictures of where heads look: a dot a head on the grid of offsets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, Rectangle

from experiments.core.plots import PALETTE

# Centres [heads, 2] and precisions [heads, 2, 2] of a layer.
Places = tuple[np.ndarray, np.ndarray]


def reach_of(centres: Any) -> int:
    """Offsets that panels show: those of all centres, but at least 3, at most 9."""
    return int(np.clip(np.ceil(np.abs(centres).max()), 3, 9))


def panel(
    axes: Any, places: Places, reach: int, *, kernel: int = 0, labels: str = ""
) -> None:
    """Draws where the heads of a layer look; rows run downwards.

    Args:
      axes: where.
      places: of the layer.
      reach: offsets that are shown on either side.
      kernel: side of a kernel whose places are framed; 0 for none.
      labels: "x", "y", both or none: which axes have numbers.
    """
    axes.set_xlim(-reach - 0.5, reach + 0.5)
    axes.set_ylim(reach + 0.5, -reach - 0.5)
    axes.set_aspect("equal")
    edges = np.arange(-reach - 0.5, reach + 1)
    lines = dict(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.hlines(edges, edges[0], edges[-1], **lines)
    axes.vlines(edges, edges[0], edges[-1], **lines)
    ticks = [tick for tick in range(-9, 10, 3) if abs(tick) <= reach]
    names = [f"{tick:+d}".replace("-", "−") if tick else "0" for tick in ticks]
    axes.set_xticks(ticks, names if "x" in labels else [""] * len(ticks))
    axes.set_yticks(ticks, names if "y" in labels else [""] * len(ticks))
    axes.tick_params(labelsize=7, length=2)
    if kernel:
        frame: dict[str, Any] = dict(
            fill=False, edgecolor="#555555", linewidth=1.0, zorder=1
        )
        axes.add_patch(Rectangle((-kernel / 2, -kernel / 2), kernel, kernel, **frame))
    axes.plot(0, 0, marker="s", color="#bbbbbb", markersize=5, zorder=1)
    for head, (centre, precision) in enumerate(zip(*places, strict=True)):
        color = PALETTE[head % len(PALETTE)]  # 9 heads have one each
        values, vectors = np.linalg.eigh(precision)
        if values[0] >= 1e-2:  # of one deviation; one wider than the panel is left out
            angle = float(np.degrees(np.arctan2(vectors[0, 0], vectors[1, 0])))
            width, height = 2 / np.sqrt(values)
            # Of one that looks far around the line alone, for others to be seen.
            face = to_rgba(color, 0.25 if max(width, height) < 4 else 0.03)
            look: Any = dict(facecolor=face, edgecolor=to_rgba(color, 0.5))
            look |= dict(angle=angle, linewidth=0.8)
            axes.add_patch(Ellipse(tuple(centre[::-1]), width, height, **look))
        axes.plot(centre[1], centre[0], marker="o", color=color, markersize=3.5)


def legend(figure: Figure, kernel: int = 0) -> None:
    """Says below what the marks of `panel` are."""
    marks: list[Any] = [
        Line2D([], [], linestyle="none", label=label, **look)
        for label, look in (
            ("the token that looks", dict(marker="s", color="#bbbbbb")),
            ("centre of a head", dict(marker="o", color=PALETTE[0], markersize=4)),
            (
                "within one deviation of it",
                dict(marker="o", color=PALETTE[0], markersize=11, alpha=0.25),
            ),
        )
    ]
    if kernel:
        marks.append(Rectangle((0, 0), 1, 1, fill=False, label="places of the kernel"))
    look: Any = dict(ncols=len(marks), frameon=False, fontsize=8)
    figure.legend(handles=marks, loc="outside lower center", **look)


def grid(
    figure: Figure,
    axes: Any,
    lines: Sequence[Sequence[Places]],
    reach: int,
    kernels: Sequence[int] = (),
) -> None:
    """Draws a panel for each of the places [rows][columns], with numbers outside."""
    last = len(lines) - 1
    for row, line in enumerate(lines):
        for column, places in enumerate(line):
            labels = "y" * (column == 0) + "x" * (row == last)
            kernel = kernels[row] if kernels else 0
            panel(axes[row, column], places, reach, kernel=kernel, labels=labels)
    for at in axes[last]:
        at.set_xlabel("columns to the right", fontsize=7)
    legend(figure, max(kernels, default=0))
