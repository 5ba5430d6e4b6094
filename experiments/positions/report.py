"""Table and figures of the experiment, from stored results alone.

`python -m experiments.positions.report FOLDER` redraws report.md and the figures of a
folder that holds results.jsonl and, if it was measured, overhead.json.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Sequence

from attn_jax._program import program
from attn_jax.nn.positional import POSITIONS
from experiments.core.plots import Series, Styles, curve
from experiments.core.store import Record
from experiments.core.tables import Row, difference, number, redraw, rows_of, table

# Biases by |t − s|, which is the same before and after: no order can be learnt by them.
SYMMETRIC = ("alibi",)

# What the paper says of each: inductive, data-driven, parameter-efficient.
PAPER = {
    "sinusoidal": "✓ ✗ ✓",
    "learned": "✗ ✓ ✗",
    "shaw": "✗ ✓ ✓",
    "floater": "✓ ✓ ✓",
}


def _bins(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Bins of sequence length, (shortest, longest), ascending."""
    names = {
        name
        for row in rows
        for record in row.records
        for name in record["metrics"]
        if name.startswith("test_accuracy_length_")
    }
    pairs = [tuple(map(int, name.split("_")[-2:])) for name in names]
    return sorted((low, high) for low, high in pairs)


def threshold(group: Sequence[Row], bins: Sequence[tuple[int, int]]) -> float:
    """Accuracy on trained lengths from which an encoding has learnt the order.

    Midway between the encoder without positions and the best, however near they are;
    infinity where no encoding is clearly ahead of the encoder without. 0 where there
    is no encoder without, so that nothing can be said.

    Args:
      group: rows of one task.
      bins: bins of length, ascending.
    """
    blind = next((r for r in group if r.config["positions"] == "none"), None)
    if blind is None or not bins:
        return 0.0
    low, high = bins[0]
    metric = f"test_accuracy_length_{low}_{high}"
    floor = _in_bin(blind, low, high)
    if floor is None:
        return 0.0
    best = floor
    for row in group:
        if row is blind or row.config["positions"] in SYMMETRIC:
            continue
        if (found := _in_bin(row, low, high)) is not None:
            if found > best and difference(row, blind, metric)[0].clear:
                best = found
    return (floor + best) / 2 if best > floor else float("inf")


def _in_bin(row: Row, low: int, high: int) -> float | None:
    found = row.of(f"test_accuracy_length_{low}_{high}")
    return None if found is None else found.mean


def _beside_none(group: Sequence[Row], bins: Sequence[tuple[int, int]]) -> list[str]:
    """Which encodings are clearly behind none, by length."""
    blind = next((r for r in group if r.config["positions"] == "none"), None)
    found = []
    if blind is None:
        return []
    for row in group:
        for low, high in bins:
            metric = f"test_accuracy_length_{low}_{high}"
            if row is blind or not (row.scores(metric) and blind.scores(metric)):
                continue
            gap, text = difference(row, blind, metric, 3)
            if gap.clear and gap.mean < 0:
                found.append(f"{row.config['positions']} at {low}–{high} ({text})")
    if not found:
        return []
    return [
        f"Clearly behind the encoder without positions (Student, 95 %): "
        f"{'; '.join(found)}.",
        "",
    ]


def write_report(records: Sequence[Record], folder: pathlib.Path) -> str:
    """Writes report.md and the figures; returns the text for the terminal."""
    rows = rows_of(records)
    if not rows:
        raise ValueError("records: there is no finished cell to report.")
    overhead: dict[str, dict[str, float]] = {}
    measured = ""
    file = folder / "overhead.json"
    if file.is_file():
        record = json.loads(file.read_text(encoding="utf-8"))
        overhead = record["encodings"]
        measured = (
            f"Time: a train step over that without positions, in turns in one run, "
            f"median of {record['turns']}; {record['tokens']:,} vectors in sequences "
            f"of {record['length']}."
        )
    text = [
        "# Position encodings",
        "",
        "Encoders that differ in their position encoding alone, trained on short "
        "sequences. Accuracy on the test part by length, mean ± standard deviation "
        "over seeds. Inductive: what is kept on the longest sequences, which training "
        'has not seen; "not learnt" where accuracy on trained lengths is nearer to '
        "that without positions than to the best: who has not learnt the order keeps "
        'what it has, and that says nothing. "Void": ALiBi adds a slope times '
        "|t − s|, which cannot tell before from after, so that it is no comparison of "
        "what is kept. "
        "All encodings have one learning rate, "
        f"{', '.join(sorted({format(r.config['learning_rate'], 'g') for r in rows}))}. "
        "Data-driven: position parameters that are learned. The paper's "
        "marks are for inductive, data-driven and parameter-efficient "
        f"(arXiv:2003.09229, Table 1). {measured}",
        "",
    ]
    for task in dict.fromkeys(row.config["task"] for row in rows):
        group = [row for row in rows if row.config["task"] == task]
        group.sort(key=lambda row: POSITIONS.index(row.config["positions"]))
        bins = _bins(group)
        config = group[0].config
        seen = config["train_length"]
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("positions", lambda row: str(row.config["positions"]))
        ]
        for low, high in bins:
            columns.append(
                (
                    f"length {low}–{high}",
                    lambda row, name=f"test_accuracy_length_{low}_{high}": number(  # type: ignore[misc]
                        row.of(name), 3
                    ),
                )
            )

        needed = threshold(group, bins)

        def kept(
            row: Row, bins: list[tuple[int, int]] = bins, needed: float = needed
        ) -> str:
            if not bins or row.config["positions"] == "none":
                return "–"
            if row.config["positions"] in SYMMETRIC:
                return "void"
            short, long = _in_bin(row, *bins[0]), _in_bin(row, *bins[-1])
            if short is None or long is None:
                return "–"
            if short < needed:
                return "not learnt"
            return f"{long - short:+.3f}".replace("0.", ".", 1).replace("-", "−")

        def time(row: Row) -> str:
            found = overhead.get(row.config["positions"])
            return "–" if found is None else f"{100 * (found['ratio'] - 1):+.0f} %"

        columns += [
            ("inductive: longest − trained", kept),
            (
                "data-driven, parameters",
                lambda row: f"{row.first('position_params') or 0:,}",
            ),
            ("time of a step", time),
            ("paper", lambda row: PAPER.get(row.config["positions"], "–")),
            ("diverged", lambda row: str(row.diverged)),
        ]
        length = f"sentences of up to {seen} words" if seen else "up to 32 symbols"
        text += [
            f"## {task}: trained on {length}, {config['updates']:,} updates",
            "",
            *table(group, columns),
            "",
            *_beside_none(group, bins),
        ]
        lines = []
        for row in group:
            points = [
                (high, row.of(f"test_accuracy_length_{low}_{high}"))
                for low, high in bins
            ]
            shown = [(n, s) for n, s in points if s is not None]
            if shown:
                lines.append(
                    Series(
                        str(row.config["positions"]),
                        [n for n, _ in shown],
                        [s.mean for _, s in shown],
                        [s.std for _, s in shown],
                        [s.count for _, s in shown],
                    )
                )
        if lines:
            name = task.split("_by_length")[0]
            curve(
                lines,
                folder / f"lengths_{name}.png",
                title=f"{name}: accuracy by length, trained on {length}",
                xlabel="longest sequence of the bin (log scale)",
                note="Mean and standard deviation over seeds.",
                styles=Styles(POSITIONS),
            )
            text += [f"![{name}](lengths_{name}.png)", ""]
    if "floater, adjoint" in overhead:
        ratio = overhead["floater, adjoint"]["ratio"]
        text += [
            "FLOATER with gradients by the adjoint equation: "
            f"{100 * (ratio - 1):+.0f} % time of a step.",
            "",
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    return "\n".join([*text, f"Report and figures: {folder}/report.md"])


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Redraws the report of a folder; returns the exit status."""
    return redraw(__doc__, write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
