"""What reports share: rows of seeds, numbers, tables."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.core.identity import of_one_kind
from experiments.core.stats import Gap, Summary, gap, sampling_error, summarize
from experiments.core.store import Record, read_jsonl

# What two cells of one row may differ in.
_FREE = ("seed",)


@dataclasses.dataclass(frozen=True)
class Row:
    """All seeds of one model.

    Attributes:
      config: of the first seed.
      records: one a seed that was trained to its end.
      diverged: how many were not.
    """

    config: dict[str, Any]
    records: tuple[Record, ...]
    diverged: int

    def of(self, metric: str) -> Summary | None:
        """Mean and deviation of a metric over the seeds."""
        values = [r["metrics"].get(metric) for r in self.records]
        found = [float(v) for v in values if v is not None]
        return summarize(found) if found else None

    def scores(self, metric: str) -> dict[int, float]:
        """A metric by seed."""
        return {
            record["config"]["seed"]: record["metrics"][metric]
            for record in self.records
            if record["metrics"].get(metric) is not None
        }

    def first(self, metric: str) -> Any:
        """A metric that is the same for every seed."""
        return self.records[0]["metrics"].get(metric) if self.records else None


def rows_of(records: Sequence[Record]) -> list[Row]:
    """Groups final cells that differ in their seed alone."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["config"].get("phase") != "final":
            continue
        key = {k: v for k, v in record["config"].items() if k not in _FREE}
        groups.setdefault(repr(sorted(key.items())), []).append(record)
    found = []
    for group in groups.values():
        group.sort(key=lambda record: record["config"]["seed"])
        done = tuple(r for r in group if r["status"] == "done")
        found.append(Row(dict(group[0]["config"]), done, len(group) - len(done)))
    return found


def number(summary: Summary | None, digits: int = 4) -> str:
    """A mean ± deviation, as ".970 ± .001".

    >>> number(summarize([0.5, 0.55, 0.6]), 2)
    '.55 ± .05'
    >>> number(summarize([70.0, 70.5, 71.0]), 2)
    '70.50 ± .50'
    """
    if summary is None:
        return "–"

    def short(value: float) -> str:
        return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")

    if summary.std is None:
        return f"{short(summary.mean)} (1 seed)"
    seeds = "" if summary.enough else f" ({summary.count} seeds)"
    return f"{short(summary.mean)} ± {short(summary.std)}{seeds}"


def table(
    rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]
) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for row in rows:
        lines.append("| " + " | ".join(show(row) for _, show in columns) + " |")
    return lines


def difference(one: Row, two: Row, metric: str, digits: int = 4) -> tuple[Gap, str]:
    """Mean of one − mean of two, with Student's interval of 95 %, and as text."""

    def signed(value: float) -> str:
        return re.sub(r"^([+-])0\.", r"\1.", f"{value:+.{digits}f}").replace("-", "−")

    found = gap(one.scores(metric), two.scores(metric))
    text = signed(found.mean)
    if found.low is not None and found.high is not None:
        text += f" [{signed(found.low)}, {signed(found.high)}]"
    return found, text


def sampling_note(
    rows: Sequence[Row],
    name: Callable[[Row], str],
    metric: str,
    size: int | None,
    items: str,
    digits: int = 4,
) -> list[str]:
    """Names the rows whose seeds differ by less than the test set can tell.

    Args:
      rows: of a table.
      name: of a row.
      metric: an accuracy.
      size: how many items it is of; None says nothing.
      items: what they are, in words.
      digits: of the error.
    """
    found: list[tuple[float, str]] = []
    for row in rows:
        summary = row.of(metric)
        if size and summary is not None and summary.std is not None:
            error = sampling_error(summary.mean, size)
            if summary.std < error:
                found.append((error, name(row)))
    if not found:
        return []
    low, high = (f"{f(found)[0]:.{digits}f}".lstrip("0") for f in (min, max))
    return [
        f"Seeds differ by less than the sampling error of the {size:,} {items}, "
        f"√(p(1 − p)/m) = {low if low == high else f'{low} to {high}'}, in: "
        f"{', '.join(text for _, text in found)}.",
        "",
    ]


def reported(
    records: Sequence[Record],
    write_report: Callable[[Sequence[Record], pathlib.Path], str],
    folder: pathlib.Path,
    planned: Iterable[Mapping[str, Any]] = (),
) -> str:
    """Writes the report of the records that may stand in one, and says of the others.

    Args:
      records: all there are.
      write_report: of an experiment.
      folder: where the report goes.
      planned: configs of this run, see `experiments.core.identity.of_one_kind`.

    Returns:
      What to print.
    """
    kept, others = of_one_kind(records, planned)
    failed = [record for record in kept if record["status"] == "failed"]
    notes = []
    if failed:
        first = failed[0]["metrics"].get("error")
        notes.append(
            f"failed: {len(failed)} (the first: {first}); the same command tries again."
        )
    if others:
        notes.append(
            f"left out: {others} records of other data, or of other sizes of its parts."
        )
    text = write_report([r for r in kept if r["status"] != "failed"], folder)
    if notes:
        with open(folder / "report.md", "a", encoding="utf-8") as file:
            file.write("".join(f"\n{note}\n" for note in notes))
    return "\n".join([text, *notes])


def redraw(
    description: str | None,
    write_report: Callable[[Sequence[Record], pathlib.Path], str],
    argv: Sequence[str] | None,
) -> int:
    """Redraws the report of a folder that holds results.jsonl; the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(argv).folder
    try:
        print(reported(read_jsonl(folder / "results.jsonl"), write_report, folder))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
