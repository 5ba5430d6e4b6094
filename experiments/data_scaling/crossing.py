"""The headline: where self-attention overtakes, for every field and every task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from experiments.core import plots, stats
from experiments.core import report as tell
from experiments.core.report import Group
from experiments.data_scaling.figures import gap_points, pair_name
from experiments.data_scaling.lines import ATTENTION, WHOLE, Line, Section, is_sequences

Pair = tuple[Line, Line]


def crossing_of(first: Line, second: Line) -> str:
    """In a few words, who is ahead where; nothing of N beyond those measured.

    "overtakes between N = 30 and 100" is where the mean of the first gets ahead for
    good; what is not clear by Student's interval is said.
    """
    gaps = gap_points(first, second)
    if not gaps:
        return tell.NONE
    found = stats.overtaking(first.scores, second.scores)
    least, most = min(gaps), max(gaps)
    if found is not None:
        said = f"overtakes between N = {found.after:,} and {found.until:,}"
        if not all(gap.enough for gap in gaps.values()):
            return f"{said} (too few seeds to be sure)"
        doubts = []
        if found.behind is None:
            doubts.append("not clearly behind before")
        if found.ahead is None:
            doubts.append("not clearly ahead after")
        return said + (f" ({', '.join(doubts)})" if doubts else "")
    if all(gap.mean > 0 for gap in gaps.values()):
        return f"ahead at every N measured, {least:,} to {most:,}"
    if all(gap.mean <= 0 for gap in gaps.values()):
        if gaps[most].enough and not gaps[most].clear:
            return f"behind, at N = {most:,} no longer clearly: no crossing in reach"
        return f"behind at every N, up to {most:,}: no crossing in reach"
    return "ahead at some N, behind at the largest"


def main_pairs(section: Section) -> list[Pair]:
    """Whole self-attention beside each rival; of images, the plain ViT."""
    found = [p for p in section.pairs if p[0].model in ATTENTION]
    if is_sequences(section.task):
        return [p for p in found if p[0].reach is None]
    return [p for p in found if p[0].model == "vit"]


def statements(section: Section) -> list[str]:
    """A line for every pair of a section."""
    return [
        f"- {one.label} against {two.label}: {crossing_of(one, two)}."
        for one, two in section.pairs
    ]


def overview(sections: Sequence[Section]) -> Iterator[str]:
    """The table of all pairs of all tasks: gaps at both ends, and the crossing."""
    rows = []
    for section in sections:
        for one, two in section.pairs:
            gaps = gap_points(one, two)
            if not gaps:
                continue
            ends = [min(gaps), max(gaps)]
            told = [
                f"{tell.decimal(gaps[n].mean, 3, sign=True)} "
                f"{tell.interval(gaps[n], 3)} at {n:,}".replace("  ", " ")
                for n in ends
            ]
            names = f"{one.label} − {two.label}"
            rows.append([section.title, names, *told, crossing_of(one, two)])
    if rows:
        header = ["task", "gap", "smallest N", "largest N", "self-attention"]
        yield tell.table(header, rows)


def of_fields(sections: Sequence[Section]) -> Section | None:
    """The task whose networks see fields of their own: crossing.png has its curves."""
    found = (s for s in sections if is_sequences(s.task) and main_pairs(s))
    return next(found, None)


def draw(
    sections: Sequence[Section], styles: plots.Styles, group: Group
) -> Iterator[str]:
    """crossing.png: accuracy over N of a task of fields, its gaps, and other tasks."""
    first = of_fields(sections)
    if first is None:
        return
    # What was run at one N of several is no line: the tables have it.
    least = min(2, len(first.sizes))
    shown = [x for x in first.lines if len(x.means) >= least and x.model != "majority"]
    shown.sort(key=lambda x: (x in first.baselines, x.model != "cnn"))
    judged = {line.metric_name for line in first.networks}
    common: dict[str, Any] = dict(decades=True, markersize=5)
    found = [
        plots.Panel(
            f"{first.title}: accuracy as N grows",
            f"training {first.examples} N (log scale)",
            "test accuracy" + " (whole utterances)" * (judged == {WHOLE}),
            [plots.Series.of(x.label, x.means.items(), name=x.name) for x in shown],
            **common,
        ),
        plots.Panel(
            "how far self-attention is ahead, the same task",
            f"training {first.examples} N (log scale)",
            "difference in test accuracy",
            _gaps(first),
            zero=True,
            marks=_marks(first),
            **common,
        ),
    ]
    others = [s for s in sections if s is not first and main_pairs(s)]
    texts = [s for s in others if s.examples == "sentences"]
    for title, some in (
        ("the same for text", texts),
        ("the same for images", [s for s in others if s not in texts]),
    ):
        if some:
            found.append(
                plots.Panel(
                    title,
                    "training examples N (log scale)",
                    "difference in test accuracy",
                    [line for s in some for line in _gaps(s, s.title.split(":")[0])],
                    zero=True,
                    marks=[mark for s in some for mark in _marks(s)],
                    **common,
                )
            )
    seeds = {s.count for x in shown for s in x.means.values()}
    plots.panels(
        found,
        group.folder / "crossing.png",
        styles,
        height=4.0,
        columns=2,
        note=f"{first.title}: {tell.span(seeds)} seeds. Bands: ± 1 standard deviation; "
        "of differences, Student's 95 % interval, paired by seed. Bars on the line of "
        "zero: between which N the mean of self-attention gets ahead for good.",
    )
    yield "![crossing](crossing.png)"


def _gaps(section: Section, prefix: str = "") -> list[plots.Series]:
    found = []
    for one, two in main_pairs(section):
        if gaps := gap_points(one, two):
            label = f"{one.label} − {two.label}"
            found.append(
                plots.Series(
                    f"{prefix}:\n{label}" if prefix else label,
                    list(gaps),
                    [g.mean for g in gaps.values()],
                    [g.low for g in gaps.values()],
                    [g.high for g in gaps.values()],
                    [min(g.seeds) for g in gaps.values()],
                    name=pair_name(one, two),
                )
            )
    return found


def _marks(section: Section) -> list[tuple[float, float, str]]:
    """Between which N a mean gets ahead, in the colour of its line."""
    found: list[tuple[float, float, str]] = []
    for one, two in main_pairs(section):
        at = stats.overtaking(one.scores, two.scores)
        if at is not None:
            found.append((at.after, at.until, pair_name(one, two)))
    return found
