"""Rows of the benchmark's tables: alternating times, ratios to each peer, memory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attn_jax.tools.bench import (
    Call,
    Program,
    alternate,
    available_memory,
    size_text,
    summarize,
)

Record = dict[str, Any]
"""Of a group: title, about, tables, targets; see `report` for what else it may hold."""

MEMORY_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
      rounds: figures of each alternative; see `alternate`.
      seconds: least time of one figure.
      smoke: shapes as small as can be: a test of the benchmark, no measurement.
      say: told what is going on, a line at a time.
      size, batches: of the models of the training steps.
      folder: where figures go; None draws none.
      compile: whether PyTorch's training steps run by `torch.compile` as well.
    """

    rounds: int = 7
    seconds: float = 0.2
    smoke: bool = False
    say: Callable[[str], None] = print
    size: str = "mu"
    batches: tuple[int, ...] = (64,)
    folder: pathlib.Path | None = None
    compile: bool = True

    def at_most(self, rounds: int, seconds: float = 0.2) -> Effort:
        """Less of it, for what takes long."""
        return dataclasses.replace(
            self, rounds=min(self.rounds, rounds), seconds=min(self.seconds, seconds)
        )


def ratio_of(row: Mapping[str, Any]) -> list[float]:
    """Median, lowest and highest ratio of a row of `summarize`."""
    return [row[key] for key in ("ratio", "ratio_low", "ratio_high")]


def target(
    work: str, at_least: float, aim: float, reached: float | None, told: str
) -> dict[str, Any]:
    """What was to be reached, and what was; `told` tells the settings apart."""
    return dict(work=work, at_least=at_least, aim=aim, reached=reached, told=told)


def too_large(needed: int | None) -> str | None:
    """Says so of a program that plans for more than half of the free memory."""
    free = available_memory()
    if needed and free and needed > MEMORY_SHARE * free:
        return f"needs {size_text(needed)}"
    return None


def compare(
    calls: Mapping[str, Call | Program],
    bases: Sequence[str],
    effort: Effort,
    *,
    gflop: float | None = None,
    peak_bytes: Mapping[str, int | None] | None = None,
) -> list[dict[str, Any]]:
    """Times alternatives, alternating.

    Args:
      calls: name -> call, or compiled program, whose memory is then told.
      bases: names that the ratios are against; those not in `calls` are left out.
      effort: how long.
      gflop: useful work of one call, for a column of GF/s that all alternatives share.
      peak_bytes: peak memory of those that are no programs.

    Returns:
      Rows: name, milliseconds, against (base -> [ratio, lowest, highest] over the
      rounds; above 1 is faster than the base), gflops_per_second, temp_bytes,
      peak_bytes.
    """
    plain = {n: c.call if isinstance(c, Program) else c for n, c in calls.items()}
    figures = alternate(plain, rounds=effort.rounds, seconds=effort.seconds)
    rows: dict[str, dict[str, Any]] = {name: dict(name=name) for name in calls}
    for base in [base for base in bases if base in calls]:
        for found in summarize(figures, base):
            row = rows[found["name"]]
            row["milliseconds"] = found["milliseconds"]
            row.setdefault("against", {})[base] = ratio_of(found)
    for name, row in rows.items():
        made = calls[name]
        if gflop is not None:
            row["gflops_per_second"] = 1e3 * gflop / row["milliseconds"]
        if isinstance(made, Program):
            row |= dict(temp_bytes=made.temp_bytes, peak_bytes=made.peak_bytes)
        elif peak_bytes and name in peak_bytes:
            row["peak_bytes"] = peak_bytes[name]
    return list(rows.values())


def worst(
    tables: Sequence[Mapping[str, Any]], name: str, base: str
) -> tuple[float | None, str]:
    """The lowest median ratio of an alternative to a base over some tables.

    Args:
      tables: with `short` (what tells one from the other) and `rows`.
      name: of the alternative.
      base: that it is measured against.

    Returns:
      The ratio, None if it was never measured; and each table's ratio, as text.
    """
    ratios = {
        table["short"]: row["against"][base][0]
        for table in tables
        for row in table["rows"]
        if row["name"] == name and base in row.get("against", {})
    }
    told = ", ".join(f"{short}: {ratio:.2f}" for short, ratio in ratios.items())
    return min(ratios.values(), default=None), told
