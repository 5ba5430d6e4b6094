"""How the cost of each variant grows with T.

Every row of `attn_jax.VARIANTS`, and `jax.nn` beside them, for one head of one example:
time by the clock, FLOPs from the jaxpr, temporary memory from the compiled program. A
program that would need too much memory or time is compiled, but not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_jax import VARIANTS, Variant
from attn_jax.tools import bench as benchmarking
from attn_jax.tools.bench import Direction, alternate
from benchmarks.timing import MEMORY_SHARE, Effort, Record, too_large

LENGTHS = tuple(2**power for power in range(8, 15))  # 256 ... 16,384
HEAD_DIM = 64
LARGEST = 4  # lengths that exponents are fitted over
MOST_SECONDS = 2.0
FIGURE = "growth.png"


def measure(
    variant: Variant | None,
    lengths: Sequence[int],
    direction: Direction,
    effort: Effort,
) -> list[dict[str, Any]]:
    """Costs of a variant (None: of `jax.nn`) at some lengths, the shortest first.

    Returns:
      A row for each length: name, direction, length, batch, flops, flops_exact,
      temp_bytes, milliseconds; without the last if it was not run, and `skipped` says
      why.
    """
    rows: list[dict[str, Any]] = []
    slowest: tuple[float, int] | None = None  # seconds and FLOPs of the last that ran
    for length in lengths:
        setting = benchmarking.Setting(
            (length,), heads=1, head_dim=HEAD_DIM, batch=1, directions=(direction,)
        )
        attend = setting.of_jax_nn if variant is None else setting.of_variant(variant)
        inputs = setting.inputs(length)
        made = benchmarking.attention(attend, *inputs, backward=direction != "forward")
        row: dict[str, Any] = dict(
            name=benchmarking.BASE if variant is None else variant.name,
            direction=direction,
            length=length,
            batch=1,
            flops=made.flops.total,
            flops_exact=made.flops.exact,
            temp_bytes=made.temp_bytes,
        )
        rows.append(row)
        large = too_large(made.temp_bytes)
        if large:
            row["skipped"] = large
            continue
        expected = slowest and slowest[0] * made.flops.total / slowest[1]
        if expected and expected > MOST_SECONDS:
            row["skipped"] = f"would take some {expected:.0f} s"
            continue
        figures = alternate(
            {"it": made.call},
            rounds=1 if expected and expected > 0.3 else effort.rounds,
            seconds=effort.seconds,
        )
        seconds = sorted(figures["it"])[len(figures["it"]) // 2]
        slowest = seconds, max(made.flops.total, 1)
        row["milliseconds"] = 1e3 * seconds
    return rows


def group(effort: Effort) -> Record:
    """All variants, forward and forward + backward; effort is shared out over many."""
    lengths = (16, 32) if effort.smoke else LENGTHS
    few = effort.at_most(3, 0.05)
    variants: list[Variant | None] = [None, *VARIANTS.values()]
    if effort.smoke:
        variants = variants[:2]
    directions: tuple[Direction, ...] = ("forward", "forward + backward")
    rows: list[dict[str, Any]] = []
    for variant in variants:
        name = benchmarking.BASE if variant is None else variant.name
        for direction in directions:
            effort.say(f"growth, {name}, {direction} ...")
            rows += measure(variant, lengths, direction, few)
    growth = []
    for found in benchmarking.exponents(rows, LARGEST):
        claimed = VARIANTS.get(found["name"])
        timed = [
            row["length"]
            for row in rows
            if (row["name"], row["direction"]) == (found["name"], found["direction"])
            and "milliseconds" in row
        ]
        growth.append(
            found
            | dict(
                claimed_time=claimed.time if claimed else None,
                claimed_memory=claimed.memory if claimed else None,
                longest=max(timed, default=None),
            )
        )
    record: Record = dict(
        title="Cost growth",
        about=f"One head of {HEAD_DIM} of one example, float32. FLOPs as "
        "`attn_jax.tools.cost.count_flops` counts them, temporary memory as XLA plans "
        "it. "
        f"Exponents of T are fitted over the {LARGEST} largest lengths that were timed "
        "(FLOPs and memory: that were compiled). What would need more than "
        f"{MEMORY_SHARE:g} of the free memory, or more than {MOST_SECONDS:g} s by the "
        "FLOPs of the length before, was compiled and not run.",
        tables=[],
        targets=[],
        growth=growth,
        growth_rows=rows,
    )
    if effort.folder is not None:
        effort.folder.mkdir(parents=True, exist_ok=True)
        title = f"one head of {HEAD_DIM} of one example, float32"
        try:
            benchmarking.figure(rows, effort.folder / FIGURE, title)
            record["figure"] = FIGURE
        except ValueError as error:  # no matplotlib
            effort.say(f"no figure: {error}")
    return record
