"""Relative attention: against its equations, and where it is plain attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import relative
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 6, 5

CASES = [
    {},
    {"causal": True},
    {"bias": True, "key_mask": True},
    {"mask": True, "causal": True, "bias": True, "scale": 0.7},
]
LENGTHS = [(1, 1), (1, 5), (5, 1), (2, 2), (7, 7), (7, 12), (12, 7)]


def _draw_arrays(draw, queries, keys, seed=0):
    shapes = {"query": (queries, H), "key": (keys, H), "value": (keys, V)}
    return draw(shapes, seed)


def _options(case, queries, keys, draw):
    rng = np.random.default_rng(queries + keys)
    options = {"is_causal": case.get("causal", False), "scale": case.get("scale")}
    if "bias" in case:
        options |= draw({"bias": (queries, keys)}, 3)
    if "mask" in case:
        options["mask"] = rng.random((queries, keys)) < 0.7
    if "key_mask" in case:
        options["key_mask"] = np.arange(keys) % 4 != 1
    return options


def _softmax(score, options, shape, memory=0):
    """Weights from a function of (t, s), pair by pair in float64."""
    weights = np.zeros(shape)
    for t in range(shape[0]):
        scores = {}
        for s in range(shape[1]):
            allowed = (
                ("mask" not in options or options["mask"][t, s])
                and ("key_mask" not in options or options["key_mask"][s])
                and (not options["is_causal"] or s <= t + memory)
            )
            if allowed:
                bias = options["bias"][t, s] if "bias" in options else 0.0
                scores[s] = score(t, s) + float(bias)
        top = max(scores.values(), default=0.0)
        total = sum(np.exp(x - top) for x in scores.values())
        for s, x in scores.items():
            weights[t, s] = np.exp(x - top) / total
    return weights


def _shaw_by_equation(query, key, value, table_key, table_value, options):
    clip = len(table_key) // 2
    scale = H**-0.5 if options["scale"] is None else options["scale"]

    def row(t, s):
        return clip + max(-clip, min(clip, s - t))

    weights = _softmax(
        lambda t, s: scale * (query[t] @ (key[s] + table_key[row(t, s)])),
        options,
        (len(query), len(key)),
    )
    out = np.zeros((len(query), value.shape[1]))
    for t in range(len(query)):
        for s in range(len(key)):
            out[t] += weights[t, s] * (value[s] + table_value[row(t, s)])
    return out


def _transformer_xl_by_equation(query, key, value, u, v, position, memory, options):
    scale = H**-0.5 if options["scale"] is None else options["scale"]

    def score(t, s):
        distance = t + memory - s
        code = np.zeros(H)
        for i in range(H // 2):
            angle = distance * 10_000.0 ** (-2 * i / H)
            code[2 * i], code[2 * i + 1] = np.sin(angle), np.cos(angle)
        return scale * ((query[t] + u) @ key[s] + (query[t] + v) @ (position @ code))

    return _softmax(score, options, (len(query), len(key)), memory) @ value


@pytest.mark.parametrize("clip", [0, 3, 20])
@pytest.mark.parametrize("queries, keys", LENGTHS)
def test_shaw_is_the_equation(queries, keys, clip, draw, slope):
    case = CASES[(queries + keys + clip) % len(CASES)]
    options = _options(case, queries, keys, draw)
    arrays = _draw_arrays(draw, queries, keys)
    rows = 2 * clip + 1
    arrays |= draw({"table_key": (rows, H), "table_value": (rows, V)}, 5)

    def ours(query, key, value, table_key, table_value):
        params = {"key": table_key, "value": table_value}
        return relative.shaw(query, key, value, params=params, **options)

    theirs = functools.partial(_shaw_by_equation, options=options)
    helpers.agree(ours, theirs, arrays, atol=2e-5)


def test_shaw_with_zero_tables_is_plain_attention(draw):
    arrays = _draw_arrays(draw, 9, 7)
    params = {"key": jnp.zeros((5, H)), "value": jnp.zeros((5, V))}
    for case in CASES:
        options = _options(case, 9, 7, draw)
        ours = functools.partial(relative.shaw, params=params, **options)
        theirs = functools.partial(dot_product, **options)
        np.testing.assert_allclose(
            jax.jit(ours)(**arrays),
            jax.jit(theirs)(**arrays),
            atol=1e-6,
        )


def test_shaw_tells_no_offset_from_another_beyond_the_clip(draw):
    """Keys further than the clip may change places, nearer ones may not."""
    params = relative.shaw_init(jax.random.key(0), H, clip=2, value_dim=V)
    arrays = _draw_arrays(draw, 1, 9)
    run = jax.jit(functools.partial(relative.shaw, params=params))
    plain = run(**arrays)
    for pair, same in (([3, 8], True), ([1, 8], False)):
        order = np.arange(9)
        order[pair] = order[pair[::-1]]
        moved = {n: arrays[n][order] for n in ("key", "value")}
        close = np.allclose(run(**{**arrays, **moved}), plain, atol=1e-6)
        assert close == same


@pytest.mark.parametrize(
    "queries, keys, memory",
    [(t, s, m) for t, s in LENGTHS for m in (0, 1, 4) if m <= s and (m or t != 5)],
)
def test_transformer_xl_is_the_equation(queries, keys, memory, draw, slope):
    case = CASES[(queries + keys + memory) % len(CASES)]
    options = _options(case, queries, keys, draw)
    arrays = _draw_arrays(draw, queries, keys)
    arrays |= draw({"u": (H,), "v": (H,), "position": (H, H)}, 5)

    def ours(query, key, value, u, v, position):
        params = {"content_bias": u, "position_bias": v, "position": position}
        return relative.transformer_xl(
            query, key, value, params=params, memory_length=memory, **options
        )

    theirs = functools.partial(
        _transformer_xl_by_equation, memory=memory, options=options
    )
    helpers.agree(ours, theirs, arrays, atol=2e-5)


def test_projections_learn_from_the_memory_that_is_stopped_before_them(draw, slope):
    """Section 3.2: k, v = W_k h̃, W_v h̃ with h̃ = [SG(h_memory); h]."""
    memory, new = 4, 3
    hidden = draw({"old": (memory, H), "new": (new, H)})
    maps = draw({"key": (H, H), "value": (H, V)}, 1)
    params = {n: x for n, x in draw({"u": (H,), "v": (H,), "W": (H, H)}, 2).items()}
    names = ("content_bias", "position_bias", "position")

    def ours(maps, old):
        stopped = jax.lax.stop_gradient(old)
        both = jnp.concatenate([stopped, hidden["new"]], axis=0)
        return relative.transformer_xl(
            hidden["new"],
            both @ maps["key"],
            both @ maps["value"],
            params=dict(zip(names, params.values(), strict=True)),
            is_causal=True,
            memory_length=memory,
        )

    def theirs(key, value):
        both = np.concatenate([hidden["old"], hidden["new"]], axis=0, dtype=np.float64)
        options = dict(_options({}, new, memory + new, draw), is_causal=True)
        return _transformer_xl_by_equation(
            hidden["new"], both @ key, both @ value, *params.values(), memory, options
        )

    cotangent = np.cos(np.arange(new * V)).reshape(new, V)
    out, pullback = jax.vjp(ours, maps, hidden["old"])
    wide = {n: np.float64(x) for n, x in maps.items()}
    np.testing.assert_allclose(out, theirs(**wide), atol=2e-5)
    grads, before = pullback(jnp.asarray(cotangent, jnp.float32))
    assert not before.any()
    directions = draw({n: x.shape for n, x in maps.items()}, 3)
    for name, found in slope(theirs, wide, directions, cotangent).items():
        claimed = float(np.sum(np.float64(grads[name]) * directions[name]))
        np.testing.assert_allclose(claimed, found, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("memory", [3, 8])
def test_segments_with_memory_are_one_long_pass(memory, draw):
    """Each segment sees itself and `memory` tokens before: a mask of one long pass."""
    segment, segments = 8, 3
    length = segment * segments
    arrays = _draw_arrays(draw, length, length)
    params = relative.transformer_xl_init(jax.random.key(1), H)
    run = jax.jit(
        functools.partial(relative.transformer_xl, params=params, is_causal=True),
        static_argnames="memory_length",
    )
    start = np.arange(length) // segment * segment
    window = np.arange(length)[None, :] >= (start - memory)[:, None]
    whole = run(**arrays, mask=window)
    for begin in range(0, length, segment):
        kept = min(memory, begin)
        end = begin + segment
        part = run(
            arrays["query"][begin:end],
            arrays["key"][begin - kept : end],
            arrays["value"][begin - kept : end],
            memory_length=kept,
        )
        np.testing.assert_allclose(part, whole[begin:end], atol=1e-5)


def test_transformer_xl_with_zero_parameters_is_plain_attention(draw):
    arrays = _draw_arrays(draw, 9, 7)
    zeros = jax.tree.map(
        jnp.zeros_like, relative.transformer_xl_init(jax.random.key(0), H)
    )
    for case in CASES:
        options = _options(case, 9, 7, draw)
        ours = functools.partial(relative.transformer_xl, params=zeros, **options)
        theirs = functools.partial(dot_product, **options)
        np.testing.assert_allclose(
            jax.jit(ours)(**arrays),
            jax.jit(theirs)(**arrays),
            atol=1e-6,
        )


def test_transformer_xl_of_an_odd_size_depends_on_the_distance_alone(draw):
    shapes = {"query": (4, 5), "key": (12, 5), "value": (12, 5)}
    arrays = draw(shapes)
    params = relative.transformer_xl_init(jax.random.key(0), 5)
    run = jax.jit(
        functools.partial(relative.transformer_xl, params=params),
        static_argnames="memory_length",
    )
    # Keys 3 … 7 with a memory of 1 are 2 … 6 places away as keys 3 … 7 of all are.
    mask = np.zeros((4, 12), bool)
    mask[:, 3:8] = True
    near = run(arrays["query"], arrays["key"][3:8], arrays["value"][3:8])
    shifted = run(**arrays, mask=mask, memory_length=3)
    np.testing.assert_allclose(near, shifted, atol=1e-5)


@pytest.mark.parametrize("queries, keys", LENGTHS)
def test_relative_shift(queries, keys):
    by_offset = np.arange(queries * (queries + keys - 1)).reshape(queries, -1)
    found = np.asarray(jax.jit(relative.relative_shift)(by_offset))
    for t in range(queries):
        for s in range(keys):
            assert found[t, s] == by_offset[t, s - t + queries - 1]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda x: relative.shaw(x, x, x, params={"key": x, "value": x}),
            ValueError,
            "must both have 2·clip . 1 rows, but have 4",
        ),
        (
            lambda x: relative.shaw(x, x, x, params={"key": x}),
            ValueError,
            "`params` must be a mapping with .'key', 'value'.",
        ),
        (
            lambda x: relative.shaw_init(jax.random.key(0), H, clip=-1),
            ValueError,
            "`clip` must be at least 0",
        ),
        (
            lambda x: relative.transformer_xl(
                x,
                x,
                x,
                params=relative.transformer_xl_init(jax.random.key(0), H),
                memory_length=5,
            ),
            ValueError,
            "`memory_length` must be at most S=4",
        ),
        (
            lambda x: relative.transformer_xl(
                x,
                x,
                x,
                params=relative.transformer_xl_init(jax.random.key(0), H),
                memory_length=1.0,
            ),
            TypeError,
            "`memory_length` must be an int",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(jnp.ones((4, H)))
