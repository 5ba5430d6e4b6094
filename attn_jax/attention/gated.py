"""Linear attention with a memory that forgets, or corrects itself; always causal.

Causal linear attention writes k_t v_tᵀ into a matrix and never takes anything out. Here
the matrix fades, at a rate of the head's own (`retention`), of the token's (`ssd`) or
of the token's for each row (`gated_linear`), or what it says of a key is replaced
(`delta_net`). All are written three times: as the recurrence, which is the
step that generates; over all pairs, which is what the tests hold them against; and in
chunks, parallel inside and recurrent between, which is the function. What weighs the
tokens reads the key, since one head has no other representation of a token, where the
papers read the layer's input.

Letters besides those of `attn_jax.attention`: C number of chunks, c size of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn_jax.attention import _checks, _tiles
from attn_jax.attention._scores import score_dtype
from attn_jax.attention.linear_attention import causal_product, with_ones

__all__ = [
    "delta_net",
    "delta_net_init",
    "delta_net_init_state",
    "delta_net_step",
    "gated_linear",
    "gated_linear_init",
    "gated_linear_init_state",
    "gated_linear_step",
    "retention",
    "retention_init",
    "retention_init_state",
    "retention_step",
    "ssd",
    "ssd_init",
    "ssd_init_state",
    "ssd_step",
]

Params = Mapping[str, jax.Array]

# A key's norm is taken to be no less.
_LEAST_NORM = 1e-6
# The exponent of `retention`, that γ be above zero.
_LEAST_EXPONENT = 0.01
# Logits of a gate are cut to ± this.
_LARGEST_LOGIT = 30.0
# The root that `gated_linear` takes of its gates, and the longest chunk whose gates,
# multiplied up, float32 still holds: exp(32 · 30/16 = 60), as 60 < 87.
_ROOT = 16.0
_LONGEST_CHUNK = 32


def _prepared(
    name: str,
    layout: Mapping[str, str],
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    params: Params,
    key_mask: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    """Checked arrays and parameters, wide, with zeros for padding."""
    one = name, "what it remembers runs along one sequence"
    query, key, value = arrays
    _checks.check_inputs(query, key, value, key_mask=key_mask, one_sequence=one)
    _checks.check_params(name, params, layout, H=key.shape[1])
    wide = score_dtype(key.dtype)
    key, value = (_checks.zero_masked(x, key_mask).astype(wide) for x in (key, value))
    made = {leaf: jnp.asarray(params[leaf]).astype(wide) for leaf in layout}
    return (query.astype(wide), key, value), made


def _token(
    name: str,
    layout: Mapping[str, str],
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    params: Params,
    key_mask: jax.Array | None,
    memory: jax.Array,
    *,
    more: int = 0,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]:
    """`_prepared` for one token, [H], [H] and [V], in the dtype of the memory.

    The memory is [H, V + more].
    """
    query, key, value = arrays
    real = None if key_mask is None else key_mask[None]
    rows, wide = _prepared(
        name, layout, (query[None], key[None], value[None]), params, real
    )
    sizes = {"H": key.shape[0], "V": value.shape[0] + more}
    _checks.check_shape("state.memory", memory, ("H", "V"), sizes)
    query, key, value = (x[0].astype(memory.dtype) for x in rows)
    wide = {leaf: x.astype(memory.dtype) for leaf, x in wide.items()}
    return (query, key, value), wide


class Memory(NamedTuple):
    """What `ssd`, `gated_linear` and `delta_net` remember of all tokens so far.

    Attributes:
      memory: [H, V].
    """

    memory: jax.Array


def _empty(head_dim: int, value_dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """An empty memory [H, V], float32 or wider."""
    _checks.check_sizes(head_dim=head_dim, value_dim=value_dim)
    return jnp.zeros((head_dim, value_dim), score_dtype(jnp.dtype(dtype)))


def _gate(params: Params, key: jax.Array) -> jax.Array:
    """Logits of a gate for keys [..., H]: [...], or [..., H] where each row has one."""
    logits = key @ params["gate"]
    logits = logits + jnp.broadcast_to(params["gate_bias"], logits.shape)
    return logits.clip(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def _gate_init(rng: jax.Array, head_dim: int, dtype: jnp.dtype) -> jax.Array:
    """Weights of a gate [H], normal with variance 1/H."""
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    return head_dim**-0.5 * jax.random.normal(rng, (head_dim,), dtype)


# ------------------------------------------------------------------------- retention

_RETENTION = {"exponent": ""}


class RetentionState(NamedTuple):
    """What `retention` remembers of all tokens so far.

    Attributes:
      memory: [H, V + 1], Σ γ^(t−s) k_s [v_s; 1]ᵀ.
      weight: [], Σ γ^(t−s).
    """

    memory: jax.Array
    weight: jax.Array


def retention_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """How long one head remembers: γ = 1 − 2^−exponent.

    Returns:
      {"exponent": []}, drawn evenly from 5 to 12, where the eight heads of the paper
      have 5, 6, ..., 12. It is a parameter like others; the paper keeps it as it is.

    >>> 5 <= retention_init(jax.random.key(0), 4)["exponent"] <= 12
    Array(True, dtype=bool)
    """
    _checks.check_int("head_dim", head_dim, 1)
    return {"exponent": jax.random.uniform(rng, (), dtype, 5.0, 12.0)}


def _log_decay(params: Params) -> jax.Array:
    """Log γ, []."""
    exponent = params["exponent"].clip(_LEAST_EXPONENT)
    return jnp.log1p(-jnp.exp2(-exponent))


def _retained(product: jax.Array, weight: jax.Array) -> jax.Array:
    """Scores over √weight, and over their sum where that is beyond ±1: [..., V]."""
    product = product / jnp.sqrt(weight)[..., None]
    return product[..., :-1] / jnp.maximum(jnp.abs(product[..., -1:]), 1.0)


def retention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """Retention: linear attention that forgets at the head's own rate.

    o_t = Σ_{s ≤ t} w[t, s] v_s / max(|Σ_s w[t, s]|, 1),
    w[t, s] = γ^(t−s) (q_t·k_s / √H) / √(Σ_{s ≤ t} γ^(t−s))

    The divisions are the paper's normalisation of scores; its rotation of queries and
    keys is RoPE, and its normalisation of the heads' outputs is the layer's. For γ → 1
    all keys so far count alike. t − s counts real tokens: padding leaves the memory as
    it is. There is no `is_causal`: query t sees keys s ≤ t, in every call.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"exponent": []}, as made by `retention_init`.
      chunk_size: tokens in a chunk; see `causal_product`.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, or a `chunk_size` below 1.

    Reference: Sun et al., 2023, arXiv:2307.08621, section 2.

    >>> x, value = jnp.ones((2, 1)), jnp.array([[0.0], [4.0]])
    >>> out = retention(x, x, value, params={"exponent": jnp.float32(1)})  # γ = 1/2
    >>> jnp.round(3 * out).tolist()
    [[0.0], [8.0]]
    """
    (query, key, wide), given = _prepared(
        "retention", _RETENTION, (query, key, value), params, key_mask
    )
    fades = jnp.broadcast_to(_log_decay(given), key.shape[:1])
    real = jnp.ones_like(fades)
    fades, real = (_checks.zero_masked(x, key_mask) for x in (fades, real))
    product = causal_product(
        query * query.shape[1] ** -0.5,
        key,
        with_ones(wide, key_mask),
        chunk_size=chunk_size,
        log_decay=fades,
    )
    # Σ γ^j over the j < n real tokens so far.
    log_decay = _log_decay(given)
    weight = jnp.expm1(jnp.cumsum(real) * log_decay) / jnp.expm1(log_decay)
    weight = jnp.where(weight > 0, weight, 1.0)
    return _retained(product, weight).astype(value.dtype)


def retention_init_state(
    head_dim: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> RetentionState:
    """The state of `retention_step` before the first token, float32 or wider.

    >>> retention_init_state(4, 3).memory.shape
    (4, 4)
    """
    memory = _empty(head_dim, value_dim + 1, dtype)
    return RetentionState(memory, jnp.zeros((), memory.dtype))


def retention_step(
    state: RetentionState,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
) -> tuple[RetentionState, jax.Array]:
    """One token of `retention`: M ← γ M + k [v; 1]ᵀ, n ← γ n + 1.

    Args:
      state: of all tokens before; `retention_init_state` makes the first.
      query, key, value: [H], [H], [V]; key_mask: bool [] or None; params: as there.

    Returns:
      The new state, and the output [V] in the dtype of the value.

    >>> state, x = retention_init_state(1, 1), jnp.ones(1)
    >>> params = {"exponent": jnp.float32(1)}
    >>> state, _ = retention_step(state, x, x, 0 * x, params=params)
    >>> jnp.round(3 * retention_step(state, x, x, 4 * x, params=params)[1]).tolist()
    [8.0]
    """
    arrays = (query, key, value)
    (query, key, wide), given = _token(
        "retention", _RETENTION, arrays, params, key_mask, state.memory, more=1
    )
    real = jnp.ones((), key.dtype) if key_mask is None else key_mask.astype(key.dtype)
    kept = jnp.exp(real * _log_decay(given))
    joined = jnp.concatenate([wide, jnp.ones(1, wide.dtype)])
    memory = kept * state.memory + key[:, None] * joined[None, :]
    weight = kept * state.weight + real
    product = (query * query.shape[0] ** -0.5) @ memory
    out = _retained(product, jnp.where(weight > 0, weight, 1.0))
    return RetentionState(memory, weight), out.astype(value.dtype)


# ------------------------------------------------------------------------------- ssd

_SSD = {"gate": "H", "gate_bias": "", "log_rate": ""}


def ssd_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Step sizes and the rate of decay of one head.

    Returns:
      {"gate": [H], "gate_bias": [], "log_rate": []}: normal with variance 1/H; such
      that a step Δ begins between .001 and .1, evenly in its logarithm; the logarithm
      of a rate that is drawn evenly from 1 to 16, as in Mamba-2.

    >>> sorted(ssd_init(jax.random.key(0), 4))
    ['gate', 'gate_bias', 'log_rate']
    """
    one, two, three = jax.random.split(rng, 3)
    low, high = math.log(1e-3), math.log(1e-1)
    step = jnp.exp(jax.random.uniform(two, (), dtype, low, high))
    return {
        "gate": _gate_init(one, head_dim, dtype),
        "gate_bias": jnp.log(jnp.expm1(step)),  # softplus gives the step
        "log_rate": jnp.log(jax.random.uniform(three, (), dtype, 1.0, 16.0)),
    }


def _ssd_steps(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Δ and log decay of keys [..., H], [...] each."""
    step = jax.nn.softplus(_gate(params, key))
    return step, -jnp.exp(params["log_rate"]) * step


def ssd(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
    chunk_size: int = 128,
) -> jax.Array:
    """State-space duality: the layer of Mamba-2 as linear attention with a scalar gate.

    M_t = exp(−A Δ_t) M_{t−1} + Δ_t k_t v_tᵀ,  o_t = M_tᵀ q_t,
    Δ_t = softplus(w·k_t + b), A = exp(log_rate)

    In Mamba-2 q, k, v are called C, B, X. Its skip, convolution and gated normalisation
    are the layer's. For A = 0 nothing is forgotten: unnormalised linear attention with
    weights Δ. Padding leaves the memory as it is. There is no `is_causal`: query t sees
    keys s ≤ t, in every call.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"gate": [H], "gate_bias": [], "log_rate": []}, as made by `ssd_init`.
      chunk_size: tokens in a chunk; see `causal_product`.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, or a `chunk_size` below 1.

    Reference: Dao and Gu, 2024, arXiv:2405.21060, sections 3 and 6.

    >>> gate = {"gate": jnp.zeros(1), "gate_bias": jnp.log(jnp.expm1(1.0))}  # Δ = 1
    >>> params = gate | {"log_rate": jnp.log(jnp.log(2.0))}
    >>> x, value = jnp.ones((2, 1)), jnp.array([[4.0], [1.0]])
    >>> jnp.round(ssd(x, x, value, params=params)).tolist()
    [[4.0], [3.0]]
    """
    (query, key, wide), given = _prepared(
        "ssd", _SSD, (query, key, value), params, key_mask
    )
    step, fades = _ssd_steps(given, key)
    step, fades = (_checks.zero_masked(x, key_mask) for x in (step, fades))
    out = causal_product(
        query, step[:, None] * key, wide, chunk_size=chunk_size, log_decay=fades
    )
    return out.astype(value.dtype)


def ssd_init_state(
    head_dim: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Memory:
    """The state of `ssd_step` before the first token, float32 or wider.

    >>> ssd_init_state(4, 3).memory.shape
    (4, 3)
    """
    return Memory(_empty(head_dim, value_dim, dtype))


def ssd_step(
    state: Memory,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
) -> tuple[Memory, jax.Array]:
    """One token of `ssd`.

    Args:
      state: of all tokens before; `ssd_init_state` makes the first.
      query, key, value: [H], [H], [V]; key_mask: bool [] or None; params: as there.

    Returns:
      The new state, and the output [V] in the dtype of the value.

    >>> x, params = jnp.ones(2), ssd_init(jax.random.key(0), 2)
    >>> ssd_step(ssd_init_state(2, 2), x, x, 0 * x, params=params)[1].tolist()
    [0.0, 0.0]
    """
    (query, key, wide), given = _token(
        "ssd", _SSD, (query, key, value), params, key_mask, state.memory
    )
    step, fades = _ssd_steps(given, key)
    if key_mask is not None:
        step, fades = (jnp.where(key_mask, x, 0.0) for x in (step, fades))
    memory = jnp.exp(fades) * state.memory + step * key[:, None] * wide[None, :]
    return Memory(memory), (query @ memory).astype(value.dtype)


# ---------------------------------------------------------------------- gated_linear

_GATED = {"gate": "HH", "gate_bias": "H"}


def gated_linear_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """Gates of one head.

    Returns:
      {"gate": [H, H], "gate_bias": [H]}: normal with variance 1/H, and zeros, so that
      gates begin near ½^(1/16) = .96.

    >>> gated_linear_init(jax.random.key(0), 4)["gate"].shape
    (4, 4)
    """
    head_dim = _checks.check_int("head_dim", head_dim, 1)
    gate = head_dim**-0.5 * jax.random.normal(rng, (head_dim, head_dim), dtype)
    return {"gate": gate, "gate_bias": jnp.zeros(head_dim, dtype)}


def gated_linear(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
    chunk_size: int = 32,
) -> jax.Array:
    """Gated linear attention: each row of the memory has a gate that reads the token.

    M_t = diag(α_t) M_{t−1} + k_t v_tᵀ,  o_t = M_tᵀ q_t / √H,
    α_t = sigmoid(Wᵀ k_t + b)^(1/16)

    The map of the gate is whole, where the paper's has rank 16. With b → ∞, up to
    sigmoid(30), it is unnormalised linear attention. Padding leaves the memory as it
    is. There is no `is_causal`: query t sees keys s ≤ t, in every call.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"gate": [H, H], "gate_bias": [H]}, as made by `gated_linear_init`.
      chunk_size: tokens in a chunk, at most 32: gates of a chunk are multiplied up, and
        divided by one another.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, or a bad `chunk_size`.

    Reference: Yang et al., 2023, arXiv:2312.06635, section 4.

    >>> params = {"gate": jnp.zeros((1, 1)), "gate_bias": jnp.full(1, 30.0)}
    >>> x, value = jnp.ones((2, 1)), jnp.array([[4.0], [1.0]])
    >>> gated_linear(x, x, value, params=params).round().tolist()
    [[4.0], [5.0]]
    """
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    if chunk_size > _LONGEST_CHUNK:
        raise ValueError(
            f"`chunk_size` must be at most {_LONGEST_CHUNK}, since the gates of a "
            f"chunk are multiplied up, but is {chunk_size}."
        )
    (query, key, wide), given = _prepared(
        "gated_linear", _GATED, (query, key, value), params, key_mask
    )
    fades = jax.nn.log_sigmoid(_gate(given, key)) / _ROOT
    fades = _checks.zero_masked(fades, key_mask)
    length = len(query)
    chunk = min(chunk_size, max(length, 1))
    query, key, wide, fades = (
        _tiles.cut(x, chunk, 0.0, blocks=-(-length // chunk))
        for x in (query * query.shape[1] ** -0.5, key, wide, fades)
    )  # [C, c, ...]
    total = jnp.cumsum(fades, axis=1)
    faded = query * jnp.exp(total)
    scores = jnp.einsum("cth,csh->cts", faded, key * jnp.exp(-total))
    past = jnp.asarray(np.tri(chunk, dtype=bool))[None]
    scores = jnp.where(past, scores, 0.0)
    added = jnp.einsum("csh,csv->chv", key * jnp.exp(total[:, -1:] - total), wide)
    kept = jnp.exp(total[:, -1])
    empty = jnp.zeros(added.shape[1:], added.dtype)

    def turn(
        memory: jax.Array, new: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        kept, added = new
        return kept[:, None] * memory + added, memory

    empty = _checks.varying(empty, (added, kept))
    _, memories = jax.lax.scan(turn, empty, (kept, added))
    out = jnp.einsum("cts,csv->ctv", scores, wide)
    out = out + jnp.einsum("cth,chv->ctv", faded, memories)
    return out.reshape(-1, value.shape[1])[:length].astype(value.dtype)


def gated_linear_init_state(
    head_dim: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Memory:
    """The state of `gated_linear_step` before the first token, float32 or wider.

    >>> gated_linear_init_state(4, 3).memory.shape
    (4, 3)
    """
    return Memory(_empty(head_dim, value_dim, dtype))


def gated_linear_step(
    state: Memory,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
) -> tuple[Memory, jax.Array]:
    """One token of `gated_linear`.

    Args:
      state: of all tokens before; `gated_linear_init_state` makes the first.
      query, key, value: [H], [H], [V]; key_mask: bool [] or None; params: as there.

    Returns:
      The new state, and the output [V] in the dtype of the value.

    >>> x, params = jnp.ones(2), gated_linear_init(jax.random.key(0), 2)
    >>> state = gated_linear_init_state(2, 2)
    >>> gated_linear_step(state, x, x, 0 * x, params=params)[1].tolist()
    [0.0, 0.0]
    """
    (query, key, wide), given = _token(
        "gated_linear", _GATED, (query, key, value), params, key_mask, state.memory
    )
    fades = jax.nn.log_sigmoid(_gate(given, key)) / _ROOT
    if key_mask is not None:
        fades = jnp.where(key_mask, fades, 0.0)
    memory = jnp.exp(fades)[:, None] * state.memory + key[:, None] * wide[None, :]
    out = (query * query.shape[0] ** -0.5) @ memory
    return Memory(memory), out.astype(value.dtype)


# ------------------------------------------------------------------------- delta_net

_DELTA = {"gate": "H", "gate_bias": ""}


def delta_net_init(
    rng: jax.Array, head_dim: int, *, dtype: jnp.dtype = jnp.float32
) -> dict[str, jax.Array]:
    """How strongly one head corrects what it remembers.

    Returns:
      {"gate": [H], "gate_bias": []}: normal with variance 1/H, and zero, so that β
      begins near one half.

    >>> delta_net_init(jax.random.key(0), 4)["gate"].shape
    (4,)
    """
    return {"gate": _gate_init(rng, head_dim, dtype), "gate_bias": jnp.zeros((), dtype)}


def _unit(x: jax.Array) -> jax.Array:
    """Rows [..., H] of length one, or shorter where they are near zero."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _LEAST_NORM**2))


def delta_net(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
    chunk_size: int = 64,
) -> jax.Array:
    """The delta rule: what is remembered of a key is replaced, not added to.

    M_t = M_{t−1} + β_t k̂_t (v_t − M_{t−1}ᵀ k̂_t)ᵀ,  o_t = M_tᵀ q̂_t,
    β_t = sigmoid(w·k_t + b), where q̂ and k̂ have length one

    It is a step of gradient descent on ‖Mᵀ k̂_t − v_t‖²/2 at the rate β. With β = 1 the
    memory answers k̂_t with v_t, whatever it said before; while keys are orthogonal it
    is unnormalised linear attention with weights β. Padding leaves the memory as it is.
    There is no `is_causal`: query t sees keys s ≤ t, in every call.

    In a chunk the corrections u solve a triangular system, (I + L) u = β (v − M₀ᵀ k̂),
    L[t, s] = β_t k̂_t·k̂_s for s < t: the paper's WY form.

    Args:
      query, key, value: [T, H], [T, H], [T, V]; others: see `attn_jax.attention`.
      params: {"gate": [H], "gate_bias": []}, as made by `delta_net_init`.
      chunk_size: tokens in a chunk.

    Raises:
      ValueError: on wrong shapes or parameters, T ≠ S, or a `chunk_size` below 1.

    Reference: Yang et al., 2024, arXiv:2406.06484; Schlag et al., 2021,
    arXiv:2102.11174.

    >>> params = {"gate": jnp.zeros(1), "gate_bias": jnp.float32(30)}  # β = 1
    >>> x, value = jnp.ones((2, 1)), jnp.array([[4.0], [1.0]])
    >>> delta_net(x, x, value, params=params).round().tolist()
    [[4.0], [1.0]]
    """
    chunk_size = _checks.check_int("chunk_size", chunk_size, 1)
    (query, key, wide), given = _prepared(
        "delta_net", _DELTA, (query, key, value), params, key_mask
    )
    rate = _checks.zero_masked(jax.nn.sigmoid(_gate(given, key)), key_mask)
    length = len(query)
    chunk = min(chunk_size, max(length, 1))
    query, key, wide, rate = (
        _tiles.cut(x, chunk, 0.0, blocks=-(-length // chunk))
        for x in (_unit(query), _unit(key), wide, rate)
    )  # [C, c, ...]
    before = jnp.asarray(np.tri(chunk, k=-1, dtype=bool))[None]
    past = jnp.asarray(np.tri(chunk, dtype=bool))[None]
    pairs = jnp.einsum("cth,csh->cts", key, key)
    lower = jnp.where(before, rate[:, :, None] * pairs, 0.0)
    lower = lower + jnp.eye(chunk, dtype=lower.dtype)[None]
    right = rate[:, :, None] * jnp.concatenate([wide, key], axis=2)
    solved = jax.lax.linalg.triangular_solve(
        lower, right, left_side=True, lower=True, unit_diagonal=True
    )
    of_value, of_key = jnp.split(solved, [wide.shape[2]], axis=2)
    scores = jnp.where(past, jnp.einsum("cth,csh->cts", query, key), 0.0)
    empty = jnp.zeros((key.shape[2], wide.shape[2]), key.dtype)

    def turn(
        memory: jax.Array, chunk: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array]:
        query, key, of_value, of_key, scores = chunk
        correction = of_value - of_key @ memory
        out = scores @ correction + query @ memory
        return memory + key.T @ correction, out

    chunks = (query, key, of_value, of_key, scores)
    _, out = jax.lax.scan(turn, _checks.varying(empty, chunks), chunks)
    return out.reshape(-1, value.shape[1])[:length].astype(value.dtype)


def delta_net_init_state(
    head_dim: int, value_dim: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> Memory:
    """The state of `delta_net_step` before the first token, float32 or wider.

    >>> delta_net_init_state(4, 3).memory.shape
    (4, 3)
    """
    return Memory(_empty(head_dim, value_dim, dtype))


def delta_net_step(
    state: Memory,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    params: Params,
    key_mask: jax.Array | None = None,
) -> tuple[Memory, jax.Array]:
    """One token of `delta_net`.

    Args:
      state: of all tokens before; `delta_net_init_state` makes the first.
      query, key, value: [H], [H], [V]; key_mask: bool [] or None; params: as there.

    Returns:
      The new state, and the output [V] in the dtype of the value.

    >>> x, params = jnp.ones(1), {"gate": jnp.zeros(1), "gate_bias": jnp.float32(30)}
    >>> state = delta_net_init_state(1, 1)
    >>> state, _ = delta_net_step(state, x, x, 4 * x, params=params)
    >>> delta_net_step(state, x, x, x, params=params)[1].round().tolist()
    [1.0]
    """
    (query, key, wide), given = _token(
        "delta_net", _DELTA, (query, key, value), params, key_mask, state.memory
    )
    rate = jax.nn.sigmoid(_gate(given, key))
    if key_mask is not None:
        rate = jnp.where(key_mask, rate, 0.0)
    key = _unit(key)
    correction = rate * (wide - key @ state.memory)
    memory = state.memory + key[:, None] * correction[None, :]
    return Memory(memory), (_unit(query) @ memory).astype(value.dtype)
