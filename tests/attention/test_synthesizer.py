"""Synthesizers: the papers' equations, and what they do not read."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from attn_jax.attention import synthesizer
from attn_jax.attention.softmax import dot_product
from tests import helpers

T, S, H, V, D, L = 6, 9, 4, 3, 5, 11
RNG = jax.random.key(0)
KINDS = ("dense", "dense_factorized", "random", "random_factorized", "mixture")
NETWORK = {
    "hidden": (H, D),
    "hidden_bias": (D,),
    "output": (D, L),
    "output_bias": (L,),
}
SHAPES = {
    "dense": NETWORK,
    "dense_factorized": {
        f"{leaf}_{x}": tuple(size if n == L else n for n in shape)
        for x, size in (("a", 4), ("b", 3))
        for leaf, shape in NETWORK.items()
    },
    "random": {"logits": (L, L)},
    "random_factorized": {"query": (L, 2), "key": (L, 2)},
    "mixture": {**NETWORK, "logits": (L, L), "mixture": (3,)},
}


def _fn(kind):
    return getattr(synthesizer, f"synthesizer_{kind}")


def _init(kind, *args, **options):
    return getattr(synthesizer, f"synthesizer_{kind}_init")(*args, **options)


def _network(q, params, suffix=""):
    hidden, hidden_bias, output, output_bias = (params[x + suffix] for x in NETWORK)
    return np.maximum(q @ hidden + hidden_bias, 0) @ output + output_bias


def _logit(kind, query, key, params, t, s):
    """One logit, from the equations of the paper."""
    if kind == "dense":
        return _network(query[t], params)[s]
    if kind == "random":
        return params["logits"][t, s]
    if kind == "random_factorized":
        return params["query"][t] @ params["key"][s]
    if kind == "dense_factorized":
        a, b = (_network(query[t], params, x) for x in ("_a", "_b"))
        return (np.tile(a, len(b)) * np.repeat(b, len(a)))[s]
    share = np.exp(params["mixture"]) / np.exp(params["mixture"]).sum()
    parts = [_logit(part, query, key, params, t, s) for part in ("dense", "random")]
    return share @ [*parts, H**-0.5 * query[t] @ key[s]]


def _draw_inputs(draw):
    return draw({"query": (T, H), "key": (S, H), "value": (S, V)})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_equation(kind, causal, draw, slope, by_loops):
    shapes = SHAPES[kind]
    inputs, params = _draw_inputs(draw), draw(shapes, seed=1)
    arrays = {**inputs, **{f"params {n}": a for n, a in params.items()}}
    arrays |= draw({"bias": (T, S)}, seed=2)
    options = {
        "mask": np.random.default_rng(0).random((T, S)) < 0.8,
        "key_mask": np.arange(S) % 4 != 1,
        "is_causal": causal,
    }

    def gather(given):
        return {n.removeprefix("params "): a for n, a in given.items() if " " in n}

    def reference(**given):
        wide = {n: np.asarray(a, np.float64) for n, a in given.items()}
        params, query, key = gather(wide), wide["query"], wide["key"]

        def score(q, k):
            return _logit(kind, query, key, params, int(q), int(k))

        return by_loops(
            score, np.arange(T), np.arange(S), wide["value"], wide["bias"], **options
        )

    def ours(**given):
        plain = {n: a for n, a in given.items() if " " not in n}
        return _fn(kind)(**plain, params=gather(given), **options)

    found = helpers.agree(ours, reference, arrays, slopes=1e-3)
    # What a synthesizer is about: keys are not read, nor queries by a random one.
    assert found["key"].any() == (kind == "mixture")
    assert found["query"].any() == ("random" not in kind)


def test_a_mixture_of_one_kind_is_that_kind(draw):
    inputs, params = _draw_inputs(draw), draw(SHAPES["mixture"], seed=1)
    mix = jax.jit(functools.partial(synthesizer.synthesizer_mixture, scale=0.7))
    dense = {name: params[name] for name in NETWORK}
    for i, theirs in enumerate(
        (
            _fn("dense")(**inputs, params=dense),
            _fn("random")(**inputs, params={"logits": params["logits"]}),
            dot_product(**inputs, scale=0.7),
        )
    ):
        only = np.where(np.arange(3) == i, 0.0, -1e9).astype("f")
        found = mix(**inputs, params={**params, "mixture": only})
        np.testing.assert_allclose(found, theirs, atol=1e-6)


def test_factors_can_hold_what_the_whole_holds(draw):
    inputs = _draw_inputs(draw)
    logits = draw({"logits": (L, L)}, seed=1)["logits"]
    whole = _fn("random")(**inputs, params={"logits": logits})
    factors = {"query": np.eye(L, dtype="f"), "key": logits.T}
    found = _fn("random_factorized")(**inputs, params=factors)
    np.testing.assert_allclose(found, whole, atol=1e-6)
    dense = draw(NETWORK, seed=2)
    one = {"hidden": (H, D), "hidden_bias": (D,), "output": (D, 1), "output_bias": (1,)}
    factors = {f"{n}_a": a for n, a in dense.items()}
    factors |= {f"{n}_b": np.zeros(shape, "f") for n, shape in one.items()}
    factors["output_bias_b"] += 1
    found = _fn("dense_factorized")(**inputs, params=factors)
    np.testing.assert_allclose(found, _fn("dense")(**inputs, params=dense), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_invisible_and_does_not_leak(kind, draw):
    inputs, params = _draw_inputs(draw), draw(SHAPES[kind], seed=1)
    padded = {n: np.pad(a, ((0, 2), (0, 0))) for n, a in inputs.items()}
    padded["query"] = padded["query"][:T]
    real = np.arange(S + 2) < S

    @jax.jit
    def run(arrays):
        def loss(arrays):
            out = _fn(kind)(**arrays, params=params, key_mask=real)
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(arrays)

    for fill in (0, 1e9):
        for name in ("key", "value"):
            padded[name][S:] = fill
        grads, out = run(padded)
        np.testing.assert_allclose(out, _fn(kind)(**inputs, params=params), atol=1e-5)
        assert not grads["key"][S:].any() and not grads["value"][S:].any()


def test_shared_axes_and_infinite_bias(draw):
    inputs = _draw_inputs(draw)
    params = {"logits": draw({"logits": (L, L)}, seed=1)["logits"]}
    bias = draw({"bias": (1, S)}, seed=2)["bias"]
    random = functools.partial(_fn("random"), **inputs, params=params)
    whole = np.broadcast_to(bias, (T, S))
    np.testing.assert_allclose(random(bias=bias), random(bias=whole), atol=1e-6)
    seen = np.arange(S)[None, :] < 3
    masked = random(mask=seen)
    np.testing.assert_allclose(random(bias=np.where(seen, 0, -np.inf)), masked)
    assert not random(bias=np.full((T, 1), -np.inf, "f")).any()


def test_initial_logits_have_unit_variance():
    query = np.random.default_rng(0).standard_normal((100, 16))

    def draw(kind, **options):
        params = _init(kind, RNG, 16, max_length=100, **options)
        return jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    dense = draw("dense", hidden_dim=64)
    factors = draw("dense_factorized", hidden_dim=64)
    low = draw("random_factorized")
    for logits in (
        _network(query, dense),
        _network(query, factors, "_a"),
        _network(query, factors, "_b"),
        draw("random")["logits"],
        low["query"] @ low["key"].T,
    ):
        assert np.sqrt(np.mean(logits**2)) == pytest.approx(1, rel=0.2)
    assert low["query"].shape == (100, 8)
    assert (factors["hidden_a"] != factors["hidden_b"]).all()


def test_sizes_of_factors():
    for options, sizes in (
        ({"max_length": 100}, (10, 10)),
        ({"max_length": 101}, (11, 10)),
        ({"max_length": 101, "factor": 4}, (4, 26)),
        ({"max_length": 1}, (1, 1)),
    ):
        init = functools.partial(_init, "dense_factorized", RNG, H, **options)
        params = jax.eval_shape(init)
        found = tuple(params[f"output_bias_{x}"].shape[0] for x in "ab")
        assert found == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_sequence_raises(kind, draw):
    params = _init(kind, RNG, H, max_length=6)
    with pytest.raises(
        ValueError, match=f"at most 6 .* S=9; .*{kind}_init.*max_length"
    ):
        _fn(kind)(**_draw_inputs(draw), params=params)
    more = {"query": np.ones((S, H), "f"), "key": np.ones((2, H), "f")}
    more["value"] = np.ones((2, V), "f")
    if kind in ("dense", "dense_factorized"):
        assert _fn(kind)(**more, params=params).shape == (S, V)
    else:
        with pytest.raises(ValueError, match="at most 6 .* T=9"):
            _fn(kind)(**more, params=params)


@pytest.mark.parametrize(
    "kind, params, message",
    [
        ("dense", {}, "synthesizer_dense_init"),
        ("random", {"logits": np.ones((3, 4), "f")}, r"must have shape \[3, 3\]"),
        (
            "dense",
            {n: np.ones(s, "f") for n, s in NETWORK.items()}
            | {"output": np.ones((D + 1, L), "f")},
            r"params\['output'\]` must have shape \[5, 11\]",
        ),
    ],
)
def test_bad_parameters_are_named(kind, params, message, draw):
    with pytest.raises(ValueError, match=message):
        _fn(kind)(**_draw_inputs(draw), params=params)
