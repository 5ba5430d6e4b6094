"""Time, FLOPs and memory of attention functions, side by side: `attn_jax bench`.

`alternate` and `summarize` time any alternatives against one another; `bench` puts that
and what `attn_jax.tools.cost` says of each program together for attention variants.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from attn_jax.multihead import multi_head, multi_head_init
from attn_jax.tools.cost import (
    Program,
    available_memory,
    fit_exponent,
    program,
    size_text,
)
from attn_jax.tools.text import aligned
from attn_jax.variant import Variant, resolve

__all__ = [
    "BASE",
    "Call",
    "Direction",
    "Setting",
    "alternate",
    "attention",
    "bench",
    "exponents",
    "figure",
    "summarize",
    "table",
]

Call = Callable[[], Any]
Direction = Literal["forward", "forward + backward"]
Row = dict[str, Any]

BASE = "jax.nn"
"""The row of `jax.nn.dot_product_attention`, which ratios are against."""


# --------------------------------------------------------------------- timing


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

    Returns:
      name -> `rounds` figures.

    >>> {name: len(values) for name, values in
    ...  alternate({"nothing": lambda: None}, rounds=3, seconds=0.0).items()}
    {'nothing': 3}
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


def summarize(figures: Mapping[str, list[float]], base: str) -> list[Row]:
    """Median time, and the ratio to the base with its spread over the rounds.

    A ratio above 1 is faster than the base. It is taken round by round.

    Args:
      figures: name -> seconds, one a round, from `alternate`.
      base: a name in it.

    Returns:
      A row each: name, milliseconds, ratio, ratio_low, ratio_high.

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


# ------------------------------------------------------------------- variants


def attention(
    attend: Callable[..., jax.Array],
    query: Any,
    key: Any,
    value: Any,
    *,
    backward: bool,
) -> Program:
    """The program of an attention function on whole arrays.

    Args:
      attend: maps query, key, value to [B, T, N, V].
      query: [B, T, N, H], as arrays or `jax.ShapeDtypeStruct`.
      key: [B, S, K, H].
      value: [B, S, K, V].
      backward: also the gradients of query, key and value, given that of the output.
    """
    if not backward:
        return program(attend, query, key, value)
    out = jax.eval_shape(attend, query, key, value)
    cotangent: Any = jax.ShapeDtypeStruct(out.shape, out.dtype)
    if not isinstance(query, jax.ShapeDtypeStruct):
        cotangent = jax.random.normal(jax.random.key(3), out.shape, out.dtype)
    return program(_with_gradients(attend), query, key, value, cotangent)


def _with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Maps query, key, value and cotangent to the output and three gradients."""

    def both(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        out, gradients = jax.vjp(attend, query, key, value)
        return out, gradients(cotangent)

    return both


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
      lengths: T = S, one or more.
      heads: N.
      head_dim: H = V.
      tokens: B · T; B is at least 1.
      batch: B instead, the same at every length.
      dtype: of query, key and value; parameters are float32.
      causal: whether query t attends only to keys s ≤ t.
      directions: "forward", "forward + backward" or both.
      options: options of the variants' functions or their `init`; each goes to those
        variants that take it.
    """

    lengths: tuple[int, ...] = (256, 1024, 4096)
    heads: int = 8
    head_dim: int = 64
    tokens: int = 4096
    batch: int | None = None
    dtype: DTypeLike = jnp.float32
    causal: bool = False
    directions: tuple[Direction, ...] = ("forward", "forward + backward")
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = dict(heads=self.heads, head_dim=self.head_dim, tokens=self.tokens)
        if self.batch is not None:
            sizes["batch"] = self.batch
        sizes |= {f"lengths[{i}]": n for i, n in enumerate(self.lengths)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {size}.")
        if not self.lengths:
            raise ValueError("`lengths` must name at least one length.")

    def batch_at(self, length: int) -> int:
        """B at a length."""
        return self.batch or max(1, self.tokens // length)

    def inputs(self, length: int, *, abstract: bool = False) -> tuple[Any, Any, Any]:
        """Normal query, key and value [B, T, N, H], or their shapes."""
        shape = (self.batch_at(length), length, self.heads, self.head_dim)
        if abstract:
            struct = jax.ShapeDtypeStruct(shape, self.dtype)
            return struct, struct, struct
        query, key, value = (
            jax.random.normal(rng, shape, self.dtype)
            for rng in jax.random.split(jax.random.key(0), 3)
        )
        return query, key, value

    def of_variant(self, variant: Variant) -> Callable[..., jax.Array]:
        """The variant on [B, T, N, H], with parameters and randomness as it needs."""
        variant = variant.fit(**{"max_length": max(self.lengths), **self.options})
        options: dict[str, Any] = {}
        params = multi_head_init(variant, jax.random.key(1), self.heads, self.head_dim)
        if params is not None:
            options["params"] = params
        if variant.stochastic:
            options["rng"] = jax.random.key(2)
        if self.causal:
            options["is_causal"] = True
        lifted = multi_head(variant)

        def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return lifted(query, key, value, **options)

        return attend

    def of_jax_nn(self, query: Any, key: Any, value: Any) -> jax.Array:
        """The peer."""
        return jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)


def _check_options(setting: Setting, variants: Sequence[Variant]) -> None:
    """Raises for an option that no variant takes."""
    for name in setting.options:
        if not any(variant.takes(name) for variant in variants):
            raise ValueError(f"no variant that is measured takes an option {name!r}.")


def _check_traces(name: str, attend: Callable[..., Any], setting: Setting) -> None:
    """Traces a variant at every length; whatever it raises names the variant."""
    for length in setting.lengths:
        q, k, v = setting.inputs(length, abstract=True)
        try:
            out = jax.eval_shape(attend, q, k, v)
            if setting.directions != ("forward",):
                jax.eval_shape(_with_gradients(attend), q, k, v, out)
        except Exception as error:
            text = str(error).strip().splitlines() or ["no message"]
            why = (
                text[0]
                if isinstance(error, ValueError | TypeError)
                else (f"{type(error).__name__}: {text[0]}")
            )
            raise ValueError(f"{name} at T = {length}: {why}") from error


def bench(
    variants: Sequence[str | Callable[..., Any] | Variant],
    setting: Setting | None = None,
    *,
    rounds: int = 7,
    seconds: float = 0.2,
    memory_share: float = 0.5,
    against: str = BASE,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Times variants, alternating, beside `dot_product` and `jax.nn`.

    A program that plans for more than ``memory_share`` of the free memory is costed,
    but not run.

    Args:
      variants: names, `path/file.py:function`, functions or records.
      setting: shapes, dtype, direction; None takes the defaults.
      rounds: figures a program, see `alternate`.
      seconds: least time of one figure.
      memory_share: of `available_memory()`, above which a program is not run.
      against: name of the program that ratios are against.
      say: told what is going on, a line at a time.

    Returns:
      A row for each direction, length and program: name, direction, length, batch,
      flops, flops_exact, temp_bytes, peak_bytes; and if it ran milliseconds, ratio,
      ratio_low, ratio_high (above 1: faster than ``against``; None where that did
      not run), else `skipped`, which says why.

    Raises:
      ValueError: if a variant is unknown, or cannot do what is asked.

    >>> rows = bench(["blockwise"], Setting((8,), 2, 4, directions=("forward",)),
    ...              rounds=1, seconds=0.0)
    >>> [row["name"] for row in rows]
    ['jax.nn', 'dot_product', 'blockwise']
    """
    setting = setting or Setting()
    records = {record.name: record for record in map(resolve, ["dot_product"])}
    records |= {record.name: record for record in map(resolve, variants)}
    _check_options(setting, list(records.values()))
    functions: dict[str, Callable[..., jax.Array]] = {BASE: setting.of_jax_nn}
    for name, record in records.items():
        functions[name] = setting.of_variant(record)
        _check_traces(name, functions[name], setting)
    rows = []
    for direction in setting.directions:
        for length in setting.lengths:
            say(f"{direction}, T = {length} ...")
            rows += _bench_one(
                functions,
                setting,
                direction,
                length,
                rounds,
                seconds,
                memory_share,
                against,
            )
    return rows


def _bench_one(
    functions: Mapping[str, Callable[..., jax.Array]],
    setting: Setting,
    direction: Direction,
    length: int,
    rounds: int,
    seconds: float,
    memory_share: float,
    against: str,
) -> list[Row]:
    inputs = setting.inputs(length)
    free = available_memory()
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    for name, attend in functions.items():
        # Strict promotion, where it is on, is for ours: jax.nn promotes bfloat16.
        lenient = name == BASE and jax.numpy_dtype_promotion("standard")
        with lenient or contextlib.nullcontext():
            made = attention(attend, *inputs, backward=direction != "forward")
        rows[name] = dict(
            name=name,
            direction=direction,
            length=length,
            batch=setting.batch_at(length),
            flops=made.flops.total,
            flops_exact=made.flops.exact,
            temp_bytes=made.temp_bytes,
            peak_bytes=made.peak_bytes,
        )
        if made.temp_bytes and free and made.temp_bytes > memory_share * free:
            rows[name]["skipped"] = (
                f"not run: it needs {size_text(made.temp_bytes)} of temporary memory, "
                f"more than {memory_share:g} of the {size_text(free)} that are free"
            )
        else:
            calls[name] = made.call
    if calls:
        base = against if against in calls else next(iter(calls))
        figures = alternate(calls, rounds=rounds, seconds=seconds)
        for row in summarize(figures, base):
            if base != against:
                row |= dict.fromkeys(("ratio", "ratio_low", "ratio_high"))
            rows[row["name"]] |= row
    return list(rows.values())


def exponents(rows: Sequence[Row], largest: int | None = None) -> list[Row]:
    """Growth of the costs of one example with T, by program and direction.

    Args:
      rows: from `bench`.
      largest: how many of the largest lengths to fit each cost over; None takes all.

    Returns:
      For each program and direction: name, direction, lengths (how many were timed),
      time, flops, temp: exponents of T, or None; see `fit_exponent`.
    """
    together: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row["direction"], row["name"]), []).append(row)
    found = []
    for (direction, name), of_one in together.items():

        def slope(field: str, of_one: list[Row] = of_one) -> float | None:
            known = [row for row in of_one if row.get(field) is not None]
            known = sorted(known, key=lambda row: row["length"])[-(largest or 0) :]
            return fit_exponent(
                [row["length"] for row in known],
                [row[field] / row["batch"] for row in known],
            )

        found.append(
            dict(
                name=name,
                direction=direction,
                lengths=sum("milliseconds" in row for row in of_one),
                time=slope("milliseconds"),
                flops=slope("flops"),
                temp=slope("temp_bytes"),
            )
        )
    return found


# --------------------------------------------------------------------- output


def table(rows: Sequence[Row], setting: Setting) -> str:
    """The rows of `bench` as text, with exponents where three lengths were measured."""
    lines = []
    cells: list[tuple[str, ...]]
    for direction in setting.directions:
        lines.append(
            f"{direction}{', causal' if setting.causal else ''}: {setting.heads} heads "
            f"of {setting.head_dim}, {jnp.dtype(setting.dtype).name}, "
            f"{jax.devices()[0].device_kind}"
        )
        cells = [
            (
                "variant",
                "T",
                "B",
                "ms",
                f"x {BASE}",
                "low..high",
                "GF/s",
                "temp",
                "peak",
            )
        ]
        notes = []
        for row in (row for row in rows if row["direction"] == direction):
            shown = [row["name"], f"{row['length']:,}", str(row["batch"])]
            if "skipped" in row:
                shown += ["-"] * 4
                notes.append(f"{row['name']}, T = {row['length']:,}: {row['skipped']}.")
            else:
                speed = row["flops"] / row["milliseconds"] / 1e6
                least = "" if row["flops_exact"] else ">= "
                shown.append(f"{row['milliseconds']:.3f}")
                if row["ratio"] is None:
                    shown += ["-", "-"]
                else:
                    shown.append(f"{row['ratio']:.2f}")
                    shown.append(f"{row['ratio_low']:.2f}..{row['ratio_high']:.2f}")
                shown.append(f"{least}{speed:.1f}")
            shown += [size_text(row["temp_bytes"]), size_text(row["peak_bytes"])]
            cells.append(tuple(shown))
        lines += [*aligned(cells), *notes, ""]
    if len(setting.lengths) >= 3:
        lines.append("growth of one example's cost with T, as the exponent of T")
        cells = [("variant", "direction", "timed", "time", "FLOPs", "temp")]
        for row in exponents(rows):
            slopes = (row["time"], row["flops"], row["temp"])
            shown = ["-" if slope is None else f"{slope:.2f}" for slope in slopes]
            cells.append(
                (row["name"], row["direction"], f"{row['lengths']} lengths", *shown)
            )
        lines += [*aligned(cells), ""]
    lines.append(
        f"x {BASE}: how many times as fast, median of the rounds. GF/s: the program's "
        "own FLOPs a second; what it recomputes is among them. peak: arguments, "
        "outputs and temporaries."
    )
    return "\n".join(lines)


def figure(rows: Sequence[Row], path: pathlib.Path, title: str = "") -> None:
    """Draws time, FLOPs and temporary memory of one example over T, log-log.

    Args:
      rows: from `bench`, or of its form.
      path: where the picture goes; its ending says which kind.
      title: above it.

    Raises:
      ValueError: if matplotlib is not installed, or cannot write such a file.
    """
    try:
        # By name: it is no dependency of attn_jax.
        canvas = importlib.import_module("matplotlib.backends.backend_agg")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ValueError(
            "a figure needs matplotlib: pip install 'attn-jax[experiments]'."
        ) from error
    panels: dict[str, tuple[str, float]] = {
        "milliseconds": ("time [ms]", 1.0),
        "flops": ("work [GFLOP]", 1e-9),
        "temp_bytes": ("temporary memory [MiB]", 2.0**-20),
    }
    names = list(dict.fromkeys(row["name"] for row in rows))
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    height = 2.9 * len(directions) + 0.3
    drawn = figures.Figure(figsize=(11.5, max(height, 1.0 + 0.22 * len(names))))
    canvas.FigureCanvasAgg(drawn)
    axes = drawn.subplots(len(directions), len(panels), squeeze=False, sharex=True)
    markers = "os^DvP<X>*"
    handles = {}
    for line, direction in zip(axes, directions, strict=True):
        for ax, (field, (label, unit)) in zip(line, panels.items(), strict=True):
            for number, name in enumerate(names):
                points = [
                    (row["length"], unit * row[field] / row["batch"])
                    for row in rows
                    if (row["name"], row["direction"]) == (name, direction)
                    and row.get(field)
                ]
                if not points:
                    continue
                (handles[name],) = ax.plot(
                    *zip(*points, strict=True),
                    color=f"C{number % 10}",
                    marker=markers[number * 3 % len(markers)],
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    linewidth=1.3,
                    markersize=3.5,
                )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45, fontsize=8)
            ax.minorticks_off()
            ax.grid(alpha=0.3, linewidth=0.5)
            ax.set_title(direction, fontsize=9)
            ax.set_ylabel(label, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("length T")
    if title:
        drawn.suptitle(title, fontsize=10)
    drawn.legend(
        list(handles.values()),
        [name.rpartition("/")[2] for name in handles],  # of a path, its end
        loc="center left",
        bbox_to_anchor=(0.85, 0.5),
        frameon=False,
        fontsize=8,
    )
    drawn.tight_layout(rect=(0, 0, 0.85, 1))
    try:
        drawn.savefig(path, dpi=85)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot write the figure {path}: {error}") from error
