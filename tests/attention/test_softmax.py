"""Dot-product and additive attention against jax.nn and against loops in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import _scores, softmax
from attn_jax.multihead import multi_head
from tests import helpers

T, S, H, V = 5, 7, 4, 3


@pytest.fixture(scope="module")
def arrays(draw):
    return draw({"query": (T, H), "key": (S, H), "value": (S, V), "bias": (T, S)})


@pytest.fixture(scope="module")
def masks():
    rng = np.random.default_rng(1)
    mask = rng.random((T, S)) < 0.6
    mask[2] = False  # a query that may attend to nothing
    key_mask = np.arange(S) < S - 2
    return {"mask": mask, "key_mask": key_mask}


# (B, T, S, N, K, H), bias axes, mask axes, causal: a size-1 axis is named by a dot.
JAX_NN_CASES = [
    ((2, 6, 9, 4, 2, 8), None, None, False),
    ((1, 9, 9, 3, 1, 5), "BNTS", None, True),
    ((2, 7, 4, 2, 2, 16), ".NTS", "BNTS", False),
    ((3, 1, 8, 4, 4, 3), "B.TS", "..TS", False),
    ((2, 8, 8, 6, 3, 4), "...S", "B..S", True),
    ((1, 33, 17, 2, 1, 24), "..T.", ".NTS", True),
]


@pytest.mark.parametrize(
    "case, dtype, tolerance",
    [(case, "float32", 1e-5) for case in JAX_NN_CASES]
    + [(case, "bfloat16", 1e-2) for case in JAX_NN_CASES[2::3]],
)
def test_equals_jax_nn_forward_and_gradient(case, dtype, tolerance, draw):
    (b, t, s, n, k, h), bias_axes, mask_axes, causal = case
    sizes = {"B": b, "N": n, "T": t, "S": s, ".": 1}
    shapes = {"query": (b, t, n, h), "key": (b, s, k, h), "value": (b, s, k, h)}
    if bias_axes:
        shapes["bias"] = tuple(sizes[axis] for axis in bias_axes)
    drawn = draw({**shapes, "cotangent": (b, t, n, h)}, seed=t)
    drawn = {name: jnp.asarray(array, dtype) for name, array in drawn.items()}
    cotangent = drawn.pop("cotangent")
    mask = None
    if mask_axes:
        shape = tuple(sizes[axis] for axis in mask_axes)
        mask = np.random.default_rng(s).random(shape) < 0.7
        # jax.nn averages all values where a query may attend to nothing; here such a
        # query gives zeros, so the comparison leaves every query its first key.
        mask[..., 0] = True

    def value_and_grads(attention):
        def loss(drawn):
            out = attention(**drawn, mask=mask, is_causal=causal)
            products = out.astype(jnp.float32) * cotangent.astype(jnp.float32)
            return products.sum(), out

        grads, out = jax.jit(jax.grad(loss, has_aux=True))(drawn)
        return {"out": out, **grads}

    ours = value_and_grads(multi_head("dot_product"))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn itself promotes bfloat16
        theirs = value_and_grads(jax.nn.dot_product_attention)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype == dtype
        scale = max(1.0, float(jnp.abs(theirs[name]).max()))
        np.testing.assert_allclose(
            np.asarray(ours[name], np.float64) / scale,
            np.asarray(theirs[name], np.float64) / scale,
            atol=tolerance,
            rtol=0,
            err_msg=name,
        )


def _dot(query, key):
    return float(query.astype(np.float64) @ key.astype(np.float64)) / np.sqrt(H)


@pytest.mark.parametrize(
    "normalize, masked, causal",
    [("softmax", False, False), ("softmax", True, False), ("softmax", True, True)]
    + [("relu", False, True), ("relu", True, True)]
    + [("sigmoid", False, False), ("sigmoid", True, True)],
)
def test_dot_product_equals_loops_in_float64(
    normalize, causal, masked, arrays, masks, by_loops, slope, draw
):
    options = {"is_causal": causal, "normalize": normalize}
    given = masks if masked else {}
    exact = functools.partial(by_loops, _dot, **given, **options)
    ours = functools.partial(softmax.dot_product, **given, **options)
    helpers.agree(ours, exact, arrays, atol=2e-6, slopes=3e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_many_scores_on_cpu_give_the_same(causal, wide, masks, draw, monkeypatch):
    """Output, gradients, forward mode and second derivatives of the faster form.

    Second derivatives in float64 alone: they magnify rounding by hundreds here, and in
    float32 two right forms differ by more or by less from machine to machine.
    """
    arrays = draw({"query": (T, H), "key": (S, H), "value": (S, V), "bias": (T, S)})
    arrays["bias"][0, 0] = -np.inf
    dots = draw({name: x.shape for name, x in arrays.items()}, seed=3)
    if wide:
        arrays, dots = jax.tree.map(np.float64, (arrays, dots))
    attend = functools.partial(
        softmax.dot_product, **masks, is_causal=causal, scale=3.0
    )

    def numbers():
        loss = lambda arrays: jnp.square(attend(**arrays)).sum()  # noqa: E731
        slope = jax.grad(loss)
        first = attend(**arrays), jax.jvp(loss, (arrays,), (dots,)), slope(arrays)
        return (*first, jax.jvp(slope, (arrays,), (dots,))[1]) if wide else first

    close = dict(rtol=1e-12, atol=1e-12) if wide else dict(rtol=1e-4, atol=3e-5)
    with jax.enable_x64(wide):
        expected = numbers()
        monkeypatch.setattr(_scores, "LARGE", 0)
        found = numbers()
        assert "optimization_barrier" in str(jax.make_jaxpr(attend)(**arrays))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == other.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_allclose(one, other, **close)
    assert not found[0][2].any()  # that query may attend to nothing


def _additive_concat(query, key, value, bias, *, params, **pairs):
    """Additive attention as Luong et al. write it (arXiv:1508.04025, "concat").

    Its score wᵀ tanh(Wᵀ [q_t; k_s]) has W = [W_q; W_k], on every concatenated pair.
    """
    shape = (len(query), len(key))
    rows = jnp.broadcast_to(query[:, None], (*shape, query.shape[1]))
    columns = jnp.broadcast_to(key[None], (*shape, key.shape[1]))
    pair = jnp.concatenate([rows, columns], axis=-1)
    weight = jnp.concatenate([params["query"], params["key"]], axis=0)
    logits = jnp.tanh(pair @ weight) @ params["score"]
    return _scores.weights_of(logits, bias, **pairs) @ value


def test_additive_a_few_queries_at_a_time_is_the_same(draw, monkeypatch):
    length = 83  # a prime number: the last rows are not whole
    arrays = draw({n: (length, H) for n in ("query", "key", "value")})
    params = softmax.additive_init(jax.random.key(0), H, hidden_dim=32)
    arrays |= {f"w_{name}": np.asarray(leaf) for name, leaf in params.items()}

    def attend(query, key, value, **weights):
        params = {name[2:]: leaf for name, leaf in weights.items()}
        return softmax.additive(query, key, value, params=params, is_causal=True)

    def memory():
        grad = jax.jit(jax.grad(lambda x: jnp.sum(attend(**x) ** 2)))
        return grad.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    hidden = 4 * length * length * 32  # bytes
    assert memory() > hidden
    whole = helpers.value_and_grads(attend, arrays)
    tangents = jax.jvp(lambda x: attend(**x), (arrays,), (arrays,))[1]
    monkeypatch.setattr(softmax, "_HIDDEN", 10_000)
    few = helpers.value_and_grads(attend, arrays)
    for name, array in few.items():
        np.testing.assert_allclose(array, whole[name], atol=3e-5, err_msg=name)
    again = jax.jvp(lambda x: attend(**x), (arrays,), (arrays,))[1]
    np.testing.assert_allclose(again, tangents, atol=3e-5)
    assert memory() < 0.4 * hidden


def test_additive_equals_loops_and_its_concatenated_form(
    arrays, masks, by_loops, slope, draw
):
    params = softmax.additive_init(jax.random.key(0), H, key_dim=6, hidden_dim=9)
    params = {name: np.asarray(leaf) for name, leaf in params.items()}
    inputs = {**arrays, **draw({"key": (S, 6)}, seed=5)}

    def exact(query_weight, key_weight, score_weight, **inputs):
        def score(query, key):
            hidden = np.tanh(query @ query_weight + key @ key_weight)
            return float(hidden @ score_weight)

        return by_loops(score, **inputs, **masks, is_causal=True)

    cotangent = draw({"cotangent": (T, V)}, seed=3)["cotangent"]

    @jax.jit
    def run(params, inputs):
        def both(params, inputs):
            given = {**inputs, **masks, "is_causal": True}
            return (
                softmax.additive(**given, params=params),
                _additive_concat(**given, params=params),
            )

        (out, concat), pullback = jax.vjp(both, params, inputs)
        zeros = jnp.zeros_like(out)
        g = jnp.asarray(cotangent)
        return out, concat, pullback((g, zeros)), pullback((zeros, g))

    out, concat, grads, concat_grads = run(params, inputs)
    everything = {
        **{name: array.astype(np.float64) for name, array in inputs.items()},
        **{f"{name}_weight": leaf.astype(np.float64) for name, leaf in params.items()},
    }
    np.testing.assert_allclose(out, exact(**everything), atol=2e-6)
    np.testing.assert_allclose(concat, out, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), grads, concat_grads
    )
    directions = draw({k: a.shape for k, a in everything.items()}, seed=4)
    slopes = slope(exact, everything, directions, cotangent)
    by_name = {
        **grads[1],
        **{f"{name}_weight": leaf for name, leaf in grads[0].items()},
    }
    for name, exact_slope in slopes.items():
        assert np.sum(by_name[name] * directions[name]) == pytest.approx(
            exact_slope, abs=2e-5
        ), name


def test_weights_are_those_that_mix_the_values(arrays, masks):
    plain = {name: arrays[name] for name in ("query", "key", "bias")}
    value = jnp.asarray(arrays["value"])
    for normalize in softmax.NORMALIZERS:
        weights = softmax.dot_product_weights(**plain, **masks, normalize=normalize)
        out = softmax.dot_product(**arrays, **masks, normalize=normalize)
        np.testing.assert_allclose(weights @ value, out, atol=1e-6)
        assert not np.any(weights[~masks["mask"] | ~masks["key_mask"]])
    weights = softmax.dot_product_weights(**plain, **masks)
    expected = np.where(np.arange(T) == 2, 0.0, 1.0)  # query 2 attends to nothing
    np.testing.assert_allclose(weights.sum(axis=1), expected, atol=1e-6)


def test_softmax_runs_in_float32_for_bfloat16_inputs():
    x = jnp.ones((2, 4), jnp.bfloat16)
    # 0.25 apart around 1,000, where neighbouring bfloat16 numbers are 4 apart.
    bias = jnp.array([[1000.0, 1000.25]] * 2, jnp.float32)
    weights = softmax.dot_product_weights(x, x, bias)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights[0, 1], 1 / (1 + np.exp(-0.25)), atol=1e-5)
    assert softmax.dot_product(x, x, x, bias).dtype == jnp.bfloat16


@pytest.mark.parametrize("normalize", ["relu", "sigmoid"])
def test_padding_does_not_change_count_normalised_attention(normalize, arrays):
    fn = functools.partial(softmax.dot_product, normalize=normalize)
    keys = {name: arrays[name] for name in ("key", "value")}
    short = {name: array[: S - 2] for name, array in keys.items()}
    padded = fn(arrays["query"], **keys, key_mask=np.arange(S) < S - 2)
    np.testing.assert_allclose(padded, fn(arrays["query"], **short), atol=1e-6)


def test_limits(arrays):
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    mean = softmax.dot_product(query, key, value, scale=0.0)
    np.testing.assert_allclose(mean, np.tile(value.mean(0), (T, 1)), atol=1e-6)
    best = np.argmax(query @ key.T, axis=1)
    hard = softmax.dot_product(query, key, value, scale=1e4)
    np.testing.assert_allclose(hard, value[best], atol=1e-5)
    params = softmax.additive_init(jax.random.key(0), H)
    params["score"] = jnp.zeros_like(params["score"])
    np.testing.assert_allclose(
        softmax.additive(query, key, value, params=params), mean, atol=1e-6
    )


def test_dropout_keeps_the_mean_and_follows_its_key():
    size, rate = 64, 0.25
    query = jnp.zeros((size, H))
    key, value = jnp.zeros((size, H)), jnp.eye(size)
    drop = jax.jit(
        lambda rng: softmax.dot_product(query, key, value, dropout_rate=rate, rng=rng)
    )
    one, again, other = (drop(jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    # The values are the unit vectors, so the output is the matrix of weights.
    kept = np.asarray(one) > 0
    np.testing.assert_allclose(np.asarray(one)[kept], 1 / size / (1 - rate), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate)) / size  # of the kept fraction
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation


BAD = {
    "batched query": (
        {"query": np.zeros((2, T, H), np.float32)},
        ValueError,
        r"`query` must have shape \[T, H\].*has shape \(2, 5, 4\).*multi_head",
    ),
    "H mismatch": (
        {"key": np.zeros((S, H + 1), np.float32)},
        ValueError,
        r"`query` \[T, H\] and `key` \[S, H\] must have the same H.*H=4 and H=5",
    ),
    "S mismatch": (
        {"value": np.zeros((S + 1, V), np.float32)},
        ValueError,
        r"`value` must have shape \[S, V\] with S=7, but has shape \(8, 3\)",
    ),
    "float mask": (
        {"mask": np.ones((T, S), np.float32)},
        TypeError,
        r"`mask` must be bool.*float32.*astype\(bool\).*`bias`",
    ),
    "transposed mask": (
        {"mask": np.ones((S, T), bool)},
        ValueError,
        r"`mask` must have shape \[T, S\] with T=5, S=7, but has shape \(7, 5\)",
    ),
    "wrong bias": (
        {"bias": np.ones((S,), np.float32)},
        ValueError,
        r"`bias` must have shape \[T, S\]",
    ),
    "bool bias": (
        {"bias": np.ones((T, S), bool)},
        TypeError,
        r"`bias` must be a floating-point array",
    ),
    "wrong key_mask": (
        {"key_mask": np.ones((T,), bool)},
        ValueError,
        r"`key_mask` must have shape \[S\] with S=7",
    ),
    "integer query": (
        {"query": np.zeros((T, H), np.int32)},
        TypeError,
        r"`query` must be a floating-point array.*int32",
    ),
    "mixed dtypes": (
        {"query": np.zeros((T, H), jnp.bfloat16)},
        TypeError,
        r"one dtype.*bfloat16, float32 and float32; cast",
    ),
    "unknown normaliser": (
        {"normalize": "softmin"},
        ValueError,
        "`normalize` must be 'softmax', 'relu' or 'sigmoid', but is 'softmin'",
    ),
    "dropout without rng": (
        {"dropout_rate": 0.1},
        ValueError,
        r"`dropout_rate`=0.1 needs `rng`",
    ),
    "dropout of everything": (
        {"dropout_rate": 1.0, "rng": None},
        ValueError,
        r"`dropout_rate` must be in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, arrays):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        softmax.dot_product(**{**arrays, **changed})


@pytest.mark.parametrize(
    "params, message",
    [
        ({"score": jnp.zeros(3)}, r"mapping with \['key', 'query', 'score'\]"),
        (None, "mapping with .*but is NoneType.*additive_init"),
        (
            {
                "query": jnp.zeros((2, H, 3)),
                "key": jnp.zeros((H, 3)),
                "score": jnp.zeros(3),
            },
            r"`params\['query'\]` must have shape \[4, \*\].*leads with the number",
        ),
    ],
)
def test_bad_additive_params_are_named(params, message, arrays):
    with pytest.raises(ValueError, match=message):
        softmax.additive(**arrays, params=params)
    with pytest.raises(ValueError, match="`hidden_dim` must be at least 1"):
        softmax.additive_init(jax.random.key(0), 4, hidden_dim=0)
