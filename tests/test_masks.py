"""Masks against loops over queries and keys, how they combine, and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import masks


def _loops(length, key_length, allowed):
    """[T, S] mask of a predicate of t and s."""
    return np.array(
        [[allowed(t, s) for s in range(key_length)] for t in range(length)], bool
    )


@pytest.mark.parametrize(("length", "key_length"), [(5, 5), (3, 5), (5, 3), (1, 4)])
def test_patterns_equal_their_definition(length, key_length):
    cases = [
        (masks.causal(length, key_length), lambda t, s: s <= t),
        (
            masks.window(length, 2, 1, key_length=key_length),
            lambda t, s: t - 2 <= s <= t + 1,
        ),
        (masks.window(length, 1, None, key_length=key_length), lambda t, s: t - 1 <= s),
        (
            masks.strided(length, 2, key_length=key_length),
            lambda t, s: (t - s) % 2 == 0,
        ),
        (
            masks.strided(length, 3, is_causal=True, key_length=key_length),
            lambda t, s: s <= t and (t - s) % 3 == 0,
        ),
    ]
    for mask, allowed in cases:
        assert mask.dtype == jnp.bool_
        np.testing.assert_array_equal(mask, _loops(length, key_length, allowed))


def test_limits_of_the_patterns():
    np.testing.assert_array_equal(masks.window(4, None, 0), masks.causal(4))
    np.testing.assert_array_equal(masks.window(4, 0, 0), np.eye(4, dtype=bool))
    assert masks.window(4, None, None).all()
    assert masks.window(4, 3, 3).all()
    assert masks.strided(4, 1).all()
    np.testing.assert_array_equal(masks.strided(4, 4), np.eye(4, dtype=bool))
    np.testing.assert_array_equal(masks.strided(4, 1, is_causal=True), masks.causal(4))


def test_causal_is_aligned_as_in_jax_nn():
    """With T ≠ S it equals what `is_causal` of jax.nn does, not the other corner."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (1, 3, 1, 4))
    key, value = (jax.random.normal(k, (1, 5, 1, 4)) for k in keys[1:])
    ours = jax.nn.dot_product_attention(
        query, key, value, mask=masks.causal(3, 5)[None, None]
    )
    theirs = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_lengths_become_key_masks():
    lengths = jnp.array([[0, 2], [4, 9]])
    mask = masks.from_lengths(lengths, 4)
    assert mask.shape == (2, 2, 4)
    np.testing.assert_array_equal(mask.sum(-1), [[0, 2], [4, 4]])
    assert mask[0, 1].tolist() == [True, True, False, False]
    np.testing.assert_array_equal(
        jax.jit(masks.from_lengths, static_argnums=1)(lengths, 4), mask
    )


def test_padding_of_keys_and_of_queries():
    key_mask = masks.from_lengths(jnp.array(2), 3)
    query_mask = masks.from_lengths(jnp.array(1), 2)
    np.testing.assert_array_equal(
        masks.padding(key_mask), np.array([[True, True, False]] * 3)
    )
    np.testing.assert_array_equal(
        masks.padding(key_mask, length=2), np.array([[True, True, False]] * 2)
    )
    np.testing.assert_array_equal(
        masks.padding(key_mask, query_mask),
        np.array([[True, True, False], [False, False, False]]),
    )
    batch = masks.from_lengths(jnp.array([1, 3]), 3)
    np.testing.assert_array_equal(
        jax.vmap(masks.padding)(batch)[0], [[True, False, False]] * 3
    )


def test_edges_equal_adjacency():
    senders, receivers = jnp.array([0, 0, 3, 0]), jnp.array([1, 2, 1, 1])
    adjacency = np.zeros((4, 4), int)
    for sender, receiver in zip(senders.tolist(), receivers.tolist(), strict=True):
        adjacency[receiver, sender] = 1
    for self_loops in (False, True):
        mask = masks.from_edges(senders, receivers, 4, self_loops=self_loops)
        np.testing.assert_array_equal(
            mask, masks.from_adjacency(jnp.asarray(adjacency), self_loops=self_loops)
        )
    np.testing.assert_array_equal(
        masks.from_edges(senders, receivers, 4), adjacency.astype(bool)
    )
    empty = jnp.zeros((0,), jnp.int32)
    assert not masks.from_edges(empty, empty, 3).any()


def test_traced_padding_edges_are_dropped():
    senders, receivers = jnp.array([0, -1, 1, 0]), jnp.array([1, 0, 3, -1])
    with pytest.raises(ValueError, match="`senders` must lie in 0 … 2"):
        masks.from_edges(senders, receivers, 3)
    mask = jax.jit(masks.from_edges, static_argnums=2)(senders, receivers, 3)
    assert np.argwhere(np.asarray(mask)).tolist() == [[1, 0]]


def test_combinations():
    band, causal = masks.window(4, 1, 1), masks.causal(4)
    np.testing.assert_array_equal(
        masks.all_of(band, causal), np.asarray(band) & np.asarray(causal)
    )
    np.testing.assert_array_equal(
        masks.any_of(band, causal), np.asarray(band) | np.asarray(causal)
    )
    key_mask = masks.from_lengths(jnp.array([1, 4]), 4)[:, None, :]
    both = masks.combine(causal[None], None, key_mask)
    assert both.shape == (2, 4, 4)
    np.testing.assert_array_equal(both[1], causal)
    assert both[0].sum() == 4
    assert masks.combine(None, None) is None
    np.testing.assert_array_equal(masks.all_of(causal), causal)


def test_sparse_transformer_pattern_reaches_everything_in_two_steps():
    """Local window or stride: every past key in at most two hops."""
    mask = masks.any_of(masks.window(16, 4, 0), masks.strided(16, 4, is_causal=True))
    one = np.asarray(mask).astype(int)
    np.testing.assert_array_equal((one @ one) > 0, masks.causal(16))
    assert one.sum() < np.asarray(masks.causal(16)).sum()


_BOOL = np.ones((2, 2), bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masks.causal(-1),
            ValueError,
            "`length` must be at least 0, but is -1",
        ),
        (lambda: masks.causal(2, -1), ValueError, "`key_length`"),
        (lambda: masks.causal(2.0), TypeError, "`length` must be an int .* float"),
        (lambda: masks.window(3, -1, 0), ValueError, "`left` must be at least 0"),
        (lambda: masks.window(3, 1, -2), ValueError, "`right` must be at least 0"),
        (lambda: masks.strided(3, 0), ValueError, "stride"),
        (lambda: masks.from_lengths(jnp.array([1.0]), 3), TypeError, "integers"),
        (lambda: masks.from_lengths(jnp.array([1]), 0), ValueError, "size"),
        (lambda: masks.padding(jnp.ones(3)), TypeError, "`key_mask` must be bool"),
        (lambda: masks.padding(jnp.ones((2, 3), bool)), ValueError, "jax.vmap"),
        (
            lambda: masks.padding(jnp.ones(3, bool), jnp.ones(2, bool), length=3),
            ValueError,
            "`length` must be that of `query_mask`, but is 3",
        ),
        (lambda: masks.from_adjacency(jnp.ones((2, 2))), TypeError, "threshold"),
        (lambda: masks.from_adjacency(jnp.ones(2, int)), ValueError, r"\[T, S\]"),
        (
            lambda: masks.from_adjacency(jnp.ones((2, 3), int), self_loops=True),
            ValueError,
            "square",
        ),
        (
            lambda: masks.from_edges(jnp.array([0]), jnp.array([3]), 3),
            ValueError,
            "`receivers` must lie in 0 … 2",
        ),
        (
            lambda: masks.from_edges(jnp.array([0.0]), jnp.array([0]), 3),
            TypeError,
            "`senders` must be integers",
        ),
        (
            lambda: masks.from_edges(jnp.array([0, 1]), jnp.array([0]), 3),
            ValueError,
            "one length, but have 2 and 1",
        ),
        (
            lambda: masks.from_edges(jnp.array([[0]]), jnp.array([0]), 3),
            ValueError,
            "`senders` must be a vector",
        ),
        (
            lambda: masks.all_of(jnp.ones((2, 2))),
            TypeError,
            r"`masks\[0\]` must be bool",
        ),
        (lambda: masks.any_of(_BOOL, _BOOL[None]), ValueError, "one rank"),
        (
            lambda: masks.combine(_BOOL, np.ones((3, 3), bool)),
            ValueError,
            "must have shapes that broadcast",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
