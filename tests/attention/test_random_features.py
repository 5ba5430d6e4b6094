"""Random features: from their equations, and near to the kernels they stand for."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.random_features import (
    orthogonal_features,
    performer,
    rfa,
    rfa_exact,
    rfa_gate,
    rfa_gate_init,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 6, 3
performer_relu = functools.partial(performer, kernel="relu")
RNG = jax.random.key(7)


def _arrays(draw, num_queries, num_keys=None, seed=0):
    num_keys = num_queries if num_keys is None else num_keys
    shapes = {"query": (num_queries, H), "key": (num_keys, H), "value": (num_keys, V)}
    return draw(shapes, seed)


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _weigh(weights, value, least=None):
    """Σ_s w[t, s] v_s over Σ_s w[t, s], which is no less than `least`[t]."""
    out = np.zeros((len(weights), value.shape[1]))
    for t, row in enumerate(weights):
        total = row.sum() if least is None else max(row.sum(), least[t])
        if total > 0:
            out[t] = row @ value / total
    return out


def _allowed(num_queries, key_mask, is_causal):
    seen = np.tile(key_mask, (num_queries, 1))
    return seen & np.tri(*seen.shape, dtype=bool) if is_causal else seen


def _performer_by_equation(query, key, value, w, kernel, scale, allowed):
    query, key = np.sqrt(scale) * query, np.sqrt(scale) * key

    def features(x):
        if kernel == "relu":
            return np.maximum(w @ x, 0) + 1e-3
        return np.exp(w @ x - x @ x / 2)

    weights = np.zeros(allowed.shape)
    for t, s in zip(*np.nonzero(allowed), strict=True):
        weights[t, s] = features(query[t]) @ features(key[s])
    return _weigh(weights, value)


def _rfa_weights(query, key, w, allowed):
    def features(x):
        return np.concatenate([np.sin(w @ x), np.cos(w @ x)]) / np.sqrt(len(w))

    query, key = _unit(query), _unit(key)
    weights = np.zeros(allowed.shape)
    for t, s in zip(*np.nonzero(allowed), strict=True):
        weights[t, s] = features(query[t]) @ features(key[s])
    return weights


def _rfa_by_equation(query, key, value, w, sigma, allowed):
    least = allowed.sum(axis=1) * np.exp(-2 / sigma**2)
    return _weigh(_rfa_weights(query, key, w, allowed), value, least)


def _gate_by_equation(query, key, value, gate, gate_bias, w, sigma, key_mask):
    """The recurrence of the paper, token by token."""

    def features(x):
        x = _unit(x)
        return np.concatenate([np.sin(w @ x), np.cos(w @ x)]) / np.sqrt(len(w))

    out = np.zeros(value.shape)
    memory, normalizer, taken = np.zeros((2 * len(w), V)), np.zeros(2 * len(w)), 0.0
    for t in range(len(query)):
        if key_mask[t]:
            g = 1 / (1 + np.exp(-(gate @ key[t] + gate_bias)))
            phi = features(key[t])
            memory = g * memory + (1 - g) * np.outer(phi, value[t])
            normalizer = g * normalizer + (1 - g) * phi
            taken = g * taken + (1 - g)
        phi = features(query[t])
        total = max(phi @ normalizer, taken * np.exp(-2 / sigma**2))
        if total > 0:
            out[t] = phi @ memory / total
    return out


def _directions(num_features, orthogonal=False):
    if orthogonal:
        return np.float64(orthogonal_features(RNG, num_features, H))
    return np.float64(jax.random.normal(RNG, (num_features, H)))


@pytest.mark.parametrize("num_features", [3, H, 2 * H + 2])
def test_directions_are_orthogonal_and_normal(num_features):
    one = functools.partial(orthogonal_features, num_features=num_features, head_dim=H)
    draws = jax.jit(jax.vmap(one))
    w = np.asarray(draws(jax.random.split(RNG, 2000)))
    assert w.shape == (2000, num_features, H)
    for begin in range(0, num_features, H):
        block = w[:, begin : begin + H]
        angles = _unit(block) @ np.swapaxes(_unit(block), 1, 2)
        np.testing.assert_allclose(angles - np.eye(block.shape[1]), 0, atol=1e-5)
    if num_features > H:
        assert np.abs(_unit(w[:, 0] * w[:, H]).sum(-1)).max() > 0.1
    # Each row alone is normal: mean 0, covariance 1, and moments of its length.
    rows = w[:, -1]
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(rows.T @ rows / 2000, np.eye(H), atol=0.15)
    lengths = (rows**2).sum(axis=1)
    np.testing.assert_allclose(lengths.var() / (2 * H), 1, atol=0.25)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_performer_equals_the_equation(kernel, is_causal, draw, slope):
    num_queries, num_keys = (9, 7) if is_causal else (5, 9)
    arrays = _arrays(draw, num_queries, num_keys)
    key_mask = np.arange(num_keys) % 4 != 0
    orthogonal = kernel == "softmax"
    fn = functools.partial(
        performer,
        rng=RNG,
        key_mask=key_mask,
        is_causal=is_causal,
        scale=0.6,
        num_features=8,
        kernel=kernel,
        orthogonal=orthogonal,
        chunk_size=4,
    )
    by_equation = functools.partial(
        _performer_by_equation,
        w=_directions(8, orthogonal),
        kernel=kernel,
        scale=0.6,
        allowed=_allowed(num_queries, key_mask, is_causal),
    )
    helpers.agree(fn, by_equation, arrays, atol=2e-5, slopes=1e-3)


def _mean_square_error(fn, exact, arrays, num_features, draws=32):
    """Of the output over `draws` redraws."""

    def one(rng):
        return fn(**arrays, rng=rng, num_features=num_features)

    outs = jax.jit(jax.vmap(one))(jax.random.split(RNG, draws))
    return float(jnp.square(outs - exact[None]).mean())


@pytest.mark.parametrize(
    "fn, exact",
    [
        (functools.partial(performer, orthogonal=False), dot_product),
        (functools.partial(performer, is_causal=True), dot_product),
        (rfa, rfa_exact),
        (functools.partial(rfa, is_causal=True, sigma=0.8), rfa_exact),
    ],
)
def test_error_falls_with_the_root_of_the_number_of_features(fn, exact, draw):
    arrays = _arrays(draw, 12)
    arrays = {name: 0.5 * array for name, array in arrays.items()}
    options = getattr(fn, "keywords", {})
    names = inspect.signature(exact).parameters
    exact = exact(**arrays, **{k: v for k, v in options.items() if k in names})
    coarse, fine = (_mean_square_error(fn, exact, arrays, m) for m in (32, 32 * 16))
    # 16 times the features: a 16th of the mean square. A bias would stop it.
    assert 8 < coarse / fine < 32


def test_orthogonal_directions_vary_less(draw):
    arrays = {name: 0.5 * array for name, array in _arrays(draw, 12).items()}
    exact = dot_product(**arrays)
    errors = [
        _mean_square_error(functools.partial(performer, orthogonal=o), exact, arrays, H)
        for o in (True, False)
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_performer_at_any_logits(is_causal, size, draw):
    arrays = _arrays(draw, 9)
    arrays["query"] *= size
    arrays["key"] *= size
    arrays["key"][0] = -10 * arrays["query"][0]  # as far from the first query as can be
    fn = functools.partial(
        performer, rng=RNG, is_causal=is_causal, num_features=16, chunk_size=4
    )
    found = helpers.value_and_grads(fn, arrays, jnp.ones((9, V)))
    assert all(np.isfinite(array).all() for array in found.values())
    out, value = np.asarray(found["out"]), arrays["value"]
    assert (out >= value.min(axis=0) - 1e-5).all()
    assert (out <= value.max(axis=0) + 1e-5).all()
    assert out.any(axis=1).all()
    if is_causal:  # the first query has one key
        np.testing.assert_allclose(found["out"][0], arrays["value"][0], rtol=1e-5)


def test_one_form_in_chunks_and_at_once_in_the_last_row(draw):
    arrays = _arrays(draw, 11)
    arrays["key"] *= 9
    given = {"rng": RNG, "num_features": 16, "chunk_size": 4}
    for fn in (performer, performer_relu, rfa):
        causal, whole = (
            jax.jit(functools.partial(fn, is_causal=causal, **given))(**arrays)
            for causal in (True, False)
        )
        np.testing.assert_allclose(causal[-1], whole[-1], atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rfa_equals_the_equation(is_causal, draw, slope):
    num_queries, num_keys = (9, 7) if is_causal else (5, 9)
    arrays = _arrays(draw, num_queries, num_keys)
    key_mask = np.arange(num_keys) % 4 != 0
    allowed = _allowed(num_queries, key_mask, is_causal)
    fn = functools.partial(
        rfa,
        rng=RNG,
        key_mask=key_mask,
        is_causal=is_causal,
        num_features=2,
        sigma=0.8,
        chunk_size=4,
    )
    w = _directions(2) / 0.8
    # Some denominators are below what the kernel can be, and some are not.
    totals = _rfa_weights(arrays["query"], arrays["key"], w, allowed).sum(axis=1)
    held = (totals < allowed.sum(axis=1) * np.exp(-2 / 0.8**2)) & allowed.any(axis=1)
    assert held.any() and not held.all()
    by_equation = functools.partial(_rfa_by_equation, w=w, sigma=0.8, allowed=allowed)
    helpers.agree(fn, by_equation, arrays, atol=2e-5, slopes=1e-3)


def test_few_features_and_a_narrow_kernel_stay_bounded(draw):
    arrays = _arrays(draw, 40)
    for sigma, bound in ((1.0, np.exp(2.0)), (0.05, 1e6)):
        fn = functools.partial(rfa, rng=RNG, num_features=1, sigma=sigma)
        found = helpers.value_and_grads(fn, arrays, jnp.ones((40, V)))
        assert all(np.isfinite(array).all() for array in found.values())
        assert np.abs(found["out"]).max() <= bound * np.abs(arrays["value"]).max()


def test_rfa_exact_is_dot_product_on_unit_vectors(draw):
    arrays = _arrays(draw, 7)
    unit = {**arrays, "query": _unit(arrays["query"]), "key": _unit(arrays["key"])}
    theirs = dot_product(**unit, scale=1 / 0.3**2, is_causal=True)
    ours = rfa_exact(**arrays, sigma=0.3, is_causal=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # Rows of zeros have no direction; nothing breaks there.
    arrays["query"][2] = arrays["key"][3] = 0.0
    fn = functools.partial(rfa, rng=RNG, num_features=4)
    found = helpers.value_and_grads(fn, arrays, jnp.ones((7, V)))
    assert all(np.isfinite(array).all() for array in found.values())


def _gated(query, key, value, gate, gate_bias, **options):
    params = {"gate": gate, "gate_bias": gate_bias}
    return rfa_gate(query, key, value, params=params, rng=RNG, **options)


def _gate_arrays(draw, length, bias=0.0):
    gate = rfa_gate_init(jax.random.key(1), H)["gate"]
    gates = {"gate": np.asarray(gate), "gate_bias": np.float32(bias)}
    return {**_arrays(draw, length), **gates}


@pytest.mark.parametrize("bias", [-1.0, 2.0])
def test_gate_equals_the_recurrence(bias, draw, slope):
    arrays = _gate_arrays(draw, 11, bias)
    key_mask = np.arange(11) % 4 != 0
    given = {"key_mask": key_mask, "sigma": 0.8}
    fn = functools.partial(_gated, num_features=8, chunk_size=4, **given)
    by_equation = functools.partial(_gate_by_equation, w=_directions(8) / 0.8, **given)
    helpers.agree(fn, by_equation, arrays, atol=2e-5, slopes=1e-3)


def test_an_open_gate_is_rfa(draw):
    arrays = _arrays(draw, 9)
    whole = functools.partial(rfa, rng=RNG, is_causal=True, num_features=8)
    expected = jax.jit(whole)(**arrays)
    fn = jax.jit(functools.partial(_gated, num_features=8, chunk_size=4))
    zeros = np.zeros(H, "f")
    for bias in (12.0, 1e4):
        open_gate = fn(**arrays, gate=zeros, gate_bias=np.float32(bias))
        np.testing.assert_allclose(open_gate, expected, atol=1e-3)
    # A closed gate remembers the last key alone.
    closed = fn(**arrays, gate=zeros, gate_bias=np.float32(-1e4))
    weights = _rfa_weights(
        arrays["query"], arrays["key"], _directions(8), np.eye(9, dtype=bool)
    )
    last = _weigh(weights, arrays["value"], np.full(9, np.exp(-2)))
    np.testing.assert_allclose(closed, last, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_padding_is_as_if_it_were_not_there(size, draw):
    arrays = _gate_arrays(draw, 11)
    arrays["key"] *= size
    real = np.arange(11) % 4 != 0
    tokens = ("query", "key", "value")
    short = {n: a[real] if n in tokens else a for n, a in arrays.items()}
    for name in tokens:
        arrays[name][~real] = 1e9
    fn = functools.partial(_gated, num_features=8, chunk_size=4)
    expected = helpers.value_and_grads(fn, short, jnp.ones((real.sum(), V)))
    cotangent = np.where(real[:, None], np.float32(1), 0) * np.ones((1, V), "f")
    masked = functools.partial(fn, key_mask=real)
    found = helpers.value_and_grads(masked, arrays, cotangent)
    for name, array in found.items():
        assert np.isfinite(array).all()
        ours = array[real] if name in ("out", *tokens) else array
        np.testing.assert_allclose(ours, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("fn", [performer, performer_relu, rfa])
def test_the_key_decides_the_draw(fn, draw):
    arrays = _arrays(draw, 5)
    fn = jax.jit(functools.partial(fn, num_features=8))
    first, again, other = (fn(**arrays, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    "fn, options, error, message",
    [
        (performer, {"kernel": "exp"}, ValueError, "`kernel` must be 'softmax' or"),
        (performer, {"num_features": 0}, ValueError, "`num_features` must be at leas"),
        (performer, {"chunk_size": 1.5}, TypeError, "`chunk_size` must be an int"),
        (rfa, {"num_features": 8.0}, TypeError, "`num_features` must be an int"),
        (rfa, {"sigma": 0.0}, ValueError, "`sigma` must be positive, but is 0"),
        (rfa_gate, {"params": {}}, ValueError, "`rfa_gate_init"),
        (rfa_gate, {"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6"),
        (rfa_gate, {"is_causal": False}, TypeError, "is_causal"),
    ],
)
def test_bad_arguments_are_named(fn, options, error, message, draw):
    given = {**_arrays(draw, 6), "rng": RNG}
    if fn is rfa_gate:
        given["params"] = rfa_gate_init(RNG, H)
    with pytest.raises(error, match=message):
        fn(**{**given, **options})
