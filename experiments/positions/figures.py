"""Figures of positions: a panel an encoding, and what encodings cost in parameters."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping

from attn_jax.nn.positional import POSITIONS
from experiments.core.plots import Styles, save_figure, subplots
from experiments.core.stats import Summary

#: What figures and tables call the encodings.
WORDS = {
    "none": "none",
    "sinusoidal": "sinusoid",
    "learned": "learned table",
    "shaw": "Shaw",
    "floater": "three flows from zero",
    "floater_input": "flow from zero, at the input",
    "sinusoidal_floater": "sinusoid + FLOATER",
    "rotation_flow": "rotation flow",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "t5": "T5 bias",
}
#: And the floors, by the name of their records.
FLOORS = {
    "majority": "most frequent label",
    "trained_positions": "right on trained positions, else most frequent label",
}
_DOTTED = (":", "-.")
STYLES = Styles(POSITIONS)
_TASKS = {"order": "Symbol two places before", "pos": "Tags of words"}
_GREY = "#8a8a8a"

Bin = tuple[int, int]


def task_name(task: str) -> str:
    """A task in words."""
    short = task.split("_by_length")[0]
    return _TASKS.get(short, short)


def lengths(
    curves: Mapping[str, Mapping[Bin, Summary | None]],
    path: pathlib.Path,
    *,
    title: str,
    trained: str,
    floors: Mapping[str, Mapping[Bin, float]],
) -> pathlib.Path:
    """Accuracy by length: a panel an encoding, with the same axes and floors.

    Args:
      curves: positions -> bin of lengths -> mean and deviation over seeds.
      path: PNG file to write.
      title: over all.
      trained: what the first bin is.
      floors: name -> accuracy without a network, by bin.

    Returns:
      The path.
    """
    kinds = sorted(curves, key=POSITIONS.index)
    kinds = [kind for kind in kinds if kind != "none"] or kinds
    rows = math.ceil(len(kinds) / 4)
    columns = math.ceil(len(kinds) / rows)
    figure, grid = subplots(
        (2.3 * columns + 2.6, 2.2 * rows + 0.9), rows, columns, title=title, dpi=120
    )
    bins = sorted({bin for found in curves.values() for bin in found})
    at = {bin: place for place, bin in enumerate(bins)}
    means = [s.mean for found in curves.values() for s in found.values() if s]
    least = min(means) - 2 * (max(means) - min(means))
    near = {n: found for n, found in floors.items() if max(found.values()) > least}
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for place, (axes, kind) in enumerate(zip(grid.flat, kinds, strict=False)):
        axes.sharey(grid.flat[0])
        axes.axvspan(-0.4, 0.4, color="#f0f0f0", zorder=0)
        if blind := curves.get("none"):
            known = [(at[b], s.mean) for b, s in blind.items() if s]
            look = dict(color=_GREY, linewidth=1.3, linestyle="--", zorder=2)
            axes.plot(*zip(*known, strict=True), label="no positions", **look)
        for (name, values), dots in zip(near.items(), _DOTTED, strict=False):
            known = [(at[bin], value) for bin, value in values.items()]
            look = dict(color=_GREY, linewidth=1.5, linestyle=dots, zorder=2)
            axes.plot(*zip(*known, strict=True), label=FLOORS.get(name, name), **look)
        found = {bin: s for bin, s in curves[kind].items() if s is not None}
        style = STYLES[kind]
        x, y = [at[bin] for bin in found], [summary.mean for summary in found.values()]
        reach = [summary.std or 0.0 for summary in found.values()]
        look = dict(color=style.color, marker=style.marker, linewidth=2, markersize=6)
        axes.plot(x, y, label=WORDS[kind], zorder=4, **look)
        axes.errorbar(x, y, reach, fmt="none", ecolor=style.color, capsize=3, zorder=3)
        axes.set_title(WORDS[kind], fontsize=10, color=style.color, weight="bold")
        names = [f"{low}–{high}" for low, high in bins]
        axes.set_xticks(range(len(bins)), names, fontsize=7.5)
        axes.set_xlim(-0.4, len(bins) - 0.6)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
        if place % columns:
            axes.tick_params(labelleft=False)
        else:
            axes.set_ylabel("test accuracy", fontsize=8.5)
    said = f"length of the sequence (grey: trained on {trained})"
    for name in [name for name in floors if name not in near]:
        low, high = (end(floors[name].values()) for end in (min, max))
        said += f"; {FLOORS.get(name, name)}: {low:.2f} to {high:.2f}, below the axes"
    figure.supxlabel(said, fontsize=8.5)
    handles = grid.flat[0].get_lines()[: bool(curves.get("none")) + len(near)]
    if handles:
        names = [str(line.get_label()) for line in handles]
        names = [name.replace(", ", ",\n") for name in names]
        look = dict(frameon=False, fontsize=8.5, labelspacing=1.0)
        figure.legend(handles, names, loc="outside right center", **look)
    return save_figure(figure, path)


def parameters(
    counts: Mapping[str, Mapping[int, int]], path: pathlib.Path
) -> pathlib.Path:
    """Position parameters against the longest sequence: who needs more of them.

    Args:
      counts: positions -> maximum length -> numbers that are learned.
      path: PNG file to write.

    Returns:
      The path.
    """
    figure, ((axes,),) = subplots((7.0, 3.8), dpi=120)
    kinds = sorted(counts, key=POSITIONS.index)
    without = [WORDS[kind] for kind in kinds if not any(counts[kind].values())]
    drawn = [kind for kind in kinds if any(counts[kind].values())]
    for kind in drawn:
        found, style = counts[kind], STYLES[kind]
        look = style.look | dict(linewidth=1.8, markersize=5)
        axes.plot([*found], [*found.values()], label=WORDS[kind], **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({n for found in counts.values() for n in found})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7.5)
    axes.minorticks_off()
    axes.set_title(
        "Parameters of position encodings: only a table of positions grows",
        fontsize=10.5,
        loc="left",
    )
    axes.set_xlabel("longest sequence that the model takes, positions", fontsize=9)
    axes.set_ylabel("parameters of the positions", fontsize=9)
    axes.grid(color="#e3e3e3", linewidth=0.7)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    look = dict(frameon=False, fontsize=8.5, loc="upper left", handlelength=3)
    legend = f"no parameters: {', '.join(without)}" if without else None
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title=legend, title_fontsize=8, bbox_to_anchor=(1.01, 1), **look)
    return save_figure(figure, path)
