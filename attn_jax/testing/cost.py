"""Checks of the compiled program: how its cost grows, and where it can be compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from attn_jax.testing.claims import growth
from attn_jax.testing.outcome import Fault, Finding, NotApplicable
from attn_jax.testing.trial import Trial, joined, split_moving
from attn_jax.tools.cost import (
    array_sizes,
    count_flops,
    fastest_growth,
    fit_exponent,
    program,
    size_text,
)
from attn_jax.variant import Variant

__all__ = ["cost", "lowering"]

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


def _exponents(formula: str) -> tuple[float | None, float | None]:
    """What exponent of T a claim comes to over the lengths measured, and at last."""
    here, far = [], []
    # A sum leans to one term or another by how large blocks and windows are.
    for constant in (16.0, 64.0, 256.0):
        claimed = growth(formula, constant)
        if claimed is None:
            return None, None
        here.append(_slope(claimed, LENGTHS))
        far.append(_slope(claimed, (1e9, 1e10, 1e11)))
    return max(here), max(far)


def _slope(cost: Callable[[float], float], lengths: Sequence[float]) -> float:
    return fit_exponent(lengths, [cost(float(length)) for length in lengths]) or 0.0


def _arguments(trial: Trial, length: int) -> tuple[Any, Any]:
    """Shapes of what has a gradient, and of the rest: nothing is made."""

    long = jax.ShapeDtypeStruct((length, HEAD_DIM), jnp.float32)
    found: dict[str, Any] = dict.fromkeys(("query", "key", "value"), long)
    if trial.variant.init is not None:
        sizes = (jnp.dtype("float32"), length, HEAD_DIM, HEAD_DIM, None)
        found["params"] = jax.eval_shape(lambda: trial._init(*sizes))
    if trial.variant.stochastic:
        found["rng"] = trial.rng()
    return split_moving(found)


def _both(trial: Trial, is_causal: bool) -> Callable[[Any, Any], Any]:
    """Output and gradients of a call."""

    def both(moving: Any, rest: Any) -> Any:
        def of(moving: Any) -> jax.Array:
            return trial.call(joined(moving, rest), is_causal=is_causal)

        out, pull = jax.vjp(of, moving)
        return out, pull(jnp.ones_like(out))[0]

    return both


def cost(trial: Trial) -> Finding:
    """FLOPs and memory grow with T no faster than claimed, forward and backward."""
    variant = trial.variant
    # With the variant's own options: what it is tried with elsewhere is tiny.
    trial = dataclasses.replace(trial, variant=trial.untried or variant)
    ways: list[tuple[str, bool, bool]] = [("", False, False)]
    if variant.key_mask and "key_mask" in trial.takes:
        ways.append(("with a key mask", True, False))
    if variant.causal and "is_causal" in trial.takes:
        ways.append(("causal", False, True))
    told, measured, faults = [], {}, []
    for name, masked, is_causal in ways:
        rows, slopes, largest = _measure(trial, masked, is_causal, compiled=not name)
        measured[name or "plain"] = {"lengths": rows, "exponents": slopes}
        shown = {k: "-" if s is None else f"{s:.2f}" for k, s in slopes.items()}
        if not name:
            bytes_ = rows[-1]["temp_bytes"]
            told.append(
                f"FLOPs ~ T^{shown['flops']}, temporary memory ~ "
                f"T^{shown['temp_bytes']} ({size_text(bytes_)} at T={LENGTHS[-1]}), no "
                f"array faster than T^{shown['array']}"
            )
        else:
            told.append(f"{name} FLOPs ~ T^{shown['flops']}")
        faults += _above(variant, name, rows, slopes, largest)
    if faults:
        raise Fault(faults[0], **measured)
    text = "; ".join(told)
    if growth(variant.time) is None and growth(variant.memory) is None:
        return Finding(f"no growth is claimed; {text}", measured, note=True)
    return Finding(
        f"{text}; claimed {variant.time} time, {variant.memory} memory", measured
    )


def _measure(
    trial: Trial, masked: bool, is_causal: bool, *, compiled: bool
) -> tuple[list[dict[str, Any]], dict[str, float | None], int]:
    """Costs at each length, their exponents, and the largest array that grows so."""
    both = _both(trial, is_causal)
    rows: list[dict[str, Any]] = []
    sizes: list[list[int]] = []
    # Blocks of a causal form may grow up to a size of their own first.
    lengths = LENGTHS if compiled else tuple(4 * length for length in LENGTHS)
    for length in lengths:
        moving, rest = _arguments(trial, length)
        if masked:
            rest["key_mask"] = jax.ShapeDtypeStruct((length,), jnp.bool_)
        flops = count_flops(both, moving, rest)
        sizes.append(array_sizes(jax.make_jaxpr(both)(moving, rest)))
        row: dict[str, Any] = {"length": length, "flops": flops.total}
        row["flops_exact"] = flops.exact
        if len(sizes[-1]) > MOST_ARRAYS:
            said = (
                f"its program of {len(sizes[-1]):,} operations at T={length} is too "
                "long to be compiled here: is a loop over T written in Python?"
            )
            if growth(trial.variant.time) or growth(trial.variant.memory):
                raise Fault(f"a growth is claimed, but {said}")
            raise NotApplicable(said)
        if compiled:
            row["temp_bytes"] = program(both, moving, rest).temp_bytes
        rows.append(row)
    slopes: dict[str, float | None] = {
        name: fit_exponent(lengths, [row.get(name) or 0 for row in rows])
        for name in ("flops", "temp_bytes")
    }
    slopes["array"], largest = fastest_growth(sizes, lengths)
    return rows, slopes, largest


def _above(
    variant: Variant,
    name: str,
    rows: list[dict[str, Any]],
    slopes: dict[str, float | None],
    largest: int,
) -> list[str]:
    """What grows faster than claimed, in words."""
    found = []
    where = f" {name}" if name else ""
    for claim, names, formula in (
        ("time", ("flops", "array"), variant.time),
        ("memory", ("temp_bytes", "array"), variant.memory),
    ):
        here, far = _exponents(formula)
        if here is None or far is None:
            continue
        if claim == "time" and not rows[-1]["flops_exact"]:
            found.append(
                f"time is claimed to be {formula}, but a loop whose length depends on "
                "data hides how often it runs, so it cannot be told"
            )
        for of in names:
            slope = slopes[of]
            # An array is one term of a sum, which in the end may be the largest.
            limit = max(here, far, 0.0) if of == "array" or name else max(here, 0.0)
            allowed = TEMP_TOLERANCE if of == "temp_bytes" else TOLERANCE
            if slope is None or slope <= limit + allowed:
                continue
            extra = ""
            if of == "array":
                extra = f", to {largest:,} elements at T={rows[-1]['length']}"
            found.append(
                f"{claim} is claimed to be {formula}, that is T^{limit:.2f} here, but "
                f"{_NAMES[of]}{where} grows as T^{slope:.2f}{extra}"
            )
    return found


def lowering(trial: Trial) -> Finding:
    """It compiles as far as it can be told here for CUDA and TPU, with its gradient."""
    arrays = trial.full(trial.inputs(dtype="bfloat16"))
    moving, rest = split_moving(arrays)

    def loss(moving: Any, rest: Any) -> jax.Array:
        return trial.call(joined(moving, rest)).astype(jnp.float32).sum()

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
