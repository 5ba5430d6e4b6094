"""Figures of reports as SVG within the page: a point says its value when pointed at.

They are drawn anew from stored records by the reports themselves, into the site's build
folder; what is committed stays PNG.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from site_numbers import ROOT

from experiments.core import plots, report, run

# A line of more points is a curve of training: its shape is read, not its points.
MOST_POINTS = 60
# A picture of pictures is larger as SVG, and has no points.
MOST_BYTES = 400_000
SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "attn_jax"}


def _half_bars(axes: Any) -> Iterator[tuple[float, float, float]]:
    """Upright bars: x, middle, half of the length."""
    for collection in axes.collections:
        if isinstance(collection, LineCollection):
            for segment in collection.get_segments():
                if len(segment) == 2 and segment[0][0] == segment[1][0]:
                    (x, low), (_, high) = segment
                    yield float(x), float(low + high) / 2, float(high - low) / 2


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _tips(figure: Any) -> list[str]:
    """Puts an unseen mark over each point that has a name; what they say, in order."""
    said: list[str] = []
    for axes in figure.axes:
        bars = list(_half_bars(axes))
        named = [line for line in axes.get_lines() if line.get_label()[:1] != "_"]
        for line in named:
            points = np.asarray(line.get_xydata(), float)
            if not 0 < len(points) <= MOST_POINTS or line.get_marker() in ("", "None"):
                continue
            for x, y in points[np.isfinite(points).all(1)]:
                half = [h for bx, mid, h in bars if np.isclose([bx, mid], [x, y]).all()]
                spread = f" ± {_number(half[0])}" if half else ""
                said.append(f"{line.get_label()}: {_number(y)}{spread} at {_number(x)}")
                mark = dict(marker="o", markersize=9, alpha=0, zorder=99)
                axes.plot([x], [y], gid=f"tip-{len(said) - 1}", scalex=False, **mark)
    return said


def svg(figure: Any, name: str) -> str:
    """A figure as an element of a page.

    Args:
      figure: Matplotlib's; marks are put on it.
      name: begins every id in it, so that two figures of a page have none in common.
    """
    limits = [(axes, axes.get_xlim(), axes.get_ylim()) for axes in figure.axes]
    said = _tips(figure)
    for axes, x, y in limits:
        axes.set_xlim(x)
        axes.set_ylim(y)
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for at, words in enumerate(said):
        place = f'<g id="tip-{at}">'
        assert place in text, place
        text = text.replace(place, f"<g><title>{html.escape(words)}</title>", 1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    keep = lambda m: f' id="{name}-{m[1]}"' if m[1] in used else ""  # noqa: E731
    text = re.sub(r' id="([\w.-]+)"', keep, text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    return re.sub(r"\n\s*\n", "\n", text)  # an empty line would end a block


def placed(page: str, figures: Mapping[str, str]) -> str:
    """A page with pictures as elements, those that are known by their file."""

    def element(picture: re.Match[str]) -> str:
        alt, name = picture.groups()
        if name not in figures:
            return picture[0]
        label = f'<svg role="img" aria-label="{html.escape(alt)}"'
        drawn = figures[name].replace("<svg", label, 1)
        return f'```{{raw}} html\n<div class="drawn">{drawn}</div>\n```'

    return re.sub(r"!\[([^\]]*)\]\(([^)/]+)\)", element, page)


def _stamp(folder: pathlib.Path) -> str:
    """Of what a folder's figures are drawn from."""
    seen = hashlib.sha256(matplotlib.__version__.encode())
    sources = [*(ROOT / "experiments").rglob("*.py"), pathlib.Path(__file__)]
    for path in sorted([*sources, *folder.glob("*.json*")]):
        seen.update(path.read_bytes())
    return seen.hexdigest()


def drawn(key: str, folder: pathlib.Path, kept: pathlib.Path) -> dict[str, str]:
    """The figures of a folder of results: name of the PNG, and the SVG in its place.

    Args:
      key: the folder, as the site calls it.
      folder: of results.
      kept: a folder in which they stay; what has not changed is not drawn again.
    """
    out = kept / key.replace("/", "-")
    stamp = out / "stamp"
    if not stamp.is_file() or stamp.read_text("utf-8") != _stamp(folder):
        shutil.rmtree(out, ignore_errors=True)
        count = itertools.count()

        def write(figure: Any, file: pathlib.Path) -> None:
            name = f"{key.replace('/', '-')}-{next(count)}"
            file.write_text(svg(figure, name), "utf-8")

        before, plots.write_to = plots.write_to, write
        try:
            report.redraw(run.find(key.split("/")[0]).report, folder, out)
        finally:
            plots.write_to = before
        stamp.write_text(_stamp(folder), "utf-8")
    return {
        path.name: path.read_text("utf-8")
        for path in sorted(out.glob("*.png"))
        if path.read_bytes()[:4] == b"<svg" and path.stat().st_size < MOST_BYTES
    }
