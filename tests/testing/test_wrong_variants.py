"""Each fault is caught by name, and nothing is said against what is right."""

from __future__ import annotations

import pathlib

import jax
import pytest

from attn_jax.testing import CHECKS, assert_conforms, check

HERE = pathlib.Path(__file__).parents[1]

# File in wrong_variants -> the check that names its fault, and what is claimed.
WRONG: dict[str, tuple[str, str | None]] = {
    "future_leak": ("causal", "causal,cross,value_dim"),
    "causal_from_the_end": ("causal", None),
    "ignored_padding": ("key_mask", None),
    "counted_padding": ("key_mask", "key_mask,cross,value_dim"),
    "nan_in_padding": ("key_mask", "key_mask,cross,value_dim"),
    "needs_a_token": ("shape", "cross,value_dim"),
    "ignored_mask": ("mask", "bias,mask,cross,value_dim"),
    "inverted_mask": ("mask", None),
    "ignored_bias": ("bias", None),
    "nan_on_an_empty_row": ("empty_rows", None),
    "wrong_gradient": ("gradient", None),
    "hidden_quadratic": ("cost", None),
    "ignored_scale": ("scale", None),
    "leak_beyond_a_chunk": ("causal", None),
    "causal_forgets_padding": ("causal", None),
    "quadratic_where_causal": ("cost", "causal,time=O(T),memory=O(T)"),
    "same_mean_claimed_near": ("approximation", "approximates,cross,value_dim"),
    "gradient_under_a_mask": ("gradient", None),
    "reads_no_rng": ("determinism", None),
    "hidden_mask": ("cost", "time=O(T),memory=O(T)"),
    "dtype_leak": ("dtype", None),
    "narrow_softmax": ("dtype", None),
    "batch_dependent": ("vmap", None),
    "hidden_randomness": ("determinism", None),
    "overflow": ("stability", None),
    "narrow_sums": ("narrow", None),
    "narrow_sums_of_gradients": ("narrow", None),
    "not_exact": ("exact", "exact,cross,value_dim"),
    "accepts_what_it_does_not_claim": ("refusal", "bias,cross,value_dim"),
    "knows_order": ("equivariance", "equivariant,cross,value_dim"),
    "does_not_converge": ("approximation", None),
    "whole_blocks_alone": ("shape", None),
    "differs_under_jit": ("jit", None),
    "coarse": ("float64", None),
    "calls_the_host": ("lowering", None),
    "carries_bare_zeros": ("shard_map", None),
    "brings_its_own_mesh": ("explicit_mesh", None),
    "learns_from_padding": ("state", None),
    "forgetful_step": ("step", None),
    "dropout_without_rescaling": ("dropout", "dropout,cross,value_dim"),
}
RIGHT = (
    *("clipped_cosine", "decayed", "hashed", "mean", "plain", "running_mean"),
    "self_alone",
)


@pytest.fixture(autouse=True)
def lenient():
    """A user's file is run with JAX's own settings."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_check_has_a_fault_and_every_file_a_check():
    assert {name for name, _ in WRONG.values()} == set(CHECKS)
    for folder, names in (("wrong_variants", WRONG), ("right_variants", RIGHT)):
        assert {p.stem for p in (HERE / folder).glob("*.py")} == set(names)


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_is_caught_by_name(name):
    expected, claims = WRONG[name]
    file = HERE / "wrong_variants" / f"{name}.py"
    report = check(f"{file}:attend", claims, only=[expected])
    assert report.failed == (expected,), report.rows
    assert report.rows[0].evidence


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_said_against_what_is_right(name):
    # Those that take longest, and that say little of so small functions, left out.
    only = [check for check in CHECKS if check not in ("jit", "cost", "lowering")]
    assert_conforms(f"{HERE / 'right_variants' / name}.py:attend", only=only)
