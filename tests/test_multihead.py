"""Mapping one head of one example to whole arrays."""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import importlib.util
import sys
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.blockwise_attention import blockwise
from attn_jax.attention.softmax import dot_product
from attn_jax.exact import dot_product_attention
from attn_jax.multihead import multi_head, multi_head_init
from attn_jax.variant import VARIANTS, resolve

B, T, S, N, K, H, V = 2, 5, 7, 4, 2, 8, 3


@pytest.fixture(scope="module")
def arrays(draw):
    return draw(
        {
            "query": (B, T, N, H),
            "key": (B, S, K, H),
            "value": (B, S, K, V),
            "bias": (B, N, T, S),
        }
    )


@pytest.fixture(scope="module")
def mask():
    return np.random.default_rng(0).random((B, N, T, S)) < 0.6


@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_equals_a_python_loop_over_batch_and_heads(how, arrays, mask, by_loops):
    key_mask = np.arange(S)[None] < np.array([[S], [S - 2]])
    out = jax.jit(multi_head(dot_product, map_heads=how))(
        **arrays, mask=mask, key_mask=key_mask
    )
    for b in range(B):
        for n in range(N):
            k = n // (N // K)
            one = by_loops(
                lambda q, k: float(q @ k) / np.sqrt(H),
                arrays["query"][b, :, n],
                arrays["key"][b, :, k],
                arrays["value"][b, :, k],
                arrays["bias"][b, n],
                mask[b, n],
                key_mask[b],
            )
            np.testing.assert_allclose(out[b, :, n], one, atol=2e-6)


@pytest.mark.parametrize("name", ["dot_product", "blockwise"])
def test_gradients_do_not_depend_on_how_heads_are_mapped(name, arrays, mask):
    bias = jnp.asarray(arrays["bias"][:1])  # shared by the batch

    def loss(query, key, bias, how):
        out = multi_head(name, map_heads=how)(
            query, key, arrays["value"], bias, mask[:, :1], is_causal=True
        )
        return (out**2).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    plain = jnp.asarray(arrays["query"]), jnp.asarray(arrays["key"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        grad(*plain, bias, "vmap"),
        grad(*plain, bias, "loop"),
    )


def _temporary_bytes(fn, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("how", ["vmap", "loop"])
@pytest.mark.parametrize("axes", [(1, 1, 512, 512), (1, 8, 1, 512), (4, 1, 512, 1)])
def test_shared_axes_of_bias_are_not_copied(how, axes):
    x = (4, 512, 8, 8)

    def small_blocks(query, key, value, bias=None):
        return blockwise(query, key, value, bias, block_size=32)

    variant = dataclasses.replace(resolve("blockwise"), fn=small_blocks)

    def attend(x, bias=None):
        return multi_head(variant, map_heads=how)(x, x, x, bias)

    extra = _temporary_bytes(attend, x, axes) - _temporary_bytes(attend, x)
    # One copy per head and example would take 32 MiB; the block of scores of every head
    # to which "vmap" adds the bias at once takes 2 MiB.
    assert extra < 4 * 2**20


def test_masks_reach_a_function_in_the_form_it_takes(arrays):
    x = {name: arrays[name] for name in ("query", "key", "value")}
    keys = np.arange(S)[None] < np.array([[S], [S - 2]])

    def with_key_mask(query, key, value, *, key_mask=None):
        return dot_product(query, key, value, key_mask=key_mask)

    def with_mask(query, key, value, mask=None):
        return dot_product(query, key, value, mask=mask)

    full = jax.jit(multi_head(dot_product))(**x, key_mask=keys)
    as_mask = keys[:, None, None, :]
    for out in (
        jax.jit(multi_head(with_key_mask))(**x, key_mask=keys),
        jax.jit(multi_head(with_key_mask))(**x, mask=as_mask),
        jax.jit(multi_head(with_mask))(**x, key_mask=keys),
        jax.jit(multi_head(with_mask))(**x, mask=as_mask),
    ):
        np.testing.assert_allclose(out, full, atol=1e-6)
    np.testing.assert_allclose(
        multi_head(with_mask)(**x, key_mask=keys, is_causal=True),
        multi_head(dot_product)(**x, key_mask=keys, is_causal=True),
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"cannot honour an arbitrary \[T, S\] `mask`"):
        multi_head(with_key_mask)(**x, mask=np.ones((1, 1, T, S), bool))


@pytest.mark.parametrize("name", ["relu_attention", "sigmoid_attention"])
def test_a_mask_of_queries_counts_all_keys(name, arrays):
    x = {k: arrays[k] for k in ("query", "key", "value")}
    mask = (np.arange(T) != 2)[None, None, :, None]
    attend = jax.jit(multi_head(name))
    full = attend(**x, mask=np.tile(mask, (1, 1, 1, S)))
    np.testing.assert_allclose(attend(**x, mask=mask), full, atol=1e-6)


def test_a_function_in_a_file_works(tmp_path, arrays):
    path = tmp_path / "mine.py"
    path.write_text(
        "import jax\n"
        "import jax.numpy as jnp\n"
        "def noisy(query, key, value, bias=None, *, params, rng, power=1.0):\n"
        "    scores = params['gain'] * (query @ key.T) + 0.1 * jax.random.normal(\n"
        "        rng, (query.shape[0], key.shape[0]))\n"
        "    if bias is not None:\n"
        "        scores = scores + bias\n"
        "    return jax.nn.softmax(power * scores) @ value\n"
        "def noisy_init(rng, head_dim, *, gain=1.0):\n"
        "    return {'gain': gain * jnp.ones(())}\n"
    )
    spec = f"{path}:noisy"
    params = multi_head_init(spec, jax.random.key(0), N, H, gain=0.5)
    assert params["gain"].shape == (N,)
    x = {name: jnp.asarray(arrays[name]) for name in ("query", "key", "value")}
    rng = jax.random.key(3)
    attend = multi_head(spec)

    def run(params, **options):
        return attend(**x, bias=arrays["bias"], params=params, rng=rng, **options)

    jitted = jax.jit(run, static_argnames="power")
    out = jitted(params)
    assert out.shape == (B, T, N, V)
    # Each head has parameters of its own: changing the second changes it alone.
    other = jitted({"gain": params["gain"].at[1].set(2.0)})
    changed = np.any(np.asarray(other != out), axis=(0, 1, 3))
    assert changed.tolist() == [False, True, False, False]
    flat = jitted(params, power=0.0)  # every query gets the mean of all values
    np.testing.assert_allclose(flat[:, 0], flat[:, 1], atol=1e-6)
    with pytest.raises(TypeError, match="takes no option `pover`; it takes: power"):
        run(params, pover=0.0)
    with pytest.raises(TypeError, match="no option `bain` of `init`; it takes: gain"):
        multi_head_init(spec, rng, N, H, bain=1.0)
    with pytest.raises(ValueError, match="needs `params`; make them with"):
        attend(**x, rng=rng)
    with pytest.raises(ValueError, match="is random and needs `rng`"):
        attend(**x, params=params)
    with pytest.raises(ValueError, match=r"`params\['gain'\]` must lead.*N=4.*\(3,\)"):
        attend(**x, params={"gain": jnp.ones(3)}, rng=rng)
    with pytest.raises(ValueError, match="cannot honour `key_mask`"):
        attend(**x, params=params, rng=rng, key_mask=jnp.ones((B, S), bool))


def test_every_head_and_example_draws_its_own_numbers():
    # Equal inputs everywhere, so that only the random keys tell heads apart.
    x = jnp.ones((B, 1, N, 1))
    key = jnp.ones((B, 64, N, 1))
    value = jnp.broadcast_to(jnp.arange(64.0)[None, :, None, None], (B, 64, N, 1))
    outs = {
        how: jax.jit(
            functools.partial(multi_head(dot_product, map_heads=how), dropout_rate=0.5)
        )(x, key, value, rng=jax.random.key(0))
        for how in ("vmap", "loop")
    }
    assert len(np.unique(outs["vmap"])) == B * N
    np.testing.assert_allclose(outs["vmap"], outs["loop"], rtol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name, row in VARIANTS.items() if row.stochastic]
)
def test_what_a_variant_is_does_not_depend_on_the_place_in_the_batch(name):
    variant = resolve(name)
    variant = variant.bind(**variant.trial)
    rng = np.random.default_rng(1)
    one = jnp.asarray(rng.normal(size=(1, 48, 1, H)), jnp.float32)
    # Equal heads, so that only what is drawn tells them apart.
    x = jnp.broadcast_to(jnp.concatenate([one, 1 - one, one]), (3, 48, 4, H))
    given = {}
    if variant.init is not None:
        of_one = multi_head_init(variant, jax.random.key(0), 1, H)
        given["params"] = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), of_one)
    outs = {}
    for kv_heads in (4, 2):
        attend = jax.jit(multi_head(variant))
        keys = x[:, :, :kv_heads]
        out = attend(x, keys, keys, rng=jax.random.key(3), **given)
        np.testing.assert_array_equal(out[0], out[2])
        assert len(np.unique(np.swapaxes(out[0], 0, 1).reshape(4, -1), axis=0)) == 4
        outs[kv_heads] = out
    np.testing.assert_allclose(outs[4], outs[2], atol=1e-5)


def test_dropout_has_a_key_of_its_own_where_rng_says_what_a_function_is():
    def noisy(query, key, value, *, rng, dropout_rng=None, dropout_rate=0.0):
        noise = jax.random.normal(rng, ())
        if not dropout_rate:
            return value + noise
        kept = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, value.shape)
        return jnp.where(kept, noise, 0.0)

    x = jnp.zeros((B, 64, N, 1))
    run = functools.partial(multi_head(noisy), x, x, x, rng=jax.random.key(0))
    draws = run()[:, 0, :, 0]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert len(np.unique(draws[0])) == N
    for share, count in ((False, B * N), (True, 1)):
        out = run(
            dropout_rate=0.5, dropout_rng=jax.random.key(1), broadcast_dropout=share
        )
        kept = np.swapaxes(out != 0, 1, 2).reshape(B * N, -1)
        assert len(np.unique(kept, axis=0)) == count
        noise = np.broadcast_to(draws[0][None, None, :, None], out.shape)
        np.testing.assert_array_equal(out[out != 0], noise[out != 0])

    def unclear(query, key, value, *, rng, dropout_rate=0.0):
        return value

    for said in (resolve(unclear), dataclasses.replace(resolve(unclear), dropout=True)):
        with pytest.raises(ValueError, match="a key of its own.*`dropout_rng=None`"):
            multi_head(said)(x, x, x, rng=jax.random.key(0), dropout_rate=0.5)


@pytest.mark.parametrize("implementation", [None, "reference", "blockwise", "xla"])
def test_implementations_agree(implementation, arrays, mask):
    mask = mask.copy()
    mask[:, :, 1] = False  # a query that may attend to nothing
    x = {**arrays, "value": np.concatenate([arrays["value"]] * 3, axis=3)[..., :H]}
    rest = {"key_mask": np.arange(S)[None] < np.array([[S], [S - 2]])}

    def run(query, **options):
        given = {**x, "query": query, "mask": mask, **rest}
        return dot_product_attention(**given, scale=0.3, is_causal=True, **options)

    def value_and_grad(query, **options):
        grad, out = jax.grad(
            lambda q: (lambda o: ((o**2).sum(), o))(run(q, **options)), has_aux=True
        )(query)
        return out, grad

    query = jnp.asarray(arrays["query"])
    out, grad = jax.jit(lambda q: value_and_grad(q, implementation=implementation))(
        query
    )
    expected = multi_head(dot_product)(
        **x, mask=mask, **rest, scale=0.3, is_causal=True
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not np.any(out[:, 1]) and not np.any(grad[:, 1])
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("length, custom_rule", [(16, False), (128, True)])
def test_large_heads_take_the_blockwise_implementation(length, custom_rule):
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    if jax.default_backend() == "cpu":
        jaxpr = str(jax.make_jaxpr(dot_product_attention)(x, x, x))
        assert ("custom_vjp" in jaxpr) == custom_rule
    blocks = functools.partial(dot_product_attention, implementation="blockwise")
    assert "custom_vjp" in str(jax.make_jaxpr(blocks)(x, x, x))


def _reference(query, key, value, bias, mask, key_mask, scale, is_causal, window):
    """Attention in float64 on whole arrays, from the equations."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(a, group, axis=2) for a in (key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) * scale
    allowed = np.ones(logits.shape, bool)
    offset = np.arange(key.shape[1])[None] - np.arange(query.shape[1])[:, None]
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    if mask is not None:
        allowed &= mask
    if key_mask is not None:
        allowed &= key_mask[:, None, None]
    if is_causal:
        allowed &= offset <= 0
    if window is not None:
        allowed &= (offset >= -window[0]) & (offset <= window[1])
    weights = np.where(allowed, np.exp(np.clip(logits, -500, 500)), 0.0)
    weights /= np.maximum(weights.sum(axis=3, keepdims=True), 1e-300)
    return np.einsum("bnts,bsnv->btnv", weights, value)


CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (3, 2)},
    "causal window": {"window": (4, 1), "is_causal": True},
    "bias and masks": {"bias": True, "mask": True, "key_mask": True},
    "everything": {
        "bias": True,
        "mask": True,
        "key_mask": True,
        "is_causal": True,
        "window": (5, 5),
    },
}


@pytest.fixture
def standard_promotion():
    """For gradients of `jax.nn`, which mixes bfloat16 and float32 in its lowering."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize(
    "case, dtype",
    [(case, "float32") for case in CASES] + [("everything", "bfloat16")],
)
def test_implementations_equal_float64_forward_and_gradient(
    case, implementation, dtype, draw, slope
):
    # Lengths that no block divides, two query heads a key head, and V ≠ H where it can
    # be. "blockwise" is given small blocks, so that there are many.
    batch, queries, keys, heads, kv_heads, size = 2, 19, 23, 4, 2, 8
    value_size = size if implementation == "xla" else 5
    shapes = {
        "query": (batch, queries, heads, size),
        "key": (batch, keys, kv_heads, size),
        "value": (batch, keys, kv_heads, value_size),
        "bias": (1, heads, queries, keys),
    }
    arrays = draw(shapes, seed=11)
    asked = dict(CASES[case])
    if not asked.pop("bias", False):
        del arrays["bias"]
    window = asked.pop("window", None)
    options = {"scale": 0.4, "is_causal": asked.pop("is_causal", False)}
    random = np.random.default_rng(5)
    mask = random.random((batch, 1, queries, keys)) < 0.7
    mask[:, :, 4] = False
    masks = {"mask": mask, "key_mask": np.arange(keys)[None] < np.array([[23], [17]])}
    masks = {name: masks[name] for name in asked}
    arrays = {name: jnp.asarray(a, dtype) for name, a in arrays.items()}

    def run(arrays):
        if implementation == "blockwise":
            attend = multi_head("blockwise", map_heads="loop")
            return attend(
                **arrays, **masks, **options, local_window_size=window, block_size=10
            )
        return dot_product_attention(
            **arrays,
            **masks,
            **options,
            local_window_size=window,
            implementation=implementation,
        )

    def exact(**given):
        given = {"bias": None, "mask": None, "key_mask": None, **masks, **given}
        return _reference(**given, **options, window=window)

    cotangent = draw({"g": (batch, queries, heads, value_size)}, seed=3)["g"]
    cotangent = jnp.asarray(cotangent, dtype)
    out, pullback = jax.jit(lambda arrays: jax.vjp(run, arrays))(arrays)
    (grads,) = jax.jit(lambda pullback, g: pullback(g))(pullback, cotangent)
    wide = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    np.testing.assert_allclose(
        np.asarray(out, np.float64), exact(**wide), atol=tolerance
    )
    directions = {
        name: random.standard_normal(array.shape) for name, array in wide.items()
    }
    expected = slope(exact, wide, directions, np.asarray(cotangent, np.float64))
    for name, direction in directions.items():
        grad = np.asarray(grads[name], np.float64)
        size_of = np.linalg.norm(grad) + 1.0
        error = abs(float((grad * direction).sum()) - expected[name]) / size_of
        assert error < tolerance * 3, name


@pytest.mark.parametrize("window", [0, 2, (3, 0), (0, 4), (30, 30)])
def test_a_window_means_what_it_means_in_jax(window, draw):
    x = draw(dict.fromkeys(("query", "key", "value"), (1, 21, 2, 8)), seed=4)
    expected = jax.nn.dot_product_attention(
        *(jnp.asarray(a) for a in x.values()), local_window_size=window
    )
    for implementation in ("reference", "blockwise", "xla"):
        out = dot_product_attention(
            **x, local_window_size=window, implementation=implementation
        )
        np.testing.assert_allclose(out, expected, atol=1e-5)
    out = multi_head("blockwise", map_heads="loop")(
        **x, local_window_size=window, block_size=2
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
def test_nothing_outside_the_window_is_seen(implementation, draw):
    x = draw(dict.fromkeys(("query", "key", "value"), (1, 24, 2, 8)), seed=4)

    def at_ten(key, value):
        out = dot_product_attention(
            x["query"],
            key,
            value,
            is_causal=True,
            local_window_size=(3, 3),
            implementation=implementation,
        )
        return out[:, 10].sum()

    given = jnp.asarray(x["key"]), jnp.asarray(x["value"])
    value, grads = jax.value_and_grad(at_ten, argnums=(0, 1))(*given)
    outside = np.r_[0:7, 11:24]
    for grad in grads:
        assert not np.any(np.asarray(grad)[:, outside])
        assert np.any(np.asarray(grad)[:, 7:11])
    poisoned = (array.at[:, outside].set(1e9) for array in given)
    np.testing.assert_allclose(at_ten(*poisoned), value, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_a_narrow_window_takes_narrow_blocks(grad):
    x = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)

    def bytes_of(window):
        def fn(*arrays):
            attend = multi_head("blockwise", map_heads="loop")
            return attend(*arrays, local_window_size=window).sum()

        return _temporary_bytes(
            jax.grad(fn, argnums=(0, 1, 2)) if grad else fn, x.shape, x.shape, x.shape
        )

    assert bytes_of((64, 0)) * 4 < bytes_of(None)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
def test_every_implementation_lowers_for_accelerators(implementation):
    x = jax.ShapeDtypeStruct((2, 300, 4, 16), jnp.bfloat16)

    def loss(query, key, value):
        return dot_product_attention(
            query, key, value, is_causal=True, implementation=implementation
        ).sum()

    exported = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))), platforms=("cuda", "tpu")
    )(x, x, x)
    assert exported.platforms == ("cuda", "tpu")


def test_wrong_windows_are_named(arrays):
    x = {name: arrays[name] for name in ("query", "key", "value")}
    for window in (-1, (1, -2), (1, 2, 3), 0.5):
        with pytest.raises(ValueError, match="`local_window_size` must be None, one"):
            dot_product_attention(**x, local_window_size=window)


@pytest.mark.parametrize("window", [np.int64(2), (np.int32(2), np.uint8(0))])
def test_windows_may_be_whole_numbers_of_numpy(window, arrays):
    x = {name: arrays[name] for name in ("query", "key", "value")}
    given = (2, 2) if isinstance(window, np.int64) else (2, 0)
    np.testing.assert_array_equal(
        dot_product_attention(**x, local_window_size=window),
        dot_product_attention(**x, local_window_size=given),
    )
    for wrong in (True, (np.int64(-1), 0)):
        with pytest.raises(ValueError, match="`local_window_size` must be None, one"):
            dot_product_attention(**x, local_window_size=wrong)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_lengths_are_those_of_jax_nn(implementation, arrays):
    x = {"query": arrays["query"], "key": arrays["key"][..., :H]}
    x["value"] = x["key"] + 1.0
    lengths = {
        "query_seq_lengths": jnp.array([4, T]),
        "key_value_seq_lengths": jnp.array([S, 3]),
    }
    np.testing.assert_allclose(
        dot_product_attention(**x, **lengths, implementation=implementation),
        jax.nn.dot_product_attention(**x, **lengths),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match=r"`key_value_seq_lengths` must .* \[B\]"):
        dot_product_attention(**x, key_value_seq_lengths=jnp.array([3]))


@pytest.mark.parametrize("implementation", [None, "xla", "tokamax", "blockwise"])
def test_every_implementation_checks_dtypes(implementation, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", _tokamax())
    x = jnp.ones((1, 4, 2, 8))
    for wrong in (x.astype(jnp.int32), x.astype(jnp.complex64)):
        with pytest.raises(TypeError, match="`query` must be a floating-point"):
            dot_product_attention(wrong, wrong, wrong, implementation=implementation)
    narrow = x.astype(jnp.bfloat16)
    with pytest.raises(TypeError, match="must have one dtype.*float32, bfloat16"):
        dot_product_attention(x, narrow, narrow, implementation=implementation)


def _tokamax():
    """A stand-in, which takes windows where T = S alone."""

    def attend(query, key, value, bias=None, mask=None, *, local_window_size, **more):
        assert local_window_size is None or query.shape[1] == key.shape[1]
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, local_window_size=local_window_size, **more
        )

    module = types.ModuleType("tokamax")
    module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    module.dot_product_attention = attend
    return module


@pytest.mark.parametrize("causal", [False, True])
def test_tokamax_gets_a_window_as_a_mask_where_lengths_differ(
    causal, arrays, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tokamax", _tokamax())
    x = (arrays["query"], arrays["key"], arrays["key"])
    options = {"is_causal": causal, "local_window_size": (2, 1)}
    np.testing.assert_allclose(
        dot_product_attention(*x, **options, implementation="tokamax"),
        dot_product_attention(*x, **options, implementation="reference"),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fault of XLA:CPU")
@pytest.mark.parametrize("implementation", ["xla", "tokamax"])
def test_what_jaxlib_cannot_compute_is_refused_before(implementation, monkeypatch):
    """There it ends the process (64 queries and keys of H = 1, with a gradient)."""
    monkeypatch.setitem(sys.modules, "tokamax", _tokamax())
    for shape, dtype, message in (
        ((1, 64, 1, 1), jnp.bfloat16, "where H=1 or B=K=T=S=1"),
        ((1, 1, 1, 8), jnp.bfloat16, "where H=1 or B=K=T=S=1"),
        ((1, 4, 2, 8), jnp.float16, "no products of float16 on CPU"),
    ):
        x = jnp.ones(shape, dtype)
        with pytest.raises(ValueError, match=message):
            dot_product_attention(x, x, x, implementation=implementation)
        assert dot_product_attention(x, x, x).dtype == dtype


@pytest.mark.parametrize("where", ["plain", "outside", "inside"])
def test_forward_mode_says_what_helps(where):
    """Also where a compiled function is differentiated, or a derivative compiled."""
    x = jnp.ones((1, 130, 1, 2))
    for attend, way in (
        (functools.partial(dot_product_attention, is_causal=True), "='reference'"),
        (multi_head("truncated"), "map_blocks='vmap'"),
    ):
        fn = lambda x, attend=attend: attend(x, x, x)  # noqa: E731
        fn = jax.jit(fn) if where == "inside" else fn
        run = lambda x, fn=fn: jax.jvp(fn, (x,), (x,))  # noqa: E731
        run = jax.jit(run) if where == "outside" else run
        with pytest.raises(TypeError, match=way):
            run(x)
    slope = lambda attend: jax.jvp(lambda x: attend(x, x, x), (x,), (x,))[1]  # noqa: E731
    reference = functools.partial(dot_product_attention, implementation="reference")
    assert slope(reference).shape == x.shape
    aside = functools.partial(multi_head("truncated"), map_blocks="vmap")
    assert slope(aside).shape == x.shape


def test_an_implementation_that_cannot_serve_says_so(arrays):
    x = {name: arrays[name] for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="'xla' needs V = H, but V=3 and H=8; use"):
        dot_product_attention(**x, implementation="xla")
    with pytest.raises(ValueError, match="`implementation` must be 'reference'"):
        dot_product_attention(**x, implementation="flash")
    if importlib.util.find_spec("tokamax") is None:
        with pytest.raises(ValueError, match="needs the package `tokamax`"):
            dot_product_attention(**x, implementation="tokamax")
    square = [jnp.asarray(x["query"])] * 3
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU.*runs on"):
            dot_product_attention(*square, implementation="cudnn")


BAD = {
    "rank of query": ({"query": (T, N, H)}, r"`query` must have shape \[B, T, N, H\]"),
    "rank of bias": ({"bias": (T, S)}, r"`bias` must have shape \[B or 1, N or 1, T"),
    "batch": (
        {"key": (3, S, K, H)},
        r"`key` must have .*with B=2, S=7.*\(3, 7, 2, 8\)",
    ),
    "keys and values": ({"value": (B, S + 1, K, V)}, r"`value` must have .*S=7"),
    "groups": ({"query": (B, T, 3, H), "bias": (1, 1, T, S)}, "N must be a multiple"),
    "head size": ({"key": (B, S, K, H + 1)}, "must have the same H.*H=8 and H=9"),
    "bias": ({"bias": (B, 3, T, S)}, r"`bias` must have .*\(2, 3, 5, 7\) where N=4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, arrays):
    shapes, message = BAD[name]
    changed = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        multi_head("dot_product")(**{**arrays, **changed})


def test_bad_options_are_named(arrays):
    attend = multi_head("dot_product")
    with pytest.raises(
        TypeError, match="takes no option `causal`; it takes: scale, is_c"
    ):
        attend(**arrays, causal=True)
    with pytest.raises(ValueError, match="has no parameters, but got `params`"):
        attend(**arrays, params={"gain": jnp.ones(N)})
    with pytest.raises(TypeError, match="`mask` must be bool"):
        attend(**arrays, mask=np.ones((1, 1, T, S), np.float32))
    with pytest.raises(TypeError, match="`key_mask` must be bool"):
        attend(**arrays, key_mask=np.ones((B, S), np.float32))
    with pytest.raises(ValueError, match=r"`key_mask` must have shape \[B, S\]"):
        attend(**arrays, key_mask=np.ones((S,), bool))
    with pytest.raises(
        ValueError, match="`map_heads` must be 'auto', 'vmap' or 'loop'"
    ):
        multi_head("dot_product", map_heads="scan")
    given = arrays["query"], arrays["key"], arrays["value"]
    with pytest.raises(ValueError, match=r"must return \[T, V\] with T=5.*\(7, 3\)"):
        multi_head(lambda query, key, value: value)(*given)
    with pytest.raises(ValueError, match=r"with T=5, V=3, but returned .*\(5, 7\)"):
        multi_head(lambda query, key, value: query @ key.T)(*given)
    # Only None asks for no scale.
    unscaled = multi_head(lambda query, key, value: query @ key.T @ value)
    assert unscaled(*given, scale=None).shape == (B, T, N, V)
    with pytest.raises(TypeError, match="takes no option `scale`"):
        unscaled(*given, scale=0.0)
    with pytest.raises(ValueError, match="'blockwise' cannot honour dropout"):
        multi_head("blockwise")(**arrays, dropout_rate=0.1, rng=jax.random.key(0))
    with pytest.raises(TypeError, match="takes no option `gain` of `init`"):
        multi_head_init("dot_product", jax.random.key(0), N, H, gain=1.0)
    with pytest.raises(ValueError, match="takes `params` but has no `init`"):
        multi_head_init(
            lambda query, key, value, params: value, jax.random.key(0), N, H
        )


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "xla"])
@pytest.mark.parametrize("window", [None, 2])
def test_what_is_masked_may_hold_nan(implementation, window, draw):
    # Queries that see nothing, keys and values that nobody sees, forward and backward.
    shapes = {"query": (2, 12, 2, 8), "key": (2, 12, 2, 8), "value": (2, 12, 2, 8)}
    arrays = draw(shapes)
    real = np.random.default_rng(0).random((2, 12)) < 0.7
    mask = real[:, None, None, :] & real[:, None, :, None]

    @jax.jit
    def run(arrays):
        def of(arrays):
            return dot_product_attention(
                **arrays,
                mask=mask,
                is_causal=window is None,
                local_window_size=window,
                implementation=implementation,
            )

        out, pullback = jax.vjp(of, arrays)
        return out, pullback(jnp.where(real[:, :, None, None], jnp.cos(out), 0))[0]

    dirty = {n: np.where(real[:, :, None, None], x, np.nan) for n, x in arrays.items()}
    for found, want in zip(
        jax.tree.leaves(run(dirty)), jax.tree.leaves(run(arrays)), strict=True
    ):
        np.testing.assert_allclose(found, want, atol=1e-5)
