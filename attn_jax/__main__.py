"""Command line of attn_jax: `python -m attn_jax COMMAND`; `attn-jax ...` is the same.

Commands: new, list, show, models, bench, compare, check, theorems.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attn_jax import VARIANTS, Variant, __version__, resolve
from attn_jax._program import program
from attn_jax.tools import text

__all__ = ["main"]


def _list(arguments: argparse.Namespace) -> str:
    if arguments.survey:
        if arguments.variants or arguments.json:
            raise ValueError("--survey is a table of its own: give nothing beside it.")
        from attn_jax.tools.survey import survey_table

        return survey_table()
    names = arguments.variants or list(VARIANTS)
    variants = [resolve(name) for name in names]
    if arguments.json:
        told = {
            "attn_jax": __version__,
            "variants": [text.describe(v) for v in variants],
        }
        return json.dumps(told, indent=2, ensure_ascii=False)
    return text.table(variants)


def _show(arguments: argparse.Namespace) -> str:
    variants = [resolve(name) for name in arguments.variants]
    if arguments.sentence is None and arguments.arrays is None:
        for name in ("png", "causal"):
            if getattr(arguments, name):
                raise ValueError(
                    f"--{name} is of weights: give --sentence or --arrays."
                )
        return "\n\n".join(map(text.show, variants))
    return _weights(variants, arguments)


def _weights(variants: Sequence[Variant], arguments: argparse.Namespace) -> str:
    """Heat maps of what variants give each query of each value."""
    from attn_jax.tools import weights

    if arguments.png and len(variants) > 1:
        raise ValueError(f"--png takes one variant, got {len(variants)}.")
    words = None if arguments.sentence is None else arguments.sentence.split()
    if words is not None:
        query = key = value = weights.vectors_of(words)
    else:
        query, key, value = weights.arrays_of(arguments.arrays)
    shown = []
    for variant in variants:
        found = weights.weights(variant, query, key, value, is_causal=arguments.causal)
        shown.append(f"{variant.name}\n{weights.heat_map(found, words, words)}")
        if arguments.png:
            weights.save_png(found, arguments.png, words, words, variant.name)
            shown.append(f"-> {arguments.png}")
    return "\n\n".join(shown)


def _models(arguments: argparse.Namespace) -> str:
    from attn_jax.tools.cost import sizes_table

    rows = sizes_table()
    if arguments.json:
        return json.dumps({"attn_jax": __version__, "models": rows}, indent=2)
    cells = [("model", "size", "image", "params", "MFLOP")]
    for row in rows:
        image = "x".join(map(str, row["image_shape"]))
        counts = f"{row['params']:,}", f"{row['flops'] / 1e6:,.1f}"
        cells.append((row["model"], row["size"], image, *counts))
    lines = text.aligned(cells)
    lines += ["", "MFLOP: of the forward pass of one image, 10 classes."]
    return "\n".join(lines)


def _new(arguments: argparse.Namespace) -> str:
    from attn_jax.tools.new import create

    return create(arguments.spec)


def _setting(arguments: argparse.Namespace) -> Any:
    """What `bench` and `compare` measure."""
    from attn_jax.tools.bench import Direction, Setting

    directions: tuple[Direction, ...] = ("forward", "forward + backward")
    if arguments.forward != arguments.backward:
        directions = directions[:1] if arguments.forward else directions[1:]
    return Setting(
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


def _compare(arguments: argparse.Namespace) -> str:
    from attn_jax.tools import compare as comparing

    rows = comparing.compare(
        arguments.variants,
        _setting(arguments),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        memory_share=arguments.memory_share,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json:
        told = {"attn_jax": __version__, "rows": rows}
        return json.dumps(told, indent=2, ensure_ascii=False)
    return comparing.table(rows)


def _bench(arguments: argparse.Namespace) -> str:
    from attn_jax.tools import bench as benchmarking

    setting = _setting(arguments)
    if arguments.figure and not arguments.figure.parent.is_dir():
        raise ValueError(f"--figure: no such folder: {arguments.figure.parent}.")
    rows = benchmarking.bench(
        arguments.variant or ["blockwise"],
        setting,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        memory_share=arguments.memory_share,
        say=lambda line: print(line, file=sys.stderr, flush=True),
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
        said = json.dumps(told, indent=2, ensure_ascii=False)
        if arguments.json == "-":
            return said
        try:
            pathlib.Path(arguments.json).write_text(said + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--json: cannot write {arguments.json}: {error}"
            ) from None
    return benchmarking.table(rows, setting)


def _check(arguments: argparse.Namespace) -> tuple[str, int]:
    from attn_jax import testing

    if bool(arguments.variants) == arguments.all:
        raise ValueError("name a variant or path/file.py:function, or give --all.")
    if arguments.all and (arguments.claims is not None or arguments.init):
        raise ValueError("--claims and --init are of one function: name it.")
    if arguments.init and len(arguments.variants) > 1:
        raise ValueError("--init is of one function: name one.")
    only = arguments.only.split(",") if arguments.only else None
    one = functools.partial(
        testing.check,
        claims=arguments.claims,
        init=arguments.init,
        options=dict(arguments.option),
        only=only,
    )
    names = arguments.variants or list(VARIANTS)
    reports = []
    with contextlib.ExitStack() as stack:
        every: Callable[..., Iterable[testing.Report]] = map
        if arguments.jobs > 1 and len(names) > 1:
            fresh = multiprocessing.get_context("spawn")  # JAX does not fork
            pool = concurrent.futures.ProcessPoolExecutor(
                arguments.jobs, mp_context=fresh
            )
            every = stack.enter_context(pool).map
        for report in every(one, names):
            reports.append(report)
            passed = sum(row.verdict == "pass" for row in report.rows)
            said = f"FAILED: {', '.join(report.failed)}" if report.failed else "ok"
            print(
                f"{report.name}: {passed} passed, {said} ({report.seconds:.1f} s)",
                file=sys.stderr,
                flush=True,
            )
    status = 0 if all(report.ok for report in reports) else 1
    if arguments.json:
        told: dict[str, Any] = {"attn_jax": __version__, "ok": status == 0}
        told["variants"] = [report.as_dict() for report in reports]
        return json.dumps(told, indent=2, ensure_ascii=False), status
    if not arguments.all:
        return "\n\n".join(map(testing.table, reports)), status
    lines = [testing.table(report) + "\n" for report in reports if not report.ok]
    wrong = sum(not report.ok for report in reports)
    lines.append(f"{len(reports)} variants, {wrong} with a claim that does not hold")
    return "\n".join(lines), status


def _theorems(arguments: argparse.Namespace) -> tuple[str, int]:
    from attn_jax.tools import theorems

    results = theorems.run(arguments.names or None)
    status = 0 if all(result.holds for result in results) else 1
    if arguments.json:
        told: dict[str, Any] = {"attn_jax": __version__, "ok": status == 0}
        told["theorems"] = [result.as_dict() for result in results]
        return json.dumps(told, indent=2, ensure_ascii=False), status
    return theorems.table(results), status


def _lengths(given: str) -> tuple[int, ...]:
    """`256,1024` as numbers."""
    try:
        return tuple(int(part) for part in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be whole numbers with commas between, as 256,1024, but is {given!r}"
        ) from None


def _option(told: str) -> tuple[str, Any]:
    """`left=64` as a name and a value: a Python literal, or else a string."""
    name, equals, given = told.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, but is {told!r}")
    try:
        return name, ast.literal_eval(given)
    except (ValueError, SyntaxError):
        return name, given


def _add_setting(parser: argparse.ArgumentParser) -> None:
    """What is measured, of `bench` and `compare` alike."""
    add = parser.add_argument
    add("--lengths", type=_lengths, default=(256, 1024, 4096), metavar="T,T,...")
    add("--heads", type=int, default=8, metavar="N")
    add("--head-dim", type=int, default=64, metavar="H")
    size = parser.add_mutually_exclusive_group()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attn-jax", description="Attention variants as pure JAX functions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    making = commands.add_parser(
        "new",
        help="write a variant of your own to begin with, which passes `check`",
        description="Write a file with a function that keeps the contract and honours "
        "all there is, to be changed, and say what to do with it.",
    )
    making.add_argument("spec", metavar="FILE.py:NAME", help="a file that is not there")
    making.set_defaults(run=_new)
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
    listing.add_argument(
        "--survey",
        action="store_true",
        help="the table of the survey of efficient Transformers, beside ours",
    )
    listing.set_defaults(run=_list)
    showing = commands.add_parser(
        "show",
        help="show a variant in full: options, parameters, equation, paper",
        description="Show all there is to tell of variants, with their docstrings; or "
        "what each query gives each value, as a heat map.",
    )
    showing.add_argument("variants", nargs="+", metavar="VARIANT", help="as for `list`")
    inputs = showing.add_mutually_exclusive_group()
    inputs.add_argument(
        "--sentence",
        metavar="WORDS",
        help="weights on a sentence: a random vector a word, sinusoids of the places",
    )
    inputs.add_argument(
        "--arrays",
        metavar="FILE",
        type=pathlib.Path,
        help="weights on query [T, H], key [S, H], value [S, V] of an .npz file",
    )
    showing.add_argument(
        "--causal", action="store_true", help="see nothing after oneself"
    )
    showing.add_argument(
        "--png", metavar="FILE", type=pathlib.Path, help="a picture too"
    )
    showing.set_defaults(run=_show)
    sizes = commands.add_parser(
        "models",
        help="show the models' named sizes with parameters and FLOPs",
        description="Trace every named size for one image, and show its parameters "
        "and the FLOPs of its forward pass. Takes some seconds; trains nothing.",
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
    _add_setting(timing)
    add("--json", metavar="FILE", help="store the figures; - prints them instead")
    add("--figure", type=pathlib.Path, metavar="FILE", help="draw them (matplotlib)")
    timing.set_defaults(run=_bench)
    comparing = commands.add_parser(
        "compare",
        help="error, time and memory of variants beside the first of them",
        description="Set attention functions beside the first: how far their outputs "
        "are from its, how fast they are, what memory they take.",
    )
    comparing.add_argument(
        "variants",
        nargs="+",
        metavar="VARIANT",
        help="two or more names or path/file.py:function",
    )
    _add_setting(comparing)
    comparing.add_argument("--json", action="store_true", help="print JSON")
    comparing.set_defaults(run=_compare)
    checking = commands.add_parser(
        "check",
        help="try what an attention function claims, with evidence",
        description="Try the claims of any function that keeps the contract: shapes, "
        "gradients, masks, padding, causality, stability, cost, ... Exit status 0 only "
        "if all hold. Without --claims they are those of its record, or, for a plain "
        "function, read from its signature.",
        epilog="Claims: bias, mask, key_mask, causal, cross (T and S may differ), "
        "value_dim (V and H may differ), dropout, exact, equivariant, approximates "
        "(comes near to dot_product), time=O(...), memory=O(...). What is not named "
        "must be refused.",
    )
    add = checking.add_argument
    add(
        "variants",
        nargs="*",
        metavar="VARIANT",
        help="a name or path/file.py:function; several are checked one by one",
    )
    add("--all", action="store_true", help="all built-in variants")
    add("--claims", metavar="CLAIM,CLAIM,...", help="such as mask,causal,time=O(T)")
    add("--init", metavar="FILE:INIT", help="makes the parameters: init(rng, head_dim)")
    add(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the function or its init, such as block_size=8; may be repeated",
    )
    add("--only", metavar="CHECK,...", help="run these checks alone")
    add("--jobs", type=int, default=1, metavar="N", help="processes for several")
    add("--json", action="store_true", help="print JSON, with all figures")
    checking.set_defaults(run=_check)
    proving = commands.add_parser(
        "theorems",
        help="execute the theorems on attention, with errors and tolerances",
        description="Execute each statement on numbers: setting, largest error, "
        "tolerance. Exit status 0 only if all hold.",
    )
    proving.add_argument(
        "names", nargs="*", metavar="NAME", help="all if none is given"
    )
    proving.add_argument("--json", action="store_true", help="print JSON")
    proving.set_defaults(run=_theorems)
    return parser


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments without the program's name; None takes those of the process.

    Returns:
      Exit status: 0; 1 if a claim or theorem does not hold; 2 for a variant that
      cannot be resolved or cannot do what is asked. (argparse exits with 2 itself on an
      unknown command or option.)

    >>> main(["list", "no_such_variant"])
    2
    """
    arguments = _parser().parse_args(argv)
    status = 0
    try:
        said = arguments.run(arguments)
        if isinstance(said, tuple):
            said, status = said
    except (TypeError, ValueError) as error:
        print(f"attn-jax {arguments.command}: {error}", file=sys.stderr)
        return 2
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
