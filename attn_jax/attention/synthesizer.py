"""Synthesizers: weights that are not a comparison of queries with keys.

The logits of a row are a function of its own query (dense) or parameters alone
(random), and softmax and values are as ever. Keys are *not read*, by definition: that
attention can do without them is the point of the paper. Only `synthesizer_mixture`,
which has a dot-product part, reads them. In self-attention a synthesizer is a mixing
of positions, so the longest sequence L is fixed with the parameters, and a shorter one
uses their first rows and columns.

Letters besides those of `attn_jax.attention`: L longest sequence, D size of the hidden
layer, K rank, A·B ≥ L the sizes of two factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attn_jax.attention import _checks, _scores
from attn_jax.attention._scores import score_dtype

__all__ = [
    "synthesizer_dense",
    "synthesizer_dense_factorized",
    "synthesizer_dense_factorized_init",
    "synthesizer_dense_init",
    "synthesizer_mixture",
    "synthesizer_mixture_init",
    "synthesizer_random",
    "synthesizer_random_factorized",
    "synthesizer_random_factorized_init",
    "synthesizer_random_init",
]


_NETWORK = {"hidden": "HD", "hidden_bias": "D", "output": "DL", "output_bias": "L"}
_FACTORS = {
    f"{leaf}_{factor}": letters.replace("L", factor.upper())
    for factor in "ab"
    for leaf, letters in _NETWORK.items()
}


def _network_init(
    rng: jax.Array, head_dim: int, hidden_dim: int | None, size: int, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Two layers from H by D to `size`: unit queries give outputs of unit size."""
    hidden_dim = head_dim if hidden_dim is None else hidden_dim
    head_dim, hidden_dim = _checks.check_sizes(head_dim=head_dim, hidden_dim=hidden_dim)
    rng_hidden, rng_output = jax.random.split(rng)
    hidden = jax.random.normal(rng_hidden, (head_dim, hidden_dim), dtype)
    output = jax.random.normal(rng_output, (hidden_dim, size), dtype)
    return {
        "hidden": head_dim**-0.5 * hidden,
        "hidden_bias": jnp.zeros((hidden_dim,), dtype),
        "output": (2 / hidden_dim) ** 0.5 * output,
        "output_bias": jnp.zeros((size,), dtype),
    }


def _network(
    query: jax.Array,
    params: Mapping[str, jax.Array],
    size: int | None = None,
    suffix: str = "",
) -> jax.Array:
    """relu(Q W₁ + b₁) W₂ + b₂, its first `size` columns, in float32 or wider."""
    hidden, hidden_bias, output, output_bias = (
        params[leaf + suffix].astype(query.dtype) for leaf in _NETWORK
    )
    inner = (
        _scores.matmul(query, hidden)
        + hidden_bias.astype(score_dtype(query.dtype))[None]
    )
    logits = _scores.matmul(jax.nn.relu(inner).astype(query.dtype), output[:, :size])
    return logits + output_bias[None, :size].astype(logits.dtype)


def _random_logits(
    params: Mapping[str, jax.Array], num_queries: int, num_keys: int, dtype: jnp.dtype
) -> jax.Array:
    """The first rows and columns of the logits, rounded as inputs are, then widened."""
    logits = params["logits"][:num_queries, :num_keys]
    return logits.astype(dtype).astype(score_dtype(dtype))


def synthesizer_dense_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    hidden_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """A two-layer network from a query to its row of logits, for one head.

    The weights are normal, with variance 1/H and 2/D, so that unit queries give logits
    of about unit size; the biases are zero.

    Args:
      hidden_dim: D; None means H.

    Returns:
      {"hidden": [H, D], "hidden_bias": [D], "output": [D, L], "output_bias": [L]}.

    >>> params = synthesizer_dense_init(jax.random.key(0), 4, max_length=6)
    >>> params["hidden"].shape, params["output"].shape
    ((4, 4), (4, 6))
    """
    length = _checks.check_int("max_length", max_length, 1)
    return _network_init(rng, head_dim, hidden_dim, length, dtype)


def synthesizer_dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Each query predicts its own row of logits; the keys are not read.

    O = softmax(relu(Q W₁ + b₁) W₂ + b₂ + bias) V

    With W₂ = 0 it is `synthesizer_random` with equal rows b₂, and with b₂ = 0 too the
    mean over the allowed values. There is no scale.

    Args:
      query: [T, H].
      key: [S, H], of which only shape and dtype are checked.
      value: [S, V], with S ≤ L.
      params: {"hidden": [H, D], "hidden_bias": [D], "output": [D, L], "output_bias":
        [L]}: W₁, b₁, W₂, b₂, as made by `synthesizer_dense_init`.

    Raises:
      ValueError: on wrong shapes or parameters, or S > L.

    Reference: Tay et al., 2020, arXiv:2005.00743, section 3, "dense synthesizer".

    >>> params = {"hidden": jnp.eye(1), "hidden_bias": jnp.zeros(1)}
    >>> params |= {"output": jnp.log(jnp.array([[1.0, 3.0]]))}
    >>> params |= {"output_bias": jnp.zeros(2)}
    >>> query, value = jnp.array([[1.0], [0.0]]), jnp.array([[0.0], [4.0]])
    >>> synthesizer_dense(query, query, value, params=params).round(4).tolist()
    [[3.0], [2.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    name, length = "synthesizer_dense", key.shape[0]
    sizes = _checks.check_params(name, params, _NETWORK, H=query.shape[1])
    _checks.check_longest(name, sizes["L"], S=length)
    query, value = _scores.zero_unseen(query, value, pairs=pairs)
    logits = _network(query, params, length)
    return _scores.attend(logits, value, bias, pairs)


def synthesizer_dense_factorized_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    factor: int | None = None,
    hidden_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Two networks from a query to the two factors of its logits, for one head.

    Both are drawn as by `synthesizer_dense_init`.

    Args:
      factor: A, the size of the first factor; None means ⌈√L⌉. The second gets
        B = ⌈L/A⌉.
      hidden_dim: D; None means H.

    Returns:
      {"hidden_a": [H, D], "hidden_bias_a": [D], "output_a": [D, A], "output_bias_a":
      [A]}, and the same with b in the place of a.

    >>> params = synthesizer_dense_factorized_init(
    ...     jax.random.key(0), 4, max_length=6, factor=2
    ... )
    >>> params["output_a"].shape, params["output_b"].shape
    ((4, 2), (4, 3))
    """
    length = _checks.check_int("max_length", max_length, 1)
    first = math.isqrt(length - 1) + 1 if factor is None else factor
    first = _checks.check_int("factor", first, 1)
    params: dict[str, jax.Array] = {}
    for suffix, stream, size in zip(
        "ab", jax.random.split(rng), (first, -(-length // first)), strict=True
    ):
        network = _network_init(stream, head_dim, hidden_dim, size, dtype)
        params |= {f"{leaf}_{suffix}": array for leaf, array in network.items()}
    return params


def synthesizer_dense_factorized(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """Each query predicts two short rows, whose products are its logits.

    R[t, s] = F_a(q_t)[s mod A] · F_b(q_t)[⌊s/A⌋],  O = softmax(R + bias) V
    F(q) = W₂ᵀ relu(W₁ᵀ q + b₁) + b₂

    The first row is tiled B times and each entry of the second repeated A times, so
    A·B ≥ L entries come from A + B. The paper tiles both rows. Their products would
    then repeat with a period of the least common multiple of A and B, which is A where
    A = B, as for L = 512 here; repeated, every entry of one row meets every entry of
    the other once. The keys are not read. With F_b = 1 the logits have
    period A; for A = L, B = 1 and F_b = 1 it is `synthesizer_dense`.

    Args:
      query: [T, H].
      key: [S, H], of which only shape and dtype are checked.
      value: [S, V], with S ≤ A·B.
      params: the two networks, as made by `synthesizer_dense_factorized_init`.

    Raises:
      ValueError: on wrong shapes or parameters, or S > A·B.

    Reference: Tay et al., 2020, arXiv:2005.00743, section 3, "factorized dense
    synthesizer".

    >>> params = {"hidden_a": jnp.eye(1), "output_a": jnp.log(jnp.array([[1.0, 3.0]]))}
    >>> params |= {"hidden_b": jnp.eye(1), "output_b": jnp.array([[0.0, 1.0]])}
    >>> biases = {"hidden_bias_a": 1, "output_bias_a": 2, "hidden_bias_b": 1}
    >>> biases |= {"output_bias_b": 2}
    >>> params |= {name: jnp.zeros(size) for name, size in biases.items()}
    >>> query, key, value = jnp.ones((1, 1)), jnp.ones((4, 1)), 6 * jnp.eye(4)
    >>> out = synthesizer_dense_factorized(query, key, value, params=params)
    >>> out.round(4).tolist()  # logits log 3 times [0 · 0, 1 · 0, 0 · 1, 1 · 1]
    [[1.0, 1.0, 1.0, 3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    name, length = "synthesizer_dense_factorized", key.shape[0]
    sizes = _checks.check_params(name, params, _FACTORS, H=query.shape[1])
    _checks.check_longest(name, sizes["A"] * sizes["B"], S=length)
    query, value = _scores.zero_unseen(query, value, pairs=pairs)
    first, second = (_network(query, params, suffix=x) for x in ("_a", "_b"))
    products = second[:, :, None] * first[:, None, :]
    logits = products.reshape(query.shape[0], sizes["A"] * sizes["B"])[:, :length]
    return _scores.attend(logits, value, bias, pairs)


def synthesizer_random_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Logits of all pairs of positions for one head, drawn from N(0, 1).

    This is the size of scaled dot products of unit vectors. They are trained; for the
    paper's fixed random synthesizer wrap them in `jax.lax.stop_gradient`.

    Returns:
      {"logits": [L, L]}.

    >>> synthesizer_random_init(jax.random.key(0), 4, max_length=6)["logits"].shape
    (6, 6)
    """
    _checks.check_int("head_dim", head_dim, 1)
    length = _checks.check_int("max_length", max_length, 1)
    return {"logits": jax.random.normal(rng, (length, length), dtype)}


def synthesizer_random(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """The logits are parameters: neither queries nor keys are read.

    O = softmax(R[:T, :S] + bias) V

    With R = 0 it is the mean over the allowed values; with one large entry in each row
    it permutes them. There is no scale.

    Args:
      query: [T, H], with T ≤ L, of which only shape and dtype are checked.
      key: [S, H], with S ≤ L, likewise.
      value: [S, V].
      params: {"logits": [L, L]}: R, as made by `synthesizer_random_init`.

    Raises:
      ValueError: on wrong shapes or parameters, or T or S > L.

    Reference: Tay et al., 2020, arXiv:2005.00743, section 3, "random synthesizer".

    >>> x, value = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> params = {"logits": jnp.array([[0.0, 0.0], [0.0, 99.0]])}
    >>> synthesizer_random(x, x, value, params=params).tolist()
    [[2.0], [3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    name, lengths = "synthesizer_random", (query.shape[0], key.shape[0])
    sizes = _checks.check_params(name, params, {"logits": "LL"})
    _checks.check_longest(name, sizes["L"], T=lengths[0], S=lengths[1])
    logits = _random_logits(params, *lengths, query.dtype)
    _, value = _scores.zero_unseen(query, value, pairs=pairs)
    return _scores.attend(logits, value, bias, pairs)


def synthesizer_random_factorized_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    rank: int = 8,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Two factors of the logits of all pairs of positions, for one head.

    Their entries have variance 1/√K, so that the logits have variance 1.

    Args:
      rank: K; the paper takes 8.

    Returns:
      {"query": [L, K], "key": [L, K]}.

    >>> params = synthesizer_random_factorized_init(jax.random.key(0), 4, max_length=6)
    >>> params["query"].shape, params["key"].shape
    ((6, 8), (6, 8))
    """
    _checks.check_int("head_dim", head_dim, 1)
    length = _checks.check_int("max_length", max_length, 1)
    rank = _checks.check_int("rank", rank, 1)
    return {
        name: rank**-0.25 * jax.random.normal(stream, (length, rank), dtype)
        for name, stream in zip(("query", "key"), jax.random.split(rng), strict=True)
    }


def synthesizer_random_factorized(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """The logits are parameters of rank K: neither queries nor keys are read.

    O = softmax(R₁[:T] R₂[:S]ᵀ + bias) V

    Equal to `synthesizer_random` with logits R₁ R₂ᵀ; K = L can hold any.

    Args:
      query: [T, H], with T ≤ L, of which only shape and dtype are checked.
      key: [S, H], with S ≤ L, likewise.
      value: [S, V].
      params: {"query": [L, K], "key": [L, K]}: R₁ and R₂, as made by
        `synthesizer_random_factorized_init`.

    Raises:
      ValueError: on wrong shapes or parameters, or T or S > L.

    Reference: Tay et al., 2020, arXiv:2005.00743, section 3, "factorized random
    synthesizer".

    >>> x, value = jnp.ones((2, 4)), jnp.array([[1.0], [3.0]])
    >>> params = {"query": jnp.array([[0.0], [1.0]]), "key": jnp.array([[0.0], [99.0]])}
    >>> synthesizer_random_factorized(x, x, value, params=params).tolist()
    [[2.0], [3.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    name, lengths = "synthesizer_random_factorized", (query.shape[0], key.shape[0])
    sizes = _checks.check_params(name, params, {"query": "LK", "key": "LK"})
    _checks.check_longest(name, sizes["L"], T=lengths[0], S=lengths[1])
    rows, columns = (
        params[leaf][:length].astype(query.dtype)
        for leaf, length in zip(("query", "key"), lengths, strict=True)
    )
    logits = _scores.matmul(rows, columns.T)
    _, value = _scores.zero_unseen(query, value, pairs=pairs)
    return _scores.attend(logits, value, bias, pairs)


def synthesizer_mixture_init(
    rng: jax.Array,
    head_dim: int,
    *,
    max_length: int = 512,
    hidden_dim: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, jax.Array]:
    """Dense and random logits and what share each kind has, for one head.

    Drawn as by `synthesizer_dense_init` and `synthesizer_random_init`; the shares of
    dense, random and dot-product logits are equal at first.

    Args:
      hidden_dim: D; None means H.

    Returns:
      {"hidden": [H, D], "hidden_bias": [D], "output": [D, L], "output_bias": [L],
      "logits": [L, L], "mixture": [3]}.

    >>> synthesizer_mixture_init(jax.random.key(0), 4)["mixture"].tolist()
    [0.0, 0.0, 0.0]
    """
    rng_dense, rng_random = jax.random.split(rng)
    options: dict[str, Any] = {"max_length": max_length, "dtype": dtype}
    return {
        **synthesizer_dense_init(rng_dense, head_dim, hidden_dim=hidden_dim, **options),
        **synthesizer_random_init(rng_random, head_dim, **options),
        "mixture": jnp.zeros((3,), dtype),
    }


def synthesizer_mixture(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    params: Mapping[str, jax.Array],
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> jax.Array:
    """A learned mixture of dense, random and dot-product logits.

    O = softmax(α₁ R_dense + α₂ R_random + α₃ scale · Q Kᵀ + bias) V,  α = softmax(a)

    Equal to `synthesizer_dense`, `synthesizer_random` or `dot_product` as a puts all
    weight on the first, second or third.

    Args:
      query: [T, H], with T ≤ L.
      key: [S, H], with S ≤ L.
      value: [S, V].
      params: those of `synthesizer_dense` and `synthesizer_random`, and {"mixture":
        [3]}: a, as made by `synthesizer_mixture_init`.
      scale: factor of the dot products; None means 1/√H.

    Raises:
      ValueError: on wrong shapes or parameters, or T or S > L.

    Reference: Tay et al., 2020, arXiv:2005.00743, section 3, "mixture of
    synthesizers".

    >>> params = synthesizer_mixture_init(jax.random.key(0), 1, max_length=2)
    >>> params["logits"] = 3 * jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    >>> query, value = jnp.zeros((2, 1)), jnp.array([[0.0], [4.0]])
    >>> out = synthesizer_mixture(query, query, value, params=params)
    >>> out.round(4).tolist()  # queries of zeros leave a third of the random logits
    [[3.0], [2.0]]
    """
    _checks.check_inputs(query, key, value, bias, mask, key_mask)
    pairs: _scores.Pairs = (mask, key_mask, is_causal)
    name, lengths = "synthesizer_mixture", (query.shape[0], key.shape[0])
    layout = {**_NETWORK, "logits": "LL", "mixture": "M"}
    sizes = _checks.check_params(name, params, layout, H=query.shape[1], M=3)
    _checks.check_longest(name, sizes["L"], T=lengths[0], S=lengths[1])
    scale = query.shape[1] ** -0.5 if scale is None else scale
    query, key, value = _scores.zero_unseen(query, key, value, pairs=pairs)
    share = jax.nn.softmax(params["mixture"].astype(score_dtype(query.dtype)))
    logits = (
        share[0] * _network(query, params, lengths[1])
        + share[1] * _random_logits(params, *lengths, query.dtype)
        + share[2] * (_scores.matmul(query, key.T) * scale)
    )
    return _scores.attend(logits, value, bias, pairs)
