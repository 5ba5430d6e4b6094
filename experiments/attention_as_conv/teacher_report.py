"""What is told of heads that imitate a convolution."""

from __future__ import annotations

from experiments.attention_as_conv.grid import CHANCE
from experiments.core import report as tell
from experiments.core.report import Group, Row, Section
from experiments.core.stats import Summary, summarize


def _rows(group: Group) -> list[Row]:
    return [row for row in group.rows if "kernel" in row.config]


def _floor(group: Group, row: Row, name: str) -> Summary | None:
    """The error of what needs no training, over the seeds of a row."""
    config = row.config
    found = [
        record["metrics"]["test_loss"]
        for record in group.records
        if record["config"]["task"] == config["task"]
        and record["metrics"].get("baseline") == name
        and record["metrics"]["heads"] == config["num_heads"]
    ]
    return summarize(found) if found else None


TEACHER = Section(
    title="## Taught by a convolution: do heads find its places?",
    rows=_rows,
    order=lambda row: (
        row.config["kernel"],
        row.config["num_heads"],
        row.config["weight_decay"],
    ),
    columns=lambda group: [
        ("kernel", lambda row: "{kernel} × {kernel}".format(**row.config)),
        tell.setting("heads", "num_heads"),
        tell.setting("decay of value maps", "weight_decay", "g"),
        tell.score("test error", "test_loss"),
        (
            "error with heads where they start",
            lambda row: tell.mean(_floor(group, row, "frozen"), 3),
        ),
        tell.score("places found", "offsets", 2),
        tell.score("heads on one token", "one_token", 2),
        tell.score(f"distance (chance {CHANCE:.2f})", "distance", 2),
        tell.RATE,
        ("seeds", lambda row: str(len(row.records))),
        tell.DIVERGED,
    ],
)
