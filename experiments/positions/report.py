"""Table and figures of the experiment, from stored results alone.

`python -m experiments positions --redraw FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, overhead.json.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from attn_jax.nn.positional import POSITIONS, make_positions, num_parameters
from experiments.core import report as tell
from experiments.core.report import Column, Group, Report, Row, Section
from experiments.core.stats import Gap, gap, summarize
from experiments.positions import figures
from experiments.positions.figures import WORDS

MEASURED = "overhead.json"

# Biases by |t − s|, which is the same before and after: no order can be learnt by them.
SYMMETRIC = ("alibi",)

# What the paper says of each: inductive, data-driven, parameter-efficient.
PAPER = {
    "sinusoidal": "✓ ✗ ✓",
    "learned": "✗ ✓ ✗",
    "shaw": "✗ ✓ ✓",
    "floater": "✓ ✓ ✓",
    "sinusoidal_floater": "✓ ✓ ✓",
}
# Longest sequences that parameters are counted for.
LENGTHS = tuple(2**power for power in range(4, 15))
_METRIC = "test_accuracy_length_"


def _kind(row: Row) -> str:
    return str(row.config["positions"])


def _bins(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Metric -> bin of sequence length, (shortest, longest), ascending."""
    records = [record for row in rows for record in row.records]
    names = {n for r in records for n in r["metrics"] if n.startswith(_METRIC)}
    found = sorted((*map(int, name.split("_")[-2:]), name) for name in names)
    return {name: (low, high) for low, high, name in found}


def _of(rows: Sequence[Row], positions: str) -> Row | None:
    """The encoder with these positions."""
    return next((row for row in rows if _kind(row) == positions), None)


def threshold(rows: Sequence[Row], metric: str) -> float:
    """Accuracy on trained lengths from which an encoding has learnt the order.

    Midway between the encoder without positions and the best, however near they are;
    infinity where no encoding is clearly ahead of the encoder without. 0 where there
    is no encoder without, so that nothing can be said.

    Args:
      rows: of one task.
      metric: the accuracy on trained lengths.
    """
    blind = _of(rows, "none")
    if blind is None or (floor := blind.mean(metric)) is None:
        return 0.0
    ahead = [
        row.mean(metric)
        for row in rows
        if _kind(row) not in ("none", *SYMMETRIC)
        and row.scores(metric)
        and (gap := tell.difference(row, blind, metric)[0]).clear
        and gap.mean > 0
    ]
    return (floor + max(ahead)) / 2 if ahead else float("inf")


def _drops(row: Row | None, bins: Sequence[str]) -> dict[int, float]:
    """Seed -> accuracy on trained lengths less that on the longest."""
    short, long = (row.scores(bins[at]) if row else {} for at in (0, -1))
    return {seed: short[seed] - long[seed] for seed in short if seed in long}


def induction(rows: Sequence[Row]) -> dict[str, str | tuple[float, float, Gap | None]]:
    """What each encoding keeps on lengths that training has not seen.

    Args:
      rows: of one task.

    Returns:
      By positions: in a word why nothing can be said ("void", "not learnt"), or how
      much accuracy falls from trained lengths to the longest, that over the fall of the
      sinusoid, and the difference of the two falls. Nothing of an encoder without
      positions.
    """
    bins = list(_bins(rows)) or [""]
    needed, of_sinusoid = (
        threshold(rows, bins[0]),
        _drops(_of(rows, "sinusoidal"), bins),
    )
    found: dict[str, str | tuple[float, float, Gap | None]] = {}
    for row in rows:
        drops = _drops(row, bins)
        if _kind(row) == "none" or not drops:
            continue
        if _kind(row) in SYMMETRIC:
            found[_kind(row)] = "void"
        elif row.mean(bins[0]) < needed:
            found[_kind(row)] = "not learnt"
        else:
            drop, ratio, beside = summarize([*drops.values()]).mean, float("nan"), None
            if of_sinusoid:
                ratio = drop / summarize([*of_sinusoid.values()]).mean
                beside = gap(drops, of_sinusoid)
            found[_kind(row)] = drop, ratio, beside
    return found


def _fall(found: Mapping[str, Any], row: Row) -> str:
    """The fall of accuracy, and that beside the sinusoid's."""
    told = found.get(_kind(row), tell.NONE)
    if isinstance(told, str):
        return told
    drop, _, beside = told
    text = tell.decimal(-drop, 3, sign=True)
    if beside is None or _kind(row) == "sinusoidal":
        return text
    less = tell.decimal(-beside.mean, 3, sign=True)
    ends = f"[{tell.decimal(-beside.high, 3, sign=True)}, " if beside.high else "["
    return f"{text} ({less} {ends}{tell.decimal(-(beside.low or 0), 3, sign=True)}])"


def mark(told: str | tuple[float, float, Gap | None] | None) -> str:
    """Whether an encoding is inductive, with its fall over the sinusoid's.

    "✓" where it clearly falls less than the sinusoid, "✗" where clearly more, "=" where
    neither is clear.
    """
    if told is None or isinstance(told, str):
        return told or tell.NONE
    _, ratio, beside = told
    if beside is None:
        return tell.NONE
    sign = "=" if not beside.clear else "✓" if beside.mean < 0 else "✗"
    return f"{sign} {tell.decimal(ratio, 2)}"


@functools.cache
def parameters(
    positions: str, options: tuple[Any, ...], length: int, **sizes: int
) -> int:
    """Numbers that an encoding learns, for sequences of up to ``length``; counted."""
    made = nnx.eval_shape(
        lambda: make_positions(
            positions, max_length=length, rngs=nnx.Rngs(0), **sizes, **dict(options)
        )
    )
    return num_parameters(made)


def counts(row: Row) -> dict[int, int]:
    """Maximum length -> parameters of an encoding."""
    sizes = {name: row.config[name] for name in ("dim", "num_heads", "depth")}
    options = tuple(sorted(row.config["position_options"].items()))
    return {n: parameters(_kind(row), options, n, **sizes) for n in LENGTHS}


def _table_1(group: Group) -> list[str]:
    """The paper's table with what was measured, and the curve of parameters."""
    by_task = {g.config["task"]: g.rows for g in group.by("task")}
    told = {task: induction(rows) for task, rows in by_task.items()}
    tasks = {task: figures.task_name(task) for task in told}
    kinds = sorted({_kind(row) for row in group.rows}, key=POSITIONS.index)
    first = {kind: _of(group.rows, kind) for kind in kinds}
    known = {kind: counts(row) for kind, row in first.items() if row is not None}
    rows = []
    for kind in kinds:
        few, many = known[kind][128], known[kind][LENGTHS[-1]]
        rows.append(
            [
                WORDS[kind],
                *(mark(found.get(kind)) for found in told.values()),
                f"{'✓' if few else '✗'} {few:,}",
                f"{'✓' if few == many else '✗'} {many:,}",
                PAPER.get(kind, tell.NONE),
            ]
        )
    header = [
        "positions",
        *(f"inductive, {name}" for name in tasks.values()),
        "data-driven: parameters at 128",
        f"parameter-efficient: at {LENGTHS[-1]:,}",
        "paper",
    ]
    figures.parameters(known, group.folder / "parameters.png")
    return [
        "## The paper's Table 1, measured",
        "Inductive: how much accuracy falls from trained lengths to the longest, over "
        "how much it falls with the sinusoid (1 is as much, 0 is not at all); ✓ "
        "clearly less, ✗ clearly more (Student's interval of 95 % over seeds), = "
        "neither. The sinusoid itself, which the paper calls inductive, is the "
        "measure. Data-driven: whether positions have parameters, which are counted "
        "for sequences of up to 128. Parameter-efficient: whether longer sequences "
        "need no more of them. The paper's marks are for the three, in this order "
        "(arXiv:2003.09229, Table 1).",
        tell.table(header, rows),
        "![parameters by maximum length](parameters.png)",
    ]


def _columns(group: Group) -> list[Column]:
    measured = group.measured(MEASURED) or {"encodings": {}}
    bins = _bins(group.rows)
    found, blind = induction(group.rows), _of(group.rows, "none")

    def time(row: Row) -> str:
        seen = measured["encodings"].get(_kind(row))
        return tell.NONE if seen is None else _percent(seen)

    def over_none(row: Row) -> str:
        trained = next(iter(bins), "")
        if blind is None or row is blind or not row.scores(trained):
            return tell.NONE
        return tell.difference(row, blind, trained, 3)[1]

    floors = group.floors(task=group.config["task"])
    longest = [*bins][-1] if bins else ""
    floor = floors.get("trained_positions", {}).get(longest)

    def beyond(row: Row) -> str:
        scores = row.scores(longest)
        if floor is None or not scores:
            return tell.NONE
        over = gap(scores, dict.fromkeys(scores, floor))
        text = tell.decimal(over.mean, 3, sign=True)
        return f"{text} {tell.interval(over, 3)}".strip()

    found_beyond = [("longest: over right on trained positions alone", beyond)]
    return [
        ("positions", lambda row: WORDS[_kind(row)]),
        *(
            tell.score(f"length {low}–{high}", name, 3)
            for name, (low, high) in bins.items()
        ),
        ("trained lengths: over none", over_none),
        (
            "longest − trained (less that of the sinusoid)",
            lambda row: _fall(found, row),
        ),
        *(found_beyond if floor is not None else []),
        tell.RATE,
        ("time of a step", time),
        tell.DIVERGED,
    ]


def _percent(found: dict[str, float]) -> str:
    return f"{100 * (found['ratio'] - 1):+.0f} %"


def _beside_none(group: Group) -> list[str]:
    """Which encodings are clearly behind none, by length."""
    blind, found = _of(group.rows, "none"), []
    for row in group.rows if blind else ():
        for metric, (low, high) in _bins(group.rows).items():
            if blind and blind.scores(metric) and row.scores(metric):
                gap, text = tell.difference(row, blind, metric, 3)
                if gap.clear and gap.mean < 0:
                    found.append(f"{WORDS[_kind(row)]} at {low}–{high} ({text})")
    said = "Clearly behind the encoder without positions (Student, 95 %): "
    return [f"{said}{'; '.join(found)}."] if found else []


def _length(config: dict[str, Any]) -> str:
    seen = config["train_length"]
    return f"sentences of up to {seen} words" if seen else "up to 32 symbols"


def _figure(group: Group) -> list[str]:
    bins = _bins(group.rows)
    curves = {
        _kind(row): {bins[m]: row.of(m) for m in bins if row.scores(m)}
        for row in group.rows
    }
    if not any(curves.values()):
        return []
    task = group.config["task"]
    name = f"lengths_{task.split('_by_length')[0]}"
    figures.lengths(
        {kind: found for kind, found in curves.items() if found},
        group.folder / f"{name}.png",
        title=f"{figures.task_name(task)}: accuracy on lengths beyond training",
        trained=_length(group.config),
        floors={
            name: {bins[m]: metrics[m] for m in bins if m in metrics}
            for name, metrics in group.floors(task=task).items()
            if any(m in metrics for m in bins)
        },
    )
    return [f"![accuracy by length]({name}.png)"]


def _floors(group: Group) -> list[list[str]]:
    """What needs no network, by length where it was measured so."""
    bins = _bins(group.rows)
    return [
        [figures.FLOORS.get(name, name), *(tell.decimal(m.get(bin), 3) for bin in bins)]
        for name, m in group.floors(task=group.config["task"]).items()
    ]


def _intro(group: Group) -> str:
    rates = ", ".join(format(rate, "g") for rate in group.rates())
    said = (
        "Encoders that differ in their position encoding alone, trained on short "
        "sequences. Accuracy on the test part by length, mean ± standard deviation "
        "over seeds; differences with Student's interval of 95 %. What is kept on the "
        "longest sequences, which training has not seen, stands as a difference, "
        'beside it the same less that of the sinusoid; "not learnt" where accuracy on '
        "trained lengths is nearer to that without positions than to the best: who has "
        "not learnt the order keeps what it has, and that says nothing. "
    )
    if any(_kind(row) in SYMMETRIC for row in group.rows):
        said += (
            '"Void": ALiBi adds a slope times |t − s|, which cannot tell before from '
            "after, so that it is no comparison of what is kept. "
        )
    if rates:
        said += f"Learning rates, of {rates}: chosen on validation data for each. "
    if (found := group.measured(MEASURED)) is None:
        return said.rstrip()
    return said + (
        "Time: a train step over that without positions, in turns in one run, median "
        "of {turns}; {tokens:,} vectors in sequences of {length}.".format(**found)
    )


def _besides(group: Group) -> list[str]:
    """What was timed besides the encodings as they are."""
    found = (group.measured(MEASURED) or {"encodings": {}})["encodings"]
    more = [
        f"{WORDS[kind]}, {besides}: {_percent(found[name])} time of a step."
        for name in found
        for kind, _, besides in [name.partition(", ")]
        if besides and kind in WORDS
    ]
    return [" ".join(more)] if more else []


REPORT = Report(
    title="# Position encodings",
    text=(_intro, _table_1),
    sections=(
        Section(
            title=lambda group: (
                f"## {figures.task_name(group.config['task'])}: trained on "
                f"{_length(group.config)}, {group.config['updates']:,} updates of "
                f"{group.config['tokens']:,} labels"
            ),
            by=("task",),
            order=lambda row: POSITIONS.index(_kind(row)),
            columns=_columns,
            floors=_floors,
            notes=(_beside_none, _figure),
        ),
    ),
    notes=(_besides,),
)
