from __future__ import annotations

import itertools
import os

import matplotlib
import numpy as np
import pytest
from matplotlib import colors
from matplotlib.image import imread

from experiments.core import plots
from experiments.core.stats import Summary

SIZES = [100, 300, 1_000, 3_000, 10_000, 30_000, 60_000]


def line(label, means, seeds, **more):
    """Means with bars of 0.01, without one where there is a single seed."""
    summaries = [
        Summary(k, m, None if k == 1 else 0.01)
        for m, k in zip(means, seeds, strict=True)
    ]
    points = zip(SIZES[: len(summaries)], summaries, strict=True)
    return plots.Series.of(label, points, **more)


def lines(count):
    seeds = [1, 2, *[3] * 5]
    return [
        line(
            f"model {i}",
            [0.5 + 0.05 * k + 0.01 * i for k in range(7)],
            seeds,
            baseline=i >= 4,
        )
        for i in range(count)
    ]


def gaps(**more):
    means = [-0.1 + 0.02 * i for i in range(7)]
    return line("ViT − CNN", means, [1, *[3] * 6], **more)


SIDES = dict(sides=("up", "down"))


def test_the_curve_is_a_small_picture_and_the_same_each_time(tmp_path):
    before = dict(matplotlib.rcParams)
    path = plots.curve(
        lines(7),
        tmp_path / "new" / "curve.png",
        title="Title",
        level=(0.1, "chance"),
        note="Note",
    )
    picture = imread(path)
    assert picture.shape[1] > 900 and picture.shape[0] > 500
    assert path.stat().st_size < 150_000
    again = plots.curve(
        lines(7),
        tmp_path / "again.png",
        title="Title",
        level=(0.1, "chance"),
        note="Note",
    )
    assert again.read_bytes() == path.read_bytes()
    assert dict(matplotlib.rcParams) == before
    # Every network's colour is there.
    pixels = (picture[..., :3].reshape(-1, 3) * 255).round().astype(int)
    seen = {tuple(p) for p in np.unique(pixels, axis=0)}
    for color in plots.PALETTE[:4]:
        assert tuple(round(255 * c) for c in colors.to_rgb(color)) in seen


def test_differences_have_two_sides_and_may_have_a_fit(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: figures.append(figure))
    x = np.geomspace(100, 60_000, 20)
    fit = x, 0.02 * np.log(x / 9_000)
    for more in ({}, {"fit": fit}):
        plots.curve([gaps(**more)], tmp_path, title="Gap", **SIDES)
    plain, fitted = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in plain.texts] == ["▲ up", "▼ down"]
    low, high = plain.get_ylim()
    assert low < -0.1 and high > 0
    assert len(fitted.get_lines()) == len(plain.get_lines()) + 1
    joined = [
        {x.get_label(): x for x in axes.get_lines()}["ViT − CNN"].get_linestyle()
        for axes in (plain, fitted)
    ]
    assert joined == ["-", "None"]


def test_the_level_of_guessing_has_a_name(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "annotate", lambda _, text, *__, **___: said.append(text)
    )
    level = 0.25, "without the centre"
    plots.curve(lines(1), tmp_path / "a.png", title="", level=level)
    assert said == ["without the centre .25"]


@pytest.mark.parametrize("more", [{}, SIDES])
def test_a_single_point_can_be_drawn(tmp_path, more):
    one = line("a", [0.5], [1])
    assert plots.curve([one], tmp_path / "a.png", title="One", **more).exists()


def test_styles_belong_to_names():
    names = [f"model {i}" for i in range(25)]
    styles = plots.Styles(names + names[:3], ["floor", "model 30"])
    found = [styles[name] for name in (*names, "floor", "model 30")]
    assert len(set(map(repr, found))) == len(found)
    assert styles["floor"].color != styles["model 30"].color
    with pytest.raises(KeyError):
        styles["unknown"]


def test_a_line_keeps_its_style_whatever_stands_beside_it(tmp_path, monkeypatch):
    seen = {}
    plot = matplotlib.axes.Axes.plot

    def spy(axes, *args, **more):
        if more.get("label"):
            seen.setdefault(more["label"], set()).add((more["color"], more["marker"]))
        return plot(axes, *args, **more)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    some = lines(6)
    styles = plots.Styles([x.label for x in some[:4]], [x.label for x in some[4:]])
    for shown in (some, some[::-1], some[2:3], some[5:]):
        plots.curve(shown, tmp_path / "a.png", title="", styles=styles)
    assert len(seen) == 6 and all(len(styles) == 1 for styles in seen.values())


def test_styles_differ_without_colour():
    count = len(plots.PALETTE)
    assert len(set(plots.MARKERS)) == len(set(plots.LINES)) == count
    for two in itertools.combinations(zip(plots.MARKERS, plots.LINES, strict=True), 2):
        assert two[0][0] != two[1][0] and two[0][1] != two[1][1]


def test_the_first_colours_differ_in_grey_too():
    def grey(color):
        return float(np.dot(colors.to_rgb(color), [0.2126, 0.7152, 0.0722]))

    first, second = map(grey, plots.PALETTE[:2])
    assert abs(first - second) > 0.05


def test_nothing_to_draw_and_unequal_columns_are_errors(tmp_path):
    with pytest.raises(ValueError, match="series: expected at least one"):
        plots.curve([], tmp_path / "x.png", title="x")
    bad = plots.Series("a", [1, 2], [0.5], [None], [None], [1])
    with pytest.raises(ValueError, match=r"series 'a': .* got \[2, 1, 1, 1, 1\]"):
        plots.curve([bad], tmp_path / "x.png", title="x")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_figure(tmp_path, monkeypatch):
    path = plots.curve([gaps()], tmp_path / "gap.png", title="Old")
    old = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        plots.curve([gaps()], path, title="New")
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["gap.png"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(300, "300"), (1_000, "1k"), (60_000, "60k"), (1.25e6, "1.25M"), (2e9, "2G")],
)
def test_sizes_are_written_short(number, text):
    assert plots._count(number) == text
    assert plots._count(number * 1.0001, 2) == text.replace("1.25M", "1.3M")


@pytest.mark.parametrize(
    ("number", "text"), [(0.02, "+.02"), (-0.1, "−.10"), (0, "0"), (0.125, "+.125")]
)
def test_differences_are_written_with_their_sign(number, text):
    assert plots._signed(number) == text
