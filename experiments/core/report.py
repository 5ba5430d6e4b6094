"""Declared reports: rows of seeds, sections of tables and figures, one way of writing.

A `Report` is sections; a `Section` is a heading, what stands above its table, the
columns of the table, the rows of what needs no network, and what stands below. Text may
name settings of its rows (``"{updates:,} updates"``), or be a function of the `Group`
that the section is about, which gives paragraphs and may draw figures.

    REPORT = Report(
        title="# Window or not",
        text=("Test accuracy after {updates:,} updates.",),
        sections=(
            Section(
                title="## {task}",
                by=("task",),
                order=lambda row: -row.mean("test_accuracy"),
                columns=(setting("model", "model"), score("test", "test_accuracy")),
                floors=lambda group: [
                    [name, decimal(found["test_accuracy"])]
                    for name, found in group.floors(task=group.config["task"]).items()
                ],
                notes=(draws_a_figure_and_gives_its_markdown,),
            ),
        ),
    )

`python -m experiments --redraw` redraws the committed reports.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from experiments.core.identity import of_one_kind
from experiments.core.stats import Gap, Summary, gap, sampling_error, summarize
from experiments.core.store import Record, ResultsStore, read_jsonl

NONE = "–"
_Item = TypeVar("_Item")

# ------------------------------------------------------------------ numbers


def decimal(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A number with so many digits: .812, 1.000, −.031, with a sign +.020.

    >>> decimal(0.8123, 3), decimal(-0.0004, 3), decimal(-1.5, 1), decimal(2, 1, sign=1)
    ('.812', '.000', '−1.5', '+2.0')
    """
    if value is None:
        return NONE
    text = f"{abs(value):.{digits}f}"
    minus = "−" if value < 0 and float(text) else "+" if sign else ""
    return minus + (text[1:] if text.startswith("0.") else text)


def mean(summary: Summary | None, digits: int = 4, *, count: bool = False) -> str:
    """A mean ± deviation; how many seeds where they are few, or where asked.

    >>> mean(summarize([0.5, 0.55, 0.6]), 2), mean(summarize([70.0, 71.0]), 1)
    ('.55 ± .05', '70.5 ± .7 (2 seeds)')
    """
    if summary is None:
        return NONE
    text = decimal(summary.mean, digits)
    if summary.std is not None:
        text += f" ± {decimal(summary.std, digits)}"
    if count:
        return f"{text} ({summary.count})"
    if summary.enough:
        return text
    return f"{text} ({summary.count} seed{'s' * (summary.count > 1)})"


def count(value: float | None) -> str:
    """A whole number with commas."""
    return NONE if value is None else f"{value:,.0f}"


def interval(found: Gap, digits: int = 4) -> str:
    """Student's interval of 95 %; nothing of a single seed."""
    if found.low is None or found.high is None:
        return ""
    ends = (decimal(end, digits, sign=True) for end in (found.low, found.high))
    return f"[{', '.join(ends)}]"


def span(values: Iterable[float], show: Callable[[float], str] = count) -> str:
    """The least and the largest of some values, or the one that they all are."""
    values = list(values)
    if not values:
        return NONE
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def plain(value: Any) -> str:
    """A setting."""
    if value is None:
        return NONE
    return f"{value:g}" if isinstance(value, float) else str(value)


def assignments(values: Mapping[str, Any]) -> str:
    """Settings by name."""
    return ", ".join(f"`{name}={plain(value)}`" for name, value in values.items())


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, aligned: bool = False
) -> str:
    """A Markdown table; rows that end early are filled up.

    >>> print(table(["a", "b"], [["1"]]))
    | a | b |
    |---|---|
    | 1 | – |
    """
    cells = [[*row, *[NONE] * (len(header) - len(row))] for row in (header, *rows)]
    rule = ["---"] * len(header)
    if aligned:  # columns line up as plain text too
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells = [
            [c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in cells
        ]
        rule = ["-" * (width + 2) for width in widths]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def tabulate(
    columns: Sequence[tuple[str, Callable[[_Item], str]]],
    items: Iterable[_Item],
    more: Iterable[Sequence[str]] = (),
) -> str:
    """A table of items: columns are (title, what it shows of an item)."""
    rows = [[show(item) for _, show in columns] for item in items]
    return table([title for title, _ in columns], [*rows, *more])


def pivot(title: str, rows: Mapping[str, Mapping[Any, str]], form: str = "{:,}") -> str:
    """A table of cells by row and by a number, which stands in the header.

    >>> print(pivot("model", {"a": {5: "x"}, "b": {9: "y"}}, "N = {}"))
    | model | N = 5 | N = 9 |
    |---|---|---|
    | a | x | – |
    | b | – | y |
    """
    keys = sorted({key for cells in rows.values() for key in cells})
    return table(
        [title, *(form.format(key) for key in keys)],
        [[name, *(cells.get(k, NONE) for k in keys)] for name, cells in rows.items()],
    )


# --------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Row:
    """All seeds of one setting."""

    config: dict[str, Any]  # of the first seed
    records: tuple[Record, ...]  # one a seed that was trained to its end
    lost: tuple[Record, ...] = ()  # the others

    def of(self, metric: str | Callable[[Record], float | None]) -> Summary | None:
        """Mean and deviation of a metric, or of a function of records, over seeds."""
        read = metric if callable(metric) else lambda r: r["metrics"].get(metric)
        found = [float(v) for v in map(read, self.records) if v is not None]
        return summarize(found) if found else None

    def mean(self, metric: str, default: Any = None) -> Any:
        """The mean alone."""
        found = self.of(metric)
        return default if found is None else found.mean

    def scores(self, metric: str) -> dict[int, float]:
        """A metric by seed."""
        found = {r["config"]["seed"]: r["metrics"].get(metric) for r in self.records}
        return {seed: value for seed, value in found.items() if value is not None}

    def first(self, metric: str) -> Any:
        """A metric that is the same for every seed."""
        return self.records[0]["metrics"].get(metric) if self.records else None


def grouped(
    items: Iterable[_Item], key: Callable[[_Item], Any]
) -> dict[Any, list[_Item]]:
    """Items by a key, in the order of their coming."""
    found: dict[Any, list[_Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def settings_of(record: Record) -> str:
    """What all seeds of a row share."""
    config = {k: v for k, v in record["config"].items() if k != "seed"}
    return repr(sorted(config.items()))


def rows_of(records: Iterable[Record]) -> list[Row]:
    """Groups final cells that differ in their seed alone."""
    final = (r for r in records if r["config"].get("phase") == "final")
    found = []
    for group in grouped(final, settings_of).values():
        group.sort(key=lambda record: record["config"]["seed"])
        done = tuple(r for r in group if r["status"] == "done")
        lost = tuple(r for r in group if r["status"] != "done")
        found.append(Row(dict(group[0]["config"]), done, lost))
    return found


def difference(one: Row, two: Row, metric: str, digits: int = 4) -> tuple[Gap, str]:
    """Mean of one − mean of two, with Student's interval of 95 %, and as text."""
    found = gap(one.scores(metric), two.scores(metric))
    text = f"{decimal(found.mean, digits, sign=True)} {interval(found, digits)}"
    return found, text.strip()


# ------------------------------------------------------------------ columns

Column = tuple[str, Callable[[Row], str]]


def score(title: str, metric: str, digits: int = 4) -> Column:
    """Mean ± deviation of a metric."""
    return title, lambda row: mean(row.of(metric), digits)


def same(title: str, metric: str) -> Column:
    """A whole number that every seed has."""
    return title, lambda row: count(row.first(metric))


def setting(title: str, name: str, form: str = "") -> Column:
    """A setting of the cells."""
    return title, lambda row: format(row.config[name], form)


PARAMETERS = same("parameters", "params")
RATE = setting("learning rate", "learning_rate", "g")
DIVERGED = ("diverged", lambda row: str(len(row.lost)))

# ----------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class Group:
    """What a section is about."""

    rows: Sequence[Row]
    records: Sequence[Record]  # all of the report, baselines included
    folder: pathlib.Path  # where the report goes, and what was measured besides lies
    every: Sequence[Row]  # all rows of the report
    columns: Sequence[Column] = ()  # of the section's table; the first names a row

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the first row, where there is one."""
        return self.rows[0].config if self.rows else {}

    def name(self, row: Row) -> str:
        """What the table calls a row."""
        return self.columns[0][1](row)

    def floors(self, **settings: Any) -> dict[str, dict[str, Any]]:
        """Metrics of the baselines of these settings, by name."""
        found = (r for r in self.records if r["config"].get("phase") == "baseline")
        return {
            record["config"]["model"]: record["metrics"]
            for record in found
            if all(record["config"].get(k) == v for k, v in settings.items())
        }

    def best(
        self, metric: str, *, less: bool = False, **settings: Any
    ) -> tuple[str, float] | None:
        """Name and metric of the best of these baselines, where one has it."""
        found = self.floors(**settings).items()
        known = [(name, m[metric]) for name, m in found if m.get(metric) is not None]
        best = min if less else max
        return best(known, key=lambda item: item[1], default=None)

    def rates(self) -> list[float]:
        """Learning rates that were tried in tuning."""
        tuned = (r["config"] for r in self.records if r["config"]["phase"] == "tune")
        return sorted({config["learning_rate"] for config in tuned})

    def measured(self, name: str) -> Any:
        """What a JSON file of the folder holds, or None."""
        file = self.folder / name
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def said(self, part: Part) -> list[str]:
        """The paragraphs of a part."""
        found = part.format(**self.config) if isinstance(part, str) else part(self)
        return [found] if isinstance(found, str) else [*found]

    def by(self, *names: str) -> list[Group]:
        """A group for each value of some settings; without any, this one."""
        if not names:
            return [self]
        groups = grouped(self.rows, lambda row: tuple(row.config[n] for n in names))
        return [dataclasses.replace(self, rows=rows) for rows in groups.values()]


#: A paragraph that may name settings in braces, or what gives some of a group.
Part = str | Callable[[Group], str | Iterable[str]]


def where(**settings: Any) -> Callable[[Group], list[Row]]:
    """The rows that have these settings."""
    return lambda group: [
        row
        for row in group.rows
        if all(row.config.get(name) == value for name, value in settings.items())
    ]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a report: heading, text, table, further sections, notes."""

    title: Part  # its heading, with its #
    rows: Callable[[Group], Sequence[Row]] = lambda group: group.rows
    by: tuple[str, ...] = ()  # settings; each of their values has such a section
    least: int = 1  # rows that it takes to write one
    order: Callable[[Row], Any] | None = None  # what rows are sorted by
    text: tuple[Part, ...] = ()  # above the table
    columns: Sequence[Column] | Callable[[Group], Sequence[Column]] = ()
    floors: Callable[[Group], Iterable[Sequence[str]]] = lambda group: ()  # more rows
    sections: tuple[Section, ...] = ()  # further ones, before the notes
    notes: tuple[Part, ...] = ()  # below the table, figures too

    def said(self, whole: Group) -> list[str]:
        """The paragraphs of this section, for each group of rows that it is about."""
        some = dataclasses.replace(whole, rows=self.rows(whole))
        found: list[str] = []
        for group in some.by(*self.by):
            if len(group.rows) < self.least:
                continue
            columns = self.columns(group) if callable(self.columns) else self.columns
            rows = sorted(group.rows, key=self.order) if self.order else group.rows
            group = dataclasses.replace(group, rows=rows, columns=columns)
            for part in (self.title, *self.text):
                found += group.said(part)
            if columns:
                found.append(tabulate(columns, rows, self.floors(group)))
            for section in self.sections:
                found += section.said(group)
            for part in self.notes:
                found += group.said(part)
        return found


class NothingToReport(ValueError):
    """No cell of a folder is finished."""


@dataclasses.dataclass(frozen=True)
class Report(Section):
    """Everything that is told of an experiment."""

    terminal: Part | None = None  # what is shown on a terminal; by default all

    def write(self, records: Sequence[Record], folder: pathlib.Path) -> str:
        """Writes report.md and the figures; returns the text for the terminal.

        Raises:
          NothingToReport: no cell is finished.
        """
        rows = rows_of(records)
        if not records or len(rows) < self.least:
            raise NothingToReport("records: there is no finished cell to report.")
        folder.mkdir(parents=True, exist_ok=True)
        group = Group(rows, records, folder, rows)
        text = "\n\n".join(self.said(group))
        (folder / "report.md").write_text(f"{text}\n", encoding="utf-8")
        if self.terminal is not None:
            text = "\n\n".join(group.said(self.terminal))
        return f"{text}\n\nReport and figures: {folder}/report.md"


# -------------------------------------------------------------------- notes


def tried(group: Group, row: Row, besides: Sequence[str] = ()) -> list[float]:
    """Learning rates that were tried for a row, ascending.

    Args:
      group: of the row.
      row: whose.
      besides: settings in which a cell that tried one may differ from the row.
    """
    loose = {"phase", "updates", "seed", "learning_rate", *besides}

    def rest(config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in loose}

    configs = (r["config"] for r in group.records)
    found = (c for c in configs if c.get("phase") == "tune")
    wanted = rest(row.config)
    return sorted({c["learning_rate"] for c in found if rest(c) == wanted})


def at_ends(
    group: Group,
    name: Callable[[Row], str],
    rows: Iterable[Row] | None = None,
    besides: Sequence[str] = (),
) -> list[str]:
    """Names the rows whose learning rate lies at an end of those tried for them.

    Args:
      group: whose rows, if ``rows`` are not given.
      name: of a row.
      rows: which of them.
      besides: as of `tried`.
    """
    found = []
    for row in group.rows if rows is None else rows:
        rates = tried(group, row, besides)
        if len(rates) > 1 and row.config["learning_rate"] in (rates[0], rates[-1]):
            found.append(name(row))
    if not found:
        return []
    return [
        "The chosen rate lies at an end of those that were tried, so that a better one "
        f"may lie beyond: {'; '.join(found)}."
    ]


def sampling(
    metric: str,
    size: Callable[[dict[str, Any]], int | None],
    items: str,
    digits: int = 4,
) -> Callable[[Group], list[str]]:
    """Names the rows whose seeds differ by less than the test set can tell.

    Args:
      metric: an accuracy.
      size: how many items it is of, by config; None says nothing.
      items: what they are, in words.
      digits: of the error.
    """

    def said(group: Group) -> list[str]:
        known, found = size(group.config), {}
        for row in group.rows if known else ():
            summary = row.of(metric)
            if known and summary is not None and summary.std is not None:
                error = sampling_error(summary.mean, known)
                if summary.std < error:
                    found[group.name(row)] = error
        if not found:
            return []
        errors = span(found.values(), lambda e: decimal(e, digits))
        return [
            f"Seeds differ by less than the sampling error of the {known:,} {items}, "
            f"√(p(1 − p)/m) = {errors}, in: {', '.join(found)}."
        ]

    return said


# ------------------------------------------------------------------ writing


def reported(
    records: Sequence[Record],
    write: Callable[[Sequence[Record], pathlib.Path], str],
    folder: pathlib.Path,
    planned: Iterable[Mapping[str, Any]] = (),
) -> str:
    """Writes the report of the records that may stand in one, and says of the others.

    Args:
      records: all there are.
      write: of a `Report`.
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
    text = write([r for r in kept if r["status"] != "failed"], folder)
    if notes:
        with open(folder / "report.md", "a", encoding="utf-8") as file:
            file.write("".join(f"\n{note}\n" for note in notes))
    return "\n".join([text, *notes])


def load(folder: pathlib.Path) -> list[Record]:
    """Records of a results folder: of its cells, and what results.jsonl has besides.

    Raises:
      FileNotFoundError: there is neither.
    """
    records, kept = ResultsStore(folder).records(), folder / "results.jsonl"
    if kept.is_file():
        known = {record["hash"] for record in records}
        records += [r for r in read_jsonl(kept) if r["hash"] not in known]
    elif not records:
        raise FileNotFoundError(f"{folder} holds no cells and no results.jsonl.")
    return records


def redraw(
    report: Report, folder: pathlib.Path, out: pathlib.Path | None = None
) -> str:
    """Writes the report of a folder anew, from what is stored there alone.

    Args:
      report: of the experiment.
      folder: of results.
      out: where to write it instead; what was measured besides is copied there.

    Returns:
      What to print.
    """
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("*.json"):
            shutil.copy(file, out)
    return reported(load(folder), report.write, out or folder)
