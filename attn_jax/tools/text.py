"""What commands print: aligned columns, and what there is to tell of a variant."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from attn_jax.variant import CAPABILITIES, Variant

__all__ = ["aligned", "describe", "show", "table"]


def aligned(rows: Sequence[Sequence[str]], others: str = ">") -> list[str]:
    """Lines of columns: the first to the left, the others as told.

    >>> aligned([("T", "ms"), ("1,024", "9")])
    ['T      ms', '1,024   9']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{others if i else '<'}{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def describe(variant: Variant) -> dict[str, Any]:
    """What `list --json` says of a variant, as plain values.

    Args:
      variant: the record.

    Returns:
      A dictionary that `json.dumps` takes.

    >>> from attn_jax import VARIANTS
    >>> describe(VARIANTS["blockwise"])["capabilities"]["dropout"]
    False
    """
    return {
        "name": variant.name,
        "summary": variant.summary,
        "capabilities": variant.capabilities(),
        "exact": variant.exact,
        "params": "params" in inspect.signature(variant.fn).parameters,
        "stochastic": variant.stochastic,
        "time": variant.time,
        "memory": variant.memory,
        "paper": variant.paper,
    }


def _paper(reference: str) -> str:
    """An arXiv number as such, anything else as it stands."""
    number = reference.replace(".", "", 1)
    return f"arXiv:{reference}" if number.isdigit() else reference or "-"


def table(variants: Sequence[Variant]) -> str:
    """Aligned columns, one variant a row, then one line on each."""
    flags = (*CAPABILITIES, "exact", "params", "stochastic")
    rows = [("variant", *flags, "time", "memory", "paper")]
    for variant in variants:
        told = describe(variant)
        has = {**told["capabilities"], **told}
        marks = ("yes" if has[flag] else "-" for flag in flags)
        rows.append(
            (variant.name, *marks, variant.time, variant.memory, _paper(variant.paper))
        )
    lines = [*aligned(rows, "<"), ""]
    width = max(len(row[0]) for row in rows)
    lines += [f"{v.name.ljust(width)}  {v.summary}" for v in variants]
    return "\n".join(lines)


def show(variant: Variant) -> str:
    """One variant in full: what `table` says of it, its options and its docstring.

    >>> from attn_jax import VARIANTS
    >>> show(VARIANTS["blockwise"]).splitlines()[-1].strip()
    '[[3.0]]'
    """
    given = inspect.signature(variant.fn).parameters.values()
    carried = ("query", "key", "value", "bias", "mask", "key_mask", "params", "rng")
    options = [str(p) for p in given if p.name not in (*carried, "dropout_rng")]
    made = ""
    if variant.init is not None:
        made = f"\nparams: {variant.init.__name__}{inspect.signature(variant.init)}"
    told = f"options: {', '.join(options) or 'none'}{made}"
    return f"{table([variant])}\n\n{told}\n\n{inspect.getdoc(variant.fn) or ''}"
