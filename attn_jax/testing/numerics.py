"""Checks of numbers: gradients, precision, exactness, extremes, approximation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.testing.outcome import (
    Fault,
    Finding,
    NotApplicable,
    expect_close,
    expect_finite,
)
from attn_jax.testing.trial import (
    LONG,
    NUM_QUERIES,
    REFUSALS,
    Trial,
    cast_floats,
    float_leaves,
    relative_error,
)

__all__ = [
    "approximation",
    "dropout",
    "exact",
    "float64",
    "gradient",
    "narrow",
    "softmax_float64",
    "stability",
]

# Steps of central differences, in the order tried: the first suits float64, the last a
# function that computes in float32 whatever comes in.
_STEPS = (1e-5, 1e-3, 1e-2)
_SLOPE_TOLERANCE = 2e-3

# Where errors of a narrow dtype are compared, how much they may grow, and below what
# they are but its own roundings.
NARROW_LENGTHS = (64, 2048)
NARROW_GROWTH = 3.0
NARROW_TOLERANCE = 0.03


def _wide(
    trial: Trial, num_queries: int = NUM_QUERIES, num_keys: int | None = None
) -> tuple[str, dict[str, Any]]:
    """Inputs in float64 if the function takes them, else in float32."""
    try:
        arrays = trial.full(trial.inputs(num_queries, num_keys, dtype="float64"))
        jax.eval_shape(trial.call, arrays)
    except REFUSALS:
        return "float32", trial.full(trial.inputs(num_queries, num_keys))
    return "float64", arrays


def _random_masks(trial: Trial, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A bias and masks with holes, as far as they are claimed."""
    shape = (arrays["query"].shape[0], arrays["key"].shape[0])
    rng = np.random.default_rng(3)
    found: dict[str, Any] = {}
    if trial.variant.bias and "bias" in trial.takes:
        found["bias"] = jnp.asarray(rng.standard_normal(shape), arrays["query"].dtype)
    if trial.variant.mask and "mask" in trial.takes:
        found["mask"] = jnp.asarray(rng.random(shape) < 0.7)
    if trial.variant.key_mask and "key_mask" in trial.takes:
        found["key_mask"] = jnp.asarray(rng.random(shape[1]) < 0.8)
    return found


def gradient(trial: Trial) -> Finding:
    """Gradients are the slopes that central differences measure."""
    worst, told, name = 0.0, [], ""
    causal = trial.variant.causal and "is_causal" in trial.takes
    with jax.enable_x64(True):
        for is_causal in (False, True)[: 1 + causal]:
            num_keys = LONG + 7 if trial.variant.cross and not is_causal else LONG
            name, arrays = _wide(trial, LONG, num_keys)
            arrays |= _random_masks(trial, arrays)
            how = " (causal)" if is_causal else ""
            for argument, error in _slopes(trial, arrays, is_causal, how).items():
                worst = max(worst, error)
                told.append(argument + how)
    return Finding(
        f"in {name}, T = {LONG}, masked, along two directions each: {', '.join(told)}; "
        f"largest relative error {worst:.1e}",
        {"error": worst},
    )


def _wider(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def _slopes(
    trial: Trial, arrays: dict[str, Any], is_causal: bool, how: str
) -> dict[str, float]:
    out, grads = trial.pull(arrays, is_causal=is_causal)
    expect_finite("the output", out)
    cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
    rng = np.random.default_rng(9)
    errors: dict[str, float] = {}
    for argument in sorted(grads):
        leaves, back = float_leaves(arrays[argument])
        if not leaves:
            continue
        slopes = [
            np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads[argument])
        ]
        for leaf in slopes:
            expect_finite(f"the gradient of {argument}{how}", leaf)
        length = math.sqrt(sum(float((leaf**2).sum()) for leaf in slopes))
        random = [rng.standard_normal(leaf.shape) for leaf in slopes]
        size = math.sqrt(sum(float((leaf**2).sum()) for leaf in random)) or 1.0
        directions = [[leaf / size for leaf in random]]
        if length > 1e-12:
            directions.append([leaf / length for leaf in slopes])
        for direction in directions:
            claimed = sum(
                float((g * d).sum()) for g, d in zip(slopes, direction, strict=True)
            )
            # A random direction meets a share 1/sqrt(n) of the gradient.
            n = sum(leaf.size for leaf in slopes)
            scale = max(abs(claimed), length / math.sqrt(n), 1e-3)
            best, seen = math.inf, 0.0
            for step in _STEPS:
                ends = []
                for sign in (1.0, -1.0):
                    moved = [
                        leaf + jnp.asarray(sign * step * d, leaf.dtype)
                        for leaf, d in zip(leaves, direction, strict=True)
                    ]
                    moved_arrays = {**arrays, argument: back(moved)}
                    value = trial.run(moved_arrays, is_causal=is_causal)
                    ends.append(float((cotangent * value.astype(np.float64)).sum()))
                slope = (ends[0] - ends[1]) / (2 * step)
                if abs(slope - claimed) / scale < best:
                    best, seen = abs(slope - claimed) / scale, slope
                if best < _SLOPE_TOLERANCE:
                    break
            if not best < _SLOPE_TOLERANCE:
                raise Fault(
                    f"the gradient of {argument}{how} says {claimed:.6g} along a "
                    f"direction where central differences measure {seen:.6g}",
                    error=best,
                )
            errors[argument] = max(errors.get(argument, 0.0), best)
    return errors


def float64(trial: Trial) -> Finding:
    """In float32 it gives what it gives in float64, forward and backward."""
    arrays = trial.full(trial.inputs())
    out, grads = trial.pull(arrays)
    with jax.enable_x64(True):
        name, wide = _wide(trial)
        if name != "float64":
            raise NotApplicable("it refuses float64")
        want, want_grads = trial.pull(wide)
    told = {}
    try:
        told["output"] = expect_close("the output", out, want, 1e-3)
        for argument in sorted(grads):
            pairs = zip(
                jax.tree.leaves(grads[argument]),
                jax.tree.leaves(want_grads[argument]),
                strict=True,
            )
            told[argument] = max(
                (
                    expect_close(f"the gradient of {argument}", g, w, 1e-2)
                    for g, w in pairs
                    if np.linalg.norm(_wider(w)) > 1e-6
                ),
                default=0.0,
            )
    except Fault:
        if trial.variant.stochastic:
            raise NotApplicable("its draws depend on the precision") from None
        raise
    worst = max(told, key=lambda k: told[k])
    return Finding(
        f"output {told['output']:.1e}; largest error {told[worst]:.1e}, in {worst}",
        told,
    )


def softmax_float64(
    arrays: Mapping[str, Any], scale: float | None = None, is_causal: bool = False
) -> np.ndarray:
    """softmax(scale · Q Kᵀ + bias) V by numpy in float64."""
    query, key, value = (_wider(arrays[k]) for k in ("query", "key", "value"))
    logits = query @ key.T * (query.shape[1] ** -0.5 if scale is None else scale)
    if arrays.get("bias") is not None:
        logits = logits + _wider(arrays["bias"])
    allowed = np.ones(logits.shape, bool)
    if arrays.get("mask") is not None:
        allowed &= np.asarray(arrays["mask"])
    if arrays.get("key_mask") is not None:
        allowed &= np.asarray(arrays["key_mask"])[None, :]
    if is_causal:
        allowed &= np.tri(*logits.shape, dtype=np.bool_)
    top = np.where(allowed, logits, -np.inf).max(axis=1, keepdims=True, initial=-1e300)
    weights = np.where(allowed, np.exp(np.where(allowed, logits - top, 0.0)), 0.0)
    total = weights.sum(axis=1, keepdims=True)
    return weights @ value / np.where(total == 0, 1.0, total)


def exact(trial: Trial) -> Finding:
    """It equals softmax(scale · Q Kᵀ + bias) V, written out in float64."""
    variant = trial.variant
    if not variant.exact:
        raise NotApplicable("not claimed")
    arrays = trial.full(trial.inputs(scale=1.5))
    shape = (NUM_QUERIES, trial.num_keys)
    rng = np.random.default_rng(4)
    scale = trial.scale
    settings: list[tuple[str, dict[str, Any], bool]] = [("plain", {}, False)]
    if variant.bias:
        draw = jnp.asarray(rng.standard_normal(shape).astype(np.float32))
        settings.append(("bias", {"bias": draw}, False))
    if variant.mask:
        settings.append(("mask", {"mask": jnp.asarray(rng.random(shape) < 0.5)}, False))
    if variant.key_mask:
        keys = jnp.asarray(rng.random(shape[1]) < 0.5)
        settings.append(("key_mask", {"key_mask": keys}, False))
    if variant.causal:
        settings.append(("causal", {}, True))
    together = {k: x for _, given, _ in settings for k, x in given.items()}
    settings.append(("all together", together, variant.causal))
    worst = 0.0
    for name, given, is_causal in settings:
        one = {**arrays, **given}
        if is_causal:
            # Where T = S, to which some hold causal attention.
            one = trial.full(trial.inputs(num_keys=NUM_QUERIES, scale=1.5))
            for k, x in given.items():
                one[k] = x[..., :NUM_QUERIES]
        want = softmax_float64(one, scale, is_causal)
        got = trial.run(one, is_causal=is_causal)
        worst = max(worst, expect_close(name, got, want, 1e-4))
    wider = trial.full(trial.inputs(scale=1.5, head_dim=12, value_dim=trial.value_dim))
    if variant.value_dim:
        want = softmax_float64(wider, scale)
        worst = max(worst, expect_close("H = 12", trial.bare(wider), want, 1e-4))
    told = ", ".join(name for name, *_ in settings)
    return Finding(f"{told}: relative error {worst:.1e}", {"error": worst})


def stability(trial: Trial) -> Finding:
    """Finite at logits of 1e4, and in bfloat16 near to float32."""
    causal = trial.variant.causal and "is_causal" in trial.takes
    # q·k/√H has this standard deviation for entries of its root.
    for name in ("float32", "bfloat16"):
        for is_causal in (False, True)[: 1 + (causal and name == "float32")]:
            num_keys = NUM_QUERIES if is_causal else None
            arrays = trial.full(trial.inputs(num_keys=num_keys, dtype=name, scale=1e2))
            out, grads = trial.pull(arrays, is_causal=is_causal)
            where = f"at logits of 1e4 in {name}{', causal' if is_causal else ''}"
            expect_finite(f"the output {where}", out)
            for argument in sorted(grads):
                for leaf in jax.tree.leaves(grads[argument]):
                    expect_finite(f"the gradient of {argument} {where}", leaf)
            if trial.variant.exact and name == "float32":
                want = softmax_float64(arrays, trial.scale, is_causal)
                expect_close(f"softmax {where}", out, want, 2e-2)
    if trial.variant.stochastic:
        return Finding(
            "output and gradients finite at logits of 1e4, float32 and bfloat16; its "
            "draws may depend on the precision, so the two are not compared"
        )
    narrow = trial.full(trial.inputs(dtype="bfloat16"))
    wide = {
        k: cast_floats(x, jnp.float32)
        if k in ("query", "key", "value", "params")
        else x
        for k, x in narrow.items()
    }
    # The float32 program is the one of the other checks, the bfloat16 one of above.
    error = relative_error(trial.run(narrow), trial.run(wide))
    if not error < 0.05:
        raise Fault(f"in bfloat16 the output is {error:.2f} away from float32")
    return Finding(
        f"output and gradients finite at logits of 1e4, float32 and bfloat16; bfloat16 "
        f"is {error:.1e} away from float32",
        {"bfloat16_error": error},
    )


def narrow(trial: Trial) -> Finding:
    """Errors in bfloat16 do not grow with T, in the output and in gradients."""
    short, long = NARROW_LENGTHS
    causal = trial.variant.causal and "is_causal" in trial.takes
    worst, told, measured = 0.0, "", {}
    for is_causal in (False, True)[: 1 + causal]:
        where = " (causal)" if is_causal else ""
        before = _narrow_errors(trial, short, is_causal)
        after = _narrow_errors(trial, long, is_causal)
        if trial.variant.stochastic and before["the output"] > 0.2:
            raise NotApplicable("its draws depend on the precision")
        for name in after:
            what = name + where
            measured[what] = [before[name], after[name]]
            if after[name] > max(NARROW_GROWTH * before[name], NARROW_TOLERANCE):
                raise Fault(
                    f"in bfloat16 {what} is a relative {before[name]:.1e} away from "
                    f"float32 at T = {short}, and {after[name]:.1e} at T = {long}: "
                    "sums over keys or queries want float32",
                    **measured,
                )
            if after[name] > worst:
                worst, told = after[name], what
    return Finding(
        f"bfloat16 is as near to float32 at T = {long} as at T = {short}; the largest "
        f"error is {worst:.1e}, in {told}",
        measured,
    )


def _narrow_errors(trial: Trial, length: int, is_causal: bool) -> dict[str, float]:
    """How far bfloat16 is away from float32, for the same numbers."""
    arrays = trial.inputs(length, length, dtype="bfloat16")
    # Means that are not zero: sums over them grow, and what is added vanishes beside.
    arrays["value"] = arrays["value"] + jnp.ones((), jnp.bfloat16)
    if "params" in trial.takes and trial.variant.init is not None:
        params = trial.params(jnp.bfloat16, max_length=max(NARROW_LENGTHS))
        arrays["params"] = cast_floats(params, jnp.float32)  # as layers hold them
    size = (length, arrays["value"].shape[1])
    cotangent = 1.0 + 0.5 * jnp.cos(jnp.arange(math.prod(size), dtype=jnp.float32))
    cotangent = cotangent.reshape(size).astype(jnp.bfloat16)
    wide = {k: cast_floats(x, jnp.float32) for k, x in arrays.items()}
    results = [
        trial.pull(one, cotangent.astype(dtype), is_causal=is_causal, bare=True)
        for one, dtype in ((arrays, jnp.bfloat16), (wide, jnp.float32))
    ]
    (out, grads), (want, want_grads) = results
    errors = {"the output": relative_error(out, want)}
    for argument in sorted(grads):
        errors[f"the gradient of {argument}"] = max(
            (
                relative_error(got, right)
                for got, right in zip(
                    jax.tree.leaves(grads[argument]),
                    jax.tree.leaves(want_grads[argument]),
                    strict=True,
                )
                if np.linalg.norm(_wider(right)) > 1e-6
            ),
            default=0.0,
        )
    return errors


def dropout(trial: Trial) -> Finding:
    """Dropout follows its key, is off at rate 0, and keeps the mean."""
    if not trial.variant.dropout:
        raise NotApplicable("not claimed")
    key = "dropout_rng" if "dropout_rng" in trial.takes else "rng"
    if not {"dropout_rate", key} <= trial.takes:
        raise Fault("dropout is claimed, but it takes no `dropout_rate` and `rng`")
    arrays = {k: x for k, x in trial.full(trial.inputs()).items() if k != key}
    off = trial.bare(arrays)

    def drop(seed: int) -> np.ndarray:
        return trial.bare({**arrays, key: jax.random.key(seed)}, dropout_rate=0.3)

    one, again, other = drop(0), drop(0), drop(1)
    if not np.array_equal(one, again):
        raise Fault("one rng drops differently at two calls")
    if np.array_equal(one, other):
        raise Fault("two rngs drop alike")
    draws = np.stack([drop(seed) for seed in range(2, 66)]).astype(np.float64)
    spread = draws.std(axis=0) / np.sqrt(len(draws))
    away = np.abs(draws.mean(axis=0) - off)
    share = float((away > 4 * spread + 1e-6).mean())
    if share > 0.02:
        raise Fault(f"the mean of 64 draws is off in {share:.0%} of the entries")
    return Finding("follows its key; 64 draws have the mean of none dropped")


def approximation(trial: Trial) -> Finding:
    """Its distance to the exact function, and that it falls with the knob."""
    variant = trial.variant
    if variant.approximates is None:
        raise NotApplicable("no approximation is claimed")
    length, head_dim = 48, 16
    knob = variant.knob or ({},)
    inputs = {"random": 1.0, "peaked": 2.0}  # logits of standard deviation 1 and 4
    errors: dict[str, list[float]] = {name: [] for name in inputs}
    means: dict[str, float] = {}
    for options in knob:
        both = _distances(trial, options, length, head_dim, list(inputs.values()))
        for name, (error, mean) in zip(inputs, both, strict=True):
            errors[name].append(error)
            means[name] = mean
    told = "; ".join(
        f"{name} {' > '.join(f'{e:.3f}' for e in found)}"
        for name, found in errors.items()
    )
    settings = [", ".join(f"{k}={v}" for k, v in options.items()) for options in knob]
    measured = {"knob": settings, **errors, "error_of_the_mean": means}
    for name, found in errors.items():
        if not all(map(math.isfinite, found)):
            raise Fault(f"the error on {name} inputs is not finite", **measured)
        if len(found) > 1 and not found[-1] < 0.9 * found[0]:
            raise Fault(
                f"on {name} inputs the error does not fall along "
                f"{' -> '.join(settings)}: {', '.join(f'{e:.3f}' for e in found)}",
                **measured,
            )
        rises = [b / a for a, b in zip(found, found[1:], strict=False) if a > 1e-4]
        if any(rise > 1.25 for rise in rises):
            raise Fault(
                f"on {name} inputs the error rises along {' -> '.join(settings)}: "
                f"{', '.join(f'{e:.3f}' for e in found)}",
                **measured,
            )
    if not errors["random"][-1] < 0.9 * means["random"]:
        raise Fault(
            f"on random inputs its error is {errors['random'][-1]:.3f}, where the mean "
            f"of all values has {means['random']:.3f}",
            **measured,
        )
    along = f" along {settings[0]} ... {settings[-1]}" if len(knob) > 1 else ""
    return Finding(f"relative error{along}: {told}", measured)


def _distances(
    trial: Trial,
    options: Mapping[str, Any],
    length: int,
    head_dim: int,
    factors: Sequence[float],
) -> list[tuple[float, float]]:
    """Mean relative error over several draws, with queries and keys times a factor.

    Beside it that of the mean over all values, which is no attention at all.
    """
    here = trial.bind(**options)
    exact = here.variant.approximates
    assert exact is not None  # `approximation` has seen to it
    wanted = set(inspect.signature(exact).parameters)
    draws = 6
    drawn = [
        here.params(max_length=length, head_dim=head_dim, value_dim=head_dim, seed=s)
        for s in range(draws)
    ]
    fixed: dict[str, Any] = {}
    if drawn[0] is not None:
        fixed["params"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *drawn)
    if trial.variant.stochastic:
        fixed["rng"] = jax.random.split(jax.random.key(3), draws)

    @jax.jit
    @jax.vmap
    def both(one: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return here.call(one), exact(**{k: x for k, x in one.items() if k in wanted})

    found = []
    for factor in factors:
        inputs = [
            here.inputs(
                length, length, head_dim, scale=factor, seed=s, head_dim=head_dim
            )
            for s in range(draws)
        ]
        arrays = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
        got, want = (np.asarray(x) for x in both({**arrays, **fixed}))
        mean = np.broadcast_to(
            np.asarray(arrays["value"]).mean(axis=1, keepdims=True), want.shape
        )
        errors = [
            np.mean([relative_error(g, w) for g, w in zip(one, want, strict=True)])
            for one in (got, mean)
        ]
        found.append((float(errors[0]), float(errors[1])))
    return found
