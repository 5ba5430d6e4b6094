"""Command line of attn_jax: `python -m attn_jax list | models | bench`.

`attn-jax ...` is the same.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import pathlib
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


def _bench(arguments: argparse.Namespace) -> str:
    from attn_jax import benchmarking

    directions: tuple[benchmarking.Direction, ...] = ("forward", "forward + backward")
    if arguments.forward != arguments.backward:
        directions = directions[:1] if arguments.forward else directions[1:]
    setting = benchmarking.Setting(
        lengths=arguments.lengths,
        heads=arguments.heads,
        head_dim=arguments.head_dim,
        tokens=arguments.tokens,
        batch=arguments.batch,
        dtype=arguments.dtype,
        causal=arguments.causal,
        directions=directions,
        options=dict(arguments.option),
    )
    if arguments.figure and not arguments.figure.parent.is_dir():
        raise ValueError(f"--figure: no such folder: {arguments.figure.parent}.")
    rows = benchmarking.bench(
        arguments.variant or ["blockwise"],
        setting,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        memory_share=arguments.memory_share,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if arguments.figure:
        benchmarking.figure(
            rows,
            arguments.figure,
            f"cost of one example: {setting.heads} heads of {setting.head_dim}, "
            f"{arguments.dtype}{', causal' if setting.causal else ''}",
        )
    if arguments.json is not None:
        import jax

        told = {
            "attn_jax": __version__,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "setting": {
                name: getattr(setting, name)
                for name in ("lengths", "heads", "head_dim", "dtype", "causal")
            },
            "rows": rows,
            "exponents": benchmarking.exponents(rows),
        }
        text = json.dumps(told, indent=2, ensure_ascii=False)
        if arguments.json == "-":
            return text
        try:
            pathlib.Path(arguments.json).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--json: cannot write {arguments.json}: {error}"
            ) from None
    return benchmarking.table(rows, setting)


def _lengths(text: str) -> tuple[int, ...]:
    """`256,1024` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between, as 256,1024, but is {text!r}"
        ) from None


def _option(text: str) -> tuple[str, Any]:
    """`left=64` as a name and a value: a Python literal, or else a string."""
    name, equals, given = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {text!r}")
    try:
        return name, ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return name, given


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
    timing = commands.add_parser(
        "bench",
        help="time variants beside dot_product and jax.nn, with FLOPs and memory",
        description="Time variants, alternating, beside dot_product and "
        "jax.nn.dot_product_attention; show FLOPs, memory and how they grow. A program "
        "that plans for more memory than is free is costed, but not run.",
    )
    add = timing.add_argument
    add(
        "--variant",
        action="append",
        metavar="VARIANT",
        help="a name or path/file.py:function; may be repeated; default: blockwise",
    )
    add("--lengths", type=_lengths, default=(256, 1024, 4096), metavar="T,T,...")
    add("--heads", type=int, default=8, metavar="N")
    add("--head-dim", type=int, default=64, metavar="H")
    size = timing.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=int, default=4096, help="batch times length")
    size.add_argument("--batch", type=int, help="the same at every length")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--causal", action="store_true", help="query t attends only to keys s <= t")
    add("--forward", action="store_true", help="the forward pass alone")
    add("--backward", action="store_true", help="forward and backward alone")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for those variants that take it, such as left=127; may be repeated",
    )
    add("--rounds", type=int, default=7, help="figures a program; the median counts")
    add("--seconds", type=float, default=0.2, help="least time of one figure")
    add(
        "--memory-share",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of the free memory, above which a program is not run (default: 0.5)",
    )
    add("--json", metavar="FILE", help="store the figures; - prints them instead")
    add("--figure", type=pathlib.Path, metavar="FILE", help="draw them (matplotlib)")
    timing.set_defaults(run=_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      Exit status: 0, or 2 for a variant that cannot be resolved or cannot do what is
      asked. (argparse exits with 2 itself on an unknown command or option.)

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
