"""The two figures of a section: accuracies, and gaps between attention and CNN."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.core import plots, stats
from experiments.core.report import Group, decimal, span
from experiments.data_scaling.lines import Line, Section, is_sequences, quotient

MISFIT = 0.02  # a law that misses a mean by more describes the data badly
MATCHED = 1.25  # FLOPs within this ratio count as matched
_MOST_GAPS = 6  # lines that a gap figure can hold
_number = functools.partial(decimal, digits=3)


def gap_points(first: Line, second: Line) -> dict[int, stats.Gap]:
    """N -> how far the first is ahead."""
    one, two = first.scores, second.scores
    return {n: stats.gap(one[n], two[n]) for n in one if n in two}


def matched(ratio: float) -> bool:
    """Whether a ratio of FLOPs counts as none."""
    return max(ratio, 1 / ratio) <= MATCHED


def unmatched_pairs(pairs: Iterable[tuple[Line, Line]]) -> list[str]:
    """The others, by name."""
    return [
        f"{pair[0].label} / {pair[1].label} (× {ratio:.2f})"
        for pair in pairs
        if (ratio := quotient(*pair)) is not None and not matched(ratio)
    ]


def pair_name(first: Line, second: Line) -> str:
    """Whose style a gap has: its own, or its rival's where that sees a field."""
    if first.model == "transformer" and first.reach is None:
        return second.name
    return f"{first.label} − {second.label}"


def styles_of(sections: Sequence[Section]) -> plots.Styles:
    """One style a name, in all figures: networks first, then their differences."""
    names = [x.name for section in sections for x in section.networks]
    pairs = [pair for section in sections for pair in section.pairs]
    names += [pair_name(*pair) for pair in pairs]
    floors = [x.name for section in sections for x in section.baselines]
    return plots.Styles(names, floors, _of_fields(sections))


def _of_fields(sections: Sequence[Section]) -> dict[str, plots.Style]:
    """Convolutions of sequences from light to dark as they see more, attention warm."""
    lines = [x for s in sections if is_sequences(s.task) for x in s.networks]
    found = {}
    for model, shades, marker in (
        ("cnn", ("#9ecae1", "#4292c6", "#2166ac", "#08306b"), "s"),
        ("transformer", ("#fdae6b", "#e6550d", "#99000d"), "o"),
        ("gru", ("#009E73",), "^"),
        ("lstm", ("#66c2a5",), "v"),
    ):
        mine = {x.reach or math.inf: x.name for x in lines if x.model == model}
        known = [mine[reach] for reach in sorted(mine)]
        for i, name in enumerate(known):
            place = len(shades) - len(known) + i if model == "transformer" else i
            shade = shades[min(max(place, 0), len(shades) - 1)]
            found[name] = plots.Style(shade, marker, plots.LINES[0])
    return found


def draw_curve(section: Section, styles: plots.Styles, group: Group) -> list[str]:
    """Accuracy over N."""
    networks, chance = [x for x in section.networks if x.means], section.chance
    greys = [x for x in section.baselines if not all(map(x.capped, x.means))]
    if not networks and not greys:
        return []
    note = ""
    if counts := [found.count for x in networks for found in x.means.values()]:
        seeds = " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))
        note = f"{seeds} seed{'s' * (seeds != '1')}."
        note += " Bars: ± 1 standard deviation." * (max(counts) > 1)
        note += " Hollow: fewer than 3 seeds." * (min(counts) < stats.MIN_SEEDS)
    shown = []
    for line in greys:
        values, rest = (
            [found.mean for x in lines for found in x.means.values()]
            for lines in ([line], [x for x in (*networks, *greys) if x is not line])
        )
        # Leave out what would squeeze all others together.
        apart = rest and min(rest) - max(values) > max(rest) - min(rest)
        if apart and line.model == "majority":
            note += f" Below the axis: {line.label}, {span(values, _number)}."
        else:
            shown.append(line)
    name = f"curve{section.suffix}"
    plots.curve(
        [
            plots.Series.of(
                line.label,
                [(n, found) for n, found in line.means.items() if not line.capped(n)],
                baseline=line in greys,
                name=line.name,
            )
            for line in (*networks, *shown)
        ],
        group.folder / f"{name}.png",
        xlabel=f"number of training {section.examples} N (log scale)",
        title=f"{section.title}: accuracy as the training set grows",
        level=None if chance is None else (chance, "without the centre"),
        note=(note + _updates_note(section)).strip(),
        styles=styles,
    )
    return [f"![{name}]({name}.png)"]


def draw_gap(section: Section, styles: plots.Styles, group: Group) -> list[str]:
    """Attention − CNN over N."""
    pairs = section.pairs
    if len(pairs) > _MOST_GAPS:  # the nearest CNN of each alone: it comes first
        nearest: dict[str, tuple[Line, Line]] = {}
        for pair in pairs:
            nearest.setdefault(pair[0].label, pair)
        pairs = list(nearest.values())
    gaps = [line for pair in pairs if (line := _gap_series(*pair))]
    if not gaps:
        return []
    note = "Bars: Student's 95 % interval over seeds."
    if any(line.fit for line in gaps):
        note += " Thin line: difference of the fitted power laws."
    if min(k for line in gaps for k in line.seeds) < stats.MIN_SEEDS:
        note += " Hollow: fewer than 3 seeds."
    note += _updates_note(section)
    if len(pairs) < len(section.pairs):
        note += " The CNN nearest in FLOPs alone; more in the report."
    if unmatched := unmatched_pairs(pairs):
        note += f" FLOPs not matched: {', '.join(unmatched)}."
    name = f"gap{section.suffix}"
    plots.curve(
        gaps,
        group.folder / f"{name}.png",
        xlabel=f"number of training {section.examples} N (log scale)",
        title=f"{section.title}: attention against the CNN",
        ylabel="difference in test accuracy",
        sides=("attention ahead", "CNN ahead"),
        note=note,
        styles=styles,
    )
    return [f"![{name}]({name}.png)"]


def _updates_note(section: Section) -> str:
    counts = [u for found in section.updates.values() for u in found]
    return f" Updates differ between the N: {span(counts)}." * section.uneven


def _gap_series(first: Line, second: Line) -> plots.Series | None:
    points = gap_points(first, second)
    if not points:
        return None
    fit = None
    try:
        laws = stats.fit_power_law(first.scores), stats.fit_power_law(second.scores)
        if max(law.worst for law in laws) <= MISFIT:
            grid = np.geomspace(min(points), max(points), 120)
            fit = grid, laws[0](grid) - laws[1](grid)
    except stats.FitError:
        pass
    wrap = "\n" if len(first.label + second.label) > 30 else " "
    return plots.Series(
        label=f"{first.label} −{wrap}{second.label}",
        x=list(points),
        y=[g.mean for g in points.values()],
        low=[g.low for g in points.values()],
        high=[g.high for g in points.values()],
        seeds=[min(g.seeds) for g in points.values()],
        fit=fit,
        name=pair_name(first, second),
    )
