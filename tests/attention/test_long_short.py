"""Long-short attention: the paper's equations by loops, its two forms and limits."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from attn_jax.attention.long_short_attention import long_short, long_short_init
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 4, 3


def _draw_arrays(draw, length, rank=2, seed=0):
    arrays = draw(
        {"query": (length, H), "key": (length, H), "value": (length, V)}, seed
    )
    params = long_short_init(jax.random.key(seed), H, rank=rank, value_dim=V)
    noise = draw({name: leaf.shape for name, leaf in params.items()}, seed + 1)
    return arrays | {n: np.asarray(p) + 0.3 * noise[n] for n, p in params.items()}


def _apply(query, key, value, *, options, **params):
    @jax.jit
    def run(query, key, value, params):
        return long_short(query, key, value, params=params, **options)

    return run(query, key, value, params)


def _norm(x, scale_and_offset):
    scale, offset = scale_and_offset
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + offset


def _by_equation(
    query,
    key,
    value,
    projection,
    local_key,
    local_value,
    global_key,
    global_value,
    *,
    window,
    segment,
    is_causal,
    key_mask,
):
    """The paper's equations, key by key in float64."""
    length, rank = len(query), projection.shape[1]
    parts = range(0, length, segment) if is_causal else [0]
    size = segment if is_causal else length
    summaries = []  # (position of the end, key, value)
    for begin in parts:
        inside = [s for s in range(begin, min(begin + size, length)) if key_mask[s]]
        for i in range(rank if inside else 0):
            p = np.exp([key[s] @ projection[:, i] for s in inside])
            p /= p.sum()
            k = sum(weight * key[s] for weight, s in zip(p, inside, strict=True))
            v = sum(weight * value[s] for weight, s in zip(p, inside, strict=True))
            summaries.append(
                (begin + size, _norm(k, global_key), _norm(v, global_value))
            )
    out = np.zeros((length, value.shape[1]))
    for t in range(length):
        first = t // window * window
        seen = [
            (_norm(key[s], local_key), _norm(value[s], local_value))
            for s in range(length)
            if first - window // 2 <= s < first + window + window // 2
            and key_mask[s]
            and (not is_causal or s <= t)
        ]
        own = t // segment * segment
        seen += [(k, v) for end, k, v in summaries if not is_causal or end <= own]
        if not seen:
            continue
        w = np.exp([query[t] @ k / np.sqrt(len(k)) for k, _ in seen])
        w /= w.sum()
        out[t] = sum(weight * v for weight, (_, v) in zip(w, seen, strict=True))
    return out


@pytest.mark.parametrize(
    "length, window, segment, causal, masked",
    [
        (1, 4, 4, False, False),
        (2, 1, 1, True, False),
        (13, 4, 5, False, True),
        (13, 5, 3, True, True),
        (13, 4, 5, True, False),
    ],
)
def test_equals_the_equation(length, window, segment, causal, masked, draw, slope):
    arrays = _draw_arrays(draw, length)
    keep = np.arange(length) % 4 != 1
    keep[3:6] = False  # a whole segment
    if not masked:
        keep[:] = True
    options = {"window": window, "segment": segment, "is_causal": causal}
    given = {**options, "key_mask": keep if masked else None}
    ours = functools.partial(_apply, options=given)
    loops = functools.partial(_by_equation, **options, key_mask=keep)
    helpers.agree(ours, loops, arrays, slopes=5e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_invisible(causal, draw):
    arrays = _draw_arrays(draw, 13)
    keep = np.arange(13) < 8
    options = {"window": 4, "segment": 3, "is_causal": causal}
    padded = _apply(**arrays, options={**options, "key_mask": keep})
    shorter = {
        n: a[:8] if n in ("query", "key", "value") else a for n, a in arrays.items()
    }
    np.testing.assert_allclose(
        padded[:8], _apply(**shorter, options=options), atol=2e-6
    )


def test_a_causal_row_knows_nothing_of_the_future(draw):
    arrays = _draw_arrays(draw, 13)
    options = {"window": 4, "segment": 3, "is_causal": True}
    fn = jax.jit(functools.partial(_apply, options=options))
    out = fn(**arrays)
    for t in (0, 5, 6, 11):
        later = {name: array.copy() for name, array in arrays.items()}
        later["key"][t + 1 :] = later["value"][t + 1 :] = 1e9
        found = fn(**later)
        np.testing.assert_array_equal(found[: t + 1], out[: t + 1])


def test_one_segment_and_one_window_is_dot_product_of_normed_keys(draw):
    arrays = _draw_arrays(draw, 9)
    options = {"window": 9, "segment": 9, "is_causal": True}
    key = np.stack([_norm(k, arrays["local_key"]) for k in arrays["key"]])
    value = np.stack([_norm(v, arrays["local_value"]) for v in arrays["value"]])
    np.testing.assert_allclose(
        _apply(**arrays, options=options),
        dot_product(arrays["query"], key, value, is_causal=True),
        atol=5e-6,
    )


def test_nothing_to_attend_to_gives_zeros(draw):
    arrays = _draw_arrays(draw, 7)
    options = {"window": 2, "key_mask": np.zeros(7, bool)}
    found = helpers.value_and_grads(functools.partial(_apply, options=options), arrays)
    assert not any(np.any(x) for x in found.values())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"window": 0}, ValueError, "`window` must be at least 1, but is 0"),
        ({"segment": 0}, ValueError, "`segment` must be at least 1, but is 0"),
        ({"window": 2.0}, TypeError, "`window` must be an int .* float: 2.0"),
    ],
)
def test_bad_options_are_named(options, error, message, draw):
    with pytest.raises(error, match=message):
        _apply(**_draw_arrays(draw, 6), options=options)


def test_bad_parameters_are_named(draw):
    arrays = _draw_arrays(draw, 6)
    with pytest.raises(ValueError, match=r"`params\['global_value'\]` must have shape"):
        _apply(**{**arrays, "global_value": np.ones((2, H), "f")}, options={})
    with pytest.raises(ValueError, match="S=6"):
        _apply(**{**arrays, "query": np.ones((4, H), "f")}, options={})
    with pytest.raises(ValueError, match="`rank` must be at least 1, but is 0"):
        long_short_init(jax.random.key(0), H, rank=0)
