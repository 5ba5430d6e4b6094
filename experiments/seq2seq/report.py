"""Tables and figures of the experiment, from stored results alone.

`python -m experiments seq2seq --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.core import report as tell
from experiments.core.plots import (
    Board,
    Panel,
    Series,
    Standing,
    Styles,
    panels,
    save_figure,
    standings,
    subplots,
)
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.core.stats import Gap, gap

PER, WER = "test_per", "test_wer"
WORDS = {
    "transformer": "Transformer",
    "lstm_attention": "LSTM with attention",
    "lstm": "LSTM, one vector of the word",
    "letters": "each letter by itself",
    "context": "each letter in the widest context seen",
}
MODELS = ("transformer", "lstm_attention", "lstm")
# Rows of one model differ in these; the most frequent values are the base.
VARIED = (
    "num_heads dim depth mlp_dim dropout_rate label_smoothing positions norm"
).split()
_TITLES = {
    "num_heads": "heads",
    "dim": "width",
    "mlp_dim": "feed-forward",
    "dropout_rate": "dropout",
    "label_smoothing": "smoothing",
}
REFERENCE = (
    "Published, of another and older split of the dictionary, so not of these words: "
    "PER 5.45 %, WER 23.55 % (bidirectional LSTM encoder-decoder; as told by later "
    "papers)."
)


def base_of(group: Group) -> dict[str, Any]:
    """What most rows have of what is varied, in the Transformer's."""
    rows = [r for r in group.rows if r.config["model"] == "transformer"] or group.rows
    found = {}
    for name in VARIED:
        values = [row.config[name] for row in rows]
        found[name] = max(dict.fromkeys(values), key=values.count)
    return found


def changes_of(row: Row, base: dict[str, Any]) -> str:
    """In what a row is not the base, in words; "" for the base."""
    return ", ".join(
        f"{_TITLES.get(name, name)} {tell.plain(row.config[name])}"
        for name in VARIED
        if row.config[name] != base[name] and row.config[name] is not None
    )


def name_of(row: Row) -> str:
    """The model in words; a file by its function."""
    model = row.config["model"]
    return WORDS.get(model, f"Transformer of {model.rpartition('/')[2]}")


def _models(group: Group) -> list[Row]:
    """Rows of the base model of each kind, the Transformer first."""
    base = base_of(group)
    found = [
        row
        for row in group.rows
        if row.config["model"] != "transformer" or not changes_of(row, base)
    ]
    order = {name: i for i, name in enumerate(MODELS)}
    return sorted(found, key=lambda row: order.get(row.config["model"], len(order)))


def _percent(title: str, metric: str) -> Column:
    def shown(row: Row) -> str:
        scaled = row.of(
            lambda r: (
                None if r["metrics"].get(metric) is None else 100 * r["metrics"][metric]
            )
        )
        return tell.mean(scaled, 2)

    return title, shown


def _columns(group: Group) -> list[Column]:
    return [
        ("model", name_of),
        _percent("PER, %", PER),
        _percent("WER, %", WER),
        _percent("WER greedy, %", "test_wer_greedy"),
        _percent("PER of longer words, %", "test_per_longer"),
        tell.RATE,
        tell.PARAMETERS,
        tell.same("FLOPs of 8 letters and 8 phones", "flops"),
        tell.DIVERGED,
    ]


def _floors(group: Group) -> Iterator[list[str]]:
    for name, found in group.floors(task=group.config["task"]).items():
        rates = [tell.decimal(100 * found[m], 2) for m in (PER, WER)]
        yield [WORDS.get(name, name), *rates]


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
    config = _models(group)[0].config
    words = max((row.first("words") or 0 for row in group.rows), default=0)
    return (
        f"Words whose {config['train_length']} letters, or phones with their end, are "
        f"not exceeded are trained on, {config['updates']:,} updates of "
        f"{config['tokens']:,} symbols with padding. PER: edits to the nearest "
        "pronunciation over its length; WER: share of words that are none of theirs. "
        f"Of {words:,} test words, by a search of {config['beams']} beams, and greedy "
        "beside. Mean ± standard deviation over seeds. "
    ) + how


def _ends(group: Group) -> list[str]:
    """Models whose learning rate lies at an end of those that were tried."""
    found = []
    for row in _models(group):
        tried = sorted(
            r["config"]["learning_rate"]
            for r in group.records
            if r["config"]["phase"] == "tune"
            and r["config"]["model"] == row.config["model"]
        )
        if len(tried) > 1 and row.config["learning_rate"] in (tried[0], tried[-1]):
            found.append(name_of(row))
    if not found:
        return []
    return [
        "The chosen rate lies at an end of those that were tried, so that a better one "
        f"may lie beyond: {'; '.join(found)}."
    ]


def _points(one: Row, two: Row) -> tuple[Gap, str]:
    """The difference of two phone error rates in points of a percent."""
    scores = (
        {seed: 100 * per for seed, per in row.scores(PER).items()} for row in (one, two)
    )
    found = gap(*scores)
    text = f"{tell.decimal(found.mean, 2, sign=True)} {tell.interval(found, 2)}"
    return found, text.strip()


def _answers(group: Group) -> list[str]:
    """Against one another, paired by seed, and against what needs no network."""
    rows, lines = [row for row in _models(group) if row.records], []
    for i, one in enumerate(rows):
        for two in rows[i + 1 :]:
            found, said = _points(one, two)
            clear = "" if found.clear else ", not clear"
            lines.append(f"* PER of {name_of(one)} − {name_of(two)}: {said}{clear}")
    floors = group.floors(task=group.config["task"])
    best = min((found[PER] for found in floors.values()), default=math.inf)
    behind = [name_of(row) for row in rows if row.mean(PER, math.inf) >= best]
    told = (
        ["Differences, in points of a percent, are paired by seed:", "\n".join(lines)]
        if lines
        else []
    )
    if behind:
        told.append(f"Behind what needs no network: {', '.join(behind)}.")
    return [*told, REFERENCE]


# ------------------------------------------------------------------- figures


def _board(group: Group) -> list[str]:
    rows = [row for row in _models(group) if row.records]
    if not rows:
        return []
    floors = group.floors(task=group.config["task"])

    def board(title: str, metric: str) -> Board:
        found = [
            Standing.of(
                name_of(row), {s: 100 * x for s, x in row.scores(metric).items()}
            )
            for row in rows
        ]
        found += [
            Standing(WORDS.get(name, name), 100 * made[metric], baseline=True)
            for name, made in floors.items()
            if name != "letters"
        ]
        return Board(title, "% of test words" if metric == WER else "%", found, True)

    names = [name_of(row) for row in rows]
    boards = [board("Phone error rate", PER), board("Word error rate", WER)]
    standings(boards, group.folder / "errors.png", Styles(names))
    return ["![error rates](errors.png)"]


def _lengths(group: Group) -> list[str]:
    """Does a model decide how long its answer is? Written length against the right."""
    rows = [row for row in _models(group) if row.records]
    rows = [row for row in rows if row.records[0]["metrics"].get("lengths")]
    if not rows:
        return []
    series, told = [], {}
    for row in rows:
        triples = np.concatenate([r["metrics"]["lengths"] for r in row.records])
        right, written, count = triples[:, 1], triples[:, 2], triples[:, 3]
        sizes = np.unique(right)
        means = [
            float(np.average(written[right == n], weights=count[right == n]))
            for n in sizes
        ]
        series.append(Series(name_of(row), sizes.tolist(), means))
        exact = float(count[right == written].sum() / count.sum())
        near = float(count[np.abs(right - written) <= 1].sum() / count.sum())
        told[name_of(row)] = {
            "as long": tell.decimal(exact, 3),
            "within one phone": tell.decimal(near, 3),
        }
    longest = max(max(line.x) for line in series)
    diagonal = Series("as long as it is", [1, longest], [1, longest], baseline=True)
    limit = rows[0].config["train_length"]
    panels(
        [
            Panel(
                "How long the answer is",
                f"phones that are right (in training at most {limit - 1})",
                "phones written, mean",
                [*series, diagonal],
            )
        ],
        group.folder / "lengths.png",
        Styles([name_of(row) for row in rows], ["as long as it is"]),
    )
    return [
        "## Does the model decide how long its answer is?",
        "Share of test words whose answer has as many phones as the pronunciation "
        "nearest to it in length:",
        tell.pivot("model", told, "{}"),
        "![written length against the right one](lengths.png)",
    ]


def _alignments(group: Group) -> list[str]:
    """What each phone looks at, of the first seed of each model that attends."""
    found = []
    for row in _models(group):
        shown = row.records[0]["metrics"].get("alignments") if row.records else None
        if not shown:
            continue
        columns = (len(shown) + 1) // 2
        figure, grid = subplots(
            (2.3 * columns, 5.2),
            2,
            columns,
            title=f"{name_of(row)}: what phones look at",
        )
        for axes, one in zip(grid.flat, shown, strict=False):
            weights = np.mean(one["weights"], axis=0)
            drawn = axes.imshow(weights, cmap="magma", vmin=0, vmax=1, aspect="auto")
            axes.set_xticks(range(len(one["word"])), list(one["word"]), fontsize=7)
            axes.set_yticks(range(len(one["phones"])), one["phones"], fontsize=7)
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_axis_off()
        scale = figure.colorbar(drawn, ax=list(grid.flat), shrink=0.6, aspect=30)
        scale.set_label("weight, mean over heads and layers", fontsize=8)
        scale.ax.tick_params(labelsize=7)
        name = f"alignments_{row.config['model'].rpartition(':')[2]}.png"
        save_figure(figure, group.folder / name)
        found.append(f"![what phones look at, {name_of(row)}]({name})")
    if found:
        found.insert(0, "## What does each phone look at?")
    return found


def _examples(group: Group) -> list[str]:
    """Some words, whatever was made of them."""
    rows = [row for row in _models(group) if row.records]
    rows = [row for row in rows if row.records[0]["metrics"].get("examples")]
    if not rows:
        return []
    shown = {name_of(row): row.records[0]["metrics"]["examples"] for row in rows}
    first = next(iter(shown.values()))
    lines = [
        [word, right, *(shown[name][i][1] for name in shown)]
        for i, (word, _, right) in enumerate(first)
    ]
    return [
        "## Some words",
        "Evenly chosen from the test part, with the first of their pronunciations.",
        tell.table(["word", "right", *shown], lines),
    ]


def _varied(group: Group) -> list[Row]:
    """Rows of the Transformer, the base first."""
    base = base_of(group)
    rows = [row for row in group.rows if row.config["model"] == "transformer"]
    return sorted(rows, key=lambda row: changes_of(row, base) != "")


def _varied_columns(group: Group) -> list[Column]:
    whole = _varied(group)
    base, first = base_of(group), whole[0]

    def against(row: Row) -> str:
        if row is first or not row.records or not first.records:
            return tell.NONE
        return _points(row, first)[1]

    return [
        ("changed", lambda row: changes_of(row, base) or "nothing"),
        _percent("PER, %", PER),
        ("PER minus the first", against),
        _percent("WER, %", WER),
        _percent("PER of longer words, %", "test_per_longer"),
        tell.PARAMETERS,
        tell.DIVERGED,
    ]


TABLE_3 = Section(
    title="## What of the Transformer matters?",
    rows=_varied,
    least=2,
    text=(
        "As in Table 3 of the paper: one thing is changed at a time, the learning rate "
        "is the first row's. Differences of PER are points of a percent, paired by "
        "seed, with Student's interval of 95 %.",
    ),
    columns=_varied_columns,
)

COMPARED = Section(
    title=lambda group: [],
    rows=_models,
    text=(_text,),
    columns=_columns,
    floors=_floors,
    notes=(_ends, _answers, _board, _lengths, _alignments, _examples),
)

REPORT = Report(
    title="# Spelling to phones", by=("task",), sections=(COMPARED, TABLE_3)
)
