"""Checks of who sees whom: bias, mask, padding, causality, empty rows."""

from __future__ import annotations

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
    relative_error,
)

__all__ = ["bias", "causal", "empty_rows", "key_mask", "mask"]

POISON = 1e9
ROUNDING = 1e-6


def _need(trial: Trial, capability: str, argument: str) -> None:
    """Raises unless a capability is claimed and the function takes its argument."""
    if not getattr(trial.variant, capability):
        raise NotApplicable("not claimed")
    if argument not in trial.takes:
        raise Fault(
            f"{capability} is claimed, but the function takes no argument `{argument}`"
        )


def _first(pairs: np.ndarray) -> str:
    t, s = (int(i) for i in np.argwhere(pairs)[0])
    return f"[t={t}, s={s}]"


def _expect_unseen(
    seen: dict[str, np.ndarray],
    hidden: np.ndarray,
    why: str,
    low: np.ndarray | None = None,
) -> np.ndarray:
    """Raises if a hidden pair has a gradient; returns who sees whom at all.

    Pairs that a bias makes `low` are hidden in rows that see something else: where all
    is low, a softmax is over the low ones.
    """
    sees = seen["value"] | seen["key"]
    if low is not None:
        others = (sees & ~hidden & ~low).any(axis=1, keepdims=True)
        hidden = hidden | (low & others)
    for name in ("value", "key"):
        leaks = seen[name] & hidden
        if leaks.any():
            raise Fault(
                f"{int(leaks.sum())} of {int(hidden.sum())} pairs that are {why} have "
                f"a gradient to {name}, the first {_first(leaks)}",
                leaks=int(leaks.sum()),
            )
    return sees


def _expect_same(what: str, clean: np.ndarray, dirty: np.ndarray) -> None:
    """Raises unless two outputs are the same, but for rounding.

    Programs of XLA:CPU may share out their sums anew at every run. A leak of 1e9 with a
    weight of 1e-15 would show.
    """
    if np.array_equal(clean, dirty):
        return
    clean, dirty = (np.asarray(x, np.float64) for x in (clean, dirty))
    size = float(np.abs(clean).max(initial=0.0)) or 1.0
    away = np.abs(dirty - clean).reshape(len(clean), -1).max(axis=1)
    differs = np.flatnonzero(~(away <= ROUNDING * size))
    if differs.size:
        error = relative_error(dirty, clean)
        raise Fault(
            f"{what} changes {differs.size} of {len(clean)} rows, the first "
            f"{int(differs[0])}, by a relative {error:.1e}",
            error=error,
        )


def _pairs(num_keys: int, share: float = 0.6) -> np.ndarray:
    """A random [T, S] pattern in which every query sees a key near itself."""
    rng = np.random.default_rng(11)
    pairs = rng.random((NUM_QUERIES, num_keys)) < share
    pairs[np.arange(NUM_QUERIES), np.arange(NUM_QUERIES)] = True
    return pairs


def _beyond_a_block(trial: Trial, what: str, hidden: np.ndarray, **given: Any) -> None:
    """Poisons hidden keys of a sequence that is longer than common blocks."""
    arrays = {**trial.full(trial.inputs(LONG, LONG)), **given}
    clean = trial.bare(arrays)
    dirty = dict(arrays)
    names = ("key", "value") if trial.variant.cross else ("query", "key", "value")
    for name in names if "key_mask" in given else ("key", "value"):
        which = jnp.asarray(hidden)[:, None]
        dirty[name] = jnp.where(which, POISON, arrays[name])
    rows = ~hidden if "key_mask" in given and not trial.variant.cross else slice(None)
    what = f"1e9 in {what}, T = {LONG},"
    _expect_same(what, clean[rows], trial.bare(dirty)[rows])


def bias(trial: Trial) -> Finding:
    """Added to the logits: zero changes nothing, far below zero hides a pair."""
    _need(trial, "bias", "bias")
    arrays = trial.full(trial.inputs())
    shape = (NUM_QUERIES, trial.num_keys)
    plain = trial.run(arrays)
    expect_close("a bias of zeros against none", plain, trial.bare(arrays), 1e-5)
    hidden = ~_pairs(trial.num_keys)
    low = jnp.where(jnp.asarray(hidden), -1e9, 0.0).astype(jnp.float32)
    seen = trial.influence({**arrays, "bias": low})
    nobody = np.zeros_like(hidden)
    sees = _expect_unseen(seen, nobody, "biased by -1e9", hidden)
    before = trial.influence(arrays)
    lost = (before["value"] & ~hidden) & ~sees
    if lost.any() and lost.sum() > 0.5 * (before["value"] & ~hidden).sum():
        raise Fault(
            f"{int(lost.sum())} pairs with a bias of 0 are hidden as well, the first "
            f"{_first(lost)}"
        )
    draw = np.random.default_rng(5).standard_normal(shape)
    small = jnp.asarray(draw.astype(np.float32))
    changed = relative_error(trial.run({**arrays, "bias": small}), plain)
    if changed < 1e-3:
        raise Fault(f"a random bias changes the output by only {changed:.1e}")
    _, grads = trial.pull({**arrays, "bias": small})
    if not np.any(grads["bias"]):
        raise Fault("the gradient of the bias is zero everywhere")
    return Finding(
        f"zeros change nothing, -1e9 hides its {int(hidden.sum())} pairs, a random "
        f"bias changes {changed:.1e} and has a gradient"
    )


def mask(trial: Trial) -> Finding:
    """True means attend, and what is masked does not leak."""
    _need(trial, "mask", "mask")
    arrays = trial.full(trial.inputs())
    plain = trial.run(arrays)
    expect_close("a mask of True against none", plain, trial.bare(arrays), 1e-5)
    pairs = _pairs(trial.num_keys)
    pairs[:, 4] = False  # a key that nobody sees
    pairs[4, 4] = False
    masked = {**arrays, "mask": jnp.asarray(pairs)}
    sees = _expect_unseen(trial.influence(masked), ~pairs, "masked")
    if not sees.any():
        raise Fault("nothing is seen at all under a random mask")
    clean = trial.run(masked)
    dirty = {
        k: masked[k].at[4].set(POISON) if k != "query" else masked[k]
        for k in ("query", "key", "value")
    }
    _expect_same("1e9 in a key that nobody sees", clean, trial.run({**masked, **dirty}))
    nobody = np.asarray(~pairs.any(axis=0))
    _nan_is_hidden(trial, masked, nobody, "a key that nobody sees", clean, slice(None))
    unseen = np.random.default_rng(6).random(LONG) < 0.3
    everyone = jnp.asarray(np.broadcast_to(~unseen, (LONG, LONG)))
    _beyond_a_block(trial, "keys that nobody sees", unseen, mask=everyone)
    changed = relative_error(clean, plain)
    if changed < 1e-3:
        raise Fault(f"a random mask changes the output by only {changed:.1e}")
    return Finding(
        f"no gradient to any of {int((~pairs).sum())} masked pairs, 1e9 behind the "
        "mask changes nothing"
    )


def _nan_is_hidden(
    trial: Trial,
    arrays: dict[str, Any],
    hidden: np.ndarray,
    where: str,
    clean: np.ndarray,
    rows: Any,
) -> None:
    """Raises if NaN in hidden keys and values reaches the output or any gradient."""
    which = jnp.asarray(hidden)[:, None]
    advice = "replace what is masked by zeros before it is read: 0 · NaN is NaN"
    for name in ("key", "value"):
        dirty = jnp.where(which, jnp.nan, arrays[name])
        out, grads = trial.pull({**arrays, name: dirty})
        reached = {"the output": out[rows]}
        reached |= {f"the gradient of {k}": x for k, x in grads.items()}
        for what, found in reached.items():
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found)):
                raise Fault(f"NaN in the {name} of {where} reaches {what}; {advice}")
        _expect_same(f"NaN in the {name} of {where}", clean[rows], out[rows])


def key_mask(trial: Trial) -> Finding:
    """Padding does not leak, has no gradient, and cannot be told from its absence."""
    _need(trial, "key_mask", "key_mask")
    arrays = trial.full(trial.inputs())
    num_keys = trial.num_keys
    tokens = not trial.variant.cross  # T = S: what is padding there, is so for queries
    none = trial.run(arrays)
    expect_close("a key mask of True against none", none, trial.bare(arrays), 1e-5)
    length, read = NUM_QUERIES - 8, False
    scattered = np.random.default_rng(2).random(num_keys) < 0.7
    scattered[0] = True
    for name, keys in (
        ("at the end", np.arange(num_keys) < length),
        ("in between", scattered),
    ):
        masked = {**arrays, "key_mask": jnp.asarray(keys)}
        clean, grads = trial.pull(masked)
        expect_finite(f"the output with padding {name}", clean)
        rows = keys if tokens else np.ones(NUM_QUERIES, bool)
        for argument in ("key", "value"):
            leak = np.abs(np.asarray(grads[argument][~keys], np.float64)).max()
            if leak != 0:
                raise Fault(
                    f"the gradient of padding {name} in {argument} is not zero: up to "
                    f"{leak:.1e}"
                )
        which = jnp.asarray(~keys)[:, None]
        dirty: dict[str, Any] = {
            k: jnp.where(which, POISON, masked[k])
            for k in (("query", "key", "value") if tokens else ("key", "value"))
        }
        poisoned, dirty_grads = trial.pull({**masked, **dirty})
        _expect_same(f"1e9 in padding {name}", clean[rows], poisoned[rows])
        if not tokens:
            for argument in ("query", "key", "value"):
                expect_finite(f"gradient of {argument}", dirty_grads[argument])
        if tokens:
            holes = {k: jnp.where(which, jnp.nan, x) for k, x in dirty.items()}
            got = trial.run({**masked, **holes})
            _expect_same(f"NaN in padding {name}", clean[rows], got[rows])
        _nan_is_hidden(trial, masked, ~keys, f"padding {name}", clean, rows)
        read |= relative_error(clean[rows], none[rows]) > 1e-6
    if not read:
        raise Fault("padding changes nothing: the key mask is not read")
    padding = np.random.default_rng(6).random(LONG) < 0.3
    _beyond_a_block(trial, "padding", padding, key_mask=jnp.asarray(~padding))
    return _invisible(trial, arrays, length)


def _invisible(trial: Trial, arrays: dict[str, Any], length: int) -> Finding:
    """Whether a padded sequence gives what the shorter one gives."""
    num_keys = trial.num_keys
    keys = jnp.arange(num_keys) < length
    padded = trial.run({**arrays, "key_mask": keys})
    short = {**arrays, "key": arrays["key"][:length], "value": arrays["value"][:length]}
    if not trial.variant.cross:
        short["query"], padded = arrays["query"][:length], padded[:length]
    leak = "padding has no gradient, and 1e9 in it changes nothing"
    try:
        alone = trial.bare(short)
    except REFUSALS as error:
        said = str(error).splitlines()[0]
        return Finding(f"{leak}; without padding it cannot run here: {said}")
    try:
        what = "a padded sequence against its real part"
        away = expect_close(what, padded, alone, 1e-4)
    except Fault:
        if not trial.variant.stochastic:
            raise
        _same_on_average(trial, {**arrays, "key_mask": keys}, short)
        return Finding(
            f"{leak}; its draws depend on the padded length, not its mean over draws"
        )
    return Finding(f"{leak}; equal to the sequence without padding ({away:.1e})")


def _same_on_average(trial: Trial, padded: Any, short: Any, draws: int = 64) -> None:
    """Raises if a padded sequence gives another mean over draws than its real part."""
    means, spreads = [], []
    rows = short["query"].shape[0]
    for arrays in (padded, short):
        outs = np.stack(
            [
                trial.bare({**arrays, "rng": jax.random.key(1000 + seed)})[:rows]
                for seed in range(draws)
            ]
        ).astype(np.float64)
        means.append(outs.mean(axis=0))
        spreads.append(outs.std(axis=0) / np.sqrt(draws))
    noise = np.hypot(*spreads) + 1e-6
    off = np.abs(means[0] - means[1]) / noise
    if float((off > 4).mean()) > 0.05:
        raise Fault(
            f"a padded sequence and its real part differ in the mean of {draws} draws, "
            f"by a relative {relative_error(means[0], means[1]):.1e}"
        )


def causal(trial: Trial) -> Finding:
    """Query t sees keys s <= t alone."""
    _need(trial, "causal", "is_causal")
    lengths = [(NUM_QUERIES, NUM_QUERIES)]
    if trial.variant.cross:
        lengths += [(NUM_QUERIES, NUM_QUERIES + 6), (NUM_QUERIES, NUM_QUERIES - 6)]
    for num_queries, num_keys in lengths:
        arrays = trial.full(trial.inputs(num_queries, num_keys))
        # Gradients where T = S; elsewhere the output alone.
        run = trial.run if num_queries == num_keys else trial.bare
        future = np.arange(num_keys)[None, :] > np.arange(num_queries)[:, None]
        try:
            clean = run(arrays, is_causal=True)
        except REFUSALS:
            if num_queries == num_keys:
                raise
            continue  # refuses causal with T ≠ S
        where = f"at T={num_queries}, S={num_keys}"
        for last in (0, num_queries // 2, num_queries - 2):
            for name, fill in (("1e9", POISON), ("zeros", 0.0)):
                dirty = {
                    k: arrays[k].at[last + 1 :].set(fill) for k in ("key", "value")
                }
                got = trial.run({**arrays, **dirty}, is_causal=True)
                _expect_same(
                    f"{name} in keys and values after t={last} ({where})",
                    clean[: last + 1],
                    got[: last + 1],
                )
        if num_queries != num_keys:
            continue
        seen = trial.influence(arrays, is_causal=True)
        sees = _expect_unseen(seen, future, "in the future")
        if (seen["query"] & future).any():
            raise Fault("outputs have a gradient to later queries")
        t = np.arange(1, num_queries)
        if not (sees[t, 0] | sees[t, t - 1]).any():
            raise Fault("no query sees a key before its own: the past is hidden too")
        _causal_and_masked(trial, arrays, future)
    _long_and_causal(trial)
    return Finding(
        "no gradient to the future, and 1e9 or zeros there leave the past as it is"
    )


def _causal_and_masked(
    trial: Trial, arrays: dict[str, Any], future: np.ndarray
) -> None:
    """Masks and bias hide what they hide also where attention is causal."""
    given: dict[str, Any] = {}
    hidden = future.copy()
    if trial.variant.key_mask and "key_mask" in trial.takes:
        keys = np.random.default_rng(8).random(NUM_QUERIES) < 0.7
        keys[:3] = False
        given["key_mask"] = jnp.asarray(keys)
        hidden |= ~keys[None, :]
    if trial.variant.mask and "mask" in trial.takes:
        pairs = _pairs(NUM_QUERIES)
        given["mask"] = jnp.asarray(pairs)
        hidden |= ~pairs
    empty = hidden.all(axis=1) if given else np.zeros(NUM_QUERIES, bool)
    low = None
    if trial.variant.bias and "bias" in trial.takes:
        low = ~_pairs(NUM_QUERIES, 0.8)
        given["bias"] = jnp.where(jnp.asarray(low), -1e9, 0.0).astype(jnp.float32)
    if not given:
        return
    what = " and ".join(given)
    seen = trial.influence({**arrays, **given}, is_causal=True)
    tokens = not trial.variant.cross  # padded queries may see what they like
    if tokens and "key_mask" in given:
        real = np.asarray(given["key_mask"])
        hidden, empty = hidden & real[:, None], empty & real
        low = None if low is None else low & real[:, None]
    _expect_unseen(seen, hidden, f"hidden by {what}, where causal,", low)
    out, grads = trial.pull({**arrays, **given}, is_causal=True)
    expect_finite(f"the causal output with {what}", out)
    for leaf in jax.tree.leaves(grads):
        expect_finite(f"a causal gradient with {what}", leaf)
    if np.any(out[empty]):
        raise Fault(
            f"causal with {what}: a query without any key gives "
            f"{np.abs(np.asarray(out[empty], np.float64)).max():.1e} instead of zeros"
        )


def _long_and_causal(trial: Trial) -> None:
    """Beyond a block, the future and its length leave the past as it is."""
    arrays = trial.full(trial.inputs(LONG, LONG))
    clean = trial.bare(arrays, is_causal=True)
    for last in (70, 199):
        dirty = dict(arrays)
        for k in ("key", "value"):
            dirty[k] = arrays[k].at[last + 1 :].set(POISON)
        got = trial.bare(dirty, is_causal=True)
        what = f"1e9 in keys and values after t={last}, T = {LONG},"
        _expect_same(what, clean[: last + 1], got[: last + 1])
    if trial.variant.key_mask and "key_mask" in trial.takes:
        padded = {**arrays, "key_mask": jnp.arange(LONG) <= 199}
        got = trial.bare(padded, is_causal=True)
        what = "the past, where the future is padding, against where it is not"
        expect_close(what, got[:200], clean[:200], 1e-4)
    if trial.variant.stochastic:
        return
    prefix = {
        k: x[:200] if k in ("query", "key", "value") else x for k, x in arrays.items()
    }
    try:
        alone = trial.bare(prefix, is_causal=True)
    except REFUSALS:
        return
    expect_close("the first 200 tokens against them alone", clean[:200], alone, 1e-4)


def empty_rows(trial: Trial) -> Finding:
    """A query that may attend to nothing gives zeros, with zero gradients."""
    arrays = trial.full(trial.inputs())
    ways: list[tuple[str, dict[str, Any], np.ndarray]] = []
    everyone = np.ones(NUM_QUERIES, bool)
    if trial.variant.key_mask and "key_mask" in trial.takes:
        none = jnp.zeros((trial.num_keys,), bool)
        ways.append(("all keys are padding", {"key_mask": none}, everyone))
    if trial.variant.mask and "mask" in trial.takes:
        pairs = _pairs(trial.num_keys)
        pairs[3] = False
        row = np.arange(NUM_QUERIES) == 3
        ways.append(("a masked row", {"mask": jnp.asarray(pairs)}, row))
    if not ways:
        raise NotApplicable("it takes neither key_mask nor mask")
    for name, given, rows in ways:
        out, grads = trial.pull({**arrays, **given})
        expect_finite(f"the output where {name}", out)
        if np.any(out[rows]):
            raise Fault(
                f"{name}: the output should be zeros, but reaches "
                f"{np.abs(np.asarray(out[rows], np.float64)).max():.1e}"
            )
        for argument in sorted(grads):
            for leaf in jax.tree.leaves(grads[argument]):
                expect_finite(f"the gradient of {argument} where {name}", leaf)
        if np.any(grads["query"][rows]):
            raise Fault(f"{name}: the gradient of those queries is not zero")
        if rows.all() and (np.any(grads["key"]) or np.any(grads["value"])):
            raise Fault(f"{name}: the gradient of keys and values is not zero")
    return Finding(f"zeros and zero gradients: {', '.join(name for name, *_ in ways)}")
