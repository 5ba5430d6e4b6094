"""The funnel: how tokens become fewer, what they still read, and the way back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_jax.nn.funnel import FunnelEncoder, halved


def _made(**options):
    return FunnelEncoder(8, num_heads=2, mlp_dim=16, rngs=nnx.Rngs(0), **options)


def test_two_tokens_become_the_mean_of_the_real_ones():
    x = jnp.array([[1.0, 3.0, 5.0, jnp.nan, jnp.nan]]).reshape(1, 5, 1)
    mask = jnp.array([[True, True, True, False, False]])
    out, real = halved(x, mask)
    assert out.ravel().tolist() == [2.0, 5.0, 0.0]
    assert real.tolist() == [[True, True, False]]


@pytest.mark.parametrize("decoder_depth", [None, 1])
def test_padding_changes_nothing(decoder_depth):
    encoder = _made(depths=(1, 1, 2), decoder_depth=decoder_depth)
    x = jax.random.normal(jax.random.key(1), (2, 11, 8))
    mask = jnp.arange(11)[None] < jnp.array([[11], [6]])
    run = jax.jit(lambda x, mask: encoder(x, mask))
    out, real = run(x, mask)
    kept = 11 if decoder_depth else 3
    assert out.shape == (2, kept, 8) and real.shape == (2, kept)
    other, _ = run(jnp.where(mask[:, :, None], x, 1e3), mask)
    np.testing.assert_allclose(out[real], other[real], atol=1e-5)
    holes = jnp.where(mask[:, :, None], x, jnp.nan)
    graphdef, params, rest = nnx.split(encoder, nnx.Param, ...)

    def loss(params):
        out, real = nnx.merge(graphdef, params, rest)(holes, mask)
        return jnp.where(real[:, :, None], out, 0.0).sum()

    slopes = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(leaf).all() for leaf in slopes)
    alone, whole = encoder(x[1:, :6])
    assert whole.all()
    np.testing.assert_allclose(out[1][real[1]], alone[0], atol=1e-5)


def test_pooled_tokens_read_all_of_the_stage_before():
    """The first pooled token depends on the last token, by attention alone."""
    encoder = _made(depths=(1, 1))
    x = jax.random.normal(jax.random.key(2), (1, 8, 8))

    def first(x):
        return encoder(x)[0][0, 0, 0]

    assert jnp.abs(jax.grad(first)(x)[0, -1]).max() > 1e-6
    # One block for the tokens, pooled, and one that asks with them: by hand.
    (one,), (two,) = encoder.stages
    mask, rng = jnp.ones((1, 8), bool), jax.random.key(0)
    h = one(x, x, mask, rng, deterministic=True)
    pooled = h.reshape(1, 4, 2, 8).mean(axis=2)
    want = encoder.norm(two(pooled, h, mask, rng, deterministic=True))
    np.testing.assert_allclose(encoder(x)[0], want, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`depths` must be a number of blocks"):
        _made(depths=(1, 0))
    with pytest.raises(ValueError, match="'truncated' cannot honour"):
        _made(depths=(1,), attention="truncated")
    with pytest.raises(ValueError, match=r"`key_mask` must be \[B, T\] = \(1, 4\)"):
        _made(depths=(1,))(jnp.ones((1, 4, 8)), jnp.ones((1, 5), bool))
