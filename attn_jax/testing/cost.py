"""Checks of the compiled program: how its cost grows, and where it can be compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.extend import core

from attn_jax.benchmarking import fit_exponent, program, size_text
from attn_jax.testing.claims import growth
from attn_jax.testing.outcome import Fault, Finding, NotApplicable
from attn_jax.testing.trial import Trial

__all__ = ["array_sizes", "cost", "fastest_growth", "lowering"]

LENGTHS = (1024, 2048, 4096)
# How far above the claimed exponent a measured one may be: fixed costs, logarithms and
# the last, partial block bend the line.
TOLERANCE = 0.15
# XLA reuses memory as it sees fit, which bends its line more.
TEMP_TOLERANCE = 0.3
HEAD_DIM = 32
MOST_ARRAYS = 6_000
_NAMES = {
    "flops": "the number of FLOPs",
    "temp_bytes": "temporary memory",
    "array": "an array that it makes",
}


def array_sizes(jaxpr: Any) -> list[int]:
    """Elements of every array that a jaxpr makes, in loops and calls too, in order.

    >>> array_sizes(jax.make_jaxpr(lambda x: (x[:, None] + x[None, :]).sum())(
    ...     jnp.ones(8)))
    [8, 8, 64, 1]
    """
    sizes = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for variable in eqn.outvars:
            sizes.append(math.prod(getattr(variable.aval, "shape", ())))
        for inner in core.jaxprs_in_params(eqn.params):
            sizes += array_sizes(inner)
    return sizes


def fastest_growth(sizes: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The exponent of the array that grows fastest, and its size at the last length.

    Arrays are matched by their place in the program; if the programs of different
    lengths differ in form, the largest array of each stands for all.

    Args:
      sizes: from `array_sizes`, one list for each of `LENGTHS`.

    >>> fastest_growth([[1024, 1024**2], [2048, 2048**2], [4096, 4096**2]])
    (2.0, 16777216)
    """
    if len({len(one) for one in sizes}) > 1:
        sizes = [[max(one, default=1)] for one in sizes]
    fastest, largest = 0.0, 1
    for one in zip(*sizes, strict=True):
        # Arrays below T elements are parts of a fixed size, or grow without harm.
        if one[-1] < LENGTHS[-1] or min(one) == 0:
            continue
        slope = fit_exponent(LENGTHS, one) or 0.0
        if round(slope, 6) > fastest or (
            round(slope, 6) == fastest and one[-1] > largest
        ):
            fastest, largest = round(slope, 6), one[-1]
    return fastest, largest


def _exponent(formula: str) -> float | None:
    """The exponent of T that a claim comes to over the lengths measured."""
    claimed = growth(formula)
    if claimed is None:
        return None
    return fit_exponent(LENGTHS, [claimed(float(length)) for length in LENGTHS])


def cost(trial: Trial) -> Finding:
    """FLOPs and memory grow with T no faster than claimed, forward and backward."""
    # With the variant's own options: what it is tried with elsewhere is tiny.
    trial = dataclasses.replace(trial, options=_as_given(trial))
    rows: list[dict[str, Any]] = []
    sizes: list[list[int]] = []
    for length in LENGTHS:
        arrays = trial.full(trial.inputs(length, length, HEAD_DIM, head_dim=HEAD_DIM))
        if "params" in arrays:
            arrays["params"] = trial.params(
                max_length=length, head_dim=HEAD_DIM, value_dim=HEAD_DIM
            )

        def both(moving: Any, rest: Any) -> Any:
            out, pull = jax.vjp(lambda moving: trial.call({**moving, **rest}), moving)
            return out, pull(jnp.ones_like(out))[0]

        moving = {
            k: arrays[k] for k in ("query", "key", "value", "params") if k in arrays
        }
        rest = {k: x for k, x in arrays.items() if k not in moving}
        sizes.append(array_sizes(jax.make_jaxpr(both)(moving, rest)))
        if len(sizes[-1]) > MOST_ARRAYS:
            raise NotApplicable(
                f"its program of {len(sizes[-1]):,} operations at T={length} is too "
                "long to be compiled here: is a loop over T written in Python?"
            )
        made = program(both, moving, rest)
        rows.append(
            {
                "length": length,
                "flops": made.flops.total,
                "flops_exact": made.flops.exact,
                "temp_bytes": made.temp_bytes,
            }
        )
    last = rows[-1]
    slopes: dict[str, float | None] = {
        name: fit_exponent(LENGTHS, [row[name] or 0 for row in rows])
        for name in ("flops", "temp_bytes")
    }
    slopes["array"], largest = fastest_growth(sizes)
    claims = {
        "time": _exponent(trial.variant.time),
        "memory": _exponent(trial.variant.memory),
    }
    shown = {k: "-" if s is None else f"{s:.2f}" for k, s in slopes.items()}
    told = (
        f"FLOPs ~ T^{shown['flops']}, temporary memory ~ T^{shown['temp_bytes']} "
        f"({size_text(last['temp_bytes'])} at T={last['length']}), no array faster "
        f"than T^{shown['array']}"
    )
    if not last["flops_exact"]:
        told += "; a loop whose length depends on data is counted once"
    measured = {"lengths": rows, "exponents": slopes, "claimed_exponents": claims}
    for claim, names, formula in (
        ("time", ("flops", "array"), trial.variant.time),
        ("memory", ("temp_bytes", "array"), trial.variant.memory),
    ):
        limit = claims[claim]
        if limit is None:
            continue
        for name in names:
            slope = slopes[name]
            allowed = TEMP_TOLERANCE if name == "temp_bytes" else TOLERANCE
            if slope is not None and slope > max(limit, 0.0) + allowed:
                extra = ""
                if name == "array":
                    extra = f", to {largest:,} elements at T={last['length']}"
                raise Fault(
                    f"{claim} is claimed to be {formula}, that is T^{limit:.2f} here, "
                    f"but {_NAMES[name]} grows as T^{slope:.2f}{extra}",
                    **measured,
                )
    if claims["time"] is None and claims["memory"] is None:
        return Finding(f"no growth is claimed; {told}", measured, note=True)
    return Finding(
        f"{told}; claimed {trial.variant.time} time, {trial.variant.memory} memory",
        measured,
    )


def _as_given(trial: Trial) -> dict[str, Any]:
    """The options without those of `Variant.trial`."""
    tiny = trial.variant.trial
    return {
        name: value
        for name, value in trial.options.items()
        if name not in tiny or tiny[name] != value
    }


def lowering(trial: Trial) -> Finding:
    """It compiles as far as it can be told here for CUDA and TPU, with its gradient."""
    arrays = trial.full(trial.inputs(dtype="bfloat16"))
    moving = {k: arrays[k] for k in ("query", "key", "value", "params") if k in arrays}
    rest = {k: x for k, x in arrays.items() if k not in moving}

    def loss(moving: Any, rest: Any) -> jax.Array:
        return trial.call({**moving, **rest}).astype(jnp.float32).sum()

    platforms = ("cuda", "tpu")
    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=platforms)
    try:
        found = exported(moving, rest).platforms
    except Exception as error:
        said = str(error).splitlines()[0]
        raise Fault(f"does not lower: {type(error).__name__}: {said}") from error
    if tuple(found) != platforms:
        raise Fault(f"lowered for {found} instead of {platforms}")
    return Finding("forward and backward lower for cuda and tpu, in bfloat16")
