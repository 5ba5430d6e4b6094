"""LSH attention: equal to dense attention under the union of its rounds' pairs."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from attn_jax.attention.reformer_attention import (
    _tiling,
    bucketed,
    lsh_buckets,
    reformer,
    reformer_exact,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 6, 3


def _draw_arrays(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _union(buckets, chunk_size, causal, real=None):
    """Pairs [T, T] that some round shows, token by token from the definition."""
    rounds, length = buckets.shape
    real = np.ones(length, bool) if real is None else real
    tile, back = _tiling(length, chunk_size, causal)
    pairs = np.zeros((length, length), bool)
    for row in buckets:
        order = sorted(np.flatnonzero(real), key=lambda t: (row[t], t))
        chunk = {}
        for place, t in enumerate(order):
            # Causal: chunks begin anew with every bucket.
            before = [s for s in order[:place] if not causal or row[s] == row[t]]
            chunk[t] = len(before) // tile
        for t in order:
            for s in order:
                near = 0 <= chunk[t] - chunk[s] <= back
                pairs[t, s] |= row[s] == row[t] and near and (not causal or s <= t)
    return pairs


@pytest.mark.parametrize(
    "causal, length, chunk, rounds, buckets",
    [(False, 37, 4, 3, 3), (True, 37, 4, 3, 3), (True, 75, 20, 2, 1)],
)
def test_equals_dense_attention_under_the_union(
    causal, length, chunk, rounds, buckets, draw
):
    arrays = _draw_arrays(draw, length)
    numbers = np.random.default_rng(1).integers(0, buckets, (rounds, length))
    real = np.random.default_rng(2).random(length) < 0.8
    pairs = _union(numbers, chunk, causal, real)
    dense = np.tri(length, dtype=bool) if causal else np.ones_like(pairs)
    assert (pairs < (dense & real & real[:, None])).any()  # some are left out
    ours = functools.partial(
        bucketed,
        buckets=numbers,
        num_buckets=buckets,
        key_mask=real,
        is_causal=causal,
        chunk_size=chunk,
    )
    theirs = functools.partial(dot_product, mask=pairs)
    helpers.same(ours, theirs, arrays, atol=2e-5)


def _by_loops(query, key, value, pairs, scale):
    """Shared-QK attention by loops in float64, one's own position as a last resort."""
    x = (query.astype(np.float64) + key) / 2
    out = np.zeros((len(x), value.shape[1]))
    for t in range(len(x)):
        seen = [s for s in np.flatnonzero(pairs[t]) if s != t] or [t]
        logits = [scale * x[t] @ x[s] / np.linalg.norm(x[s]) for s in seen]
        weights = np.exp(np.array(logits) - max(logits))
        out[t] = weights @ value[seen] / weights.sum()
    return out


@pytest.mark.parametrize("causal, scale", [(False, None), (True, 0.3)])
def test_equals_the_equation(causal, scale, draw, slope):
    length, rng = 25, jax.random.key(3)
    arrays = _draw_arrays(draw, length)
    options = {"num_buckets": 20, "num_rounds": 2}
    x = (arrays["query"] + arrays["key"]) / 2
    pairs = _union(np.asarray(lsh_buckets(x, rng, **options)), 4, causal)
    alone = pairs.sum(axis=1) == 1
    assert alone.any() and not alone.all()
    theirs = functools.partial(_by_loops, pairs=pairs, scale=scale or 1.0)
    ours = functools.partial(
        reformer, rng=rng, scale=scale, is_causal=causal, chunk_size=4, **options
    )
    helpers.agree(ours, theirs, arrays)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_where_all_share_a_bucket(causal, draw):
    arrays = _draw_arrays(draw, 12)
    # Of two buckets and many rounds, every pair shares one in some round.
    ours = functools.partial(
        reformer, rng=jax.random.key(0), num_buckets=2, num_rounds=9, is_causal=causal
    )
    arrays["key"] = arrays["key"] + 6.0  # all in about one direction
    theirs = functools.partial(reformer_exact, is_causal=causal)
    helpers.same(ours, theirs, arrays, atol=2e-5)


@pytest.mark.parametrize("causal, chunk", [(False, 20), (True, 20), (False, 64)])
def test_one_bucket_is_dot_product(causal, chunk, draw):
    arrays = _draw_arrays(draw, 20)
    ours = functools.partial(
        bucketed,
        buckets=np.zeros((2, 20), int),
        num_buckets=1,
        chunk_size=chunk,
        is_causal=causal,
    )
    helpers.same(
        ours, functools.partial(dot_product, is_causal=causal), arrays, atol=2e-5
    )


def test_later_tokens_do_not_move_what_the_past_sees(draw):
    length, t = 50, 31
    arrays = _draw_arrays(draw, length)
    see = jax.jit(
        functools.partial(
            bucketed, num_buckets=3, is_causal=True, chunk_size=4, own=False
        )
    )
    numbers = np.random.default_rng(4).integers(0, 3, (2, length))
    first = see(**arrays, buckets=numbers)
    for bucket in (0, 2):
        numbers[:, t + 1 :] = bucket
        changed = {k: a.copy() for k, a in arrays.items()}
        for array in changed.values():
            array[t + 1 :] = 1e9
        second = see(**changed, buckets=numbers)
        np.testing.assert_array_equal(first[: t + 1], second[: t + 1])
    assert np.any(first[t + 1 :] != second[t + 1 :])


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_invisible(causal, draw):
    arrays = _draw_arrays(draw, 33)
    see = jax.jit(
        functools.partial(
            reformer,
            rng=jax.random.key(0),
            num_buckets=4,
            num_rounds=2,
            chunk_size=5,
            is_causal=causal,
        )
    )
    alone = see(**{k: a[:26] for k, a in arrays.items()})
    padded = see(**arrays, key_mask=np.arange(33) < 26)
    np.testing.assert_allclose(padded[:26], alone, atol=1e-6)
    assert not padded[26:].any() and alone.any(axis=1).all()


def test_more_rounds_keep_the_first_ones(draw):
    x = draw({"x": (30, H)})["x"]
    few, many = (
        lsh_buckets(x, jax.random.key(5), num_buckets=8, num_rounds=r) for r in (2, 5)
    )
    np.testing.assert_array_equal(few, many[:2])
    assert (many[2] != many[0]).any() and many.min() >= 0 and many.max() <= 7
    # Direction alone decides, and the opposite is in the opposite bucket.
    other = lsh_buckets(-7 * x, jax.random.key(5), num_buckets=8, num_rounds=2)
    np.testing.assert_array_equal(other, (few + 4) % 8)


def test_both_arguments_count_alike(draw):
    arrays = _draw_arrays(draw, 21)
    see = jax.jit(functools.partial(reformer, rng=jax.random.key(0), num_buckets=4))
    swapped = {**arrays, "query": arrays["key"], "key": arrays["query"]}
    shared = (arrays["query"] + arrays["key"]) / 2
    out = see(**arrays)
    np.testing.assert_array_equal(out, see(**swapped))
    np.testing.assert_allclose(
        out, see(query=shared, key=shared, value=arrays["value"]), atol=1e-6
    )


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"num_buckets": 7},
            ValueError,
            "`num_buckets` must be a multiple of 2, but is 7",
        ),
        ({"num_rounds": 0}, ValueError, "`num_rounds` must be at least 1"),
        ({"chunk_size": 2.0}, TypeError, "`chunk_size` must be an int"),
        ({"query": np.ones((4, H), "f")}, ValueError, "T=4 and S=6"),
    ],
)
def test_bad_arguments_are_named(options, error, message, draw):
    with pytest.raises(error, match=message):
        reformer(**{**_draw_arrays(draw, 6), "rng": jax.random.key(0), **options})


def test_buckets_must_be_whole_numbers(draw):
    with pytest.raises(TypeError, match="`buckets` must be integers"):
        bucketed(**_draw_arrays(draw, 6), buckets=np.zeros((1, 6), "f"), num_buckets=1)
