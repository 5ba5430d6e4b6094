"""Figures: means over N with their bars, panels of lines, pictures of heads.

Okabe-Ito colours, each with a marker and a line style of its own, so that the
figures read for the colour-blind and in grey. Drawn on a figure object of their
own: no pyplot, no global state, no display.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import textwrap
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from experiments.core.stats import Summary, gap

#: Okabe and Ito, ordered so that neighbours differ in lightness too: blue, vermilion,
#: bluish green, reddish purple, orange, sky blue, black, olive, wine, grey.
PALETTE = (
    "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999933 #882255 #8C8C8C"
).split()
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

# How the parts of a figure look.
_Look = dict[str, Any]
_NETWORK: _Look = dict(
    linewidth=1.8,
    markersize=6.5,
    markeredgecolor="white",
    markeredgewidth=0.8,
    zorder=4,
)
_BASELINE: _Look = dict(linewidth=1.3, markersize=4, zorder=2)
_BAR: _Look = dict(fmt="none", elinewidth=1.4, capsize=3, capthick=1.2, zorder=3)
_HOLLOW: _Look = dict(
    linestyle="none", markersize=6.5, markerfacecolor="white", markeredgewidth=1.4
)
_LEVEL: _Look = dict(color=_INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
_GUESS: _Look = dict(color="#777777", linewidth=0.9, linestyle=":")
_LABEL: _Look = dict(ha="right", fontsize=8, color=_INK, xytext=(-3, 3))
_NOTE: _Look = dict(x=0.012, ha="left", fontsize=7.5, color="#666666", wrap=True)
_SIDE: _Look = dict(fontsize=8.5, color="#5a5a5a")
_LEGEND: _Look = dict(
    loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0
)


@dataclasses.dataclass(frozen=True)
class Style:
    """How the lines of one name are drawn."""

    color: str
    marker: str
    line: Any

    @property
    def look(self) -> _Look:
        """The same as arguments of matplotlib's."""
        return dict(color=self.color, marker=self.marker, linestyle=self.line)


class Styles:
    """A style for every name: the same in all figures and panels of a report.

    Args:
        names: What is drawn in colour, in any figure.
        baselines: What is drawn thin and grey.
        given: Styles that some names have, in place of the next in order.

    >>> styles = Styles(["ViT", "ResNet"])
    >>> styles["ResNet"].color == PALETTE[1]
    True
    """

    def __init__(
        self,
        names: Iterable[str],
        baselines: Iterable[str] = (),
        given: Mapping[str, Style] | None = None,
    ) -> None:
        self._styles: dict[str, Style] = dict(given or {})
        rest = [name for name in dict.fromkeys(names) if name not in self._styles]
        for place, name in enumerate(rest):
            turn, index = divmod(place, len(PALETTE))
            # Beyond the colours that there are, another line and marker each.
            other = (index + turn) % len(PALETTE)
            self._styles[name] = Style(PALETTE[index], MARKERS[other], LINES[other])
        for place, name in enumerate(dict.fromkeys(baselines)):
            at = place % len(_GREYS)
            self._styles[name] = Style(_GREYS[at], ".", _BASELINE_LINES[at])

    def __getitem__(self, name: str) -> Style:
        return self._styles[name]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a figure."""

    label: str  # in the legend
    x: Sequence[float]  # where it was measured: sizes, lengths, updates
    y: Sequence[float]  # the mean at each
    low: Sequence[float | None] = ()  # end of the bar or band, where there is one
    high: Sequence[float | None] = ()
    seeds: Sequence[int] = ()  # at each; a hollow marker shows fewer than three
    baseline: bool = False  # drawn thin and grey, without bars
    fit: tuple[Any, Any] | None = None  # x, y of a curve drawn in place of the line
    name: str = ""  # whose style it has, by default that of the label

    @classmethod
    def of(
        cls, label: str, points: Iterable[tuple[float, Summary | None]], **more: Any
    ) -> Series:
        """The line of some means with their deviations; no mean, no point."""
        known = [(x, summary) for x, summary in points if summary is not None]
        return cls(
            label,
            [x for x, _ in known],
            [s.mean for _, s in known],
            [None if s.std is None else s.mean - s.std for _, s in known],
            [None if s.std is None else s.mean + s.std for _, s in known],
            [s.count for _, s in known],
            **more,
        )

    @classmethod
    def training(
        cls, label: str, records: Iterable[Mapping[str, Any]], curve: str
    ) -> list[Series]:
        """The mean of a curve over seeds, with a band of one deviation.

        Of training, or of what was observed, which begins at no update. At points that
        all seeds have; nothing where no record has the curve.
        """
        seeds = []
        for curves in (r["curves"] for r in records if curve in r["curves"]):
            at, observed = curves["step"], curves.get("observed_at", ())
            at = observed if len(curves[curve]) == len(observed) else at
            seeds.append(dict(zip(at, curves[curve], strict=True)))
        if not seeds:
            return []
        x = sorted(set.intersection(*map(set, seeds)))
        values = np.array([[found[step] for step in x] for found in seeds], float)
        y = values.mean(axis=0)
        if len(values) == 1:
            return [cls(label, x, list(y))]
        spread = values.std(axis=0, ddof=1)
        return [cls(label, x, list(y), list(y - spread), list(y + spread))]

    @property
    def style(self) -> str:
        """Whose style it has."""
        return self.name or self.label

    def bars(self) -> tuple[np.ndarray, np.ndarray]:
        """What has a bar, bool [P], and how far those reach, [2, P].

        Raises:
            ValueError: Columns have unequal lengths, or none.
        """
        columns = (self.x, self.y, self.low, self.high, self.seeds)
        lengths = [len(column) for column in columns]
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError(
                f"series {self.label!r}: expected columns of one length > 0, got "
                f"{lengths}"
            )
        known = np.asarray([low is not None for low in self.low])
        y, low, high = (
            np.asarray(end, float)[known] for end in (self.y, self.low, self.high)
        )
        return known, np.maximum([y - low, high - y], 0.0)


def curve(
    series: Sequence[Series],
    path: str | os.PathLike[str],
    *,
    title: str,
    ylabel: str = "test accuracy",
    xlabel: str = IMAGES,
    level: tuple[float, str] | None = None,
    sides: tuple[str, str] | None = None,
    note: str = "",
    styles: Styles | None = None,
) -> pathlib.Path:
    """Draw means over log N with their bars, or differences of means.

    Args:
        series: The lines; at least one.
        path: PNG file to write (whole or not at all).
        title: Over the axes.
        ylabel: Name of the score.
        xlabel: What N is.
        level: Level of guessing, and what to call it.
        sides: For differences: what it means to lie above zero, and below.
        note: One small line below the axes.
        styles: Those of the report; by default colours in order, greys of baselines.

    Returns:
        The path.

    Raises:
        ValueError: There is nothing to draw, or a series has unequal lengths.
    """
    if not series:
        raise ValueError("series: expected at least one, got none")
    for line in series:
        line.bars()
    figure, ((axes,),) = subplots((7.6, 4.3), dpi=140)
    axes.set_xscale("log")
    title = textwrap.fill(title, 62)
    axes.set_title(title, fontsize=11.5, loc="left", color="black", pad=9)
    axes.set_ylabel(ylabel, fontsize=10, color=_INK)
    axes.set_xlabel(xlabel, fontsize=10, color=_INK)
    if note:
        figure.supxlabel(note, **_NOTE)
    if sides:
        axes.axhline(0, color=_INK, linewidth=1, zorder=1)
    networks = [line for line in series if not line.baseline]
    baselines = [line for line in series if line.baseline]
    if styles is None:
        styles = Styles([x.style for x in networks], [x.style for x in baselines])
    for line in baselines:
        look = styles[line.style].look | _BASELINE | dict(label=line.label)
        if len(line.x) == 1:
            look["marker"] = "_"
        axes.plot(line.x, line.y, **look)
    for i, line in enumerate(networks):
        # Shifted sideways a little, at most 6 %, so that bars do not overlap.
        among = (i - (len(networks) - 1) / 2) * min(1.0, 4 / len(networks))
        _errorbar(axes, styles[line.style], 1.03**among, line)
    if level is not None:
        value, name = level
        axes.axhline(value, **_LEVEL)
        where = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
        text = f"{name} " + f"{value:.3g}".replace("0.", ".", 1)
        axes.annotate(text, (1, value), **where, **_LABEL)
    if sides:
        _sides(axes, *sides)
    _finish(axes, sorted({x for line in series for x in line.x}))
    # Networks first, as in the tables.
    handles = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    order = [line.label for line in (*networks, *baselines)]
    look = _LEGEND | dict(fontsize=9, handlelength=3.2, labelspacing=0.7)
    axes.legend([handles[label] for label in order], order, **look)
    return save_figure(figure, path)


def _sides(axes: Axes, above: str, below: str) -> None:
    """Makes room above and below zero, and says what either means."""
    low, high = axes.get_ylim()
    room = 0.25 * max(abs(low), abs(high))
    axes.set_ylim(min(low, -room), max(high, room))
    look = _SIDE | dict(transform=axes.transAxes)
    axes.text(0.015, 0.975, f"▲ {above}", va="top", **look)
    axes.text(0.985, 0.025, f"▼ {below}", va="bottom", ha="right", **look)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _signed(y)))


def _errorbar(axes: Axes, style: Style, shift: float, line: Series) -> None:
    """Draw a line with bars, and hollow markers of few seeds."""
    x, y = np.asarray(line.x, float) * shift, np.asarray(line.y, float)
    has, bars = line.bars()
    look = style.look | _NETWORK
    if line.fit:
        axes.plot(*line.fit, color=style.color, linewidth=0.9, alpha=0.55)
        look["linestyle"] = "none"
    axes.plot(x, y, label=line.label, **look)
    if has.any():
        axes.errorbar(x[has], y[has], yerr=bars, ecolor=style.color, **_BAR)
    few = np.asarray(line.seeds) < 3
    if few.any():
        look = _HOLLOW | dict(marker=style.marker, markeredgecolor=style.color)
        axes.plot(x[few], y[few], zorder=4.5, **look)


def _finish(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_autoscalex_on(False)  # which warns where there is a single size
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    if 1 < len(sizes) <= 9:  # the measured sizes themselves make the best ticks
        # Apart by 1.45 times, and by a twelfth of a long axis.
        apart = max(1.45, (max(sizes) / min(sizes)) ** (1 / 12))
        ticks, last = [], 0.0
        for size in sizes:
            if float(size).is_integer() and size > last * apart:
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _count(number: float, digits: int = 3) -> str:
    """Write a size the short way: 300, 1k, 60k, 1.2M."""
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if number >= unit or unit == 1
    )
    return f"{float(f'{number / unit:.{digits}g}'):g}{name}"  # without an exponent


def _signed(number: float) -> str:
    """Write a difference: +.02, −.10, 0."""
    text = f"{abs(number):.3f}".rstrip("0").ljust(4, "0").lstrip("0")
    return "0" if abs(number) < 1e-9 else ("−" if number < 0 else "+") + text


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines on axes of their own, one of several beside one another."""

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]  # where they have ends, these bound a band
    level: tuple[float, str] | None = None  # drawn dotted, and its name
    ylim: tuple[float, float | None] | None = None
    log: bool = False  # whether y is on a log scale
    doubling: bool = False  # whether x is, each length a tick
    decades: bool = False  # whether x is on a log scale, measured sizes as ticks
    zero: bool = False  # whether it is of differences
    marks: Sequence[
        tuple[float, float, str]
    ] = ()  # on the zero line, (from, to, style)
    markersize: float = 4


def panels(
    found: Sequence[Panel],
    path: str | os.PathLike[str],
    styles: Styles,
    *,
    height: float = 3.4,
    columns: int = 0,
    note: str = "",
) -> pathlib.Path:
    """Draw panels beside one another, each with its legend; return the path.

    With `columns` there are so many in a row, and each row is `height` inches high.
    """
    columns = min(columns or len(found), len(found))
    rows = -(-len(found) // columns)
    figure, grid = subplots((6.4 * columns, rows * height), rows, columns, dpi=120)
    if note:
        figure.supxlabel(note, **_NOTE)
    places = grid.reshape(-1)
    for axes in places[len(found) :]:
        axes.set_visible(False)
    for axes, panel in zip(places, found, strict=False):
        for line in panel.series:
            style = styles[line.style]
            look = style.look | dict(markersize=panel.markersize, linewidth=1.5)
            axes.plot(line.x, line.y, label=line.label, **look)
            if len(line.low) and None not in (*line.low, *line.high):
                band: _Look = dict(color=style.color, alpha=0.15, linewidth=0)
                axes.fill_between(line.x, line.low, line.high, **band)
        if panel.level:
            axes.axhline(panel.level[0], label=panel.level[1], **_GUESS)
        if panel.ylim:
            axes.set_ylim(*panel.ylim)
        if panel.log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < 30 * low:  # powers of ten alone would be one tick or two
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
        if panel.zero:
            axes.axhline(0, color=_INK, linewidth=1, zorder=1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _signed(y)))
        for start, end, marked in panel.marks:
            mark: _Look = dict(linewidth=6, alpha=0.5, solid_capstyle="butt")
            mark |= dict(color=styles[marked].color, zorder=1.5)
            axes.plot([start, end], [0, 0], **mark)
        axes.legend(**_LEGEND, fontsize=8, handlelength=2.6)
        if panel.decades:
            axes.set_xscale("log")
            _finish(axes, sorted({x for line in panel.series for x in line.x}))
        if panel.doubling:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for line in panel.series for x in line.x})
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks], rotation=45)
            axes.minorticks_off()
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_xlabel(panel.xlabel, fontsize=9)
        axes.set_ylabel(panel.ylabel, fontsize=9)
        axes.grid(color="#e3e3e3", linewidth=0.7)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)


@dataclasses.dataclass(frozen=True)
class Standing:
    """What one name scored: a line of `standings`."""

    label: str
    value: float
    low: float | None = None  # ends of its interval, where there is one
    high: float | None = None
    baseline: bool = False  # drawn grey, and as a line across the others

    @classmethod
    def of(cls, label: str, scores: Mapping[int, float], **more: Any) -> Standing:
        """The mean of scores by seed, with Student's interval of 95 %.

        >>> found = Standing.of("ViT", {0: 0.5, 1: 0.6, 2: 0.7})
        >>> round(found.value, 3), round(found.low, 3)
        (0.6, 0.352)
        """
        found = gap(scores, dict.fromkeys(scores, 0.0))
        return cls(label, found.mean, found.low, found.high, **more)


@dataclasses.dataclass(frozen=True)
class Board:
    """Standings on axes of their own, the best at the top."""

    title: str
    xlabel: str
    standings: Sequence[Standing]
    less: bool = False  # whether less is better
    zero: bool = False  # for differences: a line at zero
    beyond: Sequence[Standing] = ()  # told in words, off the scale


def standings(
    found: Sequence[Board], path: str | os.PathLike[str], styles: Styles, note: str = ""
) -> pathlib.Path:
    """Draw boards beside one another: a name a line, its mean and interval.

    Args:
        found: The boards; each has a standing at least.
        path: PNG file to write.
        styles: Of the names that are no baselines.
        note: One small line below.

    Returns:
        The path.
    """
    most = max(len(board.standings) for board in found)
    size = (5.2 * len(found) + 1.4, 0.36 * most + 1.5)
    figure, (row,) = subplots(size, columns=len(found), dpi=120)
    for axes, board in zip(row, found, strict=True):
        sign = 1 if board.less else -1
        order = sorted(board.standings, key=lambda s: sign * s.value)
        for y, one in enumerate(order):
            color = _GREYS[1] if one.baseline else styles[one.label].color
            marker = "d" if one.baseline else styles[one.label].marker
            if one.baseline:
                axes.axvline(one.value, color=color, linewidth=0.8, linestyle=":")
            if one.low is not None and one.high is not None:
                axes.hlines(y, one.low, one.high, color=color, linewidth=2.2)
            look: _Look = dict(color=color, marker=marker, linestyle="none")
            axes.plot([one.value], [y], label=one.label, markersize=6.5, **look)
        if board.zero:
            axes.axvline(0, color=_INK, linewidth=1, zorder=1)
        if board.beyond:
            far = ", ".join(f"{one.label} {one.value:.3g}" for one in board.beyond)
            look = _SIDE | dict(transform=axes.transAxes, ha="right", va="bottom")
            axes.text(0.99, 1.01, f"off the scale: {far}", **look)
        axes.set_yticks(range(len(order)), [one.label for one in order], fontsize=8.5)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_title(
            board.title, fontsize=10, loc="left", pad=18 * bool(board.beyond)
        )
        axes.set_xlabel(board.xlabel, fontsize=9)
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    if note:
        figure.supxlabel(note, **_NOTE)
    return save_figure(figure, path)


def heads(
    weights: Sequence[np.ndarray],
    path: str | os.PathLike[str],
    *,
    title: str,
    size: float,
    ticks: Sequence[str] = (),
    middle: bool = False,
    bar: str = "",
) -> pathlib.Path:
    """Draw a picture a head: a row a layer, a column a head.

    Args:
        weights: Of each layer [N, rows, columns].
        path: PNG file to write.
        title: Over all.
        size: Inches of a picture's side.
        ticks: Names of rows and columns, the same; "" names none.
        middle: Whether to mark the middle.
        bar: What the colours are: all pictures have one scale, told by a bar.

    Returns:
        The path.
    """
    rows, columns = len(weights), len(weights[0])
    shape = (size * columns + 0.6 + 0.8 * bool(bar), size * rows + 0.7)
    top = max(float(np.max(layer)) for layer in weights) if bar else None
    figure, grid = subplots(shape, rows, columns, title=title)
    places = [i for i, name in enumerate(ticks) if name]
    names = [ticks[i] for i in places]
    for layer, head in np.ndindex(rows, columns):
        axes, image = grid[layer, head], np.asarray(weights[layer][head], float)
        drawn = axes.imshow(image, cmap="magma", vmin=0, vmax=top)
        if middle:
            y, x = (length // 2 for length in image.shape)
            axes.plot(x, y, "s", color="#56B4E9", markersize=2)
        bottom, left = layer == rows - 1, head == 0
        axes.set_xticks(places * bottom, names * bottom, rotation=90, fontsize=6)
        axes.set_yticks(places * left, names * left, fontsize=6)
        if layer == 0:
            axes.set_title(f"head {head + 1}", fontsize=7)
        if left:
            axes.set_ylabel(f"layer {layer + 1}", fontsize=7)
    if bar:
        scale = figure.colorbar(drawn, ax=list(grid.flat), shrink=0.6, aspect=30)
        scale.set_label(bar, fontsize=8)
        scale.ax.tick_params(labelsize=7)
    return save_figure(figure, path)


def subplots(
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    title: str = "",
    dpi: int = 100,
) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes [rows, columns]."""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Figure, file: pathlib.Path) -> None:
    # No date and no version inside: the same results give the same bytes.
    figure.savefig(file, format="png", metadata={"Software": None})


#: What puts a figure into a file; the site puts SVG in its place.
write_to: Callable[[Figure, pathlib.Path], None] = _png


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> pathlib.Path:
    """Write a figure as PNG, whole or not at all; the same figure, the same bytes."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        write_to(figure, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
