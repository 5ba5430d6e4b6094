"""Attention through latents: the papers' equations, and how the members are related."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.attention.latent import (
    isab,
    isab_init,
    luna,
    luna_init,
    perceiver,
    perceiver_init,
)
from attn_jax.attention.softmax import dot_product
from tests import helpers

H, V, M = 4, 3, 3
RNG = jax.random.key(0)
SOME = np.arange(11) % 4 != 0


def _weights(query, key, real=None):
    """Softmax over the real keys in the loop-free form of one row at a time."""
    out = np.zeros((len(query), len(key)))
    for t, q in enumerate(query):
        logits = np.array([H**-0.5 * q @ k for k in key])
        w = np.exp(logits - logits.max()) * (1 if real is None else real)
        out[t] = w / w.sum()
    return out


def _isab(query, key, value, points, real):
    gather = _weights(points, key, real)
    return _weights(query, gather @ key) @ (gather @ value)


def _perceiver(query, key, value, latent, decoder, real):
    return _weights(query, decoder) @ _weights(latent, key, real) @ value


def _luna_causal(query, key, value, extra, real):
    """One step after the other, with sums over the real keys so far."""
    scale, out = H**-0.5, np.zeros((len(query), V))
    keys, values, count = np.zeros((H, M)), np.zeros((M, V)), 0
    for t, q in enumerate(query):
        if t < len(key) and real[t]:
            score = scale * extra @ key[t]
            pack = np.where(score > 0, score + 1, np.exp(np.minimum(score, 0)))
            keys += np.outer(key[t], pack)
            values += np.outer(pack, value[t])
            count += 1
        if count:
            logits = scale * q @ keys / count
            w = np.exp(logits - logits.max())
            out[t] = w / w.sum() @ values / count
    return out


def _cases():
    shapes = [(7, H), (11, H), (11, V), (M, H)]
    for fn, reference, name in ((isab, _isab, "inducing"), (luna, _isab, "extra")):
        yield (
            lambda x, fn=fn, name=name: fn(*x[:3], params={name: x[3]}, key_mask=SOME),
            lambda x, reference=reference: reference(*x, SOME),
            shapes,
        )
    yield (
        lambda x: perceiver(
            *x[:3], params={"latent": x[3], "decoder": x[4]}, key_mask=SOME
        ),
        lambda x: _perceiver(*x, SOME),
        [*shapes, (M, H)],
    )
    for length in (7, 11, 14):
        yield (
            lambda x: luna(
                *x[:3], params={"extra": x[3]}, key_mask=SOME, is_causal=True
            ),
            lambda x: _luna_causal(*x, SOME),
            [(length, H), *shapes[1:]],
        )


@pytest.mark.parametrize("ours, theirs, shapes", list(_cases()))
def test_equals_the_equation(ours, theirs, shapes, draw, slope):
    names = [f"x{i}" for i in range(len(shapes))]
    arrays = draw(dict(zip(names, shapes, strict=True)))
    helpers.agree(
        lambda **x: ours([x[n] for n in names]),
        lambda **x: theirs([x[n] for n in names]),
        arrays,
        atol=1e-5,
        slopes=1e-3,
    )


def _draw_inputs(draw, length, seed=0):
    return draw({"query": (length, H), "key": (length, H), "value": (length, V)}, seed)


def test_one_point_is_dot_product_of_the_point(draw):
    arrays = _draw_inputs(draw, 6)
    params = isab_init(RNG, H, num_inducing=1)
    one = dot_product(params["inducing"], arrays["key"], arrays["value"])
    for found in (
        isab(**arrays, params=params),
        luna(**arrays, params={"extra": params["inducing"]}),
    ):
        np.testing.assert_allclose(found, np.repeat(one, 6, axis=0), atol=1e-6)


def test_without_decoder_keys_every_query_gets_the_mean_latent(draw):
    arrays = _draw_inputs(draw, 6)
    params = perceiver_init(RNG, H, num_latents=M)
    params["decoder"] = jnp.zeros((M, H))
    mean = dot_product(params["latent"], arrays["key"], arrays["value"]).mean(axis=0)
    found = perceiver(**arrays, params=params)
    np.testing.assert_allclose(found, np.tile(mean, (6, 1)), atol=1e-6)


VARIANTS = {
    "isab": functools.partial(isab, params=isab_init(RNG, H, num_inducing=M)),
    "perceiver": functools.partial(
        perceiver, params=perceiver_init(RNG, H, num_latents=M)
    ),
    "luna causal": functools.partial(
        luna, params=luna_init(RNG, H, num_extra=M), is_causal=True
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_is_invisible_and_without_real_tokens_all_is_zero(name, draw):
    arrays = _draw_inputs(draw, 16)
    helpers.padding_is_invisible(VARIANTS[name], arrays, 10)
    helpers.nothing_gives_zeros(VARIANTS[name], arrays)


def test_causal_luna_does_not_see_the_future(draw):
    arrays = _draw_inputs(draw, 9)
    fn = jax.jit(VARIANTS["luna causal"])
    out = fn(**arrays)
    later = {n: a.copy() for n, a in arrays.items()}
    for name in ("key", "value"):
        later[name][5:] = 1e9
    found = fn(**later)
    np.testing.assert_array_equal(found[:5], out[:5])
    assert (found[5:] != out[5:]).any() and np.isfinite(found).all()
    # The first query sees one key, whatever its own content is.
    first = {**arrays, "query": arrays["query"][::-1].copy()}
    assert (fn(**first)[1:] != out[1:]).any()


def test_long_causal_luna_is_chunked(draw):
    # Longer than two chunks of `causal_product`.
    arrays = _draw_inputs(draw, 300)
    extra = VARIANTS["luna causal"].keywords["params"]["extra"]
    found = jax.jit(VARIANTS["luna causal"])(**arrays)
    wide = (np.asarray(x, np.float64) for x in (*arrays.values(), extra))
    np.testing.assert_allclose(found, _luna_causal(*wide, np.ones(300)), atol=1e-4)


def test_large_logits_stay_finite(draw):
    arrays = _draw_inputs(draw, 9)
    arrays["query"] *= 1e4
    for name, fn in VARIANTS.items():
        run = jax.jit(jax.grad(lambda x, fn=fn: (fn(**x) ** 2).sum()))
        for leaf in jax.tree.leaves(run(arrays)):
            assert np.isfinite(leaf).all(), name


@pytest.mark.parametrize(
    "init, option, shapes",
    [
        (isab_init, "num_inducing", {"inducing"}),
        (perceiver_init, "num_latents", {"latent", "decoder"}),
        (luna_init, "num_extra", {"extra"}),
    ],
)
def test_initial_parameters(init, option, shapes):
    params = init(RNG, 32, **{option: 64})
    assert set(params) == shapes
    for leaf in params.values():
        assert leaf.shape == (64, 32) and np.std(leaf) == pytest.approx(1, rel=0.1)
    assert len({float(leaf[0, 0]) for leaf in params.values()}) == len(shapes)
    with pytest.raises(ValueError, match=f"`{option}` must be at least 1, but is 0"):
        init(RNG, 32, **{option: 0})


@pytest.mark.parametrize(
    "fn, params, message",
    [
        (isab, {}, "isab_init"),
        (luna, {"extra": np.ones((3, 5), "f")}, r"must have shape \[3, 4\]"),
        (
            perceiver,
            {"latent": np.ones((3, H), "f"), "decoder": np.ones((2, H), "f")},
            r"params\['decoder'\]` must have shape \[3, 4\]",
        ),
    ],
)
def test_bad_parameters_are_named(fn, params, message, draw):
    with pytest.raises(ValueError, match=message):
        fn(**_draw_inputs(draw, 6), params=params)
