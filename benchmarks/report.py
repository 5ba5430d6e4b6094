"""The results as a page, from the stored JSON alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn_jax.tools.bench import size_text

RESULTS = pathlib.Path(__file__).resolve().parent / "results"

# In this order on the page; any other file comes after them.
ORDER = (
    "exact_attention",
    "memory",
    "attention_layer",
    "truncated",
    "long_range",
    "long_range_small",
    "train_steps",
    "image_steps",
    "quick_preset",
    "before",
    "growth",
    "group_norm",
    "workers",
    "minutes",
    "accelerator",
)

_INTRODUCTION = """\
# Results

Made from the JSON files beside this page by `python -m benchmarks --page`; how to read
it and how it is measured is told in [../README.md](../README.md). "x peer" is how many
times as fast as the peer, the median over the rounds, with the lowest and the highest
round. Peak memory is arguments, outputs and temporaries.
"""


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, aligned for a terminal: words to the left, numbers right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    words = [all(c == "-" or c[:1].isalpha() for c in col[1:]) for col in columns]
    words[0] = True

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, words, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if left else "-" * (width - 1) + ":"
        for width, left in zip(widths, words, strict=True)
    ]
    return [line(cells[0]), line(rule), *map(line, cells[1:])]


def _number(value: float | None) -> str:
    """Three digits and no exponent."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def _words(found: str | None) -> str:
    return "-" if found is None else found


def _ratio(found: Sequence[float] | None) -> str:
    return (
        "-" if found is None else f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"
    )


def rows_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of alternatives, with those columns that any of them has."""
    bases = list(dict.fromkeys(base for row in rows for base in row.get("against", {})))
    fields: Mapping[str, tuple[str, Callable[[Any], str]]] = {
        "peer_milliseconds": ("ms of it", _number),
        "peer": ("which", _words),
        "batch": ("batch", _words),
        "gflops_per_second": ("GF/s", _number),
        "images_per_second": ("images/s", _number),
        "temp_bytes": ("temporary", size_text),
        "memory_ratio": ("dense over it", _number),
        "peak_bytes": ("peak memory", size_text),
    }
    shown = {f: how for f, how in fields.items() if any(f in row for row in rows)}
    timed = any("milliseconds" in row for row in rows)
    header = ["", *(["ms"] if timed else []), *(f"x {base}" for base in bases)]
    table = [[*header, *(label for label, _ in shown.values())]]
    for row in rows:
        cells = [row["name"]]
        if timed:
            cells.append(_number(row.get("milliseconds")))
        cells += [_ratio(row.get("against", {}).get(base)) for base in bases]
        cells += [write(row.get(field)) for field, (_, write) in shown.items()]
        table.append(cells)
    return _table(table)


def verdict(target: Mapping[str, Any]) -> str:
    """Whether a target was reached.

    >>> verdict(dict(at_least=1.0, aim=1.3, reached=1.1))
    'at least'
    """
    reached = target["reached"]
    if reached is None:
        return "not measured"
    if reached >= target["aim"]:
        return "aim"
    return "at least" if reached >= target["at_least"] else "no"


def targets_table(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was to be reached, and what was: the lowest of all settings."""
    table = [["work", "at least", "aim", "reached", "met", "each"]]
    for target in targets:
        table.append(
            [
                target["work"],
                f"{target['at_least']:g}x",
                f"{target['aim']:g}x",
                "-" if target["reached"] is None else f"{_number(target['reached'])}x",
                verdict(target),
                target.get("told") or "-",
            ]
        )
    return _table(table)


def _growth(group: Mapping[str, Any]) -> list[str]:
    lines = []
    if "figure" in group:
        lines += [f"![cost over length, log-log]({group['figure']})", ""]
    table = [
        ["", "direction", "timed to T", "time said", "time", "FLOPs", "memory said",
         "temporary"]
    ]  # fmt: skip
    for row in group["growth"]:
        slopes = [
            "-" if row[f] is None else f"{row[f]:.2f}"
            for f in ("time", "flops", "temp")
        ]
        longest = "-" if row["longest"] is None else f"{row['longest']:,}"
        said = row["claimed_time"] or "-", row["claimed_memory"] or "-"
        table.append(
            [row["name"], row["direction"], longest, said[0], *slopes[:2], said[1],
             slopes[2]]
        )  # fmt: skip
    lines += ["Exponents of T beside what is said of the variant:", "", *_table(table)]
    rows = group["growth_rows"]
    lengths = sorted({row["length"] for row in rows})
    for direction in dict.fromkeys(row["direction"] for row in rows):
        table = [
            ["", *(f"{n:,}" for n in lengths), f"GFLOP at {lengths[-1]:,}",
             f"temporary at {lengths[-1]:,}"]
        ]  # fmt: skip
        for name in dict.fromkeys(row["name"] for row in rows):
            found = {
                row["length"]: row
                for row in rows
                if (row["name"], row["direction"]) == (name, direction)
            }
            cells = [
                _number(found[n]["milliseconds"])
                if "milliseconds" in found[n]
                else found[n]["skipped"]
                for n in lengths
            ]
            last = found[lengths[-1]]
            least = "" if last["flops_exact"] else ">= "
            cells += [
                f"{least}{_number(last['flops'] / 1e9)}",
                size_text(last["temp_bytes"]),
            ]
            table.append([name, *cells])
        lines += ["", f"### {direction}: ms at T", "", *_table(table)]
    return lines


def _long_range(group: Mapping[str, Any]) -> list[str]:
    """Variants by lengths: speed and memory beside the dense Transformer's."""
    tables, paper = group["long_range"], group["paper"]
    names = list(dict.fromkeys(row["name"] for t in tables for row in t["rows"]))
    found = {t["short"]: {row["name"]: row for row in t["rows"]} for t in tables}
    last = tables[-1]["short"]

    def cell(name: str, short: str, base: str) -> str:
        row = found[short][name]
        ratio = row.get("against", {}).get(base)
        return row.get("skipped", "-") if ratio is None else f"{ratio[0]:.2f}"

    def share(name: str, short: str) -> str:
        value = found[short][name].get("memory_share")
        return "-" if value is None else f"{value:.3f}"

    speed = [
        ["", *(f"x dense, {s}" for s in found), "paper, 1K/2K/3K/4K",
         f"x blockwise, {last}", f"ms, {last}"]
    ]  # fmt: skip
    memory = [["", *(f"of dense, {s}" for s in found), "paper, 4K", f"peak, {last}"]]
    for name in names:
        row, known = found[last][name], paper.get(name)
        speed.append(
            [
                name,
                *(cell(name, s, "dot_product") for s in found),
                "/".join(f"{x:g}" for x in known[:4]) if known else "-",
                cell(name, last, "blockwise"),
                _number(row.get("milliseconds")),
            ]
        )
        memory.append(
            [
                name,
                *(share(name, s) for s in found),
                f"{known[4] / group['paper_dense_gb']:.2f}" if known else "-",
                size_text(row["peak_bytes"]),
            ]
        )
    return [
        "### Steps a second, relative to dense attention",
        "",
        *_table(speed),
        "",
        "### Peak memory, as a share of dense attention's",
        "",
        *_table(memory),
    ]


def _accelerator(group: Mapping[str, Any]) -> list[str]:
    """Costs of every step, the least time of each chip, and the clock."""
    chips, rows = list(group["peaks"]), group["accelerator"]
    timed = any("milliseconds" in row for row in rows)
    table = [
        ["", "rows", "GFLOP", "moved", "memory", "dtype", "export, MB",
         *(f"{chip}: {what}" for chip in chips for what in ("ms", "rows/s", "binds")),
         *(["ms by the clock"] if timed else [])]
    ]  # fmt: skip
    for row in rows:
        sizes = [one["export_bytes"] for one in row["exported"].values()]
        cells = [
            row["name"],
            f"{row['rows']:,} {row['unit']}",
            ("" if row["flops_exact"] else ">= ") + _number(row["gflop"]),
            size_text(row["moved_bytes"]),
            size_text(row["peak_bytes"]),
            row["dtype"],
            _number(max(sizes) / 1e6),
        ]
        for chip in chips:
            found = row["roofline"][chip]
            least, rate = found["milliseconds"], found["rows_per_second"]
            cells += [_number(least), _number(rate), found["binds"]]
        table.append(cells + ([_number(row.get("milliseconds"))] if timed else []))
    most = max(
        one["steps_per_second"] for row in rows for one in row["roofline"].values()
    )
    clean = [
        row["name"]
        for row in rows
        if not any(x["callbacks"] or x["float64"] for x in row["exported"].values())
    ]
    return [
        *_table(table),
        "",
        f"{len(clean)} of {len(rows)} steps are exported for GPUs and TPUs without a "
        f"call to the host and without float64. The shortest would want {most:,.0f} "
        "steps a second; experiments dispatch 16 at a time there.",
    ]


def _minutes(group: Mapping[str, Any]) -> list[str]:
    """Seconds of the parts of every experiment's run, and of a rerun; memory."""
    parts = ["import", "data", "checks", "XLA", "training and scoring", "report"]
    parts.append("whole")
    table = [["", "preset", *parts, "memory", "rerun", "its memory"]]
    for row in group["minutes"]:
        took, again = dict(row["first"]), row["again"]
        took["training and scoring"] = took["cells"] - took["XLA"]
        known = ("import", "data", "cells", "report")
        took["checks"] = took["whole"] - sum(took[part] for part in known)
        shown = [f"{took[part]:.1f}" for part in parts]
        shown += [size_text(took["peak_bytes"]), f"{again['whole']:.1f}"]
        table.append(
            [row["name"], row["preset"], *shown, size_text(again["peak_bytes"])]
        )
    return _table(table)


def _about(record: Mapping[str, Any]) -> str:
    """How it was measured, in a line."""
    machine, versions = record["machine"], record["versions"]
    parts = [
        f"`{record['command']}`",
        record["date"],
        f"commit {record['commit'] or 'unknown'}",
        f"{machine['cores']} x {machine['processor']}"
        + f" ({', '.join(machine['vectors'])})" * bool(machine.get("vectors")),
        *(f"{level} {size}" for level, size in machine.get("caches", {}).items()),
        f"device {machine['device']}" + f" x {machine['devices']}",
        ", ".join(
            f"{name} {version}" if version else f"no {name}"
            for name, version in versions.items()
        ),
        *(f"{name}={v}" for name, v in record["environment"].items() if v),
        f"{record['seconds']:.0f} s",
    ]
    return "; ".join(parts) + "."


def group_text(record: Mapping[str, Any]) -> str:
    """One group: tables, and how it was measured."""
    lines = [f"## {record['title']}", "", record["about"]]
    if record.get("smoke"):
        lines += [
            "",
            "**A test of the benchmark, with shapes too small to mean anything.**",
        ]
    if record.get("targets"):
        lines += ["", *targets_table(record["targets"])]
    for table in record.get("tables", []):
        lines += ["", f"### {table['title']}", "", *rows_table(table["rows"])]
        if table.get("note"):
            lines += ["", table["note"]]
    if "long_range" in record:
        lines += ["", *_long_range(record)]
    if "growth" in record:
        lines += ["", *_growth(record)]
    if "minutes" in record:
        lines += ["", *_minutes(record)]
    if "accelerator" in record:
        lines += ["", *_accelerator(record)]
    return "\n".join([*lines, "", _about(record), ""])


def load(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The stored groups by name, in the order of the page."""
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    names = [name for name in ORDER if name in files]
    names += [name for name in files if name not in ORDER]
    return {name: json.loads(files[name].read_text("utf-8")) for name in names}


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page: all targets first, then each group."""
    targets = [t for record in records.values() for t in record.get("targets", [])]
    lines = [_INTRODUCTION]
    if targets:
        lines += [
            "## Targets",
            "",
            "Reached is the lowest of all settings; `each` tells them apart.",
            "",
            *targets_table(targets),
            "",
        ]
    return "\n".join([*lines, *map(group_text, records.values())])


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the page of the results in a folder, and returns where."""
    path = folder / "README.md"
    path.write_text(page(load(folder)), encoding="utf-8")
    return path
