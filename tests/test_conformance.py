"""The claims of every row of the zoo, by the conformance kit; see also `make check`."""

from __future__ import annotations

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest

from attn_jax import masks, zoo
from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.linear_attention import attend_features
from attn_jax.testing import assert_conforms

ROOT = pathlib.Path(__file__).parents[1]


# Two rows in full; `make check` runs every check on every row.
@pytest.mark.parametrize("name", ["dot_product", "linear"])
def test_every_claim_holds(name):
    assert_conforms(name)


def test_the_example_of_contributing_is_all_that_a_variant_takes():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    function, row = re.findall(
        r"```python\n((?:def efficient|    _row).*?)```", text, re.S
    )
    names = dict(
        jax=jax,
        jnp=jnp,
        _checks=_checks,
        score_dtype=score_dtype,
        attend_features=attend_features,
    )
    exec(compile(function, "CONTRIBUTING.md", "exec"), names)
    names["attention"] = types.SimpleNamespace(efficient=names["efficient"])
    (variant,) = eval(f"({row})", {**names, "_row": zoo._row})
    assert_conforms(variant)
    # And it is what it says: a softmax over channels, with a float64 sum by hand.
    q, k, v = (jax.random.normal(jax.random.key(i), (5, 4)) for i in range(3))
    weights = jax.nn.softmax(q, -1) @ jax.nn.softmax(k, -1).T
    weights = jnp.where(masks.causal(5), weights, 0.0)
    want = weights @ v / weights.sum(1, keepdims=True)
    got = variant.fn(q, k, v, is_causal=True)
    assert jnp.abs(got - want).max() < 1e-5
