"""Times alternatives against one another: alternating, medians, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]


def alternate(
    calls: Mapping[str, Call], *, rounds: int = 7, seconds: float = 0.2
) -> dict[str, list[float]]:
    """Seconds a call of each alternative, one figure a round.

    Every round times all alternatives in turn, so that a slow moment of the machine
    falls on all of them; each is repeated until ``seconds`` have passed.

    Args:
      calls: name -> function without arguments that returns when its work is done.
      rounds: how many figures to take; one round more, the first, is thrown away.
      seconds: least time of one figure.
    """
    repeats = {}
    for name, call in calls.items():
        call()  # compiles
        began = time.perf_counter()
        call()
        once = max(time.perf_counter() - began, 1e-6)
        repeats[name] = max(1, round(seconds / once))
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            figures[name].append((time.perf_counter() - began) / repeats[name])
    return {name: values[1:] for name, values in figures.items()}


def summarize(figures: Mapping[str, list[float]], base: str) -> list[dict[str, Any]]:
    """Median time, and the ratio to the base with its spread over the rounds.

    A ratio above 1 is faster than the base. It is taken round by round.

    >>> rows = summarize({"a": [2.0, 2.0], "b": [1.0, 1.0]}, base="a")
    >>> [(row["name"], row["ratio"]) for row in rows]
    [('a', 1.0), ('b', 2.0)]
    """
    rows = []
    for name, values in figures.items():
        ratios = [b / v for b, v in zip(figures[base], values, strict=True)]
        rows.append(
            dict(
                name=name,
                milliseconds=1e3 * statistics.median(values),
                ratio=statistics.median(ratios),
                ratio_low=min(ratios),
                ratio_high=max(ratios),
            )
        )
    return rows
