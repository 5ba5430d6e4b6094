"""Tables and figures of the experiment, from stored results alone.

`python -m experiments offsets --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, panels, save_figure, subplots
from experiments.core.report import Group, Report, Row, Section
from experiments.core.stats import Summary

METRIC = "test_accuracy_known"
ATTENTION = "self-attention"


def size(row: Row) -> int:
    """k, which the name of the task says."""
    return int(row.config["task"].partition(":")[2])


def model_name(row: Row) -> str:
    """What a row's model is, in words."""
    window = row.config["window"]
    return ATTENTION if window is None else f"window ±{window}"


def _of(kind: str) -> Callable[[Group], list[Row]]:
    return lambda group: [r for r in group.rows if r.config["task"].startswith(kind)]


def _mixing(row: Row) -> float | None:
    """Parameters besides those of the input tables."""
    params, table = row.first("params"), row.first("input_params")
    return None if params is None or table is None else params - table


def _digits(k: int) -> int:
    """Of a guess at k signs, as many as say something."""
    return 3 if k > 4 else 2


def _floor(group: Group, k: int, kind: str) -> float | None:
    found = group.best(METRIC, task=f"{kind}:{k}")
    return None if found is None else found[1]


def _chosen(group: Group) -> str:
    """What the validation part chose, of what, and on what."""
    rates = ", ".join(f"{rate:g}" for rate in group.rates())
    if not rates:
        return "Learning rates were given, not chosen."
    tuned = [r["config"] for r in group.records if r["config"]["phase"] == "tune"]
    most = tell.span({config["updates"] for config in tuned})
    kinds = {c["positions"] for c in tuned if c["positions"] is not None}
    what = f"the positions of {', '.join(sorted(kinds))} and " * (len(kinds) > 1)
    return (
        f"Validation data chose {what}learning rates of {rates}, at k = "
        f"{max(map(size, group.rows))} with one seed and {most} updates; the smaller k "
        "take them over."
    )


# ------------------------------------------------------------------- k places before


def _back_text(group: Group) -> list[str]:
    attention = [row for row in group.rows if row.config["window"] is None]
    positions = ", ".join(dict.fromkeys(row.config["positions"] for row in attention))
    return [
        "Sequences of 128 symbols, of 8 kinds and drawn evenly; the label of each is "
        "the symbol k places before. Test accuracy of those that have one, mean ± "
        f"standard deviation over seeds. One layer each; {ATTENTION} has one head and "
        f"positions: {positions}. {_chosen(group)}"
    ]


def _sees(row: Row) -> bool:
    return row.config["window"] is None or row.config["window"] >= size(row)


def _line(label: str, points: Sequence[tuple[int, Summary | None]]) -> Series:
    """A line; without a band where there is one seed."""
    found = Series.of(label, sorted(points, key=lambda point: point[0]))
    if None in found.low:
        return Series(found.label, found.x, found.y)
    return found


def _smallest(group: Group) -> dict[int, Row]:
    """The smallest window that holds the place, by k."""
    found: dict[int, Row] = {}
    for row in sorted(group.rows, key=lambda row: row.config["window"] or math.inf):
        if row.config["window"] is not None and _sees(row):
            found.setdefault(size(row), row)
    return found


def _back(group: Group) -> list[str]:
    models = tell.grouped(
        sorted(group.rows, key=lambda row: row.config["window"] or 0), model_name
    )
    smallest, sizes = _smallest(group), sorted({size(row) for row in group.rows})
    guesses = [_floor(group, k, "back") for k in sizes]
    best_guess = max((g for g in guesses if g is not None), default=1 / 8)
    narrow = "smallest window that holds the place"
    panels(
        [
            Panel(
                "Accuracy of the symbol k places before",
                "k, places before",
                "test accuracy",
                [
                    _line(name, [(size(row), row.of(METRIC)) for row in rows])
                    for name, rows in models.items()
                ],
                level=(best_guess, f"one label always, {tell.decimal(best_guess, 2)}"),
                ylim=(0, 1.03),
                doubling=True,
            ),
            Panel(
                "What it takes",
                "k, places before",
                "parameters behind the input tables",
                [
                    _line(name, [(size(row), row.of(_count)) for row in rows])
                    for name, rows in (
                        (ATTENTION, models.get(ATTENTION, [])),
                        (narrow, list(smallest.values())),
                    )
                    if rows
                ],
                log=True,
                doubling=True,
            ),
        ],
        group.folder / "k_back.png",
        Styles([ATTENTION, *(n for n in models if n != ATTENTION), narrow]),
    )
    accuracy = {
        name: {size(row): tell.mean(row.of(METRIC), 3) for row in rows}
        for name, rows in models.items()
    }
    always = {k: tell.decimal(g, 3) for k, g in zip(sizes, guesses, strict=True) if g}
    first = [rows[0] for rows in models.values()]
    return [
        "![accuracy and parameters](k_back.png)",
        tell.pivot("model", accuracy | {"one label always": always}, "k = {}"),
        tell.tabulate(
            [
                ("model", model_name),
                (
                    "parameters behind the input tables",
                    lambda row: tell.count(_mixing(row)),
                ),
                ("updates", lambda row: f"{row.config['updates']:,}"),
                tell.RATE,
            ],
            first,
        ),
        *_back_verdict(group, smallest),
    ]


def _count(record: dict) -> float | None:
    metrics = record["metrics"]
    return metrics["params"] - metrics["input_params"] if "params" in metrics else None


def _back_verdict(group: Group, smallest: dict[int, Row]) -> list[str]:
    def between(rows: Sequence[Row]) -> str:
        found = [row.mean(METRIC) for row in rows if row.records]
        return tell.span(found, lambda x: tell.decimal(x, 3))

    blind = [row for row in group.rows if not _sees(row)]
    attention = [row for row in group.rows if row.config["window"] is None]
    text = []
    if blind:
        text.append(f"Windows that do not hold the place: {between(blind)}.")
    if smallest:
        costs = tell.span(c for c in map(_mixing, smallest.values()) if c)
        text.append(
            f"The smallest that do: {between(list(smallest.values()))}, with {costs} "
            f"parameters for k = {tell.span(smallest)}."
        )
    if attention:
        costs = tell.span(c for c in map(_mixing, attention) if c)
        text.append(
            f"{ATTENTION.capitalize()}: {between(attention)}, with {costs} parameters "
            "for every k."
        )
    return [" ".join(text)] if text else []


# ------------------------------------------------------------------- many relations


def most(k: int, heads: int) -> float:
    """Share of labels that can be right in all k signs, by heads of fixed weights.

    Of m heads, number j of the right vector is known as far as the direction of that
    vector lies in the space of m mixtures, by a cosine r_j with Σ r_j² = m. Its sign is
    then right with probability 1/2 + arcsin(r_j)/π. Some may be read exactly (r = 1),
    and the others share what is left.

    >>> most(2, 2), most(2, 1), round(most(8, 4), 3)
    (1.0, 0.5625, 0.114)
    """
    if heads >= k:
        return 1.0
    found = []
    for exact in range(heads + 1):
        cosine = math.sqrt((heads - exact) / (k - exact))
        found.append((0.5 + math.asin(cosine) / math.pi) ** (k - exact))
    return round(max(found), 12)


def _relations_text(group: Group) -> list[str]:
    return [
        "A vector is 8 independent normal numbers. A label needs k relations: of each, "
        "the sign of another number of another vector, up to 4 places before or after. "
        "One layer of width {dim} in all, however many heads; T5's bias, with a number "
        "for each offset of each head. Share of labels with all k signs right on the "
        "test part, mean ± standard deviation over seeds; a guess has 1/2ᵏ. {updates} "
        "updates. ".format(**group.config)
        + _chosen(group),
        'The table "at most" is what h sets of weights that do not depend on the '
        "numbers let through: h mixtures of k vectors tell no more of the k numbers "
        "than their projections on h directions.",
    ]


def _relations(group: Group) -> list[str]:
    rows = {(size(row), row.config["num_heads"]): row for row in group.rows}
    sizes, heads = (sorted({key[i] for key in rows}) for i in (0, 1))
    shape = len(sizes), len(heads)
    measured, bounds = np.full(shape, np.nan), np.ones(shape)
    marks: dict[tuple[int, int], str] = {}
    for place in np.ndindex(shape):
        k, h = sizes[place[0]], heads[place[1]]
        bounds[place] = most(k, h)
        row = rows.get((k, h))
        if row is not None and (found := row.of(METRIC)) is not None:
            measured[place] = found.mean
            marks[place] = tell.mean(found, _digits(k)).replace(" ± ", "\n± ")
    _heat(
        group,
        [
            ("Measured", measured, marks),
            (
                "At most, with one set of weights a head",
                bounds,
                {
                    (i, j): tell.decimal(float(bounds[i, j]), _digits(sizes[i]))
                    for i, j in np.ndindex(shape)
                },
            ),
        ],
        sizes,
        heads,
    )
    cells: dict[str, dict[int, str]] = {}
    for k in sizes:
        some = {h: rows[k, h] for h in heads if (k, h) in rows}
        cells[f"{k}"] = {h: tell.mean(row.of(METRIC), 3) for h, row in some.items()}
        cells[f"{k}, at most"] = {h: tell.decimal(most(k, h), 3) for h in some}
        floor = _floor(group, k, "relations")
        cells[f"{k}, one label always"] = {h: tell.decimal(floor, 3) for h in some}
    return [
        "![relations by heads](relations.png)",
        tell.pivot("relations k", cells, "{} heads"),
        *_relations_verdict(rows, sizes, heads),
        "Learning rates: "
        + ", ".join(
            f"{h} heads {rows[sizes[-1], h].config['learning_rate']:g}"
            for h in heads
            if (sizes[-1], h) in rows
        )
        + ".",
    ]


def _relations_verdict(
    rows: dict[tuple[int, int], Row], sizes: Sequence[int], heads: Sequence[int]
) -> list[str]:
    """As many heads as relations beside the next fewer, and beside the next more."""
    lines = []
    for k in sizes:
        for fewer, more in zip(heads, heads[1:], strict=False):
            if k not in (fewer, more) or not {(k, fewer), (k, more)} <= set(rows):
                continue
            one, two = rows[k, more], rows[k, fewer]
            if one.records and two.records:
                gap, said = tell.difference(one, two, METRIC, 3)
                clear = "" if gap.clear else ", not clear"
                lines.append(f"* k = {k}: {more} heads − {fewer}: {said}{clear}")
    if not lines:
        return []
    return ["Paired by seed, Student's interval of 95 %:", "\n".join(lines)]


def _heat(
    group: Group,
    maps: Sequence[tuple[str, np.ndarray, dict[tuple[int, int], str]]],
    sizes: Sequence[int],
    heads: Sequence[int],
) -> None:
    """Draws maps of k by heads on one scale, with their numbers."""
    title = "Share of labels with all k signs right"
    figure, (row,) = subplots((9.6, 4.0), columns=len(maps), title=title, dpi=120)
    for axes, (name, values, marks) in zip(row, maps, strict=True):
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1)
        for (i, j), text in marks.items():
            ink = "black" if values[i, j] > 0.55 else "white"
            axes.text(j, i, text, ha="center", va="center", color=ink, fontsize=9)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xticks(range(len(heads)), [str(h) for h in heads])
        ticks = [f"{k}  (guess {tell.decimal(0.5**k, _digits(k))})" for k in sizes]
        axes.set_yticks(range(len(sizes)), ticks)
        axes.set_xlabel("heads", fontsize=9)
        axes.set_ylabel("relations that a label needs", fontsize=9)
        axes.tick_params(labelsize=8, length=0)
    bar = figure.colorbar(image, ax=list(row), shrink=0.8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, group.folder / "relations.png")


REPORT = Report(
    title="# What lies some places away",
    sections=(
        Section(
            title="## The symbol k places before",
            rows=_of("back"),
            text=(_back_text,),
            notes=(_back,),
        ),
        Section(
            title="## Several relations at once",
            rows=_of("relations"),
            text=(_relations_text,),
            notes=(_relations,),
        ),
    ),
)
