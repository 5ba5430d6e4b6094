"""Command line of attn_jax: `python -m attn_jax list | models`, or `attn-jax ...`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from attn_jax import CAPABILITIES, VARIANTS, Variant, __version__, resolve

__all__ = ["describe", "main"]


def describe(variant: Variant) -> dict[str, Any]:
    """What `list --json` says of a variant, as plain values.

    Args:
      variant: the record.

    Returns:
      A dictionary that `json.dumps` takes.

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


def _table(variants: Sequence[Variant]) -> str:
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines.append("")
    lines += [f"{v.name.ljust(widths[0])}  {v.summary}" for v in variants]
    return "\n".join(lines)


def _list(arguments: argparse.Namespace) -> str:
    names = arguments.variants or list(VARIANTS)
    variants = [resolve(name) for name in names]
    if arguments.json:
        told = {"attn_jax": __version__, "variants": [describe(v) for v in variants]}
        return json.dumps(told, indent=2, ensure_ascii=False)
    return _table(variants)


def _models(arguments: argparse.Namespace) -> str:
    from attn_jax.models import sizes_table

    rows = sizes_table()
    if arguments.json:
        return json.dumps({"attn_jax": __version__, "models": rows}, indent=2)
    lines = [f"{'model':<8}{'size':<10}{'image':<10}{'params':>13}{'MFLOP':>12}"]
    for row in rows:
        image = "x".join(map(str, row["image_shape"]))
        lines.append(
            f"{row['model']:<8}{row['size']:<10}{image:<10}{row['params']:>13,}"
            f"{row['flops'] / 1e6:>12,.1f}"
        )
    lines += ["", "MFLOP: of the compiled forward pass of one image, 10 classes."]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attn-jax", description="Attention variants as pure JAX functions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    listing = commands.add_parser(
        "list",
        help="show the variants with capabilities, cost and paper",
        description="Show variants with what they can honour, their cost in time and "
        "additional memory, and the paper. T queries, S keys, H head size.",
    )
    listing.add_argument(
        "variants",
        nargs="*",
        metavar="VARIANT",
        help="a name or path/file.py:function; all built-in ones if none is given",
    )
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=_list)
    sizes = commands.add_parser(
        "models",
        help="show the models' named sizes with parameters and FLOPs",
        description="Compile every named size for one image, and show its parameters "
        "and the FLOPs of its forward pass. Takes a minute or two; trains nothing.",
    )
    sizes.add_argument("--json", action="store_true", help="print JSON")
    sizes.set_defaults(run=_models)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      Exit status: 0, or 2 for a variant that cannot be resolved. (argparse exits with
      2 itself on an unknown command or option.)

    >>> main(["list", "no_such_variant"])
    2
    """
    arguments = _parser().parse_args(argv)
    try:
        text = arguments.run(arguments)
    except ValueError as error:
        print(f"attn-jax {arguments.command}: {error}", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that cannot show "·" gets a question mark, not a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `attn-jax list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
