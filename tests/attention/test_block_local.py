"""Block-local attention: equal to a mask of blocks, and the tiles it is made of."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import _tiles
from attn_jax.attention.local import block_local
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 4, 3


def _draw_arrays(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _blocks(length, size, back, ahead):
    t, s = np.arange(length)[:, None] // size, np.arange(length)[None] // size
    return (s >= t - back) & (s <= t + ahead)


@pytest.mark.parametrize(
    "length, size, back, ahead, causal",
    [
        (1, 4, 0, 0, False),
        (2, 1, 0, 1, False),
        (13, 5, 0, 0, True),
        (13, 4, 1, 2, False),
        (13, 4, 2, 1, True),
        (13, 64, 0, 0, False),
    ],
)
def test_equals_a_mask_of_blocks(length, size, back, ahead, causal, draw):
    arrays = _draw_arrays(draw, length) | draw({"bias": (length, length)}, seed=4)
    rng = np.random.default_rng(length)
    mask = rng.random((length, length)) < 0.8
    key_mask = rng.random(length) < 0.8
    given = {"key_mask": key_mask, "is_causal": causal}
    blocks = _blocks(length, size, back, ahead)
    options = {"block_size": size, "look_back": back, "look_ahead": ahead}
    helpers.same(
        functools.partial(block_local, mask=mask, **given, **options),
        functools.partial(dot_product, mask=mask & blocks, **given),
        arrays,
        atol=2e-6,
    )


def test_equals_the_equation(draw, by_loops, slope):
    arrays = _draw_arrays(draw, 11)
    near = functools.partial(block_local, block_size=4, look_back=1)

    def loops(**arrays):
        return by_loops(
            lambda q, k: float(q @ k) / np.sqrt(H), **arrays, mask=_blocks(11, 4, 1, 0)
        )

    helpers.agree(near, loops, arrays, atol=2e-6, slopes=1e-4)


@pytest.mark.parametrize("shape", [(1, 13), (13, 1), (1, 1)])
def test_shared_axes_of_bias_and_mask(shape, draw):
    arrays = _draw_arrays(draw, 13) | draw({"bias": shape}, seed=4)
    mask = np.random.default_rng(1).random(shape) < 0.7
    full = {**arrays, "bias": np.broadcast_to(arrays["bias"], (13, 13))}
    ours = block_local(**arrays, mask=mask, block_size=4)
    theirs = dot_product(**full, mask=mask & _blocks(13, 4, 0, 0))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_no_queries():
    none = jnp.ones((0, H))
    assert block_local(none, none, jnp.ones((0, V))).shape == (0, V)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1, but is 0"),
        ({"look_back": -1}, ValueError, "`look_back` must be at least 0, but is -1"),
        ({"look_ahead": 1.0}, TypeError, "`look_ahead` must be an int .* float: 1.0"),
        ({"query": np.ones((4, H), "f")}, ValueError, "own block, but T=4 and S=6"),
    ],
)
def test_bad_arguments_are_named(options, error, message, draw):
    with pytest.raises(error, match=message):
        block_local(**{**_draw_arrays(draw, 6), **options})


@pytest.mark.parametrize("dynamic", [False, True])
def test_tiles_at_any_index_equal_a_mask(dynamic, draw):
    # Queries out of order, one in no block; keys twice in a slab, and none.
    rows = np.array([[3, 0], [5, -1], [1, 7]])
    columns = np.array([[2, 2, 0, 9], [-1, 4, 1, 4], [6, 5, 4, 3]])
    arrays = _draw_arrays(draw, 7) | draw({"bias": (7, 7)}, seed=4)
    mask = np.zeros((7, 7), bool)
    for block, slab in zip(rows, columns, strict=True):
        for t in block[(block >= 0) & (block < 7)]:
            mask[t, slab[(slab >= 0) & (slab < 7)]] = True

    def near(**arrays):
        index = (
            (jnp.asarray(x) for x in (rows, columns)) if dynamic else (rows, columns)
        )
        plain = (arrays.pop(name) for name in ("query", "key", "value"))
        return _tiles.attend(*plain, *index, **arrays).out

    dense = functools.partial(dot_product, mask=mask)
    ours = helpers.same(near, dense, arrays, atol=2e-6)
    assert not ours["out"][4].any() and ours["out"][5].any()


def test_merged_parts_are_one_softmax(draw):
    arrays = _draw_arrays(draw, 6)
    arrays["query"][1] *= 1e4  # one part outweighs the other
    everyone = _tiles.blocks_of(6, 6)
    mask = np.ones((6, 6), bool)
    mask[2] = False  # a row that is empty in both parts
    mask[3, :2] = False  # and one that is so in the first

    def near(query, key, value):
        return _tiles.merge(
            *(
                _tiles.attend(query, key, value, everyone, np.array([slab]), mask=mask)
                for slab in ([0, 1], [2, 3, 4, 5], [-1])
            )
        ).out

    dense = functools.partial(dot_product, mask=mask)
    ours = helpers.same(near, dense, arrays, atol=2e-6, rtol=1e-5)
    assert not ours["out"][2].any() and not ours["query"][2].any()


@pytest.mark.parametrize(
    "length, left, right, dilation", [(50, 9, 0, 1), (50, 3, 4, 3)]
)
def test_window_tiles_hold_every_pair_of_the_band_once(length, left, right, dilation):
    rows, columns = _tiles.window_tiles(length, left, right, dilation)
    found = []
    for block, slab in zip(rows, columns, strict=True):
        offset = slab[None] - block[:, None]
        near = (offset >= -left * dilation) & (offset <= right * dilation)
        for i, j in zip(*np.nonzero(near), strict=True):
            if block[i] < length and 0 <= slab[j] < length:
                found.append((block[i], slab[j]))
    band = [
        (t, s)
        for t in range(length)
        for s in range(length)
        if -left * dilation <= s - t <= right * dilation and (s - t) % dilation == 0
    ]
    assert sorted(found) == band
