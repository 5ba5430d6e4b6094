"""Figures of the report: scores, lengths of answers, alignments, fewer pairs."""

from __future__ import annotations

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import (
    Board,
    Panel,
    Series,
    Standing,
    Styles,
    curve,
    panels,
    save_figure,
    standings,
    subplots,
)
from experiments.core.report import Group, Row
from experiments.seq2seq.rows import by_pairs, models, name_of
from experiments.seq2seq.telling import Score, telling_of


def file_of(group: Group, name: str) -> str:
    """The file of a figure: with the task, where the folder holds several."""
    several = len({row.config["task"] for row in group.every}) > 1
    return f"{group.config['task']}_{name}.png" if several else f"{name}.png"


def board(group: Group) -> list[str]:
    """Who stands where, by each score."""
    rows, telling = [row for row in models(group) if row.records], telling_of(group)
    if not rows:
        return []
    floors = group.floors(task=group.config["task"])

    def of(score: Score) -> Board:
        found = [Standing.of(name_of(row), score.by_seed(row)) for row in rows]
        found += [
            Standing(telling.floors[name], score.scale * made[score.key], baseline=True)
            for name, made in floors.items()
            if name not in telling.undrawn
        ]
        title = f"{score.name}{score.unit}, of test {telling.items}"
        return Board(score.name, title, found, telling.less)

    styles = Styles([name_of(row) for row in rows])
    file = file_of(group, "scores")
    standings(list(map(of, telling.scores)), group.folder / file, styles)
    return [f"![scores of the models]({file})"]


def _lengths_of(row: Row) -> np.ndarray:
    """Of each kind of answer of all seeds: symbols of the source, that are right, that
    were written, and how many there are, [n, 4].
    """
    return np.concatenate([r["metrics"]["lengths"] for r in row.records])


def lengths(group: Group) -> list[str]:
    """Does a model decide how long its answer is? Written length against the right."""
    rows = [row for row in models(group) if row.first("lengths")]
    if not rows:
        return []
    telling, limit = telling_of(group), rows[0].config["train_length"]
    series, told = [], {}
    for row in rows:
        source, right, written, count = _lengths_of(row).T
        sizes = np.unique(right)
        means = [
            float(np.average(written[right == n], weights=count[right == n]))
            for n in sizes
        ]
        series.append(Series(name_of(row), sizes.tolist(), means))
        off, longer = np.abs(right - written), np.maximum(source, right + 1) > limit
        near = off <= np.maximum(1, right // 10)
        told[name_of(row)] = {
            "as long": tell.decimal(float(count[off == 0].sum() / count.sum()), 3),
            telling.near: tell.decimal(float(count[near].sum() / count.sum()), 3),
        }
        for title, some in (("written / right", ~longer), ("… of longer", longer)):
            if some.any():
                share = (written * count)[some].sum() / (right * count)[some].sum()
                told[name_of(row)][title] = tell.decimal(float(share), 3)
    longest = max(max(line.x) for line in series)
    diagonal = Series("as long as it is", [1, longest], [1, longest], baseline=True)
    panels(
        [
            Panel(
                "How long the answer is",
                f"{telling.target} that are right (in training at most {limit - 1})",
                f"{telling.target} written, mean",
                [*series, diagonal],
            )
        ],
        group.folder / file_of(group, "lengths"),
        Styles([name_of(row) for row in rows], ["as long as it is"]),
    )
    _histograms(rows, group)
    return [
        "## Does the model decide how long its answer is?",
        f"Share of test {telling.items} whose answer has as many {telling.target} as "
        "the target nearest to it in length, and how many are written for each that "
        f"is right, where source and target are of at most {limit} symbols as in "
        "training, and where one of them is longer:",
        tell.pivot("model", told, "{}"),
        f"![written length against the right one]({file_of(group, 'lengths')})",
        "![histogram of written and right lengths]"
        f"({file_of(group, 'length_histograms')})",
    ]


def _histograms(rows: list[Row], group: Group) -> None:
    """How often which length is written for which, a picture a model."""
    telling = telling_of(group)
    figure, grid = subplots((3.4 * len(rows) + 0.6, 3.5), columns=len(rows))
    for axes, row in zip(grid.flat, rows, strict=True):
        _, right, written, count = _lengths_of(row).T
        most = int(max(right.max(), written.max())) + 1
        axes.hist2d(
            right,
            written,
            bins=min(most, 48),
            range=[[0, most]] * 2,
            weights=count,
            cmap="magma",
        )
        axes.plot([0, most], [0, most], color="white", linewidth=0.6)
        axes.set_title(name_of(row), fontsize=9, loc="left")
        axes.set_xlabel(f"{telling.target} that are right", fontsize=8)
        axes.set_ylabel(f"{telling.target} written", fontsize=8)
        axes.tick_params(labelsize=7)
    save_figure(figure, group.folder / file_of(group, "length_histograms"))


def alignments(group: Group) -> list[str]:
    """What each symbol looks at, of the first seed of each model that attends."""
    found, telling = [], telling_of(group)
    for row in models(group):
        shown = row.first("alignments")
        if not shown:
            continue
        rows = 2 if len(shown) > 2 else 1
        columns = -(-len(shown) // rows)
        wide, high = (max(len(one[k]) for one in shown) for k in ("source", "target"))
        size = max(2.3, 0.3 * wide) * columns, max(2.6, 0.22 * high + 1.0) * rows
        name = f"{name_of(row)}: what {telling.target} look at"
        figure, grid = subplots(size, rows, columns, title=name)
        for axes, one in zip(grid.flat, shown, strict=False):
            weights = np.mean(one["weights"], axis=0)
            drawn = axes.imshow(weights, cmap="magma", vmin=0, vmax=1, aspect="auto")
            turned = 90 if max(map(len, one["source"])) > 2 else 0
            axes.set_xticks(
                range(len(one["source"])), one["source"], fontsize=7, rotation=turned
            )
            axes.set_yticks(range(len(one["target"])), one["target"], fontsize=7)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        scale = figure.colorbar(drawn, ax=list(grid.flat), shrink=0.6, aspect=30)
        scale.set_label("weight, mean over heads and layers", fontsize=8)
        scale.ax.tick_params(labelsize=7)
        file = file_of(group, f"alignments_{row.config['model'].rpartition(':')[2]}")
        save_figure(figure, group.folder / file)
        found.append(f"![what {telling.target} look at, {name_of(row)}]({file})")
    if found:
        found.insert(0, f"## What do {telling.target} look at?")
    return found


def of_pairs(group: Group) -> list[str]:
    """The first score against the number of training pairs."""
    telling = telling_of(group)
    score, file = telling.scores[0], file_of(group, "pairs")
    best = group.best(score.key, less=telling.less, task=group.config["task"])
    points = [(row.first("n"), score.of(row)) for row in by_pairs(group)]
    level = None
    if best is not None:
        # Floors are measured with all pairs, whatever N a row has.
        level = score.scale * best[1], f"{telling.floors[best[0]]}, from all pairs"
    curve(
        [Series.of("Transformer", points)],
        group.folder / file,
        title=f"{score.name} of test {telling.items}",
        ylabel=f"{score.name}{score.unit}",
        xlabel="number of training pairs N (log scale)",
        level=level,
    )
    return [f"![score against the number of training pairs]({file})"]
