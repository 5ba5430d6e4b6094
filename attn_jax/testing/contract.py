"""Checks of form: shapes, dtypes, jit, vmap, randomness, order, refusals."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from attn_jax.multihead import multi_head
from attn_jax.testing.numerics import softmax_float64
from attn_jax.testing.outcome import (
    Fault,
    Finding,
    NotApplicable,
    expect_close,
    expect_finite,
)
from attn_jax.testing.trial import (
    HEAD_DIM,
    NUM_QUERIES,
    REFUSALS,
    VALUE_DIM,
    Trial,
    cast_floats,
    joined,
    relative_error,
    split_moving,
)
from attn_jax.variant import ARGUMENTS, CAPABILITIES

__all__ = [
    "determinism",
    "dtype",
    "equivariance",
    "jit",
    "refusal",
    "scale",
    "shape",
    "state",
    "step",
    "vmap",
]


def shape(trial: Trial) -> Finding:
    """Output [T, V], finite, for no token, one, few, and no multiple of a block."""
    variant = trial.variant
    cases = {(1, 1), (2, 2), (NUM_QUERIES, trial.num_keys), (101, 101)}
    if variant.cross:
        cases = {(1, 9), (9, 1), (NUM_QUERIES, trial.num_keys), (101, 70)}
    for num_queries, num_keys in sorted(cases):
        arrays = trial.inputs(num_queries, num_keys)
        out = trial.bare(arrays)
        want = (num_queries, trial.value_dim)
        try:
            chex.assert_shape(out, want)
        except AssertionError:
            raise Fault(
                f"T={num_queries}, S={num_keys}, V={trial.value_dim}: the output has "
                f"shape {out.shape}, not [T, V] = {want}"
            ) from None
        expect_finite(f"the output at T={num_queries}, S={num_keys}", out)
    cases |= _empty(trial)
    told = ", ".join(f"{t}x{s}" for t, s in sorted(cases))
    return Finding(f"[T, V] and finite at TxS = {told}; V={trial.value_dim}, H=8")


def _with_gradients(trial: Trial, is_causal: bool, arrays: Any) -> jax.Array:
    """The output, by a call that is also differentiated."""
    moving, fixed = split_moving(arrays)
    out, back = jax.vjp(
        lambda x: trial.call(joined(x, fixed), is_causal=is_causal), moving
    )
    back(out)
    return out


def _empty(trial: Trial) -> set[tuple[int, int]]:
    """Raises unless no queries give no rows, and no keys zeros; returns the sizes."""
    sizes = {(0, 0), (0, 3), (3, 0)} if trial.variant.cross else {(0, 0)}
    causal = trial.variant.causal and "is_causal" in trial.takes
    for num_queries, num_keys in sorted(sizes):
        arrays = trial.full(trial.inputs(num_queries, num_keys))
        for is_causal in (False, True)[: 1 + causal]:
            where = f"T={num_queries}, S={num_keys}{', causal' if is_causal else ''}"

            try:
                out = jax.eval_shape(
                    functools.partial(_with_gradients, trial, is_causal), arrays
                )
            except Exception as error:
                if is_causal and num_queries != num_keys:
                    continue  # some refuse causal with T ≠ S
                raise Fault(f"{where} raises {type(error).__name__}: {error}") from None
            if out.shape != (num_queries, trial.value_dim):
                raise Fault(f"{where}: the output has shape {out.shape}, not [T, V]")
        if num_queries and np.any(trial.bare(arrays) != 0):  # NaN is no zero either
            raise Fault("queries without any key (S=0) give other than zeros")
    return sizes


def _inner(params: Any) -> list[Any]:
    return [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in core.jaxprs_in_params(params)]


_PASSED_ON = {"stop_gradient", "broadcast_in_dim", "reshape", "max", "squeeze"}
_PASSED_ON |= {"expand_dims", "select_n", "copy", "optimization_barrier"}


def narrow_softmax(jaxpr: Any) -> str | None:
    """The dtype of an exponential after a subtracted maximum, if it is narrow."""
    makers: dict[Any, Any] = {}

    def from_maximum(variable: Any, depth: int = 12) -> bool:
        eqn = makers.get(id(variable))
        if eqn is None or depth == 0:
            return False
        if eqn.primitive.name == "reduce_max":
            return True
        if eqn.primitive.name not in _PASSED_ON:
            return False
        return any(from_maximum(v, depth - 1) for v in eqn.invars)

    for eqn in jaxpr.eqns:
        for variable in eqn.outvars:
            makers[id(variable)] = eqn
        if eqn.primitive.name in ("exp", "exp2"):
            found = eqn.invars[0].aval.dtype
            before = makers.get(id(eqn.invars[0]))
            if (
                jnp.finfo(found).bits < 32
                and before is not None
                and before.primitive.name == "sub"
                and from_maximum(before.invars[1])
            ):
                return str(found)
        for inner in _inner(eqn.params):
            narrow = narrow_softmax(inner)
            if narrow:
                return narrow
    return None


def dtype(trial: Trial) -> Finding:
    """The output has the dtype of the inputs, the softmax float32."""
    seen = []
    for name in ("float32", "bfloat16", "float16"):
        arrays = trial.full(trial.inputs(dtype=name))
        # Parameters stay float32, as layers hold them.
        if "params" in arrays:
            arrays["params"] = trial.params()
        got = jax.eval_shape(trial.call, arrays).dtype
        if got != jnp.dtype(name):
            raise Fault(f"{name} in, {got} out")
        seen.append(name)
    arrays = trial.full(trial.inputs(dtype="bfloat16"))
    narrow = narrow_softmax(jax.make_jaxpr(trial.call)(arrays).jaxpr)
    if narrow:
        raise Fault(f"its softmax takes exponentials in {narrow}, not in float32")

    with jax.enable_x64(True):
        try:
            arrays = trial.full(trial.inputs(dtype="float64"))
            wide = jax.eval_shape(trial.call, arrays).dtype
        except REFUSALS as error:
            return Finding(
                f"{', '.join(seen)} kept; float64 refused: {str(error).splitlines()[0]}"
            )
    if wide != jnp.float64:
        raise Fault(f"float64 in, {wide} out")
    return Finding(f"{', '.join(seen)}, float64 kept; no softmax narrower than float32")


def jit(trial: Trial) -> Finding:
    """The jitted function gives what the plain one gives."""
    arrays = trial.full(trial.inputs())
    eager = np.asarray(trial.call(arrays))
    bare = trial.bare(arrays)
    error = expect_close("jit against eager", bare, eager, 1e-5)
    what = "a bias of 0 and masks of True against none"
    expect_close(what, trial.run(arrays), bare, 1e-5)
    return Finding(f"largest relative error {error:.1e}", {"error": error})


def vmap(trial: Trial) -> Finding:
    """Batched and head by head, the numbers are the same."""
    variant, batch, heads = trial.variant, 2, 3
    rows = [[trial.inputs(seed=10 * b + n) for n in range(heads)] for b in range(batch)]
    arrays: dict[str, Any] = {
        name: jnp.stack(
            [jnp.stack([one[name] for one in row], axis=1) for row in rows], axis=0
        )
        for name in ("query", "key", "value")
    }
    # The second example is larger, so that whatever is taken over a batch shows.
    arrays = {k: x.at[1].multiply(3.0) for k, x in arrays.items()}
    params = [trial.params(seed=n) for n in range(heads)]
    if params[0] is not None:
        arrays["params"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    if variant.stochastic:
        arrays["rng"] = jax.random.key(5)
        keys = jax.random.split(arrays["rng"], heads)  # a draw serves all examples
    if variant.key_mask:
        lengths = jnp.array([[trial.num_keys], [trial.num_keys - 7]])
        arrays["key_mask"] = jnp.arange(trial.num_keys)[None, :] < lengths

    def one(b: int, n: int) -> np.ndarray:
        found = {k: arrays[k][b, :, n] for k in ("query", "key", "value")}
        if "params" in arrays:
            found["params"] = params[n]
        if "rng" in arrays:
            found["rng"] = keys[n]
        if "key_mask" in arrays:
            found["key_mask"] = arrays["key_mask"][b]
        return trial.run(found)

    alone = [np.stack([one(b, n) for n in range(heads)], axis=1) for b in range(batch)]
    worst = 0.0
    for how in ("vmap", "loop"):
        lifted = jax.jit(multi_head(variant, map_heads=how))
        got = np.asarray(lifted(**arrays))
        for b in range(batch):
            what = f"multi_head by {how} against one head at a time, example {b}"
            worst = max(worst, expect_close(what, got[b], alone[b], 1e-4))
    return Finding(
        f"B={batch}, N={heads} by vmap and by loop: relative error {worst:.1e}",
        {"error": worst},
    )


def determinism(trial: Trial) -> Finding:
    """The same inputs and key give the same bits, also when traced anew."""
    arrays = trial.full(trial.inputs())
    first, again = trial.bare(arrays), trial.bare(arrays)
    anew = np.asarray(jax.jit(lambda a: trial.call(a))(arrays))
    bits = np.array_equal(first, again) and np.array_equal(first, anew)
    told = "bitwise equal" if bits else "equal to rounding"
    for other, fault in (
        (again, "two calls of one compiled program differ"),
        (anew, "traced a second time it gives other numbers"),
    ):
        try:
            chex.assert_trees_all_close(first, other, rtol=1e-6, atol=1e-6)
        except AssertionError:
            error = float(np.abs(np.float64(first) - np.float64(other)).max())
            raise Fault(
                f"{fault}, by up to {error:.1e}: something is drawn or remembered "
                "outside of its arguments"
            ) from None
    if not trial.variant.stochastic:
        return Finding(f"{told}, also traced anew; it takes no rng")
    others = [trial.bare({**arrays, "rng": jax.random.key(s)}) for s in range(90, 94)]
    if all(np.array_equal(first, other) for other in others):
        if trial.variant.needs("rng"):
            raise Fault("it needs an rng, and five of them give the same bits")
        return Finding(
            f"{told} for one rng; other rngs changed nothing here", note=True
        )
    return Finding(f"{told} for one rng, different for another")


def step(trial: Trial) -> Finding:
    """Token by token, its step gives the rows of its causal form."""
    variant = trial.variant
    if variant.step is None:
        raise NotApplicable("it has no `step`")
    causal = variant.causal and "is_causal" in trial.takes
    errors = {}
    for name, tolerance in (("float32", 1e-4), ("bfloat16", 5e-2)):
        arrays = trial.full(trial.inputs(num_keys=NUM_QUERIES, dtype=name))
        sizes = dict(head_dim=HEAD_DIM, value_dim=trial.value_dim)
        state = variant.start(length=NUM_QUERIES, **sizes, dtype=jnp.dtype(name))
        tokens = {k: arrays.pop(k) for k in ("query", "key", "value")}

        def token(
            state: Any, now: Any, carried: dict[str, Any] = arrays
        ) -> tuple[Any, jax.Array]:
            position, one = now
            return variant.advance(state, position=position, **one, **carried)

        try:
            now = (jnp.arange(NUM_QUERIES, dtype=jnp.int32), tokens)
            got = jax.jit(lambda s, x: jax.lax.scan(token, s, x))(state, now)[1]
        except TypeError as error:
            raise Fault(
                f"in {name} the state does not keep its form: {_first_line(error)}"
            ) from error
        if got.dtype != jnp.dtype(name):
            raise Fault(f"{name} in, {got.dtype} out of the step")
        want = trial.bare(
            {**arrays, **tokens}, **({"is_causal": True} if causal else {})
        )
        what = f"the step against the causal form, in {name}"
        errors[name] = expect_close(what, got, want, tolerance)
    return Finding(
        f"{NUM_QUERIES} tokens: relative error {errors['float32']:.1e}", errors
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def state(trial: Trial) -> Finding:
    """An `update` keeps what the state is like, and learns nothing from padding."""
    update = trial.variant.update
    if update is None:
        raise NotApplicable("it has no `update`")
    arrays = trial.inputs(num_keys=NUM_QUERIES)
    params = trial.params(head_dim=HEAD_DIM)
    half = NUM_QUERIES // 2
    real = jnp.arange(NUM_QUERIES) < half

    @jax.jit
    def run(params: Any, query: jax.Array, key: jax.Array, **given: Any) -> Any:
        return dict(update(params, query, key, **given))

    for name in ("float32", "bfloat16"):
        narrow = cast_floats(params, name)
        query, key = (arrays[k].astype(name) for k in ("query", "key"))
        new = run(narrow, query, key)
        for leaf in new:
            if leaf not in narrow:
                raise Fault(f"it returns `{leaf}`, which is no leaf of `params`")
            kinds = [
                jax.tree.map(lambda x: (x.shape, x.dtype.name), tree[leaf])
                for tree in (new, narrow)
            ]
            if kinds[0] != kinds[1]:
                raise Fault(f"in {name}, `{leaf}` becomes {kinds[0]}, from {kinds[1]}")
            for x in jax.tree.leaves(new[leaf]):
                expect_finite(f"`{leaf}` in {name}", np.asarray(x))
    if not new:
        raise Fault("it returns no leaf")
    query, key = arrays["query"], arrays["key"]
    hidden = ~real[:, None]
    poisoned = [jnp.where(hidden, 1e9, x) for x in (query, key)]
    alone = run(params, query[:half], key[:half])
    padded = run(params, *poisoned, key_mask=real)
    none = run(params, query, key, key_mask=jnp.zeros_like(real))
    for leaf in alone:
        for x, y, z in zip(
            *(jax.tree.leaves(tree[leaf]) for tree in (padded, alone, none)),
            strict=True,
        ):
            what = f"`{leaf}` of a padded sequence against its real part"
            expect_close(what, np.asarray(x), np.asarray(y), 1e-4)
            expect_finite(f"`{leaf}` where all is padding", np.asarray(z))
    told = ", ".join(sorted(new))
    return Finding(f"{told}: kept in shape and dtype, finite, nothing from padding")


def equivariance(trial: Trial) -> Finding:
    """Keys have no order, and neither have queries."""
    arrays = trial.full(trial.inputs())
    order = np.random.default_rng(0).permutation(trial.num_keys)
    other = np.random.default_rng(1).permutation(NUM_QUERIES)
    out = trial.run(arrays)
    moved = trial.run(
        {**arrays, "key": arrays["key"][order], "value": arrays["value"][order]}
    )
    turned = trial.run({**arrays, "query": arrays["query"][other]})
    if trial.variant.equivariant:
        keys = expect_close("keys permuted", moved, out, 1e-4)
        queries = expect_close("queries permuted", turned, out[other], 1e-4)
        return Finding(
            f"permuting keys changes {keys:.1e}, queries only their order "
            f"({queries:.1e})"
        )
    keys = relative_error(moved, out)
    queries = relative_error(turned, out[other])
    return Finding(
        f"not claimed; permuting keys changes {keys:.1e}, queries {queries:.1e}",
        {"keys": keys, "queries": queries},
        note=True,
    )


_ASKING: dict[str, dict[str, Any]] = {
    "cross": {"num_keys": NUM_QUERIES - 4},
    "value_dim": {"value_dim": VALUE_DIM},
}


def refusal(trial: Trial) -> Finding:
    """What it does not claim, it raises on, instead of ignoring it."""
    variant, takes = trial.variant, trial.takes
    refused = []
    for name in CAPABILITIES:
        if getattr(variant, name):
            continue
        refused.append(name)
        argument = ARGUMENTS.get(name)
        if argument is None:
            # Shapes: `multi_head` refuses them, tested below. The function itself may
            # take them, and then rightly.
            _takes_rightly(trial, **_ASKING[name])
            continue
        if argument in takes:
            try:
                trial.shapes(**{argument: True})
            except REFUSALS:
                continue
            raise Fault(
                f"`{argument}` is in its signature, is not claimed, and is accepted "
                "without an error: claim it, refuse it, or leave it out"
            )
    lifted = multi_head(variant)
    for name in refused:
        static: dict[str, Any] = {}
        shapes = _ASKING.get(name, {})
        one = trial.full(
            trial.inputs(
                NUM_QUERIES,
                shapes.get("num_keys", NUM_QUERIES),
                shapes.get("value_dim", HEAD_DIM),
            )
        )
        arrays = {k: one[k][None, :, None] for k in ("query", "key", "value")}
        if "params" in one:
            arrays["params"] = jax.tree.map(lambda leaf: leaf[None], one["params"])
        if "rng" in one:
            arrays["rng"] = one["rng"]
        pairs = (1, 1, NUM_QUERIES, NUM_QUERIES)
        if name == "bias":
            arrays["bias"] = jnp.zeros(pairs)
        elif name == "mask":
            arrays["mask"] = jnp.ones(pairs, bool)
        elif name == "key_mask":
            arrays["key_mask"] = jnp.ones(pairs[2:3], bool)[None]
        elif name == "causal":
            static["is_causal"] = True
        elif name == "dropout":
            static["dropout_rate"] = 0.1
            arrays.setdefault("rng", jax.random.key(0))
        if name in ("causal", "key_mask") and variant.mask:
            continue  # multi_head writes them as a mask
        try:
            jax.eval_shape(lambda a, s=static: lifted(**a, **s), arrays)
        except ValueError as error:
            if "cannot honour" not in str(error):
                raise Fault(f"asked for {name}, it raises: {error}") from error
            continue
        raise Fault(f"asked for {name}, which it does not claim, it raises nothing")
    if not refused:
        raise NotApplicable("it claims everything")
    return Finding(f"refused by name: {', '.join(refused)}")


def _takes_rightly(
    trial: Trial, num_keys: int = NUM_QUERIES, value_dim: int = HEAD_DIM
) -> None:
    """Raises if sizes that are not claimed are taken, with a wrong result."""
    arrays = trial.full(trial.inputs(NUM_QUERIES, num_keys, value_dim))
    try:
        out = trial.bare(arrays)
    except Exception:
        return  # refused, in whatever way
    where = f"T={NUM_QUERIES}, S={num_keys}, V={value_dim}, H={HEAD_DIM}"
    if out.shape != (NUM_QUERIES, value_dim):
        raise Fault(
            f"{where} is not claimed, and not refused: the output has shape {out.shape}"
        )
    if trial.variant.exact:
        want = softmax_float64(arrays, trial.scale)
        what = f"{where} is not claimed, not refused, and differs from softmax"
        expect_close(what, out, want, 1e-4)


def scale(trial: Trial) -> Finding:
    """The factor of the scores is read."""
    if "scale" not in trial.takes:
        raise NotApplicable("it takes no `scale`")
    arrays = trial.full(trial.inputs())
    outs = []
    for factor in (0.05, 0.8):
        outs.append(trial.bind(scale=factor).bare(arrays))
        if trial.variant.exact:
            want = softmax_float64(arrays, factor)
            expect_close(f"scale={factor} against softmax", outs[-1], want, 1e-4)
    changed = relative_error(*outs)
    if changed == 0:
        raise Fault("scale=0.05 and scale=0.8 give the same bits: it is not read")
    return Finding(f"scale=0.05 and scale=0.8 are {changed:.1e} apart")
