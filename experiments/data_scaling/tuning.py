"""Which hyper-parameters were tried and chosen, and what speaks against the choice."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.core.report import assignments, decimal, plain, span, table
from experiments.core.store import Record
from experiments.data_scaling.lines import Line, Section, updates_of


def hyper_parameters(section: Section) -> list[str]:
    """The table of what was chosen, and its caveats."""
    places = [(line, n) for line in section.networks for n in line.means]
    grids = {(line.label, n): _tuned(line, n) for line, n in places}
    names = list(dict.fromkeys(name for grid in grids.values() for name in grid))
    for name in ("weight_decay", "learning_rate"):
        if name not in names and any(name in config for config in section.configs):
            names.insert(0, name)
    if not names:
        return []
    rows, flags = [], []
    for line, n in places:
        grid, config = grids[line.label, n], line.points[n].config
        cells = [r for r in line.tune if r["config"].get("n") == n]
        chosen = {name: config.get(name) for name in grid}
        best, value = _validation(cells, grid, chosen)
        edges = _edges(grid, chosen)
        row = [line.label, f"{n:,}"]
        row += [plain(config.get(k)) + " ⚑" * (k in edges) for k in names]
        row.append(decimal(value, 3))
        for read in (_validation_images, updates_of):
            row.append(span(x for cell in cells for x in read(cell)))
        rows.append([*row, "not tuned" if untuned(line) else str(len(cells))])
        if best is not None and best != chosen:
            flags.append(
                f"- {line.label} at N = {n:,}: validation prefers "
                f"{assignments(best)}, but the final cells used "
                f"{assignments(chosen)}."
            )
    header = ["model", "N", *(f"`{n}`" for n in names)]
    header += ["val. accuracy", "val. images", "tuning updates", "cells tried"]
    text = ["### Hyper-parameters chosen", table(header, rows, aligned=True)]
    if "⚑" in text[-1]:
        text.append(
            "⚑ at the edge of the grid: a better value may lie beyond it, so this "
            "model may be undertuned at that N. (Of two values, each is at the edge.)"
        )
    if any(row[-1] == "0" for row in rows):
        text.append("0 cells tried: the values were carried over or given.")
    tuning = [u for x in section.networks for r in x.tune for u in updates_of(r)]
    finals = [u for found in section.updates.values() for u in found]
    if tuning and finals and min(tuning) < max(finals):
        text.append(
            f"Tuning cells made {span(tuning)} updates, final cells {span(finals)}: "
            "choices after few updates favour high learning rates."
        )
    return [*text, "\n".join(flags)] if flags else text


def untuned(line: Line) -> bool:
    """Whether a line has one setting for all N, and no tuning cell."""
    configs = (line.points[n].config for n in line.means)
    hidden = ("seed", "n", "updates")
    settings = {
        repr({k: v for k, v in sorted(c.items()) if k not in hidden}) for c in configs
    }
    return not line.tune and len(settings) == 1


def _validation_images(record: Record) -> list[int]:
    """How many images the validation split of a tuning cell is cut to."""
    config = record["config"]
    share, most = config.get("validation_fraction"), config.get("validation_maximum")
    if share is None or config.get("n") is None:
        return []
    wanted = max(1, round(share * config["n"]))
    return [wanted if most is None else min(wanted, most)]


def _tuned(line: Line, n: int) -> dict[str, list[Any]]:
    """What the tuning cells at N varied: name -> values, sorted."""
    cells = [r["config"] for r in line.tune if r["config"].get("n") == n]
    found = {}
    for name in sorted(
        {k for c in cells for k in c} - {"seed", "phase", "n", "updates"}
    ):
        values: list[Any] = []
        for config in cells:
            if name in config and config[name] not in values:
                values.append(config[name])
        if len(values) > 1:
            found[name] = sorted(values, key=lambda v: (str(type(v)), v))
    return found


def _validation(
    cells: Sequence[Record], grid: Mapping[str, Any], chosen: dict[str, Any]
) -> tuple[dict[str, Any] | None, float | None]:
    """The settings with the best mean, and the mean of the chosen ones."""
    settings, scores = {}, collections.defaultdict(list)
    for record in cells:
        value = record["metrics"].get("val_accuracy")
        if record["status"] == "done" and value is not None:
            setting = {name: record["config"].get(name) for name in grid}
            settings[repr(setting)] = setting
            scores[repr(setting)].append(value)
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    if not means:
        return None, None
    mine = means.get(repr(chosen))
    if mine is not None and mine >= max(means.values()) - 1e-12:  # a tie is no quarrel
        return chosen, mine
    return settings[max(means, key=lambda name: means[name])], mine


def _edges(grid: Mapping[str, list[Any]], chosen: Mapping[str, Any]) -> list[str]:
    """Names of the numbers that were chosen at an end of their grid."""
    return [
        name
        for name, values in grid.items()
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        and chosen[name] in (values[0], values[-1])
        # Nothing lies beyond "off": zero at the lower end is no edge.
        and not (chosen[name] == 0 and values[0] == 0)
    ]
