"""Table and figures of the experiment, from stored results alone.

`python -m experiments positions --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, overhead.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attn_jax.nn.positional import POSITIONS
from experiments.core import report as tell
from experiments.core.plots import Series, Styles, curve
from experiments.core.report import Column, Group, Report, Row, Section

MEASURED = "overhead.json"

# Biases by |t − s|, which is the same before and after: no order can be learnt by them.
SYMMETRIC = ("alibi",)

# What the paper says of each: inductive, data-driven, parameter-efficient.
PAPER = {
    "sinusoidal": "✓ ✗ ✓",
    "learned": "✗ ✓ ✗",
    "shaw": "✗ ✓ ✓",
    "floater": "✓ ✓ ✓",
}
_METRIC = "test_accuracy_length_"


def _bins(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Metric -> bin of sequence length, (shortest, longest), ascending."""
    records = [record for row in rows for record in row.records]
    names = {n for r in records for n in r["metrics"] if n.startswith(_METRIC)}
    found = sorted((*map(int, name.split("_")[-2:]), name) for name in names)
    return {name: (low, high) for low, high, name in found}


def _blind(rows: Sequence[Row]) -> Row | None:
    """The encoder without positions."""
    return next((row for row in rows if row.config["positions"] == "none"), None)


def threshold(rows: Sequence[Row], metric: str) -> float:
    """Accuracy on trained lengths from which an encoding has learnt the order.

    Midway between the encoder without positions and the best, however near they are;
    infinity where no encoding is clearly ahead of the encoder without. 0 where there
    is no encoder without, so that nothing can be said.

    Args:
      rows: of one task.
      metric: the accuracy on trained lengths.
    """
    blind = _blind(rows)
    if blind is None or (floor := blind.mean(metric)) is None:
        return 0.0
    ahead = [
        row.mean(metric)
        for row in rows
        if row.config["positions"] not in ("none", *SYMMETRIC)
        and row.scores(metric)
        and (gap := tell.difference(row, blind, metric)[0]).clear
        and gap.mean > 0
    ]
    return (floor + max(ahead)) / 2 if ahead else float("inf")


def _kept(rows: Sequence[Row]) -> Callable[[Row], str]:
    """What of the accuracy on trained lengths is left on the longest."""
    bins = list(_bins(rows)) or [""]
    needed = threshold(rows, bins[0])

    def kept(row: Row) -> str:
        if row.config["positions"] in SYMMETRIC:
            return "void"
        short, long = (row.mean(bins[at]) for at in (0, -1))
        if row.config["positions"] == "none" or short is None or long is None:
            return tell.NONE
        if short < needed:
            return "not learnt"
        return tell.decimal(long - short, 3, sign=True)

    return kept


def _columns(group: Group) -> list[Column]:
    measured = group.measured(MEASURED) or {"encodings": {}}

    def time(row: Row) -> str:
        found = measured["encodings"].get(row.config["positions"])
        return tell.NONE if found is None else _percent(found)

    return [
        tell.setting("positions", "positions"),
        *(
            tell.score(f"length {low}–{high}", name, 3)
            for name, (low, high) in _bins(group.rows).items()
        ),
        ("inductive: longest − trained", _kept(group.rows)),
        tell.same("data-driven, parameters", "position_params"),
        ("time of a step", time),
        ("paper", lambda row: PAPER.get(row.config["positions"], tell.NONE)),
        tell.DIVERGED,
    ]


def _percent(found: dict[str, float]) -> str:
    return f"{100 * (found['ratio'] - 1):+.0f} %"


def _beside_none(group: Group) -> list[str]:
    """Which encodings are clearly behind none, by length."""
    blind, found = _blind(group.rows), []
    for row in group.rows if blind else ():
        for metric, (low, high) in _bins(group.rows).items():
            if blind and blind.scores(metric) and row.scores(metric):
                gap, text = tell.difference(row, blind, metric, 3)
                if gap.clear and gap.mean < 0:
                    found.append(f"{row.config['positions']} at {low}–{high} ({text})")
    said = "Clearly behind the encoder without positions (Student, 95 %): "
    return [f"{said}{'; '.join(found)}."] if found else []


def _length(config: dict[str, Any]) -> str:
    seen = config["train_length"]
    return f"sentences of up to {seen} words" if seen else "up to 32 symbols"


def _figure(group: Group) -> list[str]:
    bins = _bins(group.rows)
    lines = [
        Series.of(
            row.config["positions"],
            [(high, row.of(metric)) for metric, (_, high) in bins.items()],
        )
        for row in group.rows
        if any(row.scores(metric) for metric in bins)
    ]
    if not lines:
        return []
    name = group.config["task"].split("_by_length")[0]
    curve(
        lines,
        group.folder / f"lengths_{name}.png",
        title=f"{name}: accuracy by length, trained on {_length(group.config)}",
        xlabel="longest sequence of the bin (log scale)",
        note="Mean and standard deviation over seeds.",
        styles=Styles(POSITIONS),
    )
    return [f"![{name}](lengths_{name}.png)"]


def _intro(group: Group) -> str:
    rates = sorted({format(r.config["learning_rate"], "g") for r in group.rows})
    said = (
        "Encoders that differ in their position encoding alone, trained on short "
        "sequences. Accuracy on the test part by length, mean ± standard deviation "
        "over seeds. Inductive: what is kept on the longest sequences, which training "
        'has not seen; "not learnt" where accuracy on trained lengths is nearer to '
        "that without positions than to the best: who has not learnt the order keeps "
        'what it has, and that says nothing. "Void": ALiBi adds a slope times '
        "|t − s|, which cannot tell before from after, so that it is no comparison of "
        f"what is kept. All encodings have one learning rate, {', '.join(rates)}. "
        "Data-driven: position parameters that are learned. The paper's "
        "marks are for inductive, data-driven and parameter-efficient "
        "(arXiv:2003.09229, Table 1). "
    )
    if (found := group.measured(MEASURED)) is None:
        return said.rstrip()
    return said + (
        "Time: a train step over that without positions, in turns in one run, median "
        "of {turns}; {tokens:,} vectors in sequences of {length}.".format(**found)
    )


def _adjoint(group: Group) -> list[str]:
    found = (group.measured(MEASURED) or {"encodings": {}})["encodings"]
    if "floater, adjoint" not in found:
        return []
    said = "FLOATER with gradients by the adjoint equation: "
    return [f"{said}{_percent(found['floater, adjoint'])} time of a step."]


REPORT = Report(
    title="# Position encodings",
    text=(_intro,),
    sections=(
        Section(
            title=lambda group: (
                f"## {group.config['task']}: trained on {_length(group.config)}, "
                f"{group.config['updates']:,} updates"
            ),
            by=("task",),
            order=lambda row: POSITIONS.index(row.config["positions"]),
            columns=_columns,
            notes=(_beside_none, _figure),
        ),
    ),
    notes=(_adjoint,),
)
