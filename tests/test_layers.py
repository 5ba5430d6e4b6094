"""Variants inside Flax's own nnx and linen layers, against Flax's own attention."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, linen, nnx

from attn_jax import VARIANTS, Variant, multi_head, resolve
from attn_jax.multihead import multi_head_update
from attn_jax.nn.attention_fn import (
    AttentionFn,
    AttentionState,
    LinenAttentionFn,
    ModuleAttentionFn,
    as_attention_fn,
    as_linen_attention_fn,
    training,
)
from attn_jax.nn.encoder import Encoder

BATCH, LENGTH, FEATURES, HEADS = 2, 5, 8, 2
HEAD_DIM = FEATURES // HEADS


def _inputs(seed=0, *, shape=(BATCH, LENGTH, FEATURES), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _nnx_layer(attention_fn=None, **settings):
    """Flax's layer with always the same parameters; None is Flax's own attention."""
    if attention_fn is not None:
        settings["attention_fn"] = attention_fn
    settings.setdefault("decode", False)
    return nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(7), **settings)


def _linen_layer(attention_fn=None, **settings):
    if attention_fn is not None:
        settings["attention_fn"] = attention_fn
    return linen.MultiHeadDotProductAttention(num_heads=HEADS, **settings)


def _linen_variables(layer):
    return layer.init(jax.random.key(7), _inputs())


def _additive(**settings):
    return as_attention_fn(
        "additive",
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        rngs=nnx.Rngs(3),
        **settings,
    )


_X = np.asarray(_inputs())
_CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))
_PADDING = np.arange(LENGTH)[None, :] < np.array([[LENGTH], [2]])

MASKS = {
    "none": None,
    "bool": _CAUSAL[None, None],
    "flax_causal_float32": linen.make_causal_mask(jnp.ones((BATCH, LENGTH))),
    "flax_causal_int32": nnx.make_causal_mask(
        jnp.ones((BATCH, LENGTH)), dtype=jnp.int32
    ),
    "flax_padding": linen.make_attention_mask(
        jnp.ones((BATCH, LENGTH)), _PADDING + 0.0
    ),
    "one_for_each_head": np.stack([_CAUSAL, _CAUSAL.T])[None],
}


# The same numbers as Flax


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("variant", ["dot_product", "blockwise"])
def test_nnx_layer_equals_flax(variant, name):
    fn = as_attention_fn(variant)
    ours = _nnx_layer(fn)(_X, mask=MASKS[name])
    np.testing.assert_allclose(
        ours, _nnx_layer()(_X, mask=MASKS[name]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", MASKS)
def test_linen_layer_equals_flax(name):
    layer = _linen_layer(as_attention_fn("dot_product"))
    variables = _linen_variables(_linen_layer())
    ours = layer.apply(variables, _X, mask=MASKS[name])
    theirs = _linen_layer().apply(variables, _X, mask=MASKS[name])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_equal_flax_under_jit():
    def grads(layer):
        graph, params = nnx.split(layer)

        @jax.jit
        def gradient(params, x, mask):
            def loss(params, x):
                return (nnx.merge(graph, params)(x, mask=mask) ** 2).sum()

            return jax.grad(loss, (0, 1))(params, x)

        return gradient(params, _X, MASKS["flax_causal_float32"])

    ours = grads(_nnx_layer(as_attention_fn("blockwise")))
    theirs = grads(_nnx_layer())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.tree.leaves(ours),
        jax.tree.leaves(theirs),
    )


def test_causal_by_argument_by_option_and_by_mask_agree():
    masked = _nnx_layer()(_X, mask=MASKS["bool"])
    fn, causal_fn = (
        as_attention_fn("dot_product"),
        as_attention_fn("dot_product", is_causal=True),
    )
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(_nnx_layer(fn)(_X, is_causal=True), masked, **close)
    np.testing.assert_allclose(_nnx_layer(causal_fn)(_X), masked, **close)
    # linen has no is_causal; the option is how it asks for it.
    variables = _linen_variables(_linen_layer())
    np.testing.assert_allclose(
        _linen_layer(causal_fn).apply(variables, _X),
        _linen_layer().apply(variables, _X, mask=MASKS["bool"]),
        **close,
    )
    # Both at once, and on top of a padding mask.
    both = np.logical_and(MASKS["flax_padding"], MASKS["bool"])
    np.testing.assert_allclose(
        _nnx_layer(causal_fn)(_X, mask=MASKS["flax_padding"], is_causal=True)[:1],
        _nnx_layer()(_X, mask=both)[:1],
        **close,
    )


def test_cross_attention_and_grouped_queries():
    memory = _inputs(1, shape=(BATCH, 3, FEATURES))
    settings = {"num_kv_heads": 1, "normalize_qk": True}
    ours = _nnx_layer(as_attention_fn("dot_product"), **settings)(_X, memory)
    theirs = _nnx_layer(**settings)(_X, memory)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_any_number_of_batch_axes():
    layer = _nnx_layer(as_attention_fn("dot_product"))
    flat = layer(_X, mask=MASKS["flax_padding"])
    nested = layer(_X[:, None], mask=MASKS["flax_padding"][:, None])
    np.testing.assert_allclose(nested[:, 0], flat, rtol=1e-6)
    one = layer(_X[0], mask=MASKS["flax_padding"][0])
    np.testing.assert_allclose(one, flat[0], rtol=1e-5, atol=1e-6)
    # Masks broadcast from the right, as in NumPy.
    np.testing.assert_allclose(
        layer(_X[:, None], mask=_CAUSAL), layer(_X, mask=_CAUSAL)[:, None], rtol=1e-6
    )


def test_bfloat16_layer():
    layer = _nnx_layer(as_attention_fn("dot_product"), dtype=jnp.bfloat16)
    ours = layer(_X, mask=MASKS["flax_causal_float32"])
    with jax.numpy_dtype_promotion("standard"):  # jax.nn promotes by itself
        theirs = _nnx_layer(dtype=jnp.bfloat16)(_X, mask=MASKS["flax_causal_float32"])
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=2e-2
    )
    # The arrays of a direct caller are cast too.
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    out = as_attention_fn("dot_product")(heads, heads, heads, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("said", [None, "option", "bound", "module"])
def test_decoding_equals_a_causal_pass(framework, said):
    """Step by step through Flax's cache, whose mask is float32.

    That all calls are causal may have been said before: it is nothing to a step.
    """
    fn = {
        None: as_attention_fn("dot_product"),
        "option": as_attention_fn("dot_product", is_causal=True),
        "bound": as_attention_fn(VARIANTS["blockwise"].bind(is_causal=True)),
        "module": as_linen_attention_fn("dot_product", is_causal=True),
    }[said]
    if framework == "nnx" and said == "module":
        layer = _nnx_layer(as_attention_fn("dot_product"), decode=True)
        layer.init_cache(_X.shape)
        steps = [layer(_X[:, t : t + 1], is_causal=True) for t in range(LENGTH)]
        whole = _nnx_layer()(_X, mask=MASKS["bool"])
    elif framework == "nnx":
        layer = _nnx_layer(fn, decode=True)
        layer.init_cache(_X.shape)
        steps = [layer(_X[:, t : t + 1]) for t in range(LENGTH)]
        whole = _nnx_layer()(_X, mask=MASKS["bool"])
    else:
        layer = _linen_layer(fn, decode=True)
        variables = layer.init(jax.random.key(7), _X)
        params, cache = variables["params"], variables["cache"]
        steps = []
        for t in range(LENGTH):
            step, updated = layer.apply(
                {"params": params, "cache": cache}, _X[:, t : t + 1], mutable="cache"
            )
            cache = updated["cache"]
            steps.append(step)
        whole = _linen_layer().apply({"params": params}, _X, mask=MASKS["bool"])
    np.testing.assert_allclose(
        jnp.concatenate(steps, axis=1), whole, rtol=1e-5, atol=1e-6
    )


def test_causal_by_option_refuses_queries_of_unknown_place():
    """Two new tokens against a cache: aligned at the top left they see its first."""
    fn = as_attention_fn("dot_product", is_causal=True)
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"T=2 queries meet S=\d+ keys.*give a mask"):
        fn(heads[:, 1:3], heads, heads, mask=MASKS["bool"][..., 1:3, :])
    with pytest.raises(ValueError, match="T=1 queries"):
        fn(heads[:, 1:2], heads, heads)
    # Asked for at the call, it is aligned as Flax aligns it.
    fn = as_attention_fn("dot_product")
    np.testing.assert_allclose(
        fn(heads[:, :2], heads, heads, is_causal=True),
        fn(heads[:, :2], heads, heads, mask=MASKS["bool"][..., :2, :]),
        rtol=1e-6,
    )


def test_row_without_keys_gives_zeros():
    nothing = np.zeros((1, 1, LENGTH, LENGTH), bool)
    layer = _nnx_layer(as_attention_fn("dot_product"), use_bias=False)
    np.testing.assert_array_equal(layer(_X, mask=nothing), np.zeros_like(_X))


# Masks of numbers


def test_additive_mask_is_refused_or_poisons():
    layer = _nnx_layer(as_attention_fn("dot_product"))
    additive = jnp.where(_CAUSAL[None, None], 0.0, -1e9)
    with pytest.raises(ValueError, match="`mask` must hold 0 and 1 alone.*bias"):
        layer(_X, mask=additive)
    graph, params = nnx.split(layer)
    call = jax.jit(lambda mask: nnx.merge(graph, params)(_X, mask=mask))
    assert jnp.isnan(call(additive)).all()
    np.testing.assert_allclose(
        call(MASKS["flax_causal_float32"]),
        layer(_X, mask=MASKS["bool"]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, LENGTH, LENGTH), r"`mask` has batch sizes \(3,\) .* has \(2,\)"),
        ((1, 3, LENGTH, LENGTH), r"`mask` must have shape .*N=2"),
        ((1, 1, 1, LENGTH, LENGTH), "`mask` must be broadcastable to"),
        # Of two heads or of two examples: Flax takes it to be the former.
        ((2, LENGTH, LENGTH), r"`mask` .* \[N, T, S\] or \[B, T, S\], since B=2"),
    ],
)
def test_mask_of_a_wrong_shape(shape, message):
    layer = _nnx_layer(as_attention_fn("dot_product"))
    with pytest.raises(ValueError, match=message):
        layer(_X, mask=np.ones(shape, bool))


def test_mask_of_as_many_examples_as_queries_is_not_guessed():
    layer = _nnx_layer(as_attention_fn("dot_product"))
    x, real = _inputs(shape=(LENGTH, LENGTH, FEATURES)), np.tri(LENGTH, dtype=bool)
    with pytest.raises(ValueError, match=r"may be \[T, S\] or \[B, S\], .* `key_mask`"):
        layer(x, mask=real)
    # The same program twice: one of another batch may round differently.
    seen = layer(x[:2], mask=real)
    np.testing.assert_array_equal(seen, layer(x[:2], mask=real[None, None]))
    whole = layer(x, mask=real[None, None])[:2]
    np.testing.assert_allclose(seen, whole, rtol=1e-5, atol=1e-6)


# Dropout


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_shared_dropout_drops_the_same_weights_as_flax(framework):
    """`broadcast_dropout` is Flax's default: one [T, S] pattern for everything."""
    settings = {"dropout_rate": 0.5, "deterministic": False}
    fn = as_attention_fn("dot_product")
    if framework == "nnx":
        ours, theirs = _nnx_layer(fn, **settings)(_X), _nnx_layer(**settings)(_X)
        plain = _nnx_layer()(_X)
    else:
        variables = _linen_variables(_linen_layer())
        rngs = {"dropout": jax.random.key(5)}
        ours = _linen_layer(fn, **settings).apply(variables, _X, rngs=rngs)
        theirs = _linen_layer(**settings).apply(variables, _X, rngs=rngs)
        plain = _linen_layer().apply(variables, _X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours, plain)


@pytest.mark.parametrize("typed_key", [True, False])
def test_dropout_patterns(typed_key):
    """Uniform weights and identity values show which weights were dropped."""
    length = 8
    zeros = jnp.zeros((2, length, 3, length))
    identity = jnp.broadcast_to(jnp.eye(length)[None, :, None], zeros.shape)
    key = jax.random.key(0) if typed_key else jax.random.PRNGKey(0)

    def patterns(broadcast):
        out = as_attention_fn("dot_product")(
            zeros,
            zeros,
            identity,
            dropout_rng=key,
            dropout_rate=0.25,
            broadcast_dropout=broadcast,
        )
        out = np.asarray(jnp.swapaxes(out, 1, 2)).reshape(6, length * length)
        kept = out > 0
        # Kept weights are scaled up, so that the expectation stays.
        np.testing.assert_allclose(out[kept], 1 / length / 0.75, rtol=1e-6)
        assert 0.6 < kept.mean() < 0.9
        return len(np.unique(kept, axis=0))

    assert patterns(broadcast=True) == 1
    assert patterns(broadcast=False) == 6


def test_deterministic_switches_dropout_off():
    layer = _nnx_layer(as_attention_fn("dot_product"), dropout_rate=0.5)
    np.testing.assert_array_equal(
        layer(_X, deterministic=True),
        _nnx_layer(as_attention_fn("dot_product"))(_X),
    )


def test_dropout_is_refused_where_the_variant_cannot():
    layer = _nnx_layer(as_attention_fn("blockwise"), dropout_rate=0.5)
    layer(_X, deterministic=True)
    with pytest.raises(ValueError, match=r"'blockwise' cannot .*dropout.*dot_product"):
        layer(_X, deterministic=False)


def test_dropout_without_a_key():
    heads = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="needs `dropout_rng`"):
        as_attention_fn("dot_product")(heads, heads, heads, dropout_rate=0.5)


# Precision, sowing, einsums


def _precisions(jaxpr):
    """Precisions of all matrix products, also in inner programs."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += _precisions(inner)
    return found


@pytest.mark.parametrize("variant", ["dot_product", "blockwise"])
def test_precision_reaches_every_product_forward_and_backward(variant):
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    fn = as_attention_fn(variant)

    def products(precision):
        def loss(query, key, value):
            return fn(query, key, value, precision=precision).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(heads, heads, heads)
        return _precisions(jaxpr.jaxpr)

    highest = (jax.lax.Precision.HIGHEST,) * 2
    for precision in ("highest", jax.lax.Precision.HIGHEST, highest):
        found = products(precision)
        assert len(found) >= 6
        assert set(found) == {highest}
    assert set(products(None)) == {None}
    preset = jax.lax.DotAlgorithmPreset.F32_F32_F32
    assert set(products(preset)) == {preset}


def test_precision_changes_no_gradient():
    def gradient(precision):
        layer = _nnx_layer(_additive(), precision=precision)
        graph, params = nnx.split(layer)
        mask = MASKS["flax_causal_float32"]
        loss = lambda p, x: (nnx.merge(graph, p)(x, mask=mask) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(params, _X)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.tree.leaves(gradient("highest")),
        jax.tree.leaves(gradient(None)),
    )


@pytest.mark.parametrize("precision", ["hihgest", 3, ("highest", "default")])
def test_precision_that_cannot_be_honoured(precision):
    heads = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="`precision` must be"):
        as_attention_fn("dot_product")(heads, heads, heads, precision=precision)


@pytest.mark.parametrize("variant", ["dot_product", "blockwise"])
def test_weights_are_sown_as_by_flax(variant):
    def sown_nnx(fn):
        call = nnx.capture(
            lambda layer, x: layer(x, mask=MASKS["bool"], sow_weights=True),
            nnx.Intermediate,
        )
        out, state = call(_nnx_layer(fn), _X)
        return out, jax.tree.leaves(state)

    def sown_linen(fn):
        variables = _linen_variables(_linen_layer())
        out, state = _linen_layer(fn).apply(
            variables, _X, mask=MASKS["bool"], sow_weights=True, mutable="intermediates"
        )
        return out, [state["intermediates"]["attention_weights"][0]]

    for sown in (sown_nnx, sown_linen):
        out, (weights,) = sown(as_attention_fn(variant))
        flax_out, (flax_weights,) = sown(None)
        assert weights.shape == (BATCH, HEADS, LENGTH, LENGTH)
        np.testing.assert_allclose(weights, flax_weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out, flax_out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forced", [False, True])
def test_sown_weights_have_the_dtype_of_flax(forced):
    def sown(fn):
        settings = dict(dtype=jnp.bfloat16, force_fp32_for_softmax=forced)
        with jax.numpy_dtype_promotion("standard"):
            out, state = _linen_layer(fn, **settings).apply(
                _linen_variables(_linen_layer()), _X,
                sow_weights=True, mutable="intermediates",
            )  # fmt: skip
        return out, state["intermediates"]["attention_weights"][0]

    out, weights = sown(as_attention_fn("dot_product"))
    flax_out, flax_weights = sown(None)
    assert weights.dtype == flax_weights.dtype
    assert out.dtype == flax_out.dtype == jnp.bfloat16
    assert (weights.dtype == jnp.float32) == forced
    if forced:  # and they are not rounded before
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


def test_sown_weights_are_those_before_dropout():
    settings = {"dropout_rate": 0.5, "deterministic": False}
    call = nnx.capture(lambda layer: layer(_X, sow_weights=True), nnx.Intermediate)
    _, state = call(_nnx_layer(as_attention_fn("dot_product"), **settings))
    (weights,) = jax.tree.leaves(state)
    np.testing.assert_allclose(weights.sum(-1), np.ones(weights.shape[:-1]), rtol=1e-5)


def test_custom_einsums_are_refused():
    layer = _linen_layer(
        as_attention_fn("dot_product"),
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    with pytest.raises(ValueError, match="take no `qk_attn_weights_einsum`"):
        layer.init(jax.random.key(0), _X)


def test_every_argument_of_flax_is_named():
    """Linen drops what a function does not name, so each must be named to be heard."""
    theirs = set(inspect.signature(linen.dot_product_attention).parameters)
    for fn in (
        as_attention_fn("dot_product"),
        _additive(),
        as_linen_attention_fn("additive"),
    ):
        ours = inspect.signature(fn).parameters
        assert theirs | {"is_causal"} <= set(ours)
        kinds = {parameter.kind for parameter in ours.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds


# Parameters


def test_parameters_register_in_the_nnx_layer_and_learn():
    layer = _nnx_layer(_additive(hidden_dim=6))
    assert isinstance(layer.attention_fn, ModuleAttentionFn)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    own = params["attention_fn"]["params"]
    assert {name: own[name].shape for name in own} == {
        "query": (HEADS, HEAD_DIM, 6),
        "key": (HEADS, HEAD_DIM, 6),
        "score": (HEADS, 6),
    }
    assert not jax.tree.leaves(rest)

    @jax.jit
    def gradient(params, x):
        return jax.grad(lambda p: (nnx.merge(graph, p, rest)(x) ** 2).sum())(params)

    for leaf in jax.tree.leaves(gradient(params, _X)["attention_fn"]):
        assert jnp.abs(leaf).max() > 0


def test_each_head_uses_its_own_parameters():
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    fn = _additive()
    params = {name: param[...] for name, param in fn.params.items()}
    out = fn(heads, heads, heads, is_causal=True)
    assert not np.allclose(params["score"][0], params["score"][1])
    for n in range(HEADS):
        head = heads[0, :, n]
        expected = VARIANTS["additive"].fn(
            head,
            head,
            head,
            params={name: leaf[n] for name, leaf in params.items()},
            is_causal=True,
        )
        np.testing.assert_allclose(out[0, :, n], expected, rtol=1e-5, atol=1e-6)


def test_linen_module_with_parameters_equals_the_nnx_one():
    layer = _linen_layer(as_linen_attention_fn("additive"))
    variables = _linen_variables(layer)
    head = variables["params"]["attention_fn"]["head"]
    assert head["score"].shape == (HEADS, HEAD_DIM)

    fn = _additive()
    for name in fn.params:
        fn.params[name][...] = head[name]
    plain = {k: v for k, v in variables["params"].items() if k != "attention_fn"}
    mask = MASKS["flax_causal_float32"]
    expected = _linen_layer(
        lambda query, key, value, mask: fn(query, key, value, mask=mask)
    ).apply({"params": plain}, _X, mask=mask)
    np.testing.assert_allclose(
        layer.apply(variables, _X, mask=mask), expected, rtol=1e-5, atol=1e-6
    )
    # Randomness of dropout reaches it through linen's own argument filter.
    dropping = _linen_layer(
        as_linen_attention_fn("additive"), dropout_rate=0.5, deterministic=False
    )
    outs = [
        dropping.apply(variables, _X, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.allclose(outs[0], outs[2])


def test_param_dtype_and_options_of_a_linen_init():
    fn = _additive(param_dtype=jnp.bfloat16)
    assert fn.params["score"][...].dtype == jnp.bfloat16
    assert _nnx_layer(fn)(_X).dtype == jnp.float32
    layer = _linen_layer(
        as_linen_attention_fn("additive", param_dtype=jnp.bfloat16, hidden_dim=3)
    )
    head = _linen_variables(layer)["params"]["attention_fn"]["head"]
    assert head["score"].shape == (HEADS, 3)
    assert head["score"].dtype == jnp.bfloat16


def test_several_seeds_by_vmap_equal_one_at_a_time():
    settings = {"dropout_rate": 0.3, "deterministic": False, "keep_rngs": False}
    layer = _nnx_layer(_additive(), broadcast_dropout=False, **settings)
    graph, params = nnx.split(layer)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf]), params)
    keys = jax.random.split(jax.random.key(0), 2)

    def apply(params, key):
        return nnx.merge(graph, params)(_X, rngs=nnx.Rngs(dropout=key))

    together = jax.vmap(apply)(stacked, keys)
    np.testing.assert_allclose(
        together[0], apply(params, keys[0]), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(together[0], together[1])


def test_layer_of_another_size_than_the_parameters():
    fn = as_attention_fn("additive", num_heads=4, head_dim=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_heads=4, head_dim=2.* has 2 heads"):
        _nnx_layer(fn)(_X)


# Variants of one's own


def _first_key(query, key, value, *, key_mask=None):
    """Copies the last real value: honours key_mask and nothing else."""
    real = jnp.ones(key.shape[0], bool) if key_mask is None else key_mask
    last = jnp.max(jnp.where(real, jnp.arange(key.shape[0]), 0))
    return jnp.broadcast_to(value[last], (query.shape[0], value.shape[1]))


def test_capability_that_a_function_lacks():
    layer = _nnx_layer(as_attention_fn(_first_key))
    layer(_X)
    for arguments in ({"mask": MASKS["bool"]}, {"is_causal": True}):
        with pytest.raises(ValueError, match="_first_key' cannot .*dot_product"):
            layer(_X, **arguments)
    with pytest.raises(ValueError, match="cannot .*is_causal"):
        as_attention_fn(_first_key, is_causal=True)


def test_decoding_needs_a_key_mask_alone():
    """The cache's mask is the same for every query, so it reaches key_mask."""
    layer = _nnx_layer(as_attention_fn(_first_key), decode=True)
    layer.init_cache(_X.shape)
    whole = _nnx_layer(as_attention_fn(_first_key))
    for t in range(3):
        np.testing.assert_allclose(
            layer(_X[:, t : t + 1]), whole(_X[:, : t + 1])[:, -1:], rtol=1e-5, atol=1e-6
        )


def test_function_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def mean(query, key, value, mask=None):\n"
        "    weights = mask.astype(value.dtype)\n"
        "    return weights @ value / weights.sum(-1, keepdims=True)\n"
    )
    out = _nnx_layer(as_attention_fn(f"{file}:mean"))(_X, mask=MASKS["bool"])
    heads = _nnx_layer().value(_X)
    means = jnp.cumsum(heads, axis=1) / jnp.arange(1.0, LENGTH + 1)[None, :, None, None]
    np.testing.assert_allclose(out, _nnx_layer().out(means), rtol=1e-5, atol=1e-6)


def test_function_with_parameters_from_a_file(tmp_path):
    """Parameters in any pytree, made by `<function>_init` beside the function."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax, jax.numpy as jnp\n"
        "def gated_init(rng, head_dim):\n"
        "    return {'gate': (jnp.zeros(()), [jax.random.normal(rng, (head_dim,))])}\n"
        "def gated(query, key, value, *, params):\n"
        "    gate, (shift,) = params['gate']\n"
        "    return gate * value + shift[None, :]\n"
    )
    fn = as_attention_fn(
        f"{file}:gated", num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(0)
    )
    assert {name: param.shape for name, param in fn.params.items()} == {
        "gate/0": (HEADS,),
        "gate/1/0": (HEADS, HEAD_DIM),
    }
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    shift = fn.params["gate/1/0"][...]
    np.testing.assert_allclose(
        fn(heads, heads, heads), np.broadcast_to(shift, heads.shape)
    )


def _noisy(query, key, value, *, rng):
    return value + jax.random.normal(rng, value.shape, value.dtype)


def _noisy_layer(variant=_noisy, **settings):
    fn = as_attention_fn(
        variant,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        rngs=nnx.Rngs(attention=1, params=2),
    )
    return _nnx_layer(fn, **settings)


def test_random_variant_draws_where_it_is_merged():
    graph, params, rest = nnx.split(_noisy_layer(), nnx.Param, ...)

    def twice(params, rest):
        layer = nnx.merge(graph, params, rest)
        outs = layer(_X), layer(_X)
        return outs[0].sum(), (outs, nnx.split(layer, nnx.Param, ...)[2])

    expected = _noisy_layer()
    expected = [expected(_X) for _ in range(3)]
    for rest_from_outside in (True, False):
        if rest_from_outside:
            run = jax.grad(lambda params: twice(params, rest), has_aux=True)
            _, (outs, after) = jax.jit(run)(params)
        else:
            run = jax.jit(jax.grad(twice, has_aux=True))
            _, (outs, after) = run(params, rest)
        np.testing.assert_allclose(outs, expected[:2], atol=1e-6)
        # A state that is carried on draws anew; the given one has not moved.
        third = nnx.merge(graph, params, after)(_X)
        np.testing.assert_allclose(third, expected[2], atol=1e-6)
    shapes = jax.eval_shape(lambda: twice(params, rest)[0])
    assert shapes.shape == ()
    # A layer from outside cannot count on, and says so.
    layer = _noisy_layer()
    with pytest.raises(errors.TraceContextError):
        jax.eval_shape(lambda: layer(_X))


def test_random_variant_with_a_frozen_state_draws_by_the_dropout_key():
    def noisy(query, key, value, *, rng, dropout_rng=None, dropout_rate=0.0):
        return value + jax.random.normal(rng, value.shape, value.dtype)

    settings = {"dropout_rate": 0.1, "keep_rngs": False}
    layer = _noisy_layer(noisy, **settings)
    graph, state = nnx.split(layer)

    @jax.jit
    def apply(key):
        layer = nnx.merge(graph, state)
        return layer(_X, deterministic=False, rngs=nnx.Rngs(dropout=key))

    one, again, other = (apply(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


def test_random_variant_draws_from_its_own_stream():
    with pytest.raises(ValueError, match="_noisy' is random.*rngs"):
        as_attention_fn(_noisy)

    def make():
        return as_attention_fn(
            _noisy,
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            rngs=nnx.Rngs(attention=1, params=2),
        )

    first, again = _nnx_layer(make()), _nnx_layer(make())
    one, two = first(_X), first(_X)
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(again(_X), one)
    # What a variant draws is a head's own and all examples', whatever dropout does.
    zeros = jnp.zeros((BATCH, LENGTH, HEADS, HEAD_DIM))
    for share in (True, False):
        noise = jnp.swapaxes(make()(zeros, zeros, zeros, broadcast_dropout=share), 1, 2)
        np.testing.assert_array_equal(noise[0], noise[1])
        assert len(np.unique(noise.reshape(BATCH * HEADS, -1), axis=0)) == HEADS

    layer = _linen_layer(as_linen_attention_fn(_noisy))
    keys = [jax.random.key(seed) for seed in (1, 1, 2)]
    variables = layer.init({"params": keys[0], "attention": keys[1]}, _X)
    outs = [layer.apply(variables, _X, rngs={"attention": key}) for key in keys]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert not np.allclose(outs[0], outs[2])


@pytest.mark.parametrize("name", ["performer", "reformer", "bigbird"])
def test_a_sequence_comes_out_alike_wherever_it_stands_in_a_batch(name):
    options = {"block_size": 2} if name == "bigbird" else {}
    encoder = Encoder(
        1,
        FEATURES,
        num_heads=HEADS,
        mlp_dim=8,
        attention=VARIANTS[name].bind(**options),
        dropout_rate=0.1,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(2), (1, 24, FEATURES))
    real = jnp.arange(24)[None] < 20
    batch = jnp.concatenate([x, 1 - x, x])
    mask = jnp.concatenate([real, real, real])
    out = encoder(batch, key_mask=mask)
    np.testing.assert_array_equal(out[0], out[2])
    assert not np.allclose(out[0], out[1])


def test_sowing_needs_values_of_any_size():
    narrow = dataclasses.replace(
        VARIANTS["dot_product"], value_dim=False, name="narrow"
    )
    call = nnx.capture(lambda layer: layer(_X, sow_weights=True), nnx.Intermediate)
    with pytest.raises(ValueError, match="'narrow' cannot honour V ≠ H"):
        call(_nnx_layer(as_attention_fn(narrow)))


# Options and implementations


def test_options_reach_the_function():
    heads = _X.reshape(BATCH, LENGTH, HEADS, HEAD_DIM)
    ours = as_attention_fn("dot_product", scale=0.0)(heads, heads, heads)
    mean = jnp.broadcast_to(heads.mean(1, keepdims=True), heads.shape)
    np.testing.assert_allclose(ours, mean, atol=1e-6)
    bias = _inputs(2, shape=(HEADS, LENGTH, LENGTH))
    np.testing.assert_allclose(
        as_attention_fn("dot_product", map_heads="loop")(heads, heads, heads, bias),
        multi_head("dot_product")(heads, heads, heads, bias[None]),
        rtol=1e-6,
    )


def _optional_params(query, key, value, *, params=None):
    return value


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: as_attention_fn("dot_product", blok_size=3),
            TypeError,
            "'dot_product' takes no option `blok_size`; it takes: .*scale",
        ),
        (
            lambda: as_attention_fn("dot_product", dropout_rate=0.1),
            TypeError,
            "`dropout_rate` is no option to bind",
        ),
        (lambda: as_attention_fn("dot_produkt"), ValueError, "Did you mean"),
        (
            lambda: as_attention_fn("additive"),
            ValueError,
            "'additive' has parameters: give as_attention_fn `num_heads`.*linen",
        ),
        (
            lambda: as_linen_attention_fn("dot_product", hidden_dim=2),
            TypeError,
            "takes no option `hidden_dim`",
        ),
        (
            lambda: as_attention_fn(_optional_params),
            ValueError,
            "takes `params` but has no `init`",
        ),
        (
            lambda: as_linen_attention_fn(_optional_params),
            ValueError,
            "takes `params` but has no `init`",
        ),
        (lambda: _additive(hiden=2), TypeError, "no option `hiden`"),
        (
            lambda: as_attention_fn("dot_product", implementation="flash"),
            ValueError,
            "`implementation` must be None or one of auto, reference",
        ),
        (
            lambda: as_attention_fn("relu_attention", implementation="xla"),
            ValueError,
            "not `normalize`",
        ),
        (
            lambda: as_attention_fn(
                "dot_product", implementation="xla", normalize="relu"
            ),
            ValueError,
            "not `normalize`",
        ),
        (
            lambda: as_attention_fn("dot_product")(jnp.ones((2, 3)), None, None),
            ValueError,
            r"`query` must be \[batch..., T, N, H\]",
        ),
        (
            lambda: as_attention_fn("dot_product")(
                jnp.ones((2, 3, 1, 4)), jnp.ones((1, 3, 1, 4)), jnp.ones((2, 3, 1, 4))
            ),
            ValueError,
            "`key` must have the batch sizes",
        ),
    ],
)
def test_bad_requests_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("implementation", ["auto", "reference", "blockwise", "xla"])
def test_implementations_agree(implementation):
    fn = as_attention_fn(
        "dot_product", implementation=implementation, is_causal=True, scale=0.3
    )
    plain = as_attention_fn("dot_product", is_causal=True, scale=0.3)
    mask = MASKS["flax_padding"]
    np.testing.assert_allclose(
        _nnx_layer(fn)(_X, mask=mask),
        _nnx_layer(plain)(_X, mask=mask),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="cannot drop attention weights"):
        _nnx_layer(fn, dropout_rate=0.5)(_X, deterministic=False)


def test_attention_fn_is_static():
    """Equal settings are equal and hash alike, so nothing is compiled twice."""
    one, two = (as_attention_fn("dot_product", scale=0.5) for _ in range(2))
    assert isinstance(one, AttentionFn)
    assert one == two and hash(one) == hash(two)
    assert one != as_attention_fn("dot_product", scale=0.25)
    assert nnx.split(_nnx_layer(one))[0] == nnx.split(_nnx_layer(two))[0]
    linen_one = as_linen_attention_fn("additive", hidden_dim=4)
    assert isinstance(linen_one, LinenAttentionFn)
    assert hash(linen_one) == hash(as_linen_attention_fn("additive", hidden_dim=4))


@pytest.mark.parametrize("variant", ["dot_product", "additive"])
def test_training_step_of_a_layer_lowers_for_accelerators(variant):
    fn = _additive() if variant == "additive" else as_attention_fn(variant)
    layer = _nnx_layer(
        fn, dtype=jnp.bfloat16, dropout_rate=0.1, deterministic=False, keep_rngs=False
    )
    graph, params = nnx.split(layer)

    def step(params, x, mask, key):
        def loss(params):
            rngs = nnx.Rngs(dropout=key)
            out = nnx.merge(graph, params)(x, mask=mask, rngs=rngs)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss)(params)

    exported = jax.export.export(jax.jit(step), platforms=("cuda", "tpu"))(
        params, _X, MASKS["flax_causal_float32"], jax.random.key(0)
    )
    assert exported.platforms == ("cuda", "tpu")
    assert "dot_general" in exported.mlir_module()


def _mine_with_state():
    """A user's variant that counts the tokens it has seen beside a trained gain."""

    def scaled(query, key, value, *, params, key_mask=None):
        return params["gain"] * value

    def update(params, query, key, key_mask=None):
        seen = jnp.ones(len(key), bool) if key_mask is None else key_mask
        return {"seen": params["seen"] + seen.sum().astype(jnp.float32)}

    def init(rng, head_dim):
        return {"gain": jnp.ones(()), "seen": jnp.zeros(())}

    return Variant(name="mine", fn=scaled, init=init, update=update)


@pytest.mark.parametrize("name", ["routing", "clusterformer", "mine"])
def test_state_learns_in_training_calls_alone_and_is_no_parameter(name):
    variant = _mine_with_state() if name == "mine" else resolve(name)
    fn = as_attention_fn(
        variant, num_heads=HEADS, head_dim=HEAD_DIM, max_length=9, rngs=nnx.Rngs(1)
    )
    layer = _nnx_layer(fn)
    leaf = "seen" if name == "mine" else "centroid"
    assert isinstance(fn.params[leaf], AttentionState)
    trained = nnx.to_pure_dict(nnx.state(fn, nnx.Param)).get("params", {})
    assert set(trained) == ({"gain"} if name == "mine" else set())
    start = fn.params[leaf][...]
    mask = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 2]])
    given = {"mask": mask[:, None, None]}
    want = multi_head_update(
        variant,
        fn._head_params(HEADS, HEAD_DIM),
        layer.query(_X),
        layer.key(_X),
        key_mask=mask,
    )[leaf]
    assert not np.array_equal(start, want)

    layer(_X, **given, deterministic=True)
    layer.eval()
    layer(_X, **given)
    with training(False):
        layer.train()
        layer(_X, **given)
    np.testing.assert_array_equal(fn.params[leaf][...], start)
    layer(_X, **given)  # after `train()`
    np.testing.assert_allclose(fn.params[leaf][...], want, atol=1e-6)

    # All examples of the batch, end to end, without padding; each head its own.
    head = jax.tree.map(lambda leaf: leaf[1], fn._head_params(HEADS, HEAD_DIM))
    head[leaf] = start[1]
    real = [np.asarray(x[:, :, 1])[mask] for x in (layer.query(_X), layer.key(_X))]
    alone = variant.update(head, *map(jnp.asarray, real))[leaf]
    np.testing.assert_allclose(want[1], alone, atol=1e-6)

    # In a layer with dropout Flax passes on what was asked, and that goes before.
    now = fn.params[leaf][...]
    heads = layer.query(_X), layer.key(_X), layer.value(_X)
    fn(*heads, dropout_rate=0.1, deterministic=True)
    np.testing.assert_array_equal(fn.params[leaf][...], now)


@pytest.mark.parametrize("name", ["routing", "mine"])
def test_state_in_linen_is_a_collection_of_its_own(name):
    variant = _mine_with_state() if name == "mine" else resolve(name)
    layer = _linen_layer(as_linen_attention_fn(variant))
    variables = layer.init(jax.random.key(0), _X)
    state = variables["attention_state"]["attention_fn"]["head"]
    of_params = variables["params"].get("attention_fn", {"head": {}})["head"]
    assert set(state) == {"seen" if name == "mine" else "centroid"}
    assert set(of_params) == ({"gain"} if name == "mine" else set())
    if name == "mine":
        assert not np.any(state["seen"])  # init is no training call
    layer.apply(variables, _X)
    _, moved = layer.apply(variables, _X, mutable=["attention_state"])
    now = moved["attention_state"]["attention_fn"]["head"]
    assert all(not np.array_equal(state[k], now[k]) for k in state)
    with training(False):
        _, still = layer.apply(variables, _X, mutable=["attention_state"])
    jax.tree.map(
        np.testing.assert_array_equal,
        dict(still),
        {"attention_state": variables["attention_state"]},
    )


def test_noise_for_training_is_on_in_training_calls_alone():
    fn = as_attention_fn(
        "sinkhorn",
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        rngs=nnx.Rngs(attention=1, params=2),
        max_length=LENGTH,
        block_size=2,
    )
    layer = _nnx_layer(fn)
    plain = layer(_X)
    np.testing.assert_array_equal(layer(_X), plain)
    twins = jnp.stack([_X[0], _X[0]])
    with training(True):
        noisy = layer(twins)
    assert not np.allclose(noisy[0], plain[0])
    np.testing.assert_array_equal(noisy[0], noisy[1])
    linen_layer = _linen_layer(as_linen_attention_fn("sinkhorn", block_size=2))
    variables = linen_layer.init(jax.random.key(0), _X)
    first = linen_layer.apply(variables, _X)  # needs no stream
    with training(True):
        other = linen_layer.apply(variables, _X, rngs={"attention": jax.random.key(1)})
    assert not np.allclose(first, other)


def test_an_update_that_returns_another_shape_is_named():
    def update(params, query, key, key_mask=None):
        return {"gain": jnp.ones(3), "other": params["gain"]}

    wrong = dataclasses.replace(_mine_with_state(), update=update)
    with pytest.raises(ValueError, match="the `update` of .*'mine' must return leaves"):
        as_attention_fn(wrong, num_heads=HEADS, head_dim=HEAD_DIM, rngs=nnx.Rngs(1))
