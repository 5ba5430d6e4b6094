"""Table and figures of the experiment, from stored results alone.

`python -m experiments gan --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import (
    PALETTE,
    Panel,
    Series,
    Styles,
    panels,
    save_figure,
    subplots,
)
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.data.images import unpack

FID = "test_fid"
COLLAPSED = 0.3  # diversity below which a row has collapsed
FLOORS = {
    "real": "training pictures themselves",
    "gaussian": "every pixel normal, by class",
    "noise": "every pixel uniform",
}


def name_of(row: Row) -> str:
    """A row in words."""
    config = row.config
    if config["kind"] == "none":
        return "neither"
    found = config["kind"]
    if config["attention"] not in (None, "dot_product"):
        found += f" ({config['attention'].rpartition('/')[2]})"
    part = "half" if config["shrink"] == 2 else "a quarter"
    return f"{found} at {part} of the side"


def _millions(metric: str) -> Any:
    return lambda row: tell.decimal((row.first(metric) or 0) / 1e6, 2)


_COLUMNS: tuple[Column, ...] = (
    ("what a map is given", name_of),
    tell.score("FID", FID, 2),
    tell.score("precision", "test_precision", 3),
    tell.score("recall", "test_recall", 3),
    tell.score("class as asked", "test_class_accuracy", 3),
    tell.score("diversity", "test_diversity", 2),
    tell.same("parameters of the generator", "generator_params"),
    tell.same("of the discriminator", "discriminator_params"),
    ("MFLOPs a picture", _millions("generator_flops")),
    ("to tell it", _millions("discriminator_flops")),
    tell.RATE,
    tell.DIVERGED,
)


def _players(group: Group) -> list[Row]:
    return [row for row in group.rows if row.config["model"] == "gan"]


def _judge(group: Group) -> dict[str, Any]:
    """What the classifier came to, of the same task and hash."""
    found = (
        row.records[0]["metrics"]
        for row in group.every
        if row.config["model"] == "judge"
        and row.config["task"] == group.config["task"]
        and row.records
        and row.records[0].get("hash", group.config["judge"]) == group.config["judge"]
    )
    return next(found, {})


def _floors(group: Group) -> Iterator[list[str]]:
    names = ("precision", "recall", "class_accuracy", "diversity")
    for name, found in _judge(group).get("floors", {}).items():
        values = [tell.decimal(found[key], 2 + (key[0] != "d")) for key in names]
        yield [FLOORS.get(name, name), tell.decimal(found["fid"], 2), *values]


def _of_kind(group: Group, kind: str, shrink: int) -> Row | None:
    for row in group.rows:
        config = row.config
        plain = config["attention"] in (None, "dot_product")
        if plain and (config["kind"], config["shrink"]) == (kind, shrink):
            return row
    return None


def _gaps(group: Group) -> Iterator[str]:
    """Does attention lower FID, against as many parameters, and against nothing?"""
    lines = []
    neither = next((r for r in group.rows if r.config["kind"] == "none"), None)
    for row in group.rows:
        if row.config["kind"] == "none" or not row.scores(FID):
            continue
        peer = _of_kind(group, "convolution", row.config["shrink"])
        for other in (peer, neither):
            if other is None or other is row or not other.scores(FID):
                continue
            found, text = tell.difference(row, other, FID, 2)
            known = found.low is not None
            clear = f", {'clear' if found.clear else 'not clear'}" if known else ""
            lines.append(f"- {name_of(row)} less {name_of(other)}: {text}{clear}.")
    if lines:
        yield (
            "FID, differences by seed with Student's interval of 95 % (below zero: the "
            "first is better):\n\n" + "\n".join(lines)
        )


def _ill(group: Group) -> Iterator[str]:
    """What collapsed, and what did not come to an end."""
    for row in group.rows:
        varied = row.mean("test_diversity")
        if varied is not None and varied < COLLAPSED:
            yield (
                f"**Collapsed: {name_of(row)}**; within a class its pictures vary "
                f"{tell.decimal(varied, 2)} times as much as real ones."
            )
        for record in row.lost:
            at = record["metrics"].get("diverged_at")
            ended = "failed" if at is None else f"was not finite at update {at:,}"
            yield f"{name_of(row)}, seed {record['config']['seed']}: {ended}."


def _file(group: Group, name: str) -> str:
    """Name of a figure; it says which section, where there are several."""
    kinds = {(r.config["task"], r.config["updates"]) for r in _players(_all(group))}
    if len(kinds) > 1:
        task = pathlib.PurePath(group.config["task"].replace(":", "-")).name
        name += f"_{task}_{group.config['updates']}"
    return f"{name}.png"


def _all(group: Group) -> Group:
    return Group(group.every, group.records, group.folder, group.every)


def _curves(group: Group) -> Iterator[str]:
    """FID over updates, and how much of attention the players let in."""
    styles = Styles([name_of(row) for row in group.rows])
    drawn = []
    for title, label, metric in (
        ("While they learn", "FID to 1,000 validation pictures", "val_fid"),
        ("Generator: what is let in", "|γ|", "generator_gamma"),
        ("Discriminator: what is let in", "|γ|", "discriminator_gamma"),
    ):
        lines = [
            line
            for row in group.rows
            for line in Series.training(name_of(row), _sizes(row, metric), metric)
        ]
        if metric == "val_fid":  # what is drawn before training is off any scale
            lines = [
                Series(
                    line.label,
                    line.x[1:],
                    line.y[1:],
                    line.low[1:],
                    line.high[1:],
                )
                for line in lines
            ]
        if lines and all(line.x for line in lines):
            drawn.append(Panel(title, "updates", label, lines))
    if drawn:
        file = _file(group, "curves")
        panels(drawn, group.folder / file, styles, columns=1)
        yield (
            f"![FID and γ over updates]({file})\n\nBands: one deviation over seeds. γ "
            "begins at 0; its sign is free, so its size is drawn. FID of fewer "
            "pictures than in the table is larger by itself."
        )


def _sizes(row: Row, curve: str) -> list[dict[str, Any]]:
    """The curves of a row without the signs of their numbers."""
    return [
        dict(r, curves=dict(r["curves"], **{curve: np.abs(r["curves"][curve])}))
        for r in row.records
        if curve in r["curves"]
    ]


def _show(axes: Any, picture: np.ndarray) -> None:
    grey = picture.shape[-1] == 1
    axes.imshow(picture[..., 0] if grey else picture, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])


def _tiled(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [n, s, s, C] as one, so many a line."""
    n, rows, width, channels = pictures.shape
    grid = pictures.reshape(n // columns, columns, rows, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, channels)


def _shown(group: Group) -> Iterator[str]:
    """What every row draws, a column a class."""
    found = {
        name_of(row): row.records[0]["metrics"]
        for row in group.rows
        if row.records and "shown" in row.records[0]["metrics"]
    }
    for key, file, title, caption in (
        ("shown", "samples", "Drawn pictures, a column a class", "seed 0, not chosen"),
        (
            "between",
            "between",
            "From one drawn picture to another, top to bottom",
            "of each class, between two draws at equal angles",
        ),
    ):
        if not found:
            return
        columns = min(2, len(found))
        rows = -(-len(found) // columns)
        figure, grid = subplots(
            (4.4 * columns, 3.9 * rows + 0.3), rows, columns, title=title
        )
        for axes in grid.flat[len(found) :]:
            axes.set_visible(False)
        for axes, (name, metrics) in zip(grid.flat, found.items(), strict=False):
            shape, classes = tuple(metrics["image_shape"]), metrics["classes"]
            pictures = unpack(metrics[key], (-1, *shape))
            _show(axes, _tiled(pictures, len(classes)))
            at = (np.arange(len(classes)) + 0.5) * shape[1]
            axes.set_xticks(at, classes, rotation=45, ha="right", fontsize=6)
            axes.tick_params(length=0)
            axes.set_title(name, fontsize=8)
        name = _file(group, file)
        save_figure(figure, group.folder / name)
        yield f"![{title}]({name})\n\n{title}; {caption}."


def _looks(group: Group) -> Iterator[str]:
    """What some places of the generator's map see."""
    row = _of_kind(group, "attention", 2) or _of_kind(group, "attention", 4)
    metrics = row.records[0]["metrics"] if row and row.records else {}
    if row is None or "looks" not in metrics:
        return
    shape, places = tuple(metrics["image_shape"]), metrics["places"]
    pictures = unpack(metrics["looked"], (-1, *shape))
    side = shape[0] // row.config["shrink"]
    figure, grid = subplots(
        (1.5 * (1 + len(places)), 1.6 * len(pictures) + 0.4),
        len(pictures),
        1 + len(places),
        title="Where places of the generator's map look",
    )
    for line, picture in enumerate(pictures):
        _show(grid[line, 0], picture)
        name = metrics["classes"][line % len(metrics["classes"])]
        grid[line, 0].set_title(name, fontsize=7)
        for axes, place, weights in zip(
            grid[line, 1:], places, metrics["looks"][line], strict=True
        ):
            _show(axes, picture)
            axes.imshow(
                np.array(weights).reshape(side, side),
                cmap="magma",
                alpha=0.65,
                vmin=0,
                extent=(-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5),
            )
            x, y = ((i + 0.5) * row.config["shrink"] - 0.5 for i in _xy(place, side))
            axes.plot(x, y, "o", color=PALETTE[1], markersize=4)
    file = _file(group, "looks")
    save_figure(figure, group.folder / file)
    yield (
        f"![where places look]({file})\n\nLeft: what {name_of(row)} drew; then the "
        "weights of the place under the dot, each on a scale of its own."
    )


def _xy(place: int, side: int) -> tuple[int, int]:
    """Column and row of a place.

    >>> _xy(17, 14)
    (3, 1)
    """
    return place % side, place // side


def _at_ends(group: Group) -> list[str]:
    return tell.at_ends(group, name_of, group.rows)


def _intro(group: Group) -> str:
    judged = _judge(group).get("test_accuracy")
    rates: Sequence[float] = group.rates()
    chosen = "The learning rate was given."
    if len(rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        chosen = (
            f"Learning rates were chosen by FID to validation pictures, of {tried}."
        )
    right = "" if judged is None else f" (right of {tell.decimal(judged, 3)} test ones)"
    return (
        "Two players of plain convolutions with spectral normalisation, hinge loss, "
        f"both steps at once, the generator at {group.config['share']:g} of the "
        f"discriminator's rate, on {group.config['n']:,} pictures of "
        f"{group.config['task']}. A map of both is given self-attention, or a "
        "convolution of as many parameters, times γ, which begins at 0. **FID, "
        "precision and recall are measured in the features of a classifier that was "
        f"trained here{right}, against the test part: they cannot be compared with "
        "those in Inception's features.** Class as asked: by that classifier; "
        "diversity: how much pictures of a class vary, as a share of how much test "
        f"pictures do. {chosen}"
    )


REPORT = Report(
    title="# Drawing: a generator and a discriminator with self-attention",
    rows=_players,
    sections=(
        Section(
            title="## {updates:,} updates of {batch_size} pictures, {task}",
            by=("task", "updates", "judge", "n"),
            text=(_intro,),
            columns=_COLUMNS,
            floors=_floors,
            notes=(_ill, _at_ends, _gaps, _curves, _shown, _looks),
        ),
    ),
)
