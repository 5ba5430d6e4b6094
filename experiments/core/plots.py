"""Figures: accuracy and gap over the number of training images.

Okabe-Ito colours, each with a marker and a line style of its own, so that the
figures read for the colour-blind and in grey. Drawn on a figure object of their
own: no pyplot, no global state, no display.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.axes
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

#: Okabe and Ito, ordered so that neighbours differ in lightness too.
PALETTE = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#000000",
    "#999933",  # olive
    "#882255",  # wine
    "#8C8C8C",  # grey
)
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "P", "X")
LINES = (
    "-",
    "--",
    "-.",
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (7, 2)),
    (0, (3, 1)),
    ":",
    (0, (9, 2, 2, 2)),
    (0, (2, 2)),
    (0, (5, 3, 1, 3)),
)
_GREYS = ("#333333", "#6b6b6b", "#969696", "#4d4d4d")
_BASELINE_LINES = ((0, (4, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (2, 1)))
_INK = "#333333"
IMAGES = "number of training images N (log scale)"


@dataclasses.dataclass(frozen=True)
class Style:
    """How the lines of one name are drawn."""

    color: str
    marker: str
    line: Any


class Styles:
    """A style for every name: the same in all figures and panels of a report.

    Args:
        names: What is drawn in colour, in any figure.
        baselines: What is drawn thin and grey.

    >>> styles = Styles(["ViT", "ResNet"])
    >>> styles["ResNet"].color == PALETTE[1]
    True
    """

    def __init__(self, names: Iterable[str], baselines: Iterable[str] = ()) -> None:
        self._styles: dict[str, Style] = {}
        for place, name in enumerate(dict.fromkeys(names)):
            turn, index = divmod(place, len(PALETTE))
            # Beyond the colours that there are, another line and marker each.
            other = (index + turn) % len(PALETTE)
            self._styles[name] = Style(PALETTE[index], MARKERS[other], LINES[other])
        for place, name in enumerate(dict.fromkeys(baselines)):
            self._styles[name] = Style(
                _GREYS[place % len(_GREYS)],
                ".",
                _BASELINE_LINES[place % len(_BASELINE_LINES)],
            )

    def __getitem__(self, name: str) -> Style:
        return self._styles[name]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of the accuracy figure.

    Attributes:
        label: Text of the legend.
        n: Sizes of the training set.
        mean: Mean at each of them.
        std: Standard deviation, None where there is a single seed.
        seeds: Number of seeds at each; a hollow marker shows fewer than three.
        baseline: Drawn thin and grey, without markers.
        name: Whose style it has, by default that of the label.
    """

    label: str
    n: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float | None]
    seeds: Sequence[int]
    baseline: bool = False
    name: str = ""


@dataclasses.dataclass(frozen=True)
class GapSeries:
    """One line of the gap figure; low and high are None where seeds are too few.

    `fit_n` and `fit_gap` hold the fitted difference, drawn thin where given; `name` is
    whose style it has, by default that of the label.
    """

    label: str
    n: Sequence[int]
    gap: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    seeds: Sequence[int]
    fit_n: Sequence[float] = ()
    fit_gap: Sequence[float] = ()
    name: str = ""


def curve(
    series: Sequence[Series],
    path: str | os.PathLike[str],
    *,
    title: str,
    ylabel: str = "test accuracy",
    xlabel: str = IMAGES,
    chance: float | None = None,
    chance_label: str = "chance",
    note: str = "",
    styles: Styles | None = None,
) -> pathlib.Path:
    """Draw accuracy over log N with error bars (one standard deviation).

    Args:
        series: The lines.
        path: PNG file to write (whole or not at all).
        title: Over the axes.
        ylabel: Name of the score.
        xlabel: What N is.
        chance: Level of guessing, drawn where given.
        chance_label: What to call it.
        note: One small line below the axes.
        styles: Those of the report; by default colours in order, greys of baselines.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw, or a series has unequal lengths.
    """
    if not series:
        raise ValueError("series: expected at least one, got none")
    figure, axes = _figure(title, ylabel, note, xlabel)
    sizes = sorted({n for line in series for n in line.n})
    networks = [line for line in series if not line.baseline]
    baselines = [line for line in series if line.baseline]
    if styles is None:
        styles = Styles(map(_named, networks), map(_named, baselines))
    for line in baselines:
        _lengths(line.label, line.n, line.mean, line.std, line.seeds)
        style = styles[_named(line)]
        axes.plot(
            line.n,
            line.mean,
            color=style.color,
            linestyle=style.line,
            linewidth=1.3,
            marker=style.marker if len(line.n) > 1 else "_",
            markersize=4,
            label=line.label,
            zorder=2,
        )
    for i, line in enumerate(networks):
        _lengths(line.label, line.n, line.mean, line.std, line.seeds)
        _errorbar(
            axes,
            styles[_named(line)],
            _shift(i, len(networks)),
            line.label,
            line.n,
            line.mean,
            [(s or 0.0, s or 0.0) for s in line.std],
            [s is not None for s in line.std],
            line.seeds,
        )
    if chance is not None:
        axes.axhline(chance, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
        axes.annotate(
            f"{chance_label} " + f"{chance:.3g}".replace("0.", ".", 1),
            (1, chance),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=_INK,
        )
    _finish(axes, sizes)
    # Networks first, as in the tables.
    handles, labels = axes.get_legend_handles_labels()
    order = [line.label for line in (*networks, *(s for s in series if s.baseline))]
    pairs = sorted(zip(handles, labels, strict=True), key=lambda p: order.index(p[1]))
    _legend(axes, [h for h, _ in pairs], [label for _, label in pairs])
    return save_figure(figure, path)


def gap(
    series: Sequence[GapSeries],
    path: str | os.PathLike[str],
    *,
    title: str,
    ylabel: str = "difference in test accuracy",
    above: str = "",
    below: str = "",
    note: str = "",
    styles: Styles | None = None,
) -> pathlib.Path:
    """Draw differences in accuracy over log N with their intervals.

    Args:
        series: The lines.
        path: PNG file to write (whole or not at all).
        title: Over the axes.
        ylabel: Name of the difference.
        above: What it means to lie above zero, written into that half.
        below: What it means to lie below zero.
        note: One small line below the axes.
        styles: Those of the report; by default colours in order.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw, or a series has unequal lengths.
    """
    if not series:
        raise ValueError("series: expected at least one, got none")
    figure, axes = _figure(title, ylabel, note)
    axes.axhline(0, color=_INK, linewidth=1, zorder=1)
    if styles is None:
        styles = Styles(map(_named, series))
    for i, line in enumerate(series):
        _lengths(line.label, line.n, line.gap, line.low, line.high, line.seeds)
        style = styles[_named(line)]
        known = [low is not None for low in line.low]
        reach = [
            (max(g - low, 0.0), max(high - g, 0.0))
            if low is not None and high is not None
            else (0.0, 0.0)
            for g, low, high in zip(line.gap, line.low, line.high, strict=True)
        ]
        if len(line.fit_n):
            axes.plot(
                line.fit_n, line.fit_gap, color=style.color, linewidth=0.9, alpha=0.55
            )
        _errorbar(
            axes,
            style,
            _shift(i, len(series)),
            line.label,
            line.n,
            line.gap,
            reach,
            known,
            line.seeds,
            joined=not len(line.fit_n),
        )
    low, high = axes.get_ylim()
    room = 0.25 * max(abs(low), abs(high))
    axes.set_ylim(min(low, -room), max(high, room))
    corner: dict[str, Any] = {
        "transform": axes.transAxes,
        "fontsize": 8.5,
        "color": "#5a5a5a",
    }
    axes.text(0.015, 0.975, above and f"▲ {above}", va="top", **corner)
    axes.text(0.985, 0.025, below and f"▼ {below}", va="bottom", ha="right", **corner)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _signed(y)))
    _finish(axes, sorted({n for line in series for n in line.n}))
    _legend(axes, *axes.get_legend_handles_labels())
    return save_figure(figure, path)


def _figure(
    title: str, ylabel: str, note: str, xlabel: str = IMAGES
) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(7.6, 4.3), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_title(title, fontsize=11.5, loc="left", color="black", pad=9)
    axes.set_ylabel(ylabel, fontsize=10, color=_INK)
    axes.set_xlabel(xlabel, fontsize=10, color=_INK)
    if note:
        figure.supxlabel(
            note, x=0.012, ha="left", fontsize=7.5, color="#666666", wrap=True
        )
    return figure, axes


def _errorbar(
    axes: matplotlib.axes.Axes,
    style: Style,
    shift: float,
    label: str,
    n: Sequence[int],
    values: Sequence[float],
    reach: Sequence[tuple[float, float]],
    known: Sequence[bool],
    seeds: Sequence[int],
    joined: bool = True,
) -> None:
    """Draw a line with bars, shifted sideways a little, so that bars do not overlap."""
    color, marker = style.color, style.marker
    x = np.asarray(n, float) * shift
    y = np.asarray(values, float)
    bars = np.asarray(reach, float).T.reshape(2, -1)
    has = np.asarray(known, bool)
    axes.plot(
        x,
        y,
        color=color,
        linestyle=style.line if joined else "none",
        linewidth=1.8,
        marker=marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        label=label,
        zorder=4,
    )
    if has.any():
        axes.errorbar(
            x[has],
            y[has],
            yerr=bars[:, has],
            fmt="none",
            ecolor=color,
            elinewidth=1.4,
            capsize=3,
            capthick=1.2,
            zorder=3,
        )
    few = np.asarray(seeds) < 3
    if few.any():
        axes.plot(
            x[few],
            y[few],
            linestyle="none",
            marker=marker,
            markersize=6.5,
            markerfacecolor="white",
            markeredgecolor=color,
            markeredgewidth=1.4,
            zorder=4.5,
        )


def _finish(axes: matplotlib.axes.Axes, sizes: Sequence[float]) -> None:
    axes.set_autoscalex_on(False)  # which warns where there is a single size
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    if 1 < len(sizes) <= 9:  # the measured sizes themselves make the best ticks
        ticks, last = [], 0.0
        for size in sizes:
            if float(size).is_integer() and size > last * 1.45:
                ticks.append(size)
                last = size
        axes.set_xticks(ticks)
    else:
        axes.xaxis.set_major_locator(LogLocator(10))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=_INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def _legend(axes: matplotlib.axes.Axes, handles: list, labels: list[str]) -> None:
    axes.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9,
        handlelength=3.2,
        labelspacing=0.7,
        borderaxespad=0,
    )


def _shift(index: int, count: int) -> float:
    """What x is multiplied by; at most 6 % to either side."""
    return 1.03 ** ((index - (count - 1) / 2) * min(1.0, 4 / count))


def _named(line: Series | GapSeries) -> str:
    return line.name or line.label


def _count(number: float, digits: int = 3) -> str:
    """Write a size the short way: 300, 1k, 60k, 1.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{_digits(number / unit, digits)}{name}"
    return _digits(number, digits)


def _digits(number: float, digits: int) -> str:
    """Round to so many digits, written without an exponent."""
    return f"{float(f'{number:.{digits}g}'):g}"


def _signed(number: float) -> str:
    """Write a difference: +.02, −.10, 0."""
    text = f"{abs(number):.3f}".rstrip("0").ljust(4, "0").lstrip("0")
    return "0" if abs(number) < 1e-9 else ("−" if number < 0 else "+") + text


def _lengths(label: str, *columns: Sequence[object]) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            f"series {label!r}: expected columns of one length > 0, got {lengths}"
        )


def panel_legend(axes: matplotlib.axes.Axes) -> None:
    """A legend of the panel's own, beside it, so that it hides no line."""
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=8,
        handlelength=2.6,
        borderaxespad=0,
    )


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write a figure as PNG, whole or not at all; the same figure, the same bytes."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        # No date and no version inside: the same results give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
