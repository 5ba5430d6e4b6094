"""Which rows of a report are which, and what they are called."""

from __future__ import annotations

from typing import Any

from experiments.core import report as tell
from experiments.core.report import Group, Row

NAMES = {
    "transformer": "Transformer",
    "lstm_attention": "LSTM with attention",
    "lstm": "LSTM, one vector of the source",
}
# Rows of one model differ in these; the most frequent values are the base.
VARIED = (
    "num_heads key_dim dim depth mlp_dim dropout_rate label_smoothing positions norm "
    "schedule averaged"
).split()
_TITLES = {
    "num_heads": "heads",
    "key_dim": "key size",
    "dim": "width",
    "mlp_dim": "feed-forward",
    "dropout_rate": "dropout",
    "label_smoothing": "smoothing",
    "averaged": "averaged points",
}


def _is_transformer(row: Row) -> bool:
    return bool(row.config["model"] == "transformer")


def base_of(group: Group) -> dict[str, Any]:
    """What most rows have of what is varied, in the Transformer's."""
    rows = [row for row in group.rows if _is_transformer(row)] or group.rows
    found = {}
    for name in VARIED:
        values = [row.config[name] for row in rows]
        found[name] = max(dict.fromkeys(values), key=values.count)
    return found


def changes_of(row: Row, base: dict[str, Any]) -> str:
    """In what a row is not the base, in words; "" for the base."""
    return ", ".join(
        f"{_TITLES.get(name, name)} {tell.plain(row.config[name])}"
        for name in VARIED
        if row.config[name] != base[name] and row.config[name] is not None
    )


def name_of(row: Row) -> str:
    """The model in words; a file by its function."""
    model = row.config["model"]
    return NAMES.get(model, f"Transformer of {model.rpartition('/')[2]}")


def models(group: Group) -> list[Row]:
    """Rows of the base model of each kind and of all pairs, the Transformer first."""
    base = base_of(group)
    found = [
        row
        for row in group.rows
        if row.config["pairs"] is None
        and not (_is_transformer(row) and changes_of(row, base))
    ]
    order = {name: i for i, name in enumerate(NAMES)}
    return sorted(found, key=lambda row: order.get(row.config["model"], len(order)))


def varied(group: Group) -> list[Row]:
    """Rows of the Transformer and of all pairs, the base first."""
    base = base_of(group)
    rows = [r for r in group.rows if _is_transformer(r) and r.config["pairs"] is None]
    return sorted(rows, key=lambda row: changes_of(row, base) != "")


def by_pairs(group: Group) -> list[Row]:
    """Rows of the base Transformer by their number of pairs, where some have fewer."""
    base = base_of(group)
    rows = [
        row
        for row in group.rows
        if _is_transformer(row) and not changes_of(row, base) and row.records
    ]
    if all(row.config["pairs"] is None for row in rows):
        return []
    return sorted(rows, key=lambda row: row.first("n"))
