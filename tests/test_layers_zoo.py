"""Every variant inside the multi-head layers of flax.nnx and flax.linen."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from attn_jax.multihead import multi_head
from attn_jax.nn.attention_fn import as_attention_fn, as_linen_attention_fn
from attn_jax.variant import VARIANTS, resolve

BATCH, LENGTH, HEADS, DIM = 2, 11, 2, 16
HEAD_DIM = DIM // HEADS
X = np.random.default_rng(0).standard_normal((BATCH, LENGTH, DIM)).astype(np.float32)
REAL = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 4]])  # [B, T]


def _padding(name):
    """The mask that hides padding, as a layer takes it, where the variant can."""
    variant = resolve(name)
    takes = variant.key_mask or variant.mask
    return jnp.asarray(REAL)[:, None, None] if takes else None


MINE = pathlib.Path(__file__).parent / "right_variants"
OWN = [f"{MINE / file}.py:attend" for file in ("clipped_cosine", "hashed", "mean")]


@pytest.fixture
def lenient():
    """JAX's own settings, for a user's file."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", [*VARIANTS, *OWN], ids=lambda n: n.rpartition("/")[2])
def test_the_nnx_layer_is_projections_around_multi_head(name):
    variant = resolve(name)
    layer = nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=DIM,
        decode=False,
        rngs=nnx.Rngs(0),
        attention_fn=as_attention_fn(
            name,
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            max_length=LENGTH,
            rngs=nnx.Rngs(1),
        ),
    )
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    mask = _padding(name)

    @jax.jit
    def run(params):
        def loss(params):
            out = nnx.merge(graph, params, rest)(jnp.asarray(X), mask=mask)
            return (out**2).sum(), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = run(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(np.asarray(leaf)).all()
    assert out.shape == X.shape
    if variant.stochastic:
        assert np.isfinite(out).all()
        return
    query, key, value = (
        project(jnp.asarray(X)) for project in (layer.query, layer.key, layer.value)
    )
    given = {}
    if variant.init is not None:
        own = layer.attention_fn
        given["params"] = own._head_params(HEADS, HEAD_DIM)
    attend = jax.jit(multi_head(name))
    want = layer.out(attend(query, key, value, mask=mask, **given))
    np.testing.assert_allclose(out, want, atol=2e-5)


# One without parameters or randomness is the same object in both kinds of layers.
@pytest.mark.parametrize(
    "name", ["dot_product", "linformer", "shaw", "reformer", "rfa"]
)
def test_the_linen_layer_runs_and_padding_does_not_leak(name):
    layer = linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=as_linen_attention_fn(name)
    )
    mask = _padding(name)
    rngs = {"params": jax.random.key(0), "attention": jax.random.key(1)}
    variables = jax.jit(layer.init)(rngs, X, mask=mask)

    @jax.jit
    def run(x):
        return layer.apply(
            variables, x, mask=mask, rngs={"attention": jax.random.key(2)}
        )

    out = run(X)
    assert out.shape == X.shape and np.isfinite(out).all()
    if mask is not None:
        dirty = run(np.where(REAL[..., None], X, np.float32(1e3)))
        np.testing.assert_allclose(out[REAL], dirty[REAL], atol=1e-6)
