"""Inputs as vectors: against numpy, and bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import inputs


def test_one_hot_is_rows_of_the_identity():
    ids = np.array([3, 0, 3, 2])
    np.testing.assert_array_equal(inputs.one_hot(ids, 4), np.eye(4)[ids])
    assert inputs.one_hot(ids, 4).dtype == jnp.float32
    assert inputs.one_hot(ids, 4, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    # 256 + 3 words and ids of eight bits: 3 is not also 259.
    small = inputs.one_hot(ids.astype(np.uint8), 260)
    np.testing.assert_array_equal(small, np.eye(260)[ids])


def test_embed_is_the_product_with_one_hot_vectors(draw):
    table = draw({"table": (5, 3)})["table"]
    ids = np.array([4, 0, 4])
    product = inputs.one_hot(ids, 5) @ table
    np.testing.assert_array_equal(inputs.embed(table, ids), product)
    np.testing.assert_array_equal(
        inputs.embed(table, ids.astype(np.uint8)), inputs.embed(table, ids)
    )


def test_traced_ids_out_of_range_give_zeros_and_no_gradient(draw):
    """Padding ids, also in a batch, where values cannot be checked."""
    table = draw({"table": (5, 3)})["table"]
    ids = jnp.array([[4, -1, 1], [5, 2, -7]])
    known = (np.asarray(ids) >= 0) & (np.asarray(ids) < 5)
    rows = np.where(known[:, :, None], table[np.where(known, ids, 0)], 0.0)

    @jax.jit
    def both(table, ids):
        embed = jax.vmap(inputs.embed, in_axes=(None, 0))
        gradient = jax.grad(lambda table: embed(table, ids).sum())(table)
        hot = jax.vmap(functools.partial(inputs.one_hot, size=5))(ids)
        return embed(table, ids), gradient, hot

    embedded, gradient, hot = both(table, ids)
    np.testing.assert_array_equal(embedded, rows)
    np.testing.assert_array_equal(hot.sum(axis=2), known)
    np.testing.assert_array_equal(hot.sum(axis=(0, 1)), [0, 1, 1, 0, 1])
    np.testing.assert_array_equal(gradient, np.outer([0, 1, 1, 0, 1], np.ones(3)))


def test_graph_nodes_are_types_and_degrees():
    types = np.array([2, 0, 0, 1])
    np.testing.assert_array_equal(inputs.graph_nodes(types, 3), np.eye(3)[types])
    edges = np.array([[0, 1], [2, 1], [1, 0], [3, 1], [3, 1]])
    nodes = inputs.graph_nodes(types, 3, edges)
    np.testing.assert_array_equal(nodes[:, :3], np.eye(3)[types])
    np.testing.assert_array_equal(nodes[:, 3], [1, 4, 0, 0])
    # Traced edges to or from nowhere are padding.
    padded = np.concatenate([edges, [[-1, -1], [4, 1], [1, -1], [-4, 2], [1, 4]]])
    traced = jax.jit(inputs.graph_nodes, static_argnums=1)(types, 3, padded)
    np.testing.assert_array_equal(traced, nodes)
    none = inputs.graph_nodes(types, 3, np.zeros((0, 2), int))
    np.testing.assert_array_equal(none[:, 3], np.zeros(4))


@pytest.mark.parametrize(
    ("n", "window", "hop"), [(11, 4, 3), (12, 4, 3), (13, 4, 3), (7, 7, 2), (9, 2, 5)]
)
def test_frames_are_those_of_numpy(n, window, hop):
    signal = np.arange(n, dtype=np.int16)
    windows = np.lib.stride_tricks.sliding_window_view(signal, window)[::hop]
    ours = inputs.frames(signal, window, hop)
    assert ours.dtype == jnp.int16
    np.testing.assert_array_equal(ours, windows)
    assert inputs.num_frames(n, window, hop) == len(windows)


def test_num_frames_of_what_is_too_short():
    assert inputs.num_frames(3, 4, 1) == 0
    assert inputs.num_frames(0, 4, 9) == 0


SHORT = np.zeros(399, np.float32)
SOUND = np.zeros(400, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inputs.one_hot([0, 3], 3), ValueError, r"`ids` .* 0 … 2, .* 0 to 3"),
        (lambda: inputs.one_hot([-1], 3), ValueError, "`ids` .* from -1"),
        (lambda: inputs.one_hot(np.array([2**32]), 3), ValueError, "`ids` .*4294967"),
        (lambda: inputs.one_hot(jnp.array([3]), 3), ValueError, "`ids` .* from 3"),
        (lambda: inputs.one_hot([0.0], 3), TypeError, "`ids` .* float64"),
        (lambda: inputs.one_hot([True], 3), TypeError, "`ids` .* bool"),
        (lambda: inputs.one_hot([[0]], 3), ValueError, r"`ids` .*\[T\].*\(1, 1\)"),
        (lambda: inputs.one_hot([0], 0), ValueError, "`size` .* at least 1"),
        (lambda: inputs.embed(np.ones((2, 3)), [2]), ValueError, "`ids` .* 0 … 1"),
        (lambda: inputs.embed(np.ones(3), [0]), ValueError, r"`table` .*\[V, D\]"),
        (lambda: inputs.embed(np.ones((2, 3), int), [0]), TypeError, "`table` .* int"),
        (lambda: inputs.graph_nodes([2], 2), ValueError, "`node_types` .* 0 … 1"),
        (lambda: inputs.graph_nodes([0], 2, [[0, 1]]), ValueError, "`edges` .* 0 … 0"),
        (lambda: inputs.graph_nodes([0], 2, [[0]]), ValueError, r"`edges` .*\[E, 2\]"),
        (lambda: inputs.graph_nodes([0], 2, [0]), ValueError, r"`edges` .*\[E, 2\]"),
        (lambda: inputs.num_frames(-1, 2, 1), ValueError, "`n` .* at least 0"),
        (lambda: inputs.frames(SOUND, 0, 1), ValueError, "`window` .* at least 1"),
        (lambda: inputs.frames(SOUND, 9, 0), ValueError, "`hop` .* at least 1"),
        (lambda: inputs.frames(SOUND, 9.0, 1), TypeError, "`window` .* float"),
        (lambda: inputs.frames(SHORT, 400, 1), ValueError, "`signal` .* 400 .* 399"),
        (lambda: inputs.frames(SOUND[None], 9, 1), ValueError, r"`signal` .*\[n\]"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
