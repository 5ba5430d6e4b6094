"""Tables and figures of the arena, from stored results alone.

`python -m experiments long_range --redraw FOLDER` redraws report.md and the figures of
a folder that holds results.jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, panels
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.core.stats import Gap, gap
from experiments.long_range import figures
from experiments.long_range.cells import SOFTMAX, SPANS
from experiments.long_range.published import COLUMNS, PUBLISHED, SOURCES

METRIC = "test_accuracy"
FLOORS = {"linear": "logistic regression", "flood": "flooding the ink, unlearnt"}
WORDS = {
    "text": "Text: is a mail wanted? From its bytes",
    "language": "Language of a paragraph, from its bytes",
    "retrieval": "Retrieval: is one verse the translation of the other?",
    "image": "Image: clothes, pixel by pixel",
    "pathfinder": "Pathfinder: are two discs joined by a contour?",
    "listops": "ListOps: what nested lists of digits come to",
    "recall": "Recall: the value of each of n keys",
    "copying": "Selective copying: the data among noise, in order",
    "induction": "Induction: what followed the mark",
}
"""Task -> what it asks."""


def task_of(row: Row) -> str:
    """The task, which the name of its data begins with."""
    return re.split(r"[\d_]", row.config["task"])[0]


def ordered(group: Group) -> list[Row]:
    """All rows: task by task, softmax first."""
    tasks = list(WORDS)
    return sorted(
        group.rows,
        key=lambda row: (
            tasks.index(task_of(row)) if task_of(row) in tasks else len(tasks),
            row.config["task"],
            row.config["model"] != SOFTMAX,
            row.config["model"],
            row.config["dim"],
            row.config.get("pretrain_updates", 0),
        ),
    )


def name_of(row: Row) -> str:
    """The model; a file by its function."""
    pretrained = ", pretrained" if row.config.get("pretrain_updates") else ""
    return row.config["model"].rpartition("/")[2] + pretrained


def _width(row: Row) -> int:
    return row.config["dim"]


def softmax_of(group: Group, row: Row) -> Row | None:
    """The row of exact attention on the same task, of the same width, pretrained
    where the other is.
    """
    for other in group.every:
        keys = ("task", "dim", "pretrain_updates")
        same = all(other.config.get(k) == row.config.get(k) for k in keys)
        if same and other.config["model"] == SOFTMAX and other.records:
            return other
    return None


def against(group: Group, row: Row) -> Gap | None:
    """How much more accurate a row is than exact attention."""
    other = softmax_of(group, row)
    if other is None or other is row or not row.records:
        return None
    return gap(row.scores(METRIC), other.scores(METRIC))


def above(row: Row, level: float) -> Gap:
    """How far a row lies above a level."""
    scores = row.scores(METRIC)
    return gap(scores, dict.fromkeys(scores, level))


def _floor(group: Group, row: Row, name: str) -> float | None:
    found = group.floors(task=row.config["task"]).get(name)
    return None if found is None else found.get(METRIC)


# ------------------------------------------------------------------- one task


def _columns(group: Group) -> list[Column]:
    def beside(row: Row) -> str:
        found = against(group, row)
        if found is None:
            return tell.NONE
        return f"{tell.decimal(found.mean, 3, sign=True)} {tell.interval(found, 3)}"

    columns: list[Column] = [("model", name_of)]
    if len({_width(row) for row in group.rows}) > 1:
        columns.append(tell.setting("width", "dim"))
    columns += [
        tell.score("test accuracy", METRIC, 3),
        ("minus softmax", beside),
        tell.score("on training data", "train_accuracy", 3),
        tell.RATE,
        tell.PARAMETERS,
        tell.DIVERGED,
    ]
    task = task_of(group.rows[0])
    models = {row.config["model"] for row in group.rows}
    for source, table in PUBLISHED.items() if task in COLUMNS else ():
        if not models & set(table):
            continue

        def others(row: Row, table: Any = table) -> str:
            found = table.get(name_of(row))
            return tell.NONE if found is None else f"{found[task]:.1f} %"

        columns.append((f"{source} (other data)", others))
    return columns


def _floors(group: Group) -> Iterator[list[str]]:
    wide = len({_width(row) for row in group.rows}) > 1
    for name, found in group.floors(task=group.config["task"]).items():
        shown = FLOORS.get(name, name)
        yield [shown, *[""] * wide, tell.decimal(found[METRIC], 3)]


def _title(group: Group) -> list[str]:
    task = task_of(group.rows[0])
    found = [f"## {WORDS.get(task, task)} (`{group.config['task']}`)"]
    if group.config["bigram"]:
        found.append(
            "In every model, a position reads the symbol before it too, by a table of "
            "its own: what followed what need not be learnt."
        )
    return found


def _text(group: Group) -> str:
    tuned = [r["config"] for r in group.records if r["config"]["phase"] == "tune"]
    how = "Learning rates were given, not chosen."
    if tuned:
        most = tell.span({config["updates"] for config in tuned})
        rates = ", ".join(f"{rate:g}" for rate in group.rates())
        how = (
            "The validation part chose the learning rate of each task and model, of "
            f"{rates} (the outer ones where the best lay at an end of what had been "
            f"tried), with one seed and {most} updates."
        )
    return (
        "One encoder of {depth} layers and {num_heads} heads for every variant, "
        "positions {positions}, {updates:,} updates of {batch_size} sequences; nothing "
        "but the attention differs. Mean ± standard deviation over seeds; the "
        "difference from softmax is paired by seed, with Student's interval of 95 %. "
    ).format(**_attends(group)) + how


def _ends(group: Group) -> list[str]:
    return tell.at_ends(
        group,
        lambda row: f"{name_of(row)}, width {_width(row)}",
        besides=("pretrain_updates", "masked"),  # tried from scratch
    )


def _attends(group: Group) -> dict:
    found = [row.config for row in group.rows if row.config["attention"] is not None]
    return min(found, key=lambda c: c["updates"]) if found else group.config


# ------------------------------------------------------------- recall and its pairs

_PAIRS = re.compile(r"test_accuracy_pairs_(\d+)")


def pairs_of(rows: Sequence[Row]) -> list[int]:
    """The numbers of pairs that accuracy is told for."""
    names = {name for row in rows for r in row.records for name in r["metrics"]}
    found = (_PAIRS.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _label(row: Row, wide: bool) -> str:
    return f"{name_of(row)}, width {_width(row)}" if wide else name_of(row)


def _recall(group: Group) -> list[str]:
    """Accuracy by the number of pairs: figure and table."""
    sizes = pairs_of(group.rows)
    if not sizes:
        return []
    wide = len({_width(row) for row in group.rows}) > 1
    rows = sorted(group.rows, key=lambda row: (name_of(row) != SOFTMAX, -_width(row)))
    rows = [row for row in rows if row.records]
    by_pairs = {
        _label(row, wide): {n: row.of(f"test_accuracy_pairs_{n}") for n in sizes}
        for row in rows
    }
    floor = _floor(group, rows[0], "majority") if rows else None
    level = None if floor is None else (floor, f"majority, {tell.decimal(floor, 2)}")
    shown = [
        Panel(
            "Recall by how much there is to remember",
            "pairs of key and value",
            "test accuracy",
            [Series.of(name, found.items()) for name, found in by_pairs.items()],
            level=level,
            ylim=(0, 1.03),
            doubling=True,
        )
    ]
    names = list(by_pairs)
    if wide:
        of_models = tell.grouped(rows, name_of)
        names += [name for name in of_models if name not in names]
        most = f"test_accuracy_pairs_{sizes[-1]}"
        shown.append(
            Panel(
                f"{sizes[-1]} pairs, by width",
                "width (linear attention remembers width² / heads numbers a layer)",
                "test accuracy",
                [
                    Series.of(
                        name,
                        [
                            (_width(row), row.of(most))
                            for row in sorted(some, key=_width)
                        ],
                    )
                    for name, some in of_models.items()
                    if len(some) > 1
                ],
                level=level,
                ylim=(0, 1.03),
                doubling=True,
            )
        )
    panels(shown, group.folder / "recall.png", Styles(names))
    told = {
        name: {n: tell.mean(summary, 3) for n, summary in found.items()}
        for name, found in by_pairs.items()
    }
    return [
        "![recall against the number of pairs](recall.png)",
        tell.pivot("model", told, "{} pairs"),
        *_separates(rows, sizes[-1]),
    ]


def _separates(rows: Sequence[Row], most: int) -> list[str]:
    """What softmax has over each other model at the most pairs, in words."""
    metric, lines = f"test_accuracy_pairs_{most}", []
    for row in rows:
        others = [r for r in rows if name_of(r) == SOFTMAX and _width(r) == _width(row)]
        if not others or row in others:
            continue
        found, said = tell.difference(others[0], row, metric, 3)
        clear = "" if found.clear else ", not clear"
        lines.append(f"* width {_width(row)}: softmax − {name_of(row)} {said}{clear}")
    if not lines:
        return []
    return [f"At {most} pairs, paired by seed:", "\n".join(lines)]


# ------------------------------------------------------------------- all tasks


def _answers(group: Group) -> list[str]:
    """Which variants are near softmax, what the others lose and gain, who learns."""
    models = tell.grouped([row for row in group.rows if row.records], name_of)
    near, lines = [], []
    for name, rows in models.items():
        gaps = [(row, against(group, row)) for row in rows]
        known = [(row, g) for row, g in gaps if g is not None and g.enough]
        if not known:
            continue
        parts = []
        for word, sign in (("loses", -1), ("gains", 1)):
            clear = [
                f"{_where(row)} {tell.decimal(g.mean, 3, sign=True)}"
                for row, g in known
                if g.clear and sign * g.mean > 0
            ]
            if clear:
                parts.append(f"{word} on {', '.join(clear)}")
        if parts:
            lines.append(f"* {name} {'; '.join(parts)}.")
        else:
            near.append(f"{name} ({len(known)} of {len(gaps)} told)")
    found = []
    if near:
        found.append(f"Within the interval of softmax everywhere: {', '.join(near)}.")
    if lines:
        found += ["Clearly apart from softmax:", "\n".join(lines)]
    return found + _learnt(group)


def _where(row: Row) -> str:
    return f"{row.config['task']} (width {_width(row)})"


def _learnt(group: Group) -> list[str]:
    """On which tasks nothing learns, and on which nothing beats the linear model."""
    lines = []
    for task, rows in tell.grouped(group.rows, lambda r: r.config["task"]).items():
        known = [row for row in rows if row.records]
        for name in ("majority", "linear"):
            level = _floor(group, rows[0], name) if known else None
            if level is None:
                continue
            shown = FLOORS.get(name, name)
            wide = len({_width(row) for row in known}) > 1
            gaps = {_label(row, wide): above(row, level) for row in known}
            over = [m for m, g in gaps.items() if g.clear and g.mean > 0]
            if not over:
                lines.append(
                    f"* {task}: no model is clearly above {shown}, "
                    f"{tell.decimal(level, 3)}."
                )
            elif len(over) < len(gaps):
                rest = ", ".join(m for m in gaps if m not in over)
                lines.append(f"* {task}: not clearly above {shown}: {rest}.")
    head = "Not clearly above what needs no network:"
    return [head, "\n".join(lines)] if lines else []


# ------------------------------------------------------- pretraining, spans, speed


def _pretrained(group: Group) -> list[str]:
    """What pretraining on a task's own sequences gives each model."""
    rows = [row for row in group.rows if row.records]
    found, gaps = [], []
    for row in rows:
        config = row.config
        if not config.get("pretrain_updates"):
            continue
        for other in rows:
            keys = ("task", "dim", "model")
            same = all(other.config[k] == config[k] for k in keys)
            if not same or other.config.get("pretrain_updates"):
                continue
            _, said = tell.difference(row, other, METRIC, 3)
            found.append(
                [
                    config["task"],
                    name_of(other),
                    tell.mean(other.of(METRIC), 3),
                    tell.mean(row.of(METRIC), 3),
                    said,
                ]
            )
            before, after = against(group, other), against(group, row)
            if before is not None and after is not None:
                gaps.append(
                    f"* {config['task']}: {name_of(other)} − softmax "
                    f"{tell.decimal(before.mean, 3, sign=True)} from scratch, "
                    f"{tell.decimal(after.mean, 3, sign=True)} "
                    f"{tell.interval(after, 3)} pretrained."
                )
    if not found:
        return []
    header = ["task", "model", "from scratch", "pretrained", "difference"]
    first = max(row.config.get("pretrain_updates", 0) for row in rows)
    text = [
        "## Pretrained on the task's own sequences",
        f"{first:,} updates that restore masked symbols, then as many of the task as "
        "from scratch: more updates in all.",
        tell.table(header, found),
    ]
    return text + (["Is the gap one of pretraining?", "\n".join(gaps)] if gaps else [])


def _spans(group: Group) -> list[str]:
    """How far exact attention looks in each task."""
    rows = {
        row.config["task"]: row
        for row in group.rows
        if row.of("span") is not None and not row.config.get("pretrain_updates")
    }
    if len(rows) < 2:
        return []
    figures.spans(rows, group.folder / "spans.png")
    return [
        "## How far attention looks",
        "The mean distance of query and key by the weights of exact attention, over "
        f"layers and heads, on {SPANS} sequences that are held out.",
        "![spans](spans.png)",
    ]


def _speed(group: Group) -> list[str]:
    """Accuracy against speed, where speed was measured."""
    found = group.measured(figures.SPEED)
    if found is None:
        return []
    scratch = [row for row in group.rows if not row.config.get("pretrain_updates")]
    by_task = tell.grouped(
        [row for row in scratch if row.records], lambda row: row.config["task"]
    )
    tasks, means = list(by_task), dict[str, list[float]]()
    for rows in by_task.values():
        widest = max(map(_width, rows))
        for row in rows:
            if _width(row) == widest:
                means.setdefault(row.config["model"], []).append(row.mean(METRIC))
    scores = {
        model: sum(values) / len(tasks)
        for model, values in means.items()
        if len(values) == len(tasks)
    }
    styles = Styles([SOFTMAX, *sorted(set(scores) - {SOFTMAX})])
    drawn = figures.speed(found, scores, styles, group.folder / "speed.png", tasks)
    if not drawn:
        return []
    return [
        "## Accuracy, speed and memory",
        "Time and memory of an update, all in one run on one core "
        "(`experiments.long_range.speed`); the accuracy is the mean over "
        f"{', '.join(tasks)}.",
        "![accuracy against speed](speed.png)",
    ]


def _sources(group: Group) -> list[str]:
    if not any(task_of(row) in COLUMNS for row in group.rows):
        return []
    lines = (f"* {name}: {said}." for name, said in SOURCES.items())
    return ["Numbers of others, of the official data:", "\n".join(lines)]


REPORT = Report(
    title="# Long Range Arena",
    text=(_text,),
    sections=(
        Section(title="## In words", rows=ordered, text=(_answers, _speed)),
        Section(
            title=_title,
            rows=ordered,
            by=("task",),
            order=lambda row: -row.mean(METRIC, 0.0),
            columns=_columns,
            floors=_floors,
            notes=(_ends, _recall, figures.examples),
        ),
        Section(title=_pretrained, rows=ordered),
        Section(title=_spans, rows=ordered),
    ),
    notes=(_sources,),
)
