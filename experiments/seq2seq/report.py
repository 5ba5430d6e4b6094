"""Tables of the experiment, from stored results alone.

`python -m experiments seq2seq --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from experiments.core import report as tell
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.core.stats import Gap, gap
from experiments.seq2seq import figures
from experiments.seq2seq.rows import (
    base_of,
    by_pairs,
    changes_of,
    models,
    name_of,
    varied,
)
from experiments.seq2seq.telling import Score, telling_of


def _columns(group: Group) -> list[Column]:
    telling = telling_of(group)
    first = telling.scores[0]
    return [
        ("model", name_of),
        *(score.column() for score in telling.scores),
        first.column(" greedy", "_greedy"),
        first.column(f" of longer {telling.items}", "_longer"),
        tell.RATE,
        tell.PARAMETERS,
        tell.same(f"FLOPs of 8 {telling.source} and 8 {telling.target}", "flops"),
        tell.DIVERGED,
    ]


def _floors(group: Group) -> Iterator[list[str]]:
    telling = telling_of(group)
    for name, found in group.floors(task=group.config["task"]).items():
        scores = [tell.decimal(s.scale * found[s.key], 2) for s in telling.scores]
        yield [telling.floors[name], *scores]


def _text(group: Group) -> str:
    tuned = [r["config"] for r in group.records if r["config"]["phase"] == "tune"]
    how = "Learning rates were given, not chosen."
    if tuned:
        most = tell.span({config["updates"] for config in tuned})
        rates = ", ".join(f"{rate:g}" for rate in group.rates())
        how = (
            f"The validation part chose each model's learning rate of {rates}, by its "
            f"loss after {most} updates with one seed."
        )
    config, telling = models(group)[0].config, telling_of(group)
    written = max((row.first("written") or 0 for row in group.rows), default=0)
    symbols = max((row.first("symbols") or 0 for row in group.rows), default=0)
    averaged = config["averaged"]
    mean = f", parameters the mean of {averaged} points" if averaged > 1 else ""
    smoothed = config["label_smoothing"]
    smooth = f", labels smoothed by {smoothed:g}" if smoothed else ""
    return (
        f"Pairs of which a side is longer than {config['train_length']} symbols, the "
        f"target's end among them, are not trained on; {config['updates']:,} updates "
        f"of {config['tokens']:,} symbols with padding{smooth}, schedule "
        f"{config['schedule']}{mean}. Targets are of {symbols:,} kinds of "
        f"{telling.target}, beginning and end among them. {telling.explained} Of "
        f"{written:,} test {telling.items}, by a search of {config['beams']} beams, "
        "and greedy beside. "
        "Mean ± standard deviation over seeds. "
    ) + how


def _signatures(group: Group) -> list[str]:
    """How scores were computed, where that has a signature."""
    found = {
        f"{score.name}: `{signature}`"
        for row in models(group)
        for score in telling_of(group).scores
        if (signature := row.first(f"{score.key}_signature"))
    }
    return [f"sacreBLEU's signatures: {'; '.join(sorted(found))}."] if found else []


def _ends(group: Group) -> list[str]:
    return tell.at_ends(group, name_of, models(group))


def _points(one: Row, two: Row, score: Score) -> tuple[Gap, str]:
    """The difference of two rows, as the score is told."""
    found = gap(score.by_seed(one), score.by_seed(two))
    text = f"{tell.decimal(found.mean, 2, sign=True)} {tell.interval(found, 2)}"
    return found, text.strip()


def _answers(group: Group) -> list[str]:
    """Against one another, paired by seed, and against what needs no network."""
    rows, lines = [row for row in models(group) if row.records], []
    telling = telling_of(group)
    score = telling.scores[0]
    for i, one in enumerate(rows):
        for two in rows[i + 1 :]:
            found, said = _points(one, two, score)
            clear = "" if found.clear else ", not clear"
            names = f"{name_of(one)} − {name_of(two)}"
            lines.append(f"* {score.name} of {names}: {said}{clear}")
    told = [f"Differences, in {telling.points}, are paired by seed:", "\n".join(lines)]
    told = told if lines else []
    sign = 1 if telling.less else -1
    floors = group.floors(task=group.config["task"]).values()
    best = min((sign * found[score.key] for found in floors), default=math.inf)
    behind = [
        name_of(row)
        for row in rows
        if sign * row.mean(score.key, sign * math.inf) >= best
    ]
    if behind:
        told.append(f"Behind what needs no network: {'; '.join(behind)}.")
    return [*told, telling.reference]


def _examples(group: Group) -> list[str]:
    """Some sources, whatever was made of them."""
    rows = [row for row in models(group) if row.first("examples")]
    if not rows:
        return []
    telling = telling_of(group)
    shown = {name_of(row): row.first("examples") for row in rows}
    first = next(iter(shown.values()))
    apart = max(1, len(first) // telling.shown)
    lines = [
        [source, right, *(made[i][1] for made in shown.values())]
        for i, (source, _, right) in list(enumerate(first))[::apart]
    ]
    return [
        f"## Some {telling.items}",
        "Evenly chosen from the test part, with the first of their right targets; of "
        "each model the first seed.",
        tell.table(
            ["source", "right", *shown],
            [[cell.replace("|", "\\|") for cell in line] for line in lines],
        ),
    ]


def _varied_columns(group: Group) -> list[Column]:
    base, first, telling = base_of(group), varied(group)[0], telling_of(group)
    score = telling.scores[0]

    def against(row: Row) -> str:
        if row is first or not row.records or not first.records:
            return tell.NONE
        return _points(row, first, score)[1]

    one, *more = (s.column() for s in telling.scores)
    return [
        ("changed", lambda row: changes_of(row, base) or "nothing"),
        one,
        (f"{score.name} minus the first", against),
        *more,
        score.column(f" of longer {telling.items}", "_longer"),
        tell.PARAMETERS,
        tell.DIVERGED,
    ]


def _pairs_columns(group: Group) -> list[Column]:
    return [
        tell.same("pairs", "n"),
        tell.setting("updates", "updates", ","),
        *(score.column() for score in telling_of(group).scores),
        tell.score("loss of training pairs", "train_loss", 3),
        tell.score("loss of test pairs", "test_loss", 3),
        tell.DIVERGED,
    ]


TABLE_3 = Section(
    title="## What of the Transformer matters?",
    rows=varied,
    least=2,
    text=(
        lambda group: (
            "As in Table 3 of the paper: one thing is changed at a time, the learning "
            f"rate is the first row's. Differences are {telling_of(group).points}, "
            "paired by seed, with Student's interval of 95 %."
        ),
    ),
    columns=_varied_columns,
)

PAIRS = Section(
    title="## How many pairs does it take?",
    rows=by_pairs,
    least=2,
    text=(
        "The Transformer, with all pairs and with fewer, drawn anew for every seed; "
        "fewer take fewer updates, by the root of their number. The learning rate is "
        "that of all pairs, and so is the vocabulary.",
    ),
    columns=_pairs_columns,
    notes=(figures.of_pairs,),
)

COMPARED = Section(
    title=lambda group: [],
    rows=models,
    text=(_text,),
    columns=_columns,
    floors=_floors,
    notes=(
        _signatures,
        _ends,
        _answers,
        figures.board,
        figures.lengths,
        figures.alignments,
        _examples,
    ),
)

REPORT = Report(
    title=lambda group: telling_of(group).title,
    by=("task",),
    sections=(COMPARED, TABLE_3, PAIRS),
)
