"""Weights that are measured, and how they are shown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import VARIANTS, masks
from attn_jax import __main__ as command_line
from attn_jax.attention.softmax import dot_product_weights
from attn_jax.tools import weights


def _inputs(rows=5, columns=7):
    of_query, of_key, of_value = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(of_query, (rows, 4)),
        jax.random.normal(of_key, (columns, 4)),
        jax.random.normal(of_value, (columns, 3)),
    )


@pytest.mark.parametrize("name", ["dot_product", "blockwise"])
def test_those_of_softmax_attention_are_its_softmax(name):
    query, key, value = _inputs()
    found = weights.weights(VARIANTS[name], query, key, value)
    np.testing.assert_allclose(found, dot_product_weights(query, key), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["linear", "gated_linear", "performer", "retention", "linformer"]
)
def test_a_weighted_sum_is_the_sum_by_its_weights(name):
    variant = VARIANTS[name].fit(max_length=6)
    query, key, value = _inputs(6, 6)
    value = jnp.zeros_like(value).at[:, 0].set(value[:, 0])
    causal = variant.causal
    found = weights.weights(variant, query, key, value, is_causal=causal)
    of_params, of_draws = jax.random.split(jax.random.key(0))
    given = {"is_causal": True} if causal else {}
    if variant.needs("params"):
        bound = variant.fit(value_dim=3)
        given["params"] = bound.make(of_params, 4)
    if variant.needs("rng"):
        given["rng"] = of_draws
    want = variant.fn(query, key, value, **given)[:, 0]
    np.testing.assert_allclose(found @ value[:, 0], want, atol=1e-5)
    if causal:
        assert not found[~masks.causal(6)].any()


def test_the_same_word_has_the_same_vector_but_for_its_place():
    words = "a saw a".split()
    bare = weights.vectors_of(words, 8, positions=False)
    assert (bare[0] == bare[2]).all() and (bare[0] != bare[1]).any()
    placed = weights.vectors_of(words, 8)
    assert (placed[0] != placed[2]).any()


def test_a_map_marks_what_is_negative_and_has_its_largest_darkest():
    shown = weights.heat_map(jnp.array([[1.0, -0.5], [0.0, 0.5]])).splitlines()
    assert shown[1].split() == ["0", "████", "----", "1.00"]
    assert shown[2].split() == ["1", "▒▒▒▒", "0.50"]
    wide = weights.heat_map(jnp.eye(30)).splitlines()
    assert len(wide) == 30 and all(line.count("█") == 1 for line in wide)


def test_arrays_come_from_a_file_and_what_is_wrong_is_told(tmp_path):
    query, key, value = map(np.asarray, _inputs())
    np.savez(tmp_path / "all.npz", query=query, key=key, value=value)
    for one, other in zip(
        weights.arrays_of(tmp_path / "all.npz"), (query, key, value), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.savez(tmp_path / "one.npz", query=query)
    assert all((x == query).all() for x in weights.arrays_of(tmp_path / "one.npz"))
    np.savez(tmp_path / "none.npz", q=query)
    with pytest.raises(ValueError, match=r"`query` \[T, H\] is needed, it has q"):
        weights.arrays_of(tmp_path / "none.npz")
    np.savez(tmp_path / "flat.npz", query=query[0])
    with pytest.raises(ValueError, match=r"query must have two axes, got \(4,\)"):
        weights.arrays_of(tmp_path / "flat.npz")


def test_the_command_shows_and_draws_them(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "weights.png"
    wanted = ["show", "dot_product", "--sentence", "I saw a saw", "--causal"]
    assert command_line.main([*wanted, "--png", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dot_product\n") and said.count("saw") == 4
    assert picture.read_bytes()[1:4] == b"PNG"
    for wrong, message in (
        (["show", "linear", "--causal"], "--causal is of weights"),
        (["show", "linear", "shaw", "--png", "x", "--sentence", "a b"], "one variant"),
        (["show", "linformer", "--causal", "--sentence", "a b"], "no causal form"),
    ):
        assert command_line.main(wrong) == 2
        assert message in capsys.readouterr().err
