"""Attention through latents: m learned vectors read the keys, the queries read them.

The sequence never meets itself: m latents attend to the S keys and are attended to by
the T queries, in O((T + S) · m · H). The latents are parameters. What the queries
compare themselves with tells the members apart: keys as the latents have gathered them
(`isab`, `luna`), or learned ones (`perceiver`).

Letters besides those of `attn_jax.attention`: m latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _tiles
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.linear_attention import causal_product
from attn_jax.attention.softmax import dot_product

__all__ = [
    "isab",
    "isab_init",
    "luna",
    "luna_init",
    "perceiver",
    "perceiver_init",
]


def _normal(
    rng: jax.Array, name: str, count: int, head_dim: int, dtype: jnp.dtype
) -> jax.Array:
    """[m, H] from N(0, 1): against unit keys the scaled scores have variance 1 too."""
    count = _checks.check_int(name, count, 1)
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    return jax.random.normal(rng, (count, head_dim), dtype)


def isab_init(
    rng: jax.Array,
    head_dim: int,
    *,
    num_inducing: int = 32,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Inducing points for one head, drawn from N(0, 1).

    Args:
      num_inducing: m.

    Returns:
      {"inducing": [m, H]}.

    >>> isab_init(jax.random.key(0), 4)["inducing"].shape
    (32, 4)
    """
    return {"inducing": _normal(rng, "num_inducing", num_inducing, head_dim, dtype)}


def _through_packed(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    latents: jax.Array,
    key_mask: jax.Array | None,
    scale: float | None,
) -> jax.Array:
    """Attention of the queries to keys and values as the latents have gathered them."""
    # In the dtype of scores: what latents gather from many keys is nearly equal, and
    # what the queries tell apart in it would be lost in roundings.
    out_dtype, dtype = value.dtype, score_dtype(query.dtype)
    query = query.astype(dtype)
    key, value = (_checks.zero_masked(x, key_mask).astype(dtype) for x in (key, value))
    packed = dot_product(
        latents.astype(out_dtype).astype(dtype),
        key,
        jnp.concatenate([key, value], axis=1),
        key_mask=key_mask,
        scale=scale,
    )
    packed_key, packed_value = jnp.split(packed, [key.shape[1]], axis=1)
    return dot_product(query, packed_key, packed_value, scale=scale).astype(out_dtype)


def isab(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Set attention through m learned inducing points, in O((T + S) · m).

    A = softmax(scale · I Kᵀ),  O = softmax(scale · Q (A K)ᵀ) A V

    One head of the induced set attention block: the points attend to the set, and the
    queries to what the points have gathered. With one point, or equal points, it is the
    same for every query: `dot_product` of the point. It never equals `dot_product` of
    the queries in general, as the A K lie within the hull of the keys.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      params: {"inducing": [m, H]}: I, as made by `isab_init`.
      scale: factor of both scores; None means 1/√H.

    Returns:
      [T, V], in the dtype of the inputs; zeros if no key is real.

    Reference: Lee et al., 2018, arXiv:1810.00825, section 3.

    >>> query, key = jnp.array([[9.0], [-9.0]]), jnp.array([[0.0], [1.0]])
    >>> value = jnp.array([[0.0], [4.0]])
    >>> params = {"inducing": jnp.log(jnp.array([[3.0]]))}
    >>> isab(query, key, value, params=params).round(4).tolist()  # what one point saw
    [[3.0], [3.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    _checks.check_params("isab", params, {"inducing": "mH"}, H=query.shape[1])
    return _through_packed(query, key, value, params["inducing"], key_mask, scale)


def perceiver_init(
    rng: jax.Array,
    head_dim: int,
    *,
    num_latents: int = 32,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Latent queries and the keys to read them by, for one head, drawn from N(0, 1).

    Args:
      num_latents: m.

    Returns:
      {"latent": [m, H], "decoder": [m, H]}.

    >>> params = perceiver_init(jax.random.key(0), 4, num_latents=8)
    >>> params["latent"].shape, params["decoder"].shape
    ((8, 4), (8, 4))
    """
    rng_latent, rng_decoder = jax.random.split(rng)
    return {
        "latent": _normal(rng_latent, "num_latents", num_latents, head_dim, dtype),
        "decoder": _normal(rng_decoder, "num_latents", num_latents, head_dim, dtype),
    }


def perceiver(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Encode into m latents by cross-attention, decode by the queries: O((T + S) · m).

    Z = softmax(scale · L Kᵀ) V,  O = softmax(scale · Q Dᵀ) Z

    One head of Perceiver's encoder and one of Perceiver IO's decoder, without the
    layers between. Which latents a query reads depends on the query alone, since D is
    learned; in `isab` it depends on the keys too. With D = 0 every query gets the mean
    of the latents.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      params: {"latent": [m, H], "decoder": [m, H]}: L and D, as made by
        `perceiver_init`.
      scale: factor of both scores; None means 1/√H.

    Returns:
      [T, V], in the dtype of the inputs; zeros if no key is real.

    Reference: Jaegle et al., 2021, arXiv:2103.03206, section 3 (encoder); Jaegle et
    al., 2021, arXiv:2107.14795, section 3 (decoder).

    >>> query, key = jnp.array([[9.0], [-9.0]]), jnp.array([[0.0], [1.0]])
    >>> value = jnp.array([[0.0], [4.0]])
    >>> params = {"latent": jnp.log(jnp.array([[3.0], [1 / 3]])), "decoder": query}
    >>> perceiver(query, key, value, params=params).round(4).tolist()
    [[3.0], [1.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    layout = {"latent": "mH", "decoder": "mH"}
    _checks.check_params("perceiver", params, layout, H=query.shape[1])
    # In the dtype of scores, as in `_through_packed`.
    out_dtype, dtype = value.dtype, score_dtype(query.dtype)
    query = query.astype(dtype)
    key, value = (_checks.zero_masked(x, key_mask).astype(dtype) for x in (key, value))
    latent, decoder = (
        params[x].astype(out_dtype).astype(dtype) for x in ("latent", "decoder")
    )
    read = dot_product(latent, key, value, key_mask=key_mask, scale=scale)
    return dot_product(query, decoder, read, scale=scale).astype(out_dtype)


def luna_init(
    rng: jax.Array,
    head_dim: int,
    *,
    num_extra: int = 32,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """The extra sequence for one head, drawn from N(0, 1).

    Args:
      num_extra: m, the length of the extra sequence.

    Returns:
      {"extra": [m, H]}.

    >>> luna_init(jax.random.key(0), 4)["extra"].shape
    (32, 4)
    """
    return {"extra": _normal(rng, "num_extra", num_extra, head_dim, dtype)}


def luna(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Pack the keys into m vectors, and unpack these by the queries: O((T + S) · m).

    A = softmax(scale · P Kᵀ),  O = softmax(scale · Q (A K)ᵀ) A V

    Causal, with n_t the number of real keys s ≤ t:

    A = ω(scale · P Kᵀ),  ω(x) = elu(x) + 1
    U[t] = softmax(scale · q_t · (1/n_t) Σ_{s≤t} k_s A[:, s]ᵀ)
    o_t = (1/n_t) Σ_{s≤t} (U[t] · A[:, s]) v_s

    Without causality one head is the same function as `isab`: Luna as a layer differs
    in that the packed sequence is also an output, which becomes the extra sequence P of
    the next layer, and in having no feed-forward layer between packing and unpacking.
    The causal form is Luna's own. There A weights each key by itself, since a softmax
    over keys would see the future; with zero scores every weight is 1, and o_t is the
    mean of the values so far.

    Args:
      query, key, value: [T, H], [S, H], [S, V]; others: see `attn_jax.attention`.
      params: {"extra": [m, H]}: P, as made by `luna_init`.
      scale: factor of both scores; None means 1/√H.

    Reference: Ma et al., 2021, arXiv:2106.01540, section 3.

    >>> query, key = jnp.ones((3, 1)), jnp.array([[0.0], [1.0], [2.0]])
    >>> value, params = jnp.array([[0.0], [3.0], [3.0]]), {"extra": jnp.ones((1, 1))}
    >>> out = luna(query, key, value, params=params, is_causal=True)
    >>> out.round(4).tolist()  # sums with ω = 1, 2, 3 over the number of keys
    [[0.0], [3.0], [5.0]]
    """
    _checks.check_inputs(query, key, value, key_mask=key_mask)
    _checks.check_params("luna", params, {"extra": "mH"}, H=query.shape[1])
    if not is_causal:
        return _through_packed(query, key, value, params["extra"], key_mask, scale)
    out_dtype, dtype = value.dtype, score_dtype(query.dtype)
    scale = query.shape[1] ** -0.5 if scale is None else scale
    num_queries = query.shape[0]
    real = jnp.ones(key.shape[0], bool) if key_mask is None else key_mask
    # Later keys than the last query are not seen; missing ones are as padding.
    real, key, value = (
        _tiles.cut(x[:num_queries], num_queries, blocks=1)[0]
        for x in (real, key, value)
    )
    query, key, value = (
        x.astype(dtype)
        for x in (query, *(_checks.zero_masked(x, real) for x in (key, value)))
    )
    count = jnp.cumsum(real, dtype=jnp.int32)[:, None].astype(dtype)
    scores = key @ params["extra"].astype(dtype).T * scale  # [T, m]
    pack = _checks.zero_masked(jax.nn.elu(scores) + 1, real)
    logits = _checks.safe_divide(causal_product(query, key, pack), count)
    unpack = jax.nn.softmax(scale * logits, axis=-1)
    out = _checks.safe_divide(causal_product(unpack, pack, value), count)
    return out.astype(out_dtype)
