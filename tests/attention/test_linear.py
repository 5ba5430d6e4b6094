"""Linear attention: from its equation, in three equal forms, and safe with logs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention._scores import MASKED_LOGIT
from attn_jax.attention.linear_attention import (
    FEATURE_MAPS,
    causal_product,
    cosformer,
    linear,
    linear_init_state,
    linear_parallel,
    linear_recurrent,
    linear_step,
)
from tests import helpers

H, V = 6, 3

MAPS = {
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(x)),
    "relu": lambda x: np.maximum(x, 0),
    "softplus": lambda x: np.log1p(np.exp(x)),
}


def _arrays(draw, num_queries, num_keys=None, seed=0):
    num_keys = num_queries if num_keys is None else num_keys
    shapes = {"query": (num_queries, H), "key": (num_keys, H), "value": (num_keys, V)}
    return draw(shapes, seed)


def _loops(similarity, query, key, value, key_mask, is_causal):
    """Σ_s sim v / Σ_s sim, pair by pair in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros((len(query), value.shape[1]))
    for t in range(len(query)):
        total = 0.0
        for s in range(len(key)):
            if key_mask[s] and (s <= t or not is_causal):
                w = similarity(query[t], key[s], t, s)
                total += w
                out[t] += w * value[s]
        if total > 0:
            out[t] /= total
    return out


def _linear_loops(feature_map, **given):
    phi = MAPS[feature_map]
    return _loops(lambda q, k, t, s: phi(q) @ phi(k), **given)


def _cosformer_loops(query, key, value, key_mask, is_causal, horizon=None):
    real = horizon or 1 + max(np.flatnonzero(key_mask), default=0)

    def similarity(q, k, t, s):
        near = np.cos(np.pi / 2 * (min(t, real - 1) - s) / real)
        return np.maximum(q, 0) @ np.maximum(k, 0) * near

    return _loops(similarity, query, key, value, key_mask, is_causal)


@pytest.mark.parametrize("name", [*FEATURE_MAPS, "cosformer"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_the_equation(name, is_causal, draw, slope):
    length = 11
    arrays = _arrays(draw, length)
    given = {"key_mask": np.arange(length) % 4 != 2, "is_causal": is_causal}
    given["key_mask"][-1] = False
    if name == "cosformer":
        fn = functools.partial(cosformer, horizon=16 if is_causal else None)
        loops = functools.partial(
            _cosformer_loops, horizon=16 if is_causal else None, **given
        )
    else:
        fn = functools.partial(linear, feature_map=name)
        loops = functools.partial(_linear_loops, feature_map=name, **given)
    helpers.agree(functools.partial(fn, chunk_size=4, **given), loops, arrays)


@pytest.mark.parametrize(
    "length, chunk_size, feature_map",
    [(1, 4, "elu"), (2, 1, "softplus"), (9, 4, "elu"), (8, 4, jnp.square)],
)
def test_three_forms_are_equal(length, chunk_size, feature_map, draw):
    arrays = _arrays(draw, length)
    key_mask = np.arange(length) % 3 != 1
    key_mask[0] = length != 9  # then nothing is seen at first
    options = {"key_mask": key_mask, "feature_map": feature_map}
    forms = (
        functools.partial(linear_parallel, is_causal=True, **options),
        functools.partial(linear, is_causal=True, chunk_size=chunk_size, **options),
        functools.partial(linear_recurrent, **options),
    )
    cotangent = jnp.cos(jnp.arange(length * V, dtype="float32")).reshape(length, V)
    theirs, *others = (helpers.value_and_grads(fn, arrays, cotangent) for fn in forms)
    for ours in others:
        for name, found in ours.items():
            np.testing.assert_allclose(found, theirs[name], atol=2e-5, err_msg=name)


def test_steps_continue_from_a_state(draw):
    arrays = _arrays(draw, 6)
    state = linear_init_state(H, V)
    outs, step = [], jax.jit(linear_step)
    for t in range(6):
        real = jnp.asarray(t != 2)
        row = {name: jnp.asarray(array[t]) for name, array in arrays.items()}
        before = state
        state, out = step(state, **row, key_mask=real)
        outs.append(out)
        if t == 2:  # padding leaves the state as it is
            np.testing.assert_array_equal(before.memory, state.memory)
    whole = jax.jit(functools.partial(linear, is_causal=True))
    expected = whole(**arrays, key_mask=jnp.arange(6) != 2)
    np.testing.assert_allclose(np.stack(outs), expected, atol=1e-6)
    assert linear_init_state(H, V, jnp.bfloat16).memory.dtype == jnp.float32


@pytest.mark.parametrize("num_queries, num_keys", [(9, 5), (5, 9)])
def test_causal_cross_is_aligned_at_the_top_left(num_queries, num_keys, draw):
    arrays = _arrays(draw, num_queries, num_keys)
    both = functools.partial(linear, chunk_size=4), linear_parallel
    ours, theirs = (
        jax.jit(functools.partial(f, is_causal=True))(**arrays) for f in both
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def _product_by_pairs(query, key, value, log_scale, log_decay):
    """`causal_product` with all pairs and one logarithm for each, in float64."""
    query, key, value = (np.float64(x) for x in (query, key, value))
    length = len(query)
    out = np.zeros((length, value.shape[1]))
    for t in range(length):
        logs = np.zeros(t + 1)
        for s in range(t + 1):
            if log_scale is not None:
                logs[s] += log_scale[s]
            if log_decay is not None:
                logs[s] += np.float64(log_decay[s + 1 : t + 1]).sum()
        if log_scale is not None:
            logs -= logs.max()
        for s in range(t + 1):
            out[t] += np.exp(logs[s]) * (query[t] @ key[s]) * value[s]
    return out


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_products_with_logarithms(scaled, decayed, spread, draw, slope):
    length = 10
    drawn = draw({"a": (length, 4), "b": (length, 4), "v": (length, V), "l": (2, 10)})
    arrays = {"query": drawn["a"], "key": drawn["b"], "value": drawn["v"]}
    arrays["log_scale"] = spread * drawn["l"][0] if scaled else None
    arrays["log_decay"] = -spread * abs(drawn["l"][1]) if decayed else None

    def ours(query, key, value, **logs):
        return causal_product(query, key, value, chunk_size=3, **logs)

    given = {name: array for name, array in arrays.items() if array is not None}
    if spread > 1:
        found = helpers.value_and_grads(ours, given)
        np.testing.assert_allclose(found["out"], _product_by_pairs(**arrays), atol=5e-3)
        assert all(np.isfinite(array).all() for array in found.values())
        return

    def theirs(**changed):
        return _product_by_pairs(**{**arrays, **changed})

    helpers.agree(ours, theirs, given, slopes=1e-3)


def test_no_later_key_is_felt_even_in_its_chunk(draw):
    length, t = 8, 4
    drawn = draw({"a": (length, 4), "b": (length, 4), "v": (length, V), "l": (2, 8)})
    logs = {"log_scale": drawn["l"][0], "log_decay": -abs(drawn["l"][1])}
    product = jax.jit(functools.partial(causal_product, chunk_size=5))
    clean = product(drawn["a"], drawn["b"], drawn["v"], **logs)
    for array in (drawn["b"], drawn["v"], logs["log_scale"]):
        array[t + 1 :] = 1e9
    logs["log_decay"][t + 1 :] = -1e9
    dirty = product(drawn["a"], drawn["b"], drawn["v"], **logs)
    np.testing.assert_array_equal(clean[: t + 1], dirty[: t + 1])
    assert (clean[t + 1 :] != dirty[t + 1 :]).any()


def test_a_row_keeps_its_largest_key_whatever_the_scale():
    ones = jnp.ones((6, 1))
    log_scale = jnp.asarray([MASKED_LOGIT, -1e30, -1e4, 1e4, -1e4, 1e30])
    product = jax.jit(functools.partial(causal_product, chunk_size=2))
    out = product(ones, ones.at[0].set(0), ones, log_scale=log_scale)
    np.testing.assert_array_equal(out[:, 0], [0, 1, 1, 1, 1, 1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_very_negative_inputs_keep_weights_and_gradients(is_causal, draw):
    arrays = _arrays(draw, 5)
    arrays = {**arrays, "query": arrays["query"] - 1e4, "key": arrays["key"] - 1e4}
    fn = functools.partial(linear, is_causal=is_causal)
    found = helpers.value_and_grads(fn, arrays, jnp.ones((5, V)))
    mean = np.cumsum(arrays["value"], 0) / np.arange(1, 6)[:, None]
    np.testing.assert_allclose(
        found["out"],
        mean if is_causal else np.tile(mean[-1], (5, 1)),
        rtol=1e-5,
    )
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize(
    "fn", [functools.partial(linear, feature_map="relu"), cosformer]
)
def test_nothing_in_common_gives_zeros(fn, draw):
    arrays = _arrays(draw, 5)
    arrays["query"][2] = -1.0
    found = helpers.value_and_grads(fn, arrays, jnp.ones((5, V)))
    assert not found["out"][2].any() and found["out"][1].any()
    assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_invisible_to_cosformer(is_causal, draw):
    arrays = _arrays(draw, 7)
    fn = jax.jit(functools.partial(cosformer, is_causal=is_causal))
    short = fn(**arrays)
    padded = {name: np.pad(a, ((0, 4), (0, 0))) for name, a in arrays.items()}
    for array in padded.values():
        array[7:] = 1e9
    long = fn(**padded, key_mask=jnp.arange(11) < 7)
    np.testing.assert_allclose(long[:7], short, atol=1e-6)
    # Without the mask the length is another, and so are the weights.
    padded = {name: np.pad(a, ((0, 4), (0, 0))) for name, a in arrays.items()}
    assert np.abs(fn(**padded)[:7] - short).max() > 1e-3


@pytest.mark.parametrize("length", [512, 20_000])
def test_causal_cosformer_weighs_by_distance_at_any_length(length, draw):
    arrays = draw({"query": (length, H), "key": (length, H), "value": (length, V)})
    run = jax.jit(lambda fn, **a: fn(**a, is_causal=True), static_argnums=0)
    ours = run(cosformer, **arrays)
    # The last row by its equation, with N = T.
    t, s = length - 1, np.arange(length)
    relu = {n: np.maximum(np.float64(arrays[n]), 0) for n in ("query", "key")}
    weights = relu["key"] @ relu["query"][t] * np.cos(np.pi / 2 * (t - s) / length)
    want = weights @ arrays["value"] / weights.sum()
    np.testing.assert_allclose(ours[t], want, atol=2e-4)
    plain = run(functools.partial(linear, feature_map="relu"), **arrays)
    spread = np.std(plain[length // 2 :])  # about √(V / length), the noise of a mean
    assert np.abs(ours - plain)[length // 2 :].mean() > 0.2 * spread


def test_a_horizon_makes_the_past_independent_of_the_length(draw):
    arrays = _arrays(draw, 11)
    fn = functools.partial(cosformer, is_causal=True, horizon=16)
    short = fn(**{name: a[:7] for name, a in arrays.items()})
    np.testing.assert_allclose(fn(**arrays)[:7], short, atol=1e-6)


@pytest.mark.parametrize(
    "fn, options, error, message",
    [
        (linear, {"feature_map": "exp"}, ValueError, "`feature_map` must be one of"),
        (linear, {"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
        (linear, {"chunk_size": 2.0}, TypeError, "`chunk_size` must be an int"),
        (linear, {"value": np.ones((4, V), "f")}, ValueError, "`value` must have"),
        (cosformer, {"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6"),
        (cosformer, {"horizon": 5}, ValueError, "`horizon` of 5 tokens, but T=6"),
        (linear_recurrent, {"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6"),
    ],
)
def test_bad_arguments_are_named(fn, options, error, message, draw):
    with pytest.raises(error, match=message):
        fn(**{**_arrays(draw, 6), **options})


def test_shapes_of_a_step_and_a_product_are_checked():
    x = jnp.ones(H)
    with pytest.raises(ValueError, match="`state.memory` must have shape"):
        linear_step(linear_init_state(H, V + 1), x, x, jnp.ones(V))
    x = jnp.ones((4, H))
    with pytest.raises(ValueError, match="`key_features` must have shape"):
        causal_product(x, jnp.ones((4, H + 1)), x)
    with pytest.raises(ValueError, match="`log_decay` must have shape"):
        causal_product(x, x, x, log_decay=jnp.ones(5))
