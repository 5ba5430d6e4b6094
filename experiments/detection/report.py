"""Table and figures of the experiment, from stored results alone.

`python -m experiments detection --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl.
"""

from __future__ import annotations

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
from experiments.detection.cells import SURE

AP = "test_ap"
DETR, CENTERS = "DETR", "map of centres (convolutions)"
FLOORS = {"mean_boxes": "mean box of each class, without looking"}


def name_of(row: Row) -> str:
    """A row in words."""
    config = row.config
    if config["model"] == "centers":
        return CENTERS
    found = [DETR]
    if config["attention"] != "dot_product":
        found.append(f"with {config['attention'].rpartition('/')[2]}")
    if config["cross"] == "same":
        found.append("(queries too)")
    for lacks, name in (
        (config["depth"] == 0, "encoder"),
        (not config["positions"], "positions"),
        (not config["auxiliary"], "auxiliary losses"),
    ):
        if lacks:
            found.append(f"without {name}")
    return " ".join(found)


def _of(rows: Sequence[Row], name: str, n: int) -> Row | None:
    return next((r for r in rows if name_of(r) == name and r.config["n"] == n), None)


_COLUMNS: tuple[Column, ...] = (
    ("model", name_of),
    tell.setting("N", "n", ","),
    tell.score("AP", AP, 3),
    tell.score("AP50", "test_ap50", 3),
    tell.score("AP75", "test_ap75", 3),
    tell.score("small", "test_ap_small", 3),
    tell.score("medium", "test_ap_medium", 3),
    tell.score("large", "test_ap_large", 3),
    tell.score("AP50, training scenes", "train_ap50", 3),
    tell.PARAMETERS,
    ("forward MFLOPs", lambda row: f"{row.first('flops') / 1e6:,.0f}"),
    tell.RATE,
    tell.DIVERGED,
)


def _floors(group: Group) -> Iterator[list[str]]:
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    for name, found in group.floors(task=group.config["task"]).items():
        values = [tell.decimal(found.get(f"test_{k}"), 3) for k in names]
        yield [FLOORS.get(name, name), tell.NONE, *values]


def _gaps(group: Group) -> Iterator[str]:
    """What is clearly apart: DETR and convolutions, and what DETR is without."""
    lines = []
    for n in sorted({row.config["n"] for row in group.rows}):
        whole = _of(group.rows, DETR, n)
        for row in group.rows:
            if whole is None or row.config["n"] != n or row is whole:
                continue
            one, two = (whole, row) if name_of(row) == CENTERS else (row, whole)
            if one.scores(AP) and two.scores(AP):
                found, text = tell.difference(one, two, AP, 3)
                known = found.low is not None
                clear = f", {'clear' if found.clear else 'not clear'}" if known else ""
                lines.append(
                    f"- N = {n:,}: {name_of(one)} less {name_of(two)} {text}{clear}."
                )
    if lines:
        yield (
            "AP, differences by seed with Student's interval of 95 %:\n\n"
            + "\n".join(lines)
        )


def _styles(group: Group) -> Styles:
    return Styles([name_of(row) for row in group.rows])


def _file(group: Group, name: str) -> str:
    """Name of a figure; it says which section, where there are several."""
    kinds = {(row.config["task"], row.config["updates"]) for row in group.every}
    if len(kinds) > 1:
        name += f"_{group.config['task'].replace(':', '-')}_{group.config['updates']}"
    return f"{name}.png"


def _curves(group: Group) -> Iterator[str]:
    """How fast they learn, and what more scenes are worth."""
    most = max(row.config["n"] for row in group.rows)
    learning = [
        line
        for row in group.rows
        if row.config["n"] == most
        for line in Series.training(name_of(row), row.records, "val_ap50")
    ]
    found = []
    if learning:
        found.append(
            Panel(
                f"While they learn, N = {most:,}",
                "updates",
                "AP50 on 50 validation scenes",
                learning,
                ylim=(0.0, 1.0),
            )
        )
    names = dict.fromkeys(name_of(row) for row in group.rows)
    over: list[Series] = []
    for name in names:
        rows = [row for row in group.rows if name_of(row) == name]
        points = sorted((row.config["n"], row.of(AP)) for row in rows)
        if len(points) > 1:
            over.append(Series.of(name, points))
    if over:
        found.append(
            Panel(
                "What more scenes are worth",
                "training scenes N",
                "test AP",
                over,
                decades=True,
            )
        )
    if found:
        file = _file(group, "curves")
        panels(found, group.folder / file, _styles(group), columns=1)
        yield f"![AP50 while they learn, and AP over N]({file})"


def _first(group: Group, name: str) -> dict[str, Any] | None:
    """Metrics of seed 0 of a row at the largest N."""
    most = max(row.config["n"] for row in group.rows)
    row = _of(group.rows, name, most)
    records = row.records if row else ()
    return next((r["metrics"] for r in records if r["config"]["seed"] == 0), None)


def _draw_boxes(
    axes: Any, entries: list[list[float]], side: int, classes: list[str], **look: Any
) -> None:
    """Boxes, and where there are names of classes, what they are told to be."""
    from matplotlib.patches import Rectangle

    for score, kind, x, y, w, h, _ in entries:
        corner = (x - w / 2) * side - 0.5, (y - h / 2) * side - 0.5
        color = PALETTE[int(kind) % len(PALETTE)]
        axes.add_patch(
            Rectangle(corner, w * side, h * side, fill=False, edgecolor=color, **look)
        )
        if classes:
            axes.text(
                *corner,
                f"{classes[int(kind)]} {score:.2f}",
                fontsize=5,
                color=color,
                va="bottom",
            )


def _picture(axes: Any, scene: dict[str, Any], side: int, **look: Any) -> None:
    pixels = unpack(scene["image"], (side, side, -1))
    grey = pixels.shape[-1] == 1
    axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray", **look)
    axes.set_xticks([])
    axes.set_yticks([])


def _side(config: dict[str, Any]) -> int:
    """Pixels a side of the stored pictures."""
    return int(config["task"].partition("-")[2].partition("px")[0])


def _shown(group: Group) -> Iterator[str]:
    """Test scenes with the boxes that are told of them."""
    found = {name: _first(group, name) for name in (DETR, CENTERS)}
    known = {name: m for name, m in found.items() if m and m.get("shown")}
    if not known:
        return
    columns = len(next(iter(known.values()))["shown"])
    shape = (1.9 * columns, 2.1 * len(known) + 0.4)
    figure, grid = subplots(
        shape, len(known), columns, title=f"Test scenes, boxes of scores above {SURE}"
    )
    for row, (name, metrics) in enumerate(known.items()):
        for column, scene in enumerate(metrics["shown"]):
            axes, side = grid[row, column], _side(group.config)
            _picture(axes, scene, side)
            sure = [entry for entry in scene["found"] if entry[0] > SURE]
            _draw_boxes(axes, scene["truth"], side, [], linewidth=0.8, linestyle=":")
            _draw_boxes(axes, sure, side, metrics["classes"], linewidth=1.2)
            if column == 0:
                axes.set_ylabel(name, fontsize=7)
    file = _file(group, "scenes")
    save_figure(figure, group.folder / file)
    yield (
        f"![test scenes and what is told of them]({file})\n\n"
        "Solid: what is told, with its class and score; dotted: what is there. The "
        "colour is the class."
    )


def _queries(group: Group) -> Iterator[str]:
    """Where the boxes of each query lie."""
    metrics = _first(group, DETR)
    if not metrics or not metrics.get("queries"):
        return
    entries = np.array(metrics["queries"])
    used = np.unique(entries[:, 0]).astype(int)
    columns = min(10, len(used))
    rows = -(-len(used) // columns)
    figure, grid = subplots(
        (1.3 * columns, 1.45 * rows + 0.4), rows, columns, title="Boxes by query"
    )
    for axes in grid.flat[len(used) :]:
        axes.set_visible(False)
    for axes, query in zip(grid.flat, used, strict=False):
        mine = entries[entries[:, 0] == query]
        axes.scatter(mine[:, 1], mine[:, 2], s=60 * mine[:, 3] * mine[:, 4] + 1)
        axes.set_xlim(0, 1)
        axes.set_ylim(1, 0)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"query {query + 1} ({len(mine)})", fontsize=6)
    file = _file(group, "queries")
    save_figure(figure, group.folder / file)
    total = group.config["num_queries"]
    yield (
        f"![centres of the boxes of each query]({file})\n\nCentres of the boxes "
        f"that each query told with a score above {SURE} (how many in brackets; area: "
        f"that of the box), a square is a picture. {len(used)} of {total} queries told "
        "one."
    )


def _looks(group: Group) -> Iterator[str]:
    """What queries see of a scene, and what places of the encoder see."""
    metrics = _first(group, DETR)
    if not metrics or "query_looks" not in metrics:
        return
    scene, classes = metrics["shown"][0], metrics["classes"]
    side, size = _side(group.config), metrics["map_size"]
    sure = sorted((e for e in scene["found"] if e[0] > SURE), reverse=True)[:4]
    pictures = [
        (
            f"query {row + 1}: {classes[int(kind)]}",
            np.array(metrics["query_looks"][int(row)]),
            (x, y),
        )
        for _, kind, x, y, _, _, row in sure
    ]
    for place, looks in metrics.get("place_looks", []):
        at = (place % size[1] + 0.5) / size[1], (place // size[1] + 0.5) / size[0]
        pictures.append(("encoder, from the dot", np.array(looks), at))
    if not pictures:
        return
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, grid = subplots(
        (2.2 * columns, 2.4 * rows + 0.4), rows, columns, title="Who looks where"
    )
    for axes in grid.flat[len(pictures) :]:
        axes.set_visible(False)
    for axes, (title, looks, at) in zip(grid.flat, pictures, strict=False):
        _picture(axes, scene, side, extent=(0, 1, 1, 0))
        axes.imshow(
            looks.reshape(size),
            cmap="magma",
            alpha=0.65,
            extent=(0, 1, 1, 0),
            vmin=0,
        )
        axes.plot(*at, "o", color=PALETTE[1], markersize=4)
        axes.set_title(title, fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    file = _file(group, "looks")
    save_figure(figure, group.folder / file)
    yield (
        f"![what queries and places look at]({file})\n\nWeights of the last block, "
        "mean over heads, each picture on a scale of its own: of the decoder's surest "
        "queries (dot: the centre of the told box), and of the encoder's places under "
        "some items (dot)."
    )


def _at_ends(group: Group) -> list[str]:
    most = max(row.config["n"] for row in group.rows)
    whole = [row for row in group.rows if row.config["n"] == most]
    return tell.at_ends(group, name_of, whole)


def _intro(group: Group) -> str:
    task, rates = group.config["task"], group.rates()
    if task.startswith("coco"):
        data = (
            "Pictures are squeezed to squares; crowds, and pictures with no item or "
            "with more than the most that are told, are left out, and the test part is "
            "the first pictures of COCO's validation part: **not comparable with "
            f"published AP**. Task {task}."
        )
    else:
        data = (
            "Scenes of photographed items, **composed here**: their arrangement is "
            f"artificial. Task {task}."
        )
    chosen = "one learning rate, which was given"
    if len(rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        chosen = (
            f"learning rates chosen by AP on validation scenes, of {tried}, at the "
            "largest N (smaller N take it over)"
        )
    return (
        f"{data} AP is measured as COCO has it (mean over overlaps from .5 to .95, "
        "and over classes), mean ± standard deviation over seeds; small, medium and "
        "large are items of less than 3 %, 3 to 9 % and more than 9 % of the picture. "
        "DETR tells a set of boxes, with no suppression of near ones; the map of "
        "centres keeps the surest of nine neighbouring places. Both have the same "
        f"backbone and losses of boxes, the same updates, and {chosen}."
    )


REPORT = Report(
    title="# Detection: a set of boxes by self-attention, and by convolutions",
    text=(_intro,),
    sections=(
        Section(
            title="## {updates:,} updates of {batch_size} scenes",
            by=("task", "updates"),
            order=lambda row: (row.config["n"], name_of(row) != DETR, name_of(row)),
            columns=_COLUMNS,
            floors=_floors,
            notes=(_at_ends, _gaps, _curves, _shown, _queries, _looks),
        ),
    ),
)
