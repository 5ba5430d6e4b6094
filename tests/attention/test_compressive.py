"""Compressive attention: the equation by loops, its limits, and what a step keeps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.compressive_attention import (
    compressive,
    compressive_init,
    compressive_init_state,
    compressive_step,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 4, 3


def _draw(draw, length, compression=2, seed=0):
    arrays = draw(
        {"query": (length, H), "key": (length, H), "value": (length, V)}, seed
    )
    params = compressive_init(
        jax.random.key(seed), H, value_dim=V, compression=compression
    )
    return arrays | {f"{name}_kernel": np.asarray(p) for name, p in params.items()}


def _apply(query, key, value, key_kernel, value_kernel, *, options):
    @jax.jit
    def run(query, key, value, key_kernel, value_kernel):
        params = {"key": key_kernel, "value": value_kernel}
        return compressive(query, key, value, params=params, **options)

    return run(query, key, value, key_kernel, value_kernel)


def _by_equation(
    query,
    key,
    value,
    key_kernel,
    value_kernel,
    *,
    segment,
    memory,
    compressed,
    is_causal,
    key_mask,
):
    """Position by position in float64."""
    length, width = len(query), len(key_kernel)

    def window(j, rows, kernel):
        real = (i for i in range(width) if key_mask[j * width + i])
        return sum((rows[j * width + i] @ kernel[i] for i in real), 0 * rows[0])

    out = np.zeros((length, value.shape[1]))
    for t in range(length):
        begin = t // segment * segment
        last = t if is_causal else min(begin + segment, length) - 1
        near = range(max(0, begin - memory), last + 1)
        seen = [(key[s], value[s]) for s in near if key_mask[s]]
        end = max(0, begin - memory) // width
        for j in range(max(0, end - compressed), end):
            if any(key_mask[j * width : (j + 1) * width]):
                pair = (key, key_kernel), (value, value_kernel)
                seen.append(tuple(window(j, *one) for one in pair))
        if not seen:
            continue
        w = np.exp([query[t] @ k / np.sqrt(len(k)) for k, _ in seen])
        w /= w.sum()
        out[t] = sum(weight * v for weight, (_, v) in zip(w, seen, strict=True))
    return out


@pytest.mark.parametrize(
    "length, segment, memory, compressed, causal, masked",
    [
        (1, 4, 2, 1, True, False),
        (17, 4, 2, 2, True, True),
        (17, 4, 2, 9, False, True),
        (13, 2, 0, 3, True, False),
        (11, 4, 4, 0, False, False),
    ],
)
def test_equals_the_equation(
    length, segment, memory, compressed, causal, masked, draw, slope
):
    arrays = _draw(draw, length)
    keep = np.arange(length) % 5 != 1
    keep[4:6] = False  # a whole window
    if not masked:
        keep[:] = True
    options = dict(
        segment=segment, memory=memory, compressed=compressed, is_causal=causal
    )
    given = {**options, "key_mask": keep if masked else None}
    ours = functools.partial(_apply, options=given)
    loops = functools.partial(_by_equation, **options, key_mask=keep)
    helpers.agree(ours, loops, arrays, slopes=5e-4)


@pytest.mark.parametrize("sizes", [dict(segment=24), dict(segment=4, memory=20)])
def test_where_nothing_is_old_it_is_dot_product(sizes, draw):
    arrays = _draw(draw, 19)
    q, k, v = (arrays[name] for name in ("query", "key", "value"))
    params = {"key": arrays["key_kernel"], "value": arrays["value_kernel"]}
    found = compressive(q, k, v, params=params, is_causal=True, **sizes)
    np.testing.assert_allclose(found, dot_product(q, k, v, is_causal=True), atol=1e-5)


def test_one_position_a_window_compresses_nothing(draw):
    arrays = _draw(draw, 19)
    q, k, v = (arrays[name] for name in ("query", "key", "value"))
    one = dict(compression=1, value_dim=V, scheme="pool")
    params = compressive_init(jax.random.key(0), H, **one)
    sizes = dict(segment=3, memory=2, compressed=19)
    found = compressive(q, k, v, params=params, is_causal=True, **sizes)
    np.testing.assert_allclose(found, dot_product(q, k, v, is_causal=True), atol=1e-5)


def test_a_step_leaves_out_padding_and_its_memory_does_not_grow(draw):
    length, sizes = 23, dict(segment=4, memory=2, compressed=3)
    arrays = _draw(draw, length)
    q, k, v = (arrays[name] for name in ("query", "key", "value"))
    params = {"key": arrays["key_kernel"], "value": arrays["value_kernel"]}
    keep = np.arange(length) % 4 != 1
    whole = compressive(q, k, v, params=params, key_mask=keep, is_causal=True, **sizes)
    state = compressive_init_state(H, V, compression=2, **sizes)
    step = jax.jit(functools.partial(compressive_step, params=params, **sizes))
    for t in range(length):
        state, out = step(
            state,
            q[t],
            k[t],
            v[t],
            position=jnp.int32(t),
            key_mask=jnp.asarray(keep[t]),
        )
        np.testing.assert_allclose(out, whole[t], atol=1e-5)
    assert (len(state.key), len(state.short_key)) == (6, 6)


def test_sizes_that_do_not_fit_are_named():
    x, params = jnp.ones((4, H)), compressive_init(jax.random.key(0), H)
    with pytest.raises(ValueError, match="`segment` must be .* multiple of 4"):
        compressive(x, x, x, params=params, segment=6)
    with pytest.raises(ValueError, match="`memory` must be .* multiple of 4"):
        compressive(x, x, x, params=params, memory=2)
    state = compressive_init_state(H, H)
    with pytest.raises(ValueError, match="`state` must hold 12 positions and 131"):
        compressive_step(
            state, x[0], x[0], x[0], position=jnp.int32(0), params=params,
            segment=8, memory=4,
        )  # fmt: skip
