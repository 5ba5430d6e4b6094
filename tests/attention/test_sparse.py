"""Sparse patterns: equal to dense attention under their masks, in their own cost."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import masks
from attn_jax.attention import sparse
from attn_jax.attention.local import truncated
from attn_jax.attention.softmax import dot_product
from attn_jax.attention.sparse import (
    bigbird,
    etc,
    etc_init,
    longformer,
    sparse_fixed,
    sparse_strided,
)
from tests import helpers

H, V = 4, 3


def _draw_arrays(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _out(fn, arrays, **options):
    return jax.jit(functools.partial(fn, **options))(**arrays)


def _strided(t, s, stride):
    return abs(t - s) <= stride or (t - s) % stride == 0


def _fixed(t, s, block_size, num_summary):
    return t // block_size == s // block_size or s % block_size >= (
        block_size - num_summary
    )


def _longformer(t, s, window, dilation, num_global):
    near = abs(t - s) <= window * dilation and (t - s) % dilation == 0
    return near or t < num_global or s < num_global


def _pairs(sees, length, **options):
    grid = [[sees(t, s, **options) for s in range(length)] for t in range(length)]
    return np.array(grid, bool)


PATTERNS = [
    (sparse_strided, _strided, {"stride": 1}),
    (sparse_strided, _strided, {"stride": 3}),
    (sparse_strided, _strided, {"stride": 64}),
    (sparse_fixed, _fixed, {"block_size": 4, "num_summary": 1}),
    (sparse_fixed, _fixed, {"block_size": 5, "num_summary": 2}),
    (sparse_fixed, _fixed, {"block_size": 3, "num_summary": 0}),
    (longformer, _longformer, {"window": 2, "dilation": 1, "num_global": 1}),
    (longformer, _longformer, {"window": 2, "dilation": 3, "num_global": 2}),
    (longformer, _longformer, {"window": 64, "dilation": 64, "num_global": 64}),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fn, sees, options", [PATTERNS[i] for i in (1, 4, 7)])
def test_equals_its_mask(fn, sees, options, causal, draw):
    length = 19
    arrays = _draw_arrays(draw, length) | draw({"bias": (length, length)}, seed=4)
    rng = np.random.default_rng(length)
    mask = rng.random((length, length)) < 0.8
    given = {"key_mask": rng.random(length) < 0.8, "is_causal": causal}
    pattern = _pairs(sees, length, **options)
    helpers.same(
        functools.partial(fn, mask=mask, **given, **options),
        functools.partial(dot_product, mask=mask & pattern, **given),
        arrays,
        atol=3e-6,
    )


@pytest.mark.parametrize("length", [2])
def test_short_sequences(length, draw):
    arrays = _draw_arrays(draw, length)
    cases = [
        (functools.partial(fn, **options), _pairs(sees, length, **options))
        for fn, sees, options in PATTERNS
    ]
    key = {"rng": jax.random.key(0), "num_random_blocks": 0}
    full = np.ones((length, length), bool)
    cases.append((functools.partial(bigbird, **key), full))
    params = jax.tree.map(jnp.zeros_like, etc_init(jax.random.key(0), H))
    cases.append((functools.partial(etc, params=params), full))
    ours = jax.jit(lambda arrays: [fn(**arrays) for fn, _ in cases])(arrays)
    for found, (_, pattern) in zip(ours, cases, strict=True):
        theirs = dot_product(**arrays, mask=pattern)
        np.testing.assert_allclose(found, theirs, atol=2e-6)


def test_strided_is_the_union_of_two_masks(draw):
    arrays = _draw_arrays(draw, 23)
    union = masks.any_of(masks.window(23, 4, 0), masks.strided(23, 4, is_causal=True))
    np.testing.assert_allclose(
        _out(sparse_strided, arrays, stride=4, is_causal=True),
        dot_product(**arrays, mask=union),
        atol=2e-6,
    )


def test_equals_the_equation(draw, by_loops, slope):
    arrays = _draw_arrays(draw, 11)
    options = {"window": 1, "dilation": 2, "num_global": 1}

    def loops(**arrays):
        pattern = _pairs(_longformer, 11, **options)
        return by_loops(lambda q, k: float(q @ k) / np.sqrt(H), **arrays, mask=pattern)

    helpers.agree(functools.partial(longformer, **options), loops, arrays, atol=3e-6)


def test_longformer_without_global_tokens_is_truncated(draw):
    arrays = _draw_arrays(draw, 19)
    np.testing.assert_allclose(
        _out(longformer, arrays, window=3, num_global=0, is_causal=True),
        _out(truncated, arrays, left=3, right=3, is_causal=True),
        atol=2e-6,
    )


# BigBird


def _seen_pairs(rng, length, **options):
    """Who sees whom, from equal weights on values that tell the keys apart: [T, T]."""
    fn = functools.partial(bigbird, rng=rng, **options)
    same = np.zeros((length, H), np.float32)
    return np.asarray(jax.jit(fn)(same, same, np.eye(length, dtype=np.float32))) > 0


@pytest.mark.parametrize("num_global, num_window", [(2, 5)])
def test_bigbird_sees_window_global_and_random_blocks(num_global, num_window, draw):
    length, size, count = 31, 3, 11
    options = {
        "block_size": size,
        "num_global_blocks": num_global,
        "num_window_blocks": num_window,
        "num_random_blocks": 2,
    }
    seen = _seen_pairs(jax.random.key(1), length, **options)
    block = np.arange(length) // size
    for i in range(count):
        found = {int(b) for b in block[seen[np.flatnonzero(block == i)[0]]]}
        near = {j for j in range(count) if abs(i - j) <= num_window // 2}
        if i < num_global:
            assert found == set(range(count))
            continue
        named = near | set(range(num_global))
        assert named <= found
        assert len(found - named) == min(2, count - len(named))
        for t in np.flatnonzero(block == i):  # whole blocks, equal for all queries
            np.testing.assert_array_equal(seen[t], np.isin(block, list(found)))
    # Under its own mask it is dot_product.
    arrays = _draw_arrays(draw, length) | draw({"bias": (length, length)}, seed=4)
    given = {"key_mask": np.arange(length) % 5 != 1}
    # The last real token is in the last block, as without a mask: the same draws.
    helpers.same(
        functools.partial(bigbird, rng=jax.random.key(1), **given, **options),
        functools.partial(dot_product, mask=seen, **given),
        arrays,
        atol=3e-6,
    )


def test_bigbird_draws_different_blocks_that_it_does_not_see_and_all_alike():
    # Block 4 of 9 with one global block and one neighbour: 1, 2, 6, 7 and 8 are left.
    def draw(rng, number=4, most=9, num_random=3):
        number, most = jnp.int32(number), jnp.int32(most)
        return sparse._unseen_blocks(rng, number, most, 1, 1, num_random)

    rngs = jax.random.split(jax.random.key(0), 4000)
    drawn = np.sort(jax.jit(jax.vmap(draw))(rngs), axis=1)
    sets, times = np.unique(drawn, axis=0, return_counts=True)
    assert [set(s) for s in sets.tolist()] == [
        set(s) for s in itertools.combinations((1, 2, 6, 7, 8), 3)
    ]
    assert times.min() > 320 and times.max() < 480  # 400 ± 19 each
    # Fewer than asked for, at an edge, among padding alone, and none at all.
    for number, most, left in [(4, 9, {1, 2, 6, 7, 8}), (8, 9, set(range(1, 7)))] + [
        (12, 4, {1, 2, 3}),
        (1, 3, set()),
    ]:
        found = draw(rngs[0], number, most, 7).tolist()
        assert sorted(x for x in found if x >= 0) == sorted(left)


def test_bigbird_draws_are_those_of_the_rng_and_not_of_padding():
    options = {"block_size": 2, "num_window_blocks": 1, "num_random_blocks": 2}
    seen, same, other = (
        _seen_pairs(jax.random.key(seed), 30, **options) for seed in (0, 0, 1)
    )
    assert (seen == same).all() and (seen != other).any()
    padded = np.arange(50) < 30
    longer = _seen_pairs(jax.random.key(0), 50, key_mask=padded, **options)
    np.testing.assert_array_equal(longer[:30, :30], seen)


@pytest.mark.parametrize(
    "options", [{"num_window_blocks": 21}, {"num_global_blocks": 10}]
)
def test_bigbird_that_covers_all_is_dot_product(options, draw):
    arrays = _draw_arrays(draw, 20)
    options = options | {"rng": jax.random.key(0), "block_size": 2}
    ours = _out(bigbird, arrays, **options)
    np.testing.assert_allclose(ours, dot_product(**arrays), atol=2e-6)


# ETC


def _etc_by_loops(query, key, value, label, global_label, *, radius, num_global, keep):
    """From the paper's equations, pair by pair in float64."""
    clip = len(label) // 2
    out = np.zeros((len(query), value.shape[1]))
    for t in range(len(query)):
        scores = {}
        for s in range(len(key)):
            if t < num_global:
                a = global_label[0 if s < num_global else 1]
            elif s < num_global:
                a = global_label[2]
            elif abs(t - s) <= radius:
                a = label[min(max(s - t, -clip), clip) + clip]
            else:
                continue
            if keep[s]:
                scores[s] = query[t] @ (key[s] + a) / np.sqrt(query.shape[1])
        total = sum(np.exp(x) for x in scores.values())
        for s, x in scores.items():
            out[t] += np.exp(x) / total * value[s]
    return out


@pytest.mark.parametrize(
    "length, radius, num_global, clip",
    [(13, 2, 3, 1), (9, 2, 0, 0), (5, 2, 16, 1)],
)
def test_etc_equals_the_equation(length, radius, num_global, clip, draw, slope):
    arrays = _draw_arrays(draw, length)
    params = etc_init(jax.random.key(3), H, clip=clip)
    arrays |= {name: np.asarray(leaf) for name, leaf in params.items()}
    keep = np.arange(length) % 4 != 3
    options = {"radius": radius, "num_global": num_global}

    def ours(label, global_label, **arrays):
        params = {"label": label, "global_label": global_label}
        return etc(**arrays, params=params, key_mask=keep, **options)

    loops = functools.partial(_etc_by_loops, keep=keep, **options)
    helpers.agree(ours, loops, arrays, atol=3e-6)


def test_etc_without_labels_is_longformer(draw):
    arrays = _draw_arrays(draw, 19) | draw({"bias": (19, 19)}, seed=4)
    params = jax.tree.map(jnp.zeros_like, etc_init(jax.random.key(0), H))
    given = {"mask": np.random.default_rng(1).random((19, 19)) < 0.8, "num_global": 3}
    np.testing.assert_allclose(
        _out(etc, arrays, params=params, radius=2, **given),
        _out(longformer, arrays, window=2, **given),
        atol=2e-6,
    )


X = np.ones((6, H), "f")
LABELS = {"label": jnp.ones((4, H)), "global_label": jnp.ones((3, H))}
SHORT = {**LABELS, "label": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    "fn, options, message",
    [
        (sparse_strided, {"stride": 0}, "`stride` must be at least 1, but is 0"),
        (sparse_fixed, {"block_size": 0}, "`block_size` must be at least 1"),
        (sparse_fixed, {"num_summary": -1}, "`num_summary` must be at least 0"),
        (
            sparse_fixed,
            {"num_summary": 5, "block_size": 4},
            "`num_summary` must be at most `block_size`, but is 5",
        ),
        (longformer, {"window": -1}, "`window` must be at least 0"),
        (longformer, {"dilation": 0}, "`dilation` must be at least 1"),
        (longformer, {"num_global": -1}, "`num_global` must be at least 0"),
        (longformer, {"query": X[:4]}, "one sequence, but T=4 and S=6"),
        (bigbird, {"rng": 0, "num_window_blocks": 2}, "must be odd, .* but is 2"),
        (bigbird, {"rng": 0, "num_random_blocks": -1}, "must be at least 0, but is -1"),
        (etc, {"params": LABELS}, "must have an odd number of rows.* but has 4"),
        (etc, {"params": SHORT}, r"`params\['label'\]` must have shape \[3, 4\]"),
        (etc, {"params": {}}, "`etc_init"),
    ],
)
def test_bad_arguments_are_named(fn, options, message):
    with pytest.raises(ValueError, match=message):
        fn(**{"query": X, "key": X, "value": X, **options})


def test_bad_sizes_of_labels_are_named():
    with pytest.raises(ValueError, match="`clip` must be at least 0, but is -1"):
        etc_init(jax.random.key(0), H, clip=-1)
