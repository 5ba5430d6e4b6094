"""Claims as words and formulas."""

from __future__ import annotations

import math

import pytest

from attn_jax.testing import growth
from attn_jax.testing.claims import claimed, with_claims
from attn_jax.variant import VARIANTS, Variant, resolve


@pytest.mark.parametrize(
    ("formula", "at_256"),
    [
        ("O(T)", 256),
        ("O(1)", 1),
        ("O(T·S·H)", 64 * 256**2),
        ("O(N log N)", 256 * 8),
        ("O(T * log(T))", 256 * 8),
        ("O(T·√T·H)", 256 * 16 * 64),
        ("O(T^1.5)", 256 * 16),
        ("O(T²/w)", 256**2 / 64),
        ("O(n(k+m))", 256 * 128),
        ("O((T+S)·k)", 512 * 64),
        ("O(TS)", 256**2),
        ("O(T·log T + T sqrt(T))", 256 * 8 + 256 * 16),
    ],
)
def test_growths_are_read(formula, at_256):
    assert growth(formula)(256.0) == pytest.approx(at_256)


def test_every_growth_in_the_table_is_read():
    for variant in VARIANTS.values():
        for formula in (variant.time, variant.memory):
            assert math.isfinite(growth(formula)(1024.0)), variant.name


@pytest.mark.parametrize(
    "formula", ["T", "O(T", "O()", "O(T;S)", "O(import os)x", "O(+)"]
)
def test_what_is_no_growth_says_how_to_write_one(formula):
    with pytest.raises(ValueError, match="cannot read the growth"):
        growth(formula)


def _plain(query, key, value, bias=None, mask=None, *, key_mask=None):
    if bias is not None:
        raise NotImplementedError("no `bias` here")
    if query.shape != key.shape:
        raise ValueError("T must be S")
    return value[: query.shape[0]]


def test_claims_are_read_from_the_function():
    found = with_claims(resolve(_plain), None, declared=False)
    assert found.mask and found.key_mask and found.value_dim
    assert not found.bias and not found.cross and not found.causal


def test_claims_are_said():
    said = "mask, causal,exact,time=O(max(T, S)),memory=O(1)"
    found = with_claims(resolve(_plain), said, declared=False)
    assert found.mask and found.causal and found.exact
    assert not (found.bias or found.key_mask or found.cross or found.value_dim)
    assert claimed(found)["time"] == "O(max(T, S))"
    assert with_claims(found, "", declared=True).mask is False
    near = with_claims(resolve(_plain), ["approximates"], declared=False)
    assert claimed(near)["approximates"] == "dot_product"


def test_a_record_keeps_its_own_claims():
    record = Variant(name="mine", fn=_plain, mask=True)
    assert with_claims(record, None, declared=True) is record


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("speed", "unknown claim 'speed'; what can be claimed: bias, mask"),
        ("time", r"`time` needs a growth, such as time=O\(T\)"),
        ("time=fast", "cannot read the growth 'fast'"),
        ("mask=yes", "takes no value"),
    ],
)
def test_bad_claims_are_named(claims, message):
    with pytest.raises(ValueError, match=message):
        with_claims(resolve(_plain), claims, declared=False)
