"""Low-rank attention: the papers' equations, and where they become full attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention import low_rank
from attn_jax.attention.low_rank import (
    linformer,
    linformer_init,
    memory_compressed,
    memory_compressed_init,
    nystromformer,
    nystromformer_init,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V = 4, 3
RNG = jax.random.key(0)
INPUTS = ("query", "key", "value")


def _softmax(logits):
    w = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


def _linformer(query, key, value, e, f, real):
    length, rank = len(key), e.shape[1]
    keys, values = np.zeros((rank, H)), np.zeros((rank, V))
    for j in range(rank):
        for s in range(length):
            if real[s]:
                keys[j] += e[s, j] * key[s]
                values[j] += f[s, j] * value[s]
    return _softmax(H**-0.5 * query @ keys.T) @ values


def _memory(query, key, value, w, u, real, is_causal):
    width, length = len(w), len(key)
    keys, values, ends = [], [], []
    for begin in range(0, length, width):
        inside = [s for s in range(begin, min(begin + width, length)) if real[s]]
        if inside:
            keys.append(sum(key[s] @ w[s - begin] for s in inside))
            values.append(sum(value[s] @ u[s - begin] for s in inside))
            ends.append(begin + width - 1)
    out = np.zeros((len(query), V))
    for t, q in enumerate(query):
        seen = [j for j, end in enumerate(ends) if not is_causal or end <= t]
        if seen:
            logits = np.array([H**-0.5 * q @ keys[j] for j in seen])
            out[t] = _softmax(logits) @ np.array([values[j] for j in seen])
    return out


def _nystrom(query, key, value, kernel, real, landmarks, iterations):
    near = [[], []]
    rows = np.flatnonzero(real)
    m = min(landmarks, len(rows))
    for j in range(m):
        inside = [row for r, row in enumerate(rows) if r * m // len(rows) == j]
        for means, of in zip(near, (query, key), strict=True):
            means.append(np.mean([of[row] for row in inside], axis=0))
    near_q, near_k = (H**-0.25 * np.array(x) for x in near)
    q, k, v = H**-0.25 * query, H**-0.25 * key[rows], value[rows]
    a = _softmax(near_q @ near_k.T)
    one = np.eye(m)
    z = a.T / (np.abs(a).sum(axis=0).max() * np.abs(a).sum(axis=1).max())
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    out = _softmax(q @ near_k.T) @ z @ _softmax(near_q @ k.T) @ v
    half = len(kernel) // 2
    for t in range(len(out)):
        for i, weight in enumerate(kernel):
            s = t + i - half
            if 0 <= s < len(value) and real[s]:
                out[t] += weight * value[s]
    return out


# Of the windows of three, one is whole, one empty, and two are partly real.
REAL = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1], bool)


def _cases():
    yield (
        lambda x: linformer(*x[:3], params={"key": x[3], "value": x[4]}, key_mask=REAL),
        lambda x: _linformer(*x, REAL),
        [(7, H), (11, H), (11, V), (13, 4), (13, 4)],
    )
    for causal in (False, True):
        yield (
            lambda x, causal=causal: memory_compressed(
                *x[:3],
                params={"key": x[3], "value": x[4]},
                key_mask=REAL,
                is_causal=causal,
            ),
            lambda x, causal=causal: _memory(*x, REAL, causal),
            [(9, H), (11, H), (11, V), (3, H, H), (3, V, V)],
        )
    for m, i in ((3, 6), (64, 2)):
        yield (
            lambda x, m=m, i=i: nystromformer(
                *x[:3],
                params={"convolution": x[3]},
                key_mask=REAL,
                num_landmarks=m,
                pinv_iterations=i,
            ),
            lambda x, m=m, i=i: _nystrom(*x, REAL, m, i),
            [(11, H), (11, H), (11, V), (5,)],
        )


@pytest.mark.parametrize("ours, theirs, shapes", list(_cases()))
def test_equals_the_equation(ours, theirs, shapes, draw, slope):
    names = [f"x{i}" for i in range(len(shapes))]
    arrays = draw(dict(zip(names, shapes, strict=True)))
    helpers.agree(
        lambda **x: ours([x[n] for n in names]),
        lambda **x: theirs([x[n] for n in names]),
        arrays,
        atol=1e-4,
        slopes=2e-3,
    )


def _draw_inputs(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def _exact():
    yield (
        linformer,
        linformer_init(RNG, H, max_length=20, rank=99, scheme="pool"),
        {},
        0,
    )
    compressed = memory_compressed_init(
        RNG, H, compression=1, value_dim=V, scheme="pool"
    )
    yield memory_compressed, compressed, {}, 0
    yield memory_compressed, compressed, {"is_causal": True}, 0
    nystrom = nystromformer_init(RNG, H)
    yield nystromformer, nystrom, {"num_landmarks": 16, "pinv_iterations": 14}, 2e-3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fn, params, options, atol", list(_exact()))
def test_at_full_rank_it_is_dot_product(fn, params, options, atol, masked, draw):
    arrays = _draw_inputs(draw, 16)
    key_mask = np.arange(16) % 5 != 2 if masked else None
    run = functools.partial(fn, params=params, key_mask=key_mask, **options)
    ours = jax.jit(run)(**arrays)
    options = {k: v for k, v in options.items() if k == "is_causal"}
    theirs = dot_product(**arrays, key_mask=key_mask, **options)
    # Nyström's landmarks hold real queries alone, so only these are exact.
    rows = key_mask if masked and fn is nystromformer else slice(None)
    np.testing.assert_allclose(ours[rows], theirs[rows], atol=1e-5 + atol)


def _variants():
    normal = linformer_init(RNG, H, max_length=20, rank=4)
    pool = linformer_init(RNG, H, max_length=20, rank=8, scheme="pool")
    compressed = memory_compressed_init(RNG, H, value_dim=V)
    convolution = {"convolution": jnp.array([0.5, -1.0, 2.0])}
    yield "normal", functools.partial(linformer, params=normal)
    yield "pool", functools.partial(linformer, params=pool)
    for causal in (False, True):
        name = "compressed" + " causal" * causal
        yield (
            name,
            functools.partial(memory_compressed, params=compressed, is_causal=causal),
        )
    for m in (4, 64):
        yield (
            f"{m} landmarks",
            functools.partial(nystromformer, params=convolution, num_landmarks=m),
        )


VARIANTS = dict(_variants())


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_invisible_and_without_real_tokens_all_is_zero(name, draw):
    arrays = _draw_inputs(draw, 16)
    helpers.padding_is_invisible(VARIANTS[name], arrays, 10)
    helpers.nothing_gives_zeros(VARIANTS[name], arrays)


def test_a_compressed_key_is_seen_after_its_last_position(draw):
    arrays = _draw_inputs(draw, 11)
    fn = jax.jit(VARIANTS["compressed causal"])
    out = fn(**arrays)
    assert not out[:2].any() and out[2:].any(axis=1).all()
    for t in (2, 4, 5, 10):
        later = {n: a.copy() for n, a in arrays.items()}
        for name in ("key", "value"):
            later[name][t + 1 :] = 1e9
        np.testing.assert_array_equal(fn(**later)[: t + 1], out[: t + 1])
    # Windows end at 2, 5, 8: key 5 enters at query 5, and the rest of a window never.
    moved = {**arrays, "value": arrays["value"] + (np.arange(11) == 4)[:, None]}
    changed = (fn(**moved) != out).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [5, 6, 7, 8, 9, 10]


def test_pseudo_inverse_is_that_of_numpy(draw):
    matrix = _softmax(3 * np.eye(6) + draw({"a": (6, 6)})["a"])
    invert = jax.jit(lambda a: low_rank._pseudo_inverse(a, 8))
    found = invert(jnp.asarray(matrix, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.pinv(matrix), atol=1e-4)
    # Of rank one: the mean of equal rows.
    flat = np.full((6, 6), 1 / 6, np.float32)
    np.testing.assert_allclose(invert(flat), flat, atol=1e-3)


@pytest.mark.parametrize("length, width", [(1, 5), (100, 5), (100, 39)])
def test_convolution_in_blocks_is_that_of_numpy(length, width, draw):
    arrays = draw({"value": (length, 2), "kernel": (width,)})
    value, kernel = arrays["value"], arrays["kernel"]
    found = jax.jit(low_rank._convolve)(value, kernel)
    for channel in range(2):
        whole = np.convolve(value[:, channel], kernel[::-1])
        near = whole[width // 2 :][:length]
        np.testing.assert_allclose(found[:, channel], near, atol=1e-4)


def test_initial_parameters():
    params = jax.tree.map(np.asarray, linformer_init(RNG, H, max_length=200, rank=50))
    assert params["key"].shape == params["value"].shape == (200, 50)
    assert np.std(params["key"]) == pytest.approx(50**-0.5, rel=0.05)
    assert (params["key"] != params["value"]).any()
    assert jax.eval_shape(lambda: linformer_init(RNG, H))["key"].shape == (512, 256)
    pooled = linformer_init(RNG, H, max_length=10, rank=4, scheme="pool")["key"]
    pooled = np.asarray(pooled)
    np.testing.assert_allclose(pooled.sum(axis=0), 1.0, atol=1e-6)
    assert ((pooled > 0).sum(axis=1) == 1).all()
    params = memory_compressed_init(RNG, 32, compression=2, value_dim=16)
    assert np.std(params["key"]) == pytest.approx(64**-0.5, rel=0.1)
    assert np.std(params["value"]) == pytest.approx(32**-0.5, rel=0.1)
    assert nystromformer_init(RNG, H, kernel_size=0)["convolution"].shape == (0,)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: linformer_init(RNG, H, scheme="mean"),
            ValueError,
            "'normal' or 'pool'",
        ),
        (
            lambda: linformer_init(RNG, H, rank=0),
            ValueError,
            "`rank` must be at least 1",
        ),
        (
            lambda: memory_compressed_init(RNG, H, compression=0),
            ValueError,
            "at least 1",
        ),
        (lambda: nystromformer_init(RNG, H, kernel_size=4), ValueError, "odd or 0"),
    ],
)
def test_bad_options_of_init_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "fn, options, error, message",
    [
        (
            linformer,
            {"params": linformer_init(RNG, H, max_length=4)},
            ValueError,
            "S=6",
        ),
        (linformer, {"params": {}}, ValueError, "linformer_init"),
        (
            memory_compressed,
            {"params": memory_compressed_init(RNG, H)},
            ValueError,
            r"params\['value'\]` must have shape \[3, 3, 3\]",
        ),
        (nystromformer, {"num_landmarks": 0}, ValueError, "`num_landmarks`"),
        (nystromformer, {"pinv_iterations": 2.0}, TypeError, "`pinv_iterations`"),
        (nystromformer, {"query": np.ones((5, H), "f")}, ValueError, "T=5 and S=6"),
        (nystromformer, {"params": {"convolution": jnp.ones(2)}}, ValueError, "odd"),
    ],
)
def test_bad_arguments_are_named(fn, options, error, message, draw):
    given = {"params": nystromformer_init(RNG, H), **_draw_inputs(draw, 6), **options}
    with pytest.raises(error, match=message):
        fn(**given)
