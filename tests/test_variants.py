"""Resolving names, files and functions to variants."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.softmax import dot_product
from attn_jax.multihead import multi_head
from attn_jax.nn.attention_fn import as_attention_fn, as_linen_attention_fn
from attn_jax.testing import assert_conforms, check
from attn_jax.variant import (
    ARGUMENTS,
    VARIANTS,
    Variant,
    require,
    resolve,
    variants_with,
)

SOURCE = '''
"""A file of a user's own."""
import jax, jax.numpy as jnp

def mean(query, key, value, *, key_mask=None):
    """The mean over all keys."""
    weights = jnp.ones(len(key)) if key_mask is None else key_mask.astype(jnp.float32)
    row = (weights / weights.sum()) @ value
    return jnp.broadcast_to(row, (query.shape[0], value.shape[1]))

def scaled(query, key, value, *, params):
    return params["gain"] * mean(query, key, value)

def scaled_init(rng, head_dim):
    return {"gain": jnp.ones(())}

def scaled_step(state, query, key, value, *, params):
    return state, params["gain"] * value

def scaled_init_state():
    return ()

def greedy(query, key, value, **kwargs):
    return query

def shuffled(key, query, value):
    return query

number = 3
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_names_functions_and_records_resolve():
    for name, variant in VARIANTS.items():
        assert resolve(name) is resolve(variant) is resolve(variant.fn) is variant
    assert VARIANTS["dot_product"].fn is dot_product


def test_a_function_in_a_file_resolves_with_its_capabilities(file):
    variant = resolve(f"{file}:mean")
    assert variant.name == f"{file}:mean"
    assert variant.summary == "The mean over all keys."
    assert variant.capabilities() == {
        "bias": False,
        "mask": False,
        "key_mask": True,
        "causal": False,
        "cross": True,
        "value_dim": True,
        "dropout": False,
    }
    assert variant.init is None and not variant.stochastic and not variant.exact
    # The same content gives the same function, so that compiled programs are reused.
    assert resolve(f"{file}:mean").fn is variant.fn
    file.write_text(SOURCE.replace("The mean", "A mean"))
    assert resolve(f"{file}:mean").summary == "A mean over all keys."


def test_a_file_may_hold_parameters_or_a_record(file):
    scaled = resolve(f"{file}:scaled")
    assert scaled.init(None, 4)["gain"] == 1.0 and scaled.start() == ()
    out = scaled.advance((), query=1, key=2, value=3, params={"gain": 5})[1]
    assert out == 15
    file.write_text(
        SOURCE + "\nfrom attn_jax.variant import Variant\n"
        "record = Variant(name='mine', fn=mean, key_mask=True, time='O(S)')\n"
    )
    assert resolve(f"{file}:record").time == "O(S)"


def test_callables_of_other_kinds_resolve():
    partial = functools.partial(dot_product, scale=1.0)
    assert resolve(partial).bias and resolve(partial).dropout

    class Attention:
        def __call__(self, query, key, value, mask=None, *, rng):
            return query

    variant = resolve(Attention())
    assert variant.mask and not variant.bias
    assert variant.stochastic  # takes rng for something other than dropout


def _told(variant):
    """What a record says, less its name and functions."""
    functions = ("name", "fn", "init", "trial", "approximates", "arrays", "update")
    functions += ("step", "init_state")
    return {
        field.name: getattr(variant, field.name)
        for field in dataclasses.fields(variant)
        if field.name not in functions
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_options_bind_and_the_record_stays(name):
    row = VARIANTS[name]
    takes = inspect.signature(row.fn).parameters
    options = {k: x for k, x in row.trial.items() if k in takes}
    options |= {"scale": 0.5} if "scale" in takes else {}
    bound = row.bind(**options)
    assert _told(bound) == _told(row) and bound.arrays is row.arrays
    assert bound.base is row.base and bound.name.startswith(name)
    assert (bound.init is None) == (row.init is None)
    assert resolve(functools.partial(row.fn, **options)) == bound
    assert resolve(bound.fn) == bound
    if options:
        assert bound.options.items() >= options.items()
        again = row
        for key, value in options.items():
            again = again.bind(**{key: value})
        assert again == bound and hash(again) == hash(bound)
        assert "(" in bound.name and bound.name.count(name) == 1
    with pytest.raises(
        TypeError, match=f"'{name}' takes no option `no_such`; it takes"
    ):
        row.bind(no_such=1)


def test_what_is_bound_is_used_up():
    row = VARIANTS["dot_product"]
    causal = row.bind(is_causal=True)
    assert causal.causal and not causal.exact and not causal.equivariant
    assert not row.bind(key_mask=jnp.ones(3, bool)).key_mask
    assert not VARIANTS["blockwise"].bind(local_window_size=2).exact
    drawn = VARIANTS["performer"].bind(rng=jax.random.key(0))
    assert not drawn.stochastic and not drawn.needs("rng")
    params = {"score": jnp.ones(4)}
    assert VARIANTS["gatv2"].bind(params=params).init is None
    assert row.bind() is row and causal.bind(scale=1.0).bind(scale=2.0).options == {
        "is_causal": True,
        "scale": 2.0,
    }
    # One option of a function and its `init` is one option.
    assert VARIANTS["sinkhorn"].bind(block_size=8).init.keywords == {"block_size": 8}
    assert VARIANTS["routing"].bind(num_clusters=3).options == {"num_clusters": 3}
    with pytest.raises(TypeError, match="`dropout_rate` is no option to bind"):
        row.bind(dropout_rate=0.1)
    with pytest.raises(ValueError, match="binds 1 of the .* by their place"):
        resolve(functools.partial(dot_product, jnp.ones((2, 2))))


def test_bound_options_are_heeded_by_multi_head_and_layers():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 130, 1, 2)), jnp.float32)
    near = VARIANTS["truncated"].bind(left=2, right=1)
    assert near.arrays is not None  # on CPU that is what "loop" runs
    want = multi_head("truncated", map_heads="vmap")(x, x, x, left=2, right=1)
    for how in ("vmap", "loop"):
        np.testing.assert_allclose(
            multi_head(near, map_heads=how)(x, x, x), want, atol=1e-6
        )
    np.testing.assert_allclose(
        as_attention_fn(functools.partial(near.fn, right=0))(x, x, x),
        multi_head("truncated")(x, x, x, left=2, right=0),
        atol=1e-6,
    )
    # A layer says `is_causal=False` at every call; what is causal stays so.
    causal = functools.partial(dot_product, is_causal=True)
    np.testing.assert_allclose(
        as_attention_fn(causal)(x, x, x),
        multi_head(dot_product)(x, x, x, is_causal=True),
    )
    of_heads = as_linen_attention_fn(VARIANTS["additive"].bind(hidden_dim=3))
    params = of_heads.init(jax.random.key(0), x, x, x)["params"]["head"]
    assert params["score"].shape == (1, 3)


def test_a_bound_variant_conforms():
    assert_conforms(
        functools.partial(VARIANTS["linear"].fn, is_causal=True, chunk_size=8),
        only=["shape", "vmap", "causal", "equivariance", "refusal"],
    )
    report = check(functools.partial(dot_product, scale=0.3), only=["exact", "scale"])
    assert report.ok and report.claims["exact"], report


def test_every_row_says_what_its_signature_says():
    for name, variant in VARIANTS.items():
        takes = inspect.signature(variant.fn).parameters
        for flag, argument in ARGUMENTS.items():
            assert getattr(variant, flag) == (argument in takes), (name, flag)
        for_dropout_alone = "dropout_rate" in takes and "dropout_rng" not in takes
        assert variant.stochastic == ("rng" in takes and not for_dropout_alone), name
        assert variant.dropout <= bool({"rng", "dropout_rng"} & set(takes)), name
    assert VARIANTS["sinkhorn"].stochastic and not VARIANTS["sinkhorn"].needs("rng")
    assert VARIANTS["performer"].needs("rng") and not VARIANTS["dot_product"].stochastic


def test_what_draws_what_is_read_from_names():
    def both(query, key, value, *, rng, dropout_rng=None, dropout_rate=0.0):
        return value

    def unclear(query, key, value, *, rng, dropout_rate=0.0):
        return value

    def dropout(query, key, value, *, rng=None, dropout_rate=0.0):
        return value

    found = {fn: resolve(fn) for fn in (both, unclear, dropout)}
    assert [found[fn].stochastic for fn in found] == [True, True, False]
    assert [found[fn].dropout for fn in found] == [True, False, True]
    with pytest.raises(ValueError, match="by a key of its own, `dropout_rng=None`"):
        require(found[unclear], "dropout")
    # What a function takes and refuses can be said.
    assert not Variant(name="mine", fn=dropout, dropout=False).dropout


@pytest.mark.parametrize(
    "spec, message",
    [
        ("dot_produkt", r"unknown attention variant 'dot_produkt'. Did you mean 'dot_"),
        ("zzz", r"unknown attention variant 'zzz'. Known: .*path/file.py:function"),
        ("{file}:meen", r"no function 'meen' in .*mine.py; it has: greedy, mean"),
        ("{file}:number", r"no function 'number'"),
        ("{file}x:mean", r"no such file: .*mine.pyx"),
        ("{file}:greedy", r"takes `\*\*kwargs`.*name its arguments"),
        ("{file}:shuffled", r"must begin with the arguments \(query, key, value\)"),
    ],
)
def test_what_does_not_resolve_says_why(spec, message, file):
    with pytest.raises(ValueError, match=message):
        resolve(spec.format(file=file))


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "import no_such_module_here",
            "fails on import with ModuleNotFoundError: .*no_",
        ),
        ("def f(:", "fails on import with SyntaxError"),
        ("1 / 0", "fails on import with ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_fails_says_how(source, message, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message):
        resolve(f"{path}:f")


def test_a_file_imports_its_neighbours(tmp_path):
    (tmp_path / "a_neighbour_of_mine.py").write_text("def f(x): return 2 * x")
    path = tmp_path / "mine.py"
    path.write_text(
        "from a_neighbour_of_mine import f\ndef g(query, key, value): return f(value)"
    )
    before = list(sys.path)
    try:
        assert resolve(f"{path}:g").fn(1, 2, 3) == 6
    finally:
        sys.modules.pop("a_neighbour_of_mine", None)
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        resolve(f"{path}:g")
    assert sys.path == before


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(TypeError, match="`spec` must be a variant's name.*but is int"):
        resolve(3)
    text = tmp_path / "notes.txt"
    text.write_text("def f(query, key, value): return query")
    with pytest.raises(ValueError, match="is not a Python file"):
        resolve(f"{text}:f")


def test_require_names_those_that_can():
    require(VARIANTS["dot_product"], "dropout")
    with pytest.raises(ValueError, match="'blockwise' cannot honour dropout") as raised:
        require(VARIANTS["blockwise"], "dropout")
    assert all(name in str(raised.value) for name in variants_with("dropout"))
    mine = resolve(lambda query, key, value: value)
    with pytest.raises(ValueError, match="Your function gains it by .*`is_causal`"):
        require(mine, "causal")
    with pytest.raises(ValueError, match="Put `<function>_step` and .* beside yours"):
        mine.start(head_dim=4)
    rigid = dataclasses.replace(mine, cross=False)
    with pytest.raises(ValueError, match="Set `cross=True` in its `Variant`"):
        require(rigid, "cross")
    with pytest.raises(ValueError, match="`capability` must be one of"):
        variants_with("speed")


def test_records_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["dot_product"].name = "other"
    plain = Variant(name="plain", fn=lambda query, key, value: jnp.zeros(()))
    able = [name for name, can in plain.capabilities().items() if can]
    assert able == ["cross", "value_dim"]
