"""Attention functions against one of them: error, time, memory side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attn_jax.tools import bench as benchmarking
from attn_jax.tools.bench import Setting
from attn_jax.tools.cost import size_text
from attn_jax.tools.text import aligned
from attn_jax.variant import Variant, resolve

__all__ = ["compare", "table"]

Row = dict[str, Any]


def _distance(one: jax.Array, other: jax.Array) -> float:
    """‖other − one‖ / ‖one‖, in float32."""
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    return float(jnp.linalg.norm(other - one) / jnp.linalg.norm(one))


def compare(
    variants: Sequence[str | Callable[..., Any] | Variant],
    setting: Setting | None = None,
    *,
    rounds: int = 7,
    seconds: float = 0.2,
    memory_share: float = 0.5,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """What attention functions give, take and need, beside the first of them.

    Inputs are drawn from a normal distribution, parameters are as `init` makes them: a
    distance from the first says how near a function that approximates it is, and of
    functions that are to differ, that they do.

    Args:
      variants: two or more names, `path/file.py:function`, functions or records.
      setting: shapes, dtype, direction; None takes the defaults.
      rounds, seconds, memory_share, say: as of `attn_jax.tools.bench.bench`.

    Returns:
      A row for each direction, length and function: name, direction, length,
      temp_bytes, distance (of the outputs from those of the first; None where one did
      not run), and if it ran milliseconds and ratio (above 1: faster than the first),
      else `skipped`.

    Raises:
      ValueError: for fewer than two, two of one name, or as `bench`.

    >>> rows = compare(["dot_product", "blockwise"],
    ...                Setting((8,), 2, 4, directions=("forward",)),
    ...                rounds=1, seconds=0.0)
    >>> [row["name"] for row in rows], rows[1]["distance"] < 1e-5
    (['dot_product', 'blockwise'], True)
    """
    setting = setting or Setting()
    records = {record.name: record for record in map(resolve, variants)}
    if len(records) < 2 or len(records) < len(variants):
        raise ValueError(
            f"two different functions or more are compared, got {', '.join(records)}."
        )
    measured = benchmarking.bench(
        list(records.values()),
        setting,
        rounds=rounds,
        seconds=seconds,
        memory_share=memory_share,
        against=next(iter(records)),
        say=say,
    )
    first, *_ = records
    functions = {name: jax.jit(setting.of_variant(r)) for name, r in records.items()}
    distances: dict[tuple[str, int], float | None] = {}
    rows = []
    for row in measured:
        if row["name"] not in records:
            continue
        name, length = row["name"], row["length"]
        group = [
            other
            for other in measured
            if other["length"] == length and other["direction"] == row["direction"]
        ]
        base = next(other for other in group if other["name"] == first)
        ran = "milliseconds" in row and "milliseconds" in base
        if (name, length) not in distances:
            found = None
            if ran:
                inputs = setting.inputs(length)
                found = _distance(functions[first](*inputs), functions[name](*inputs))
            distances[name, length] = found
        kept: Row = {
            k: row[k]
            for k in (
                *("name", "direction", "length", "temp_bytes"),
                *("milliseconds", "ratio", "skipped"),
            )
            if k in row
        }
        rows.append(kept | {"distance": distances[name, length]})
    order = {name: place for place, name in enumerate(records)}
    directions = list(setting.directions)
    return sorted(
        rows,
        key=lambda row: (
            directions.index(row["direction"]),
            row["length"],
            order[row["name"]],
        ),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows of `compare` as text, the first function's above the others'."""
    first = rows[0]["name"]
    cells = [("direction", "T", "variant", "distance", "ms", "times", "memory")]
    for row in rows:
        distance, ran = row["distance"], "milliseconds" in row
        cells.append(
            (
                row["direction"],
                f"{row['length']:,}",
                row["name"],
                "-" if distance is None else f"{distance:.1e}",
                f"{row['milliseconds']:,.2f}" if ran else "-",
                f"{row['ratio']:.2f}" if row.get("ratio") else "-",
                size_text(row["temp_bytes"]),
            )
        )
    return "\n".join(
        [
            *aligned(cells),
            "",
            *(
                f"{row['name']}, T = {row['length']:,}, {row['direction']}: "
                f"{row['skipped']}."
                for row in rows
                if "skipped" in row
            ),
            f"distance: of the outputs from those of {first}, relative; times: how "
            f"often as fast as {first}; memory: temporary, of the compiled program.",
        ]
    )
