"""Tables and figures of the experiment, from stored results alone.

`python -m experiments pretraining --redraw FOLDER` redraws report.md and the figures of
a folder that holds results.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.core import report as tell
from experiments.core.plots import Panel, Series, Styles, curve, panels
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.core.stats import gap, summarize
from experiments.core.store import Record

ACCURACY = "test_accuracy"
MODEL = "masked_lm"
WORDS = {
    "dot_product": "softmax",
    "unigram": "how frequent a word is",
    "neighbours": "previous and next word, with back-off",
    "majority": "most frequent label",
    "most_frequent_tag_by_suffix": "most frequent tag of each word",
    "naive_bayes": "naive Bayes (linear in counts)",
}
TITLES = {"pos": "Tags of words", "spam": "Unwanted mail", "language": "Languages"}
THINGS = {"pos": "sentences", "spam": "mails", "language": "paragraphs"}


def attention_of(row: Row) -> str:
    """The variant in words; a file by its function."""
    name = row.config["attention"]
    return WORDS.get(name, name.rpartition("/")[2])


def name_of(row: Row) -> str:
    """The variant, and whether it was pre-trained."""
    how = "from scratch" if row.config["pretrained"] is None else "pre-trained"
    return f"{attention_of(row)}, {how}"


def _kind(task: str) -> str:
    """The task of a name, also of a toy."""
    return task.removeprefix("toy_")


def _masked(group: Group) -> list[Row]:
    return [row for row in group.rows if row.config["model"] == MODEL]


def _tuned(group: Group) -> list[Row]:
    return [row for row in group.rows if row.config["model"] != MODEL]


# ---------------------------------------------------------------- hidden words


def _sources(rows: Sequence[Row]) -> list[str]:
    """Names of the sources, from the metrics of rows."""
    names = (n for row in rows for r in row.records for n in r["metrics"])
    start = "test_perplexity_"
    return sorted({n.removeprefix(start) for n in names if n.startswith(start)})


def _masked_columns(group: Group) -> list[Column]:
    return [
        ("attention", attention_of),
        tell.score("perplexity", "test_perplexity", 1),
        *(
            tell.score(f"of {source}", f"test_perplexity_{source}", 1)
            for source in _sources(group.rows)
        ),
        tell.score("accuracy", ACCURACY, 3),
        tell.RATE,
        tell.PARAMETERS,
        tell.same("FLOPs of a window", "flops"),
        tell.DIVERGED,
    ]


def _masked_floors(group: Group) -> Iterator[list[str]]:
    names = [f"test_perplexity_{source}" for source in _sources(group.rows)]
    for name, found in group.floors(task=group.config["task"]).items():
        values = [tell.decimal(found.get(n), 1) for n in ("test_perplexity", *names)]
        yield [WORDS.get(name, name), *values, tell.decimal(found.get(ACCURACY), 3)]


def _masked_text(group: Group) -> str:
    config = group.config
    row = next((row for row in group.rows if row.records), None)
    read = ""
    if row is not None:
        read = (
            f", {row.mean('epochs'):.2g} times the {tell.count(row.first('words'))} "
            "words that there are"
        )
    second = ""
    if config["next_sentence"]:
        second = " Whether the second half of a window follows was learnt too."
    return (
        f"{config['updates']:,} updates of {config['batch_size']} windows of "
        f"{config['length']} words{read}. {100 * config['masked']:g} % of the words "
        "that the vocabulary has are restored: of ten, eight are masked, one is "
        "another word, one is left; of held-out text all are masked. Perplexity and "
        "accuracy are of those, the same for all rows; what needs no network sees as "
        f"little of them.{second}"
    )


MASKED = Section(
    title="## Hidden words",
    rows=_masked,
    by=("task",),
    text=(_masked_text,),
    columns=_masked_columns,
    floors=_masked_floors,
    notes=(lambda group: tell.at_ends(group, attention_of),),
)


# ----------------------------------------------------------------- fine-tuning


def _baselines(group: Group) -> dict[str, dict[int, list[Record]]]:
    """Records of what needs no network, by name and N."""
    task = group.config["task"]
    found: dict[str, dict[int, list[Record]]] = {}
    for record in group.records:
        config = record["config"]
        if config["phase"] == "baseline" and config["task"] == task:
            sizes = found.setdefault(config["model"], {})
            sizes.setdefault(config["n"], []).append(record)
    return found


def _by_name(group: Group) -> dict[str, dict[int, Row]]:
    """Rows by name and N."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(group.rows, key=lambda row: row.config["n"]):
        found.setdefault(name_of(row), {})[row.config["n"]] = row
    return found


def _table(group: Group) -> str:
    rows = {
        name: {n: tell.mean(row.of(ACCURACY), 3) for n, row in sizes.items()}
        for name, sizes in _by_name(group).items()
    }
    for name, sizes in _baselines(group).items():
        values = {n: [r["metrics"][ACCURACY] for r in rs] for n, rs in sizes.items()}
        rows[WORDS.get(name, name)] = {
            n: tell.mean(summarize(found), 3) for n, found in values.items()
        }
    return tell.pivot("accuracy", rows, "N = {:,}")


def _pairs(group: Group) -> Iterator[tuple[str, int, Row, Row]]:
    """(variant, N, pre-trained, from scratch), of what has been run to its end."""
    found = _by_name(group)
    variants = dict.fromkeys(map(attention_of, group.rows))
    for variant in variants:
        one, two = (
            found.get(f"{variant}, {how}", {})
            for how in ("pre-trained", "from scratch")
        )
        for n in sorted(set(one) & set(two)):
            if one[n].records and two[n].records:
                yield variant, n, one[n], two[n]


def _encoders(group: Group, row: Row) -> int:
    """How many encoders the seeds of a row began with."""
    told = {r["metrics"].get("encoder_sha256") for r in row.records} - {None}
    before = [
        len(other.records)
        for other in group.every
        if other.config["model"] == MODEL
        and other.config["attention"] == row.config["attention"]
    ]
    return len(told) or max(before, default=0)


def _gaps(group: Group) -> list[str]:
    rows: dict[str, dict[int, str]] = {}
    said = []
    first: set[str] = set()
    for variant, n, one, two in _pairs(group):
        found, text = tell.difference(one, two, ACCURACY, 3)
        rows.setdefault(variant, {})[n] = text
        if variant in first:
            continue
        first.add(variant)
        if found.low is None or not found.enough:
            verdict = "of too few seeds to say"
        elif not found.clear:
            verdict = "its interval holds zero: not shown"
        else:
            verdict = "it helps" if found.mean > 0 else "it harms"
            encoders = _encoders(group, one)
            if encoders < len(one.records):
                these = "these encoders" if encoders > 1 else "this encoder"
                verdict = f"with {these} {verdict}"
        said.append(
            f"Does pre-training help at N = {n:,} ({variant})? {text}: {verdict}."
        )
    if not rows:
        return []
    return [
        "Pre-trained minus from scratch, paired by seed, with Student's interval of "
        "95 %:",
        tell.pivot("difference", rows, "N = {:,}"),
        *said,
    ]


def _ends(label: str, points: Sequence[tuple[int, dict[int, float]]]) -> Series:
    """Means of scores by seed at each N, with Student's intervals."""
    found = [(n, gap(s, dict.fromkeys(s, 0.0)), len(s)) for n, s in points]
    return Series(
        label,
        [n for n, _, _ in found],
        [g.mean for _, g, _ in found],
        [g.low for _, g, _ in found],
        [g.high for _, g, _ in found],
        [count for _, _, count in found],
    )


def _figures(group: Group) -> list[str]:
    kind = _kind(group.config["task"])
    lines = []
    for name, sizes in _by_name(group).items():
        points = [(n, row.scores(ACCURACY)) for n, row in sizes.items() if row.records]
        if points:
            lines.append(_ends(name, points))
    if not lines:
        return []
    networks = [line.label for line in lines]
    for name, known in _baselines(group).items():
        means = sorted(
            (n, sum(r["metrics"][ACCURACY] for r in rs) / len(rs))
            for n, rs in known.items()
        )
        label = WORDS.get(name, name)
        x, y = zip(*means, strict=True)
        lines.append(
            Series(label, x, y, [None] * len(x), [None] * len(x), [3] * len(x), True)
        )
    styles = Styles(networks, [line.label for line in lines if line.baseline])
    xlabel = f"labelled {THINGS.get(kind, 'sequences')} N (log scale)"
    note = "bars: Student's interval of 95 % over seeds"
    curve(
        lines,
        group.folder / f"{kind}.png",
        title=f"{TITLES.get(kind, kind)}: with pre-training and without",
        xlabel=xlabel,
        note=note,
        styles=styles,
    )
    found = [f"![accuracy against N]({kind}.png)"]
    differences: dict[str, list[tuple[int, dict[int, float]]]] = {}
    for variant, n, one, two in _pairs(group):
        scores = one.scores(ACCURACY), two.scores(ACCURACY)
        both = sorted(set(scores[0]) & set(scores[1]))
        if both:
            apart = {s: scores[0][s] - scores[1][s] for s in both}
            differences.setdefault(variant, []).append((n, apart))
    if differences:
        curve(
            [_ends(variant, points) for variant, points in differences.items()],
            group.folder / f"{kind}_gap.png",
            title=f"{TITLES.get(kind, kind)}: pre-trained minus from scratch",
            ylabel="difference of test accuracy",
            xlabel=xlabel,
            sides=("pre-training helps", "pre-training harms"),
            note=note,
        )
        found.append(f"![what pre-training adds]({kind}_gap.png)")
    return found


def _tuned_text(group: Group) -> str:
    config = group.config
    rates = sorted({rate for row in group.rows for rate in tell.tried(group, row)})
    how = "Learning rates were given, not chosen."
    if rates:
        how = (
            "For each N and row the validation part chose the learning rate of "
            f"{', '.join(f'{rate:g}' for rate in rates)}, with one seed."
        )
    return (
        f"The same encoder, {config['updates']:,} updates of {config['tokens']:,} "
        "words with padding, with inputs and encoder of pre-training and from scratch. "
        "From scratch a test word that is not among the N is unknown; who was "
        f"pre-trained may know it. Mean ± standard deviation over seeds. {how}"
    )


def _seeds(group: Group) -> list[str]:
    """Whether seeds of fine-tuning share encoders."""
    tuned = (row for row in group.rows if row.config["pretrained"] is not None)
    counts = [(_encoders(group, row), len(row.records)) for row in tuned]
    shared = [encoders for encoders, seeds in counts if encoders < seeds]
    if not shared:
        return []
    fewest = max(1, min(shared))
    begin = "begin with one encoder" if fewest == 1 else f"share {fewest} encoders"
    return [
        f"Seeds {begin}, so they are not independent: intervals are of fine-tuning, of "
        "the labels that were given and of their order, not of pre-training anew."
    ]


def _tuned_ends(group: Group) -> list[str]:
    return tell.at_ends(group, lambda row: f"{name_of(row)}, N = {row.config['n']:,}")


def _title(group: Group) -> str:
    kind = _kind(group.config["task"])
    return f"## {TITLES.get(kind, kind)}"


TUNED = Section(
    title=_title,
    rows=_tuned,
    by=("task",),
    text=(_tuned_text,),
    notes=(_table, _gaps, _figures, _seeds, _tuned_ends),
)


# ------------------------------------------------------ layers, and what it says


def _probe(group: Group) -> list[str]:
    """Accuracy of tags that are read off every layer."""
    table: dict[str, dict[int, str]] = {}
    lines, said = [], []
    for row in group.rows:
        if not row.records:
            continue
        for name, metric in (
            ("pre-trained", "probe"),
            ("untrained", "probe_untrained"),
        ):
            label = f"{attention_of(row)}, {name}"
            rows = [r["metrics"][metric] for r in row.records]
            found = [summarize(values) for values in zip(*rows, strict=True)]
            layers = range(len(found))
            table[label] = {i: tell.mean(x, 3) for i, x in enumerate(found)}
            means = [summary.mean for summary in found]
            lines.append(Series(label, list(layers), means))
            if metric == "probe":
                best = max(layers, key=lambda i: means[i])
                where = f"layer {best} of {len(means) - 1}" if best else "the input"
                said.append(
                    f"Of {attention_of(row)}, {where} knows tags best: "
                    f"{tell.decimal(means[best], 3)}."
                )
    if not table:
        return []
    panels(
        [
            Panel(
                "Tags read off a layer",
                "layer (0 = input)",
                "test accuracy of a linear probe",
                lines,
            )
        ],
        group.folder / "probe.png",
        Styles([line.label for line in lines]),
    )
    return [
        "## Which layer knows tags?",
        "Least squares from what a layer makes of a word to its tag, the encoder as it "
        "was pre-trained, or before; its penalty is chosen on validation sentences. "
        "Layer 0 is the input, which knows the word but not its neighbours.",
        tell.pivot("probe", table, "layer {}"),
        *said,
        "![accuracy of a probe by layer](probe.png)",
    ]


def _examples(group: Group) -> list[str]:
    """What the first row fills in, whatever it is."""
    records = [r for row in group.rows for r in row.records]
    shown = next((r for r in records if r["metrics"].get("examples")), None)
    if shown is None:
        return []
    lines = []
    for text, word, chance, filled in shown["metrics"]["examples"]:
        guesses = ", ".join(f"{w} {tell.decimal(p, 2)}" for w, p in filled)
        line = [text, f"{word} {tell.decimal(chance, 3)}", guesses]
        lines.append([cell.replace("|", "¦") for cell in line])
    return [
        "## What does it fill in?",
        "Held-out text, chosen evenly; the word that stands there with the chance that "
        "it got, and the five likeliest.",
        tell.table(["text", "word", "filled in"], lines),
    ]


INSIDE = Section(title=lambda group: [], rows=_masked, notes=(_probe, _examples))

REPORT = Report(title="# What pre-training is worth", sections=(MASKED, TUNED, INSIDE))
