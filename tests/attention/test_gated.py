"""Memories that forget: chunks, all pairs and the recurrence are equal."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax import resolve
from attn_jax.attention import gated
from tests import helpers

T, H, V = 21, 4, 3
NAMES = ("retention", "ssd", "gated_linear", "delta_net")
INITS = {name: getattr(gated, f"{name}_init") for name in NAMES}


@pytest.fixture(scope="module")
def arrays(draw):
    return draw({"query": (T, H), "key": (T, H), "value": (T, V)})


def params_of(name):
    """Parameters in float64, with gates that differ from token to token."""
    params = INITS[name](jax.random.key(3), H)
    wide = {leaf: np.asarray(x, np.float64) for leaf, x in params.items()}
    if name == "retention":
        wide["exponent"] = np.float64(1.5)
    if name == "ssd":
        wide["gate_bias"] = np.float64(-0.5)
        wide["log_rate"] = np.float64(-1.0)
    return wide


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_recurrence(name, params, real, query, key, value):
    """The equation, token by token in float64."""
    out, memory, sums, weight = [], np.zeros((H, V)), np.zeros(H), 0.0
    for t in range(T):
        q, k, v = query[t], key[t], value[t]
        if real[t]:
            if name == "retention":
                decay = 1 - 2 ** -params["exponent"]
                memory = decay * memory + np.outer(k, v)
                sums, weight = decay * sums + k, decay * weight + 1
            elif name == "ssd":
                step = np.log1p(np.exp(k @ params["gate"] + params["gate_bias"]))
                fade = np.exp(-np.exp(params["log_rate"]) * step)
                memory = fade * memory + step * np.outer(k, v)
            elif name == "gated_linear":
                gates = sigmoid(k @ params["gate"] + params["gate_bias"]) ** (1 / 16)
                memory = gates[:, None] * memory + np.outer(k, v)
            else:
                rate = sigmoid(k @ params["gate"] + params["gate_bias"])
                k = k / np.linalg.norm(k)
                memory = memory + rate * np.outer(k, v - memory.T @ k)
        if name == "retention":
            root = np.sqrt(H) * np.sqrt(weight if weight else 1.0)
            out.append(memory.T @ q / root / max(abs(sums @ q) / root, 1.0))
        elif name == "delta_net":
            out.append(memory.T @ q / np.linalg.norm(q))
        else:
            out.append(memory.T @ q / (np.sqrt(H) if name == "gated_linear" else 1))
    return np.stack(out)


@pytest.mark.parametrize("chunk_size", [1, 4, 32])
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_recurrence_forward_and_slopes(name, chunk_size, arrays):
    params = params_of(name)
    real = np.arange(T) % 5 != 3
    real[:2] = False
    narrow = {leaf: jnp.asarray(x, jnp.float32) for leaf, x in params.items()}
    ours = functools.partial(
        resolve(name).fn, params=narrow, key_mask=jnp.asarray(real),
        chunk_size=chunk_size,
    )  # fmt: skip
    exact = functools.partial(by_recurrence, name, params, real)
    helpers.agree(ours, exact, arrays, atol=2e-5)


@pytest.mark.parametrize("name", ["retention", "ssd", "gated_linear"])
def test_equals_all_pairs(name, arrays):
    """O = (Q Kᵀ ∘ D) V, with the decay between each two tokens written out."""
    params = params_of(name)
    query, key, value = (np.asarray(arrays[n], np.float64) for n in arrays)
    if name == "retention":
        logs = np.full((T, H), np.log(1 - 2 ** -params["exponent"]))
    elif name == "ssd":
        step = np.log1p(np.exp(key @ params["gate"] + params["gate_bias"]))
        logs = np.repeat((-np.exp(params["log_rate"]) * step)[:, None], H, axis=1)
    else:
        logs = np.log(sigmoid(key @ params["gate"] + params["gate_bias"])) / 16
    total = np.cumsum(logs, axis=0)
    decay = np.exp(total[:, None] - total[None])  # [T, S, H]
    pairs = np.tri(T) * np.einsum("th,sh,tsh->ts", query, key, decay)
    if name == "ssd":
        pairs = pairs * step[None]
    else:
        pairs = pairs / np.sqrt(H)
    if name == "retention":
        weight = (np.tri(T)[:, :, None] * decay)[..., 0].sum(axis=1)
        pairs = pairs / np.sqrt(weight)[:, None]
        pairs = pairs / np.maximum(np.abs(pairs.sum(axis=1)), 1.0)[:, None]
    narrow = {leaf: jnp.asarray(x, jnp.float32) for leaf, x in params.items()}
    ours = resolve(name).fn(**arrays, params=narrow, chunk_size=8)
    np.testing.assert_allclose(ours, pairs @ value, atol=2e-5)


def test_the_delta_rule_recalls_what_was_written_last():
    """Orthogonal keys with β = 1 are a table: reading gives the last value."""
    params = {"gate": jnp.zeros(4), "gate_bias": jnp.float32(30.0)}
    key = jnp.eye(4)[jnp.array([0, 1, 0, 2, 1, 3])]
    value = jnp.arange(6.0)[:, None]
    query = 3.0 * jnp.eye(4)[jnp.array([0, 0, 0, 1, 1, 0])]
    out = gated.delta_net(query, key, value, params=params, chunk_size=2)
    np.testing.assert_allclose(out[:, 0], [0, 0, 2, 1, 4, 2], atol=1e-5)
    # Linear attention would give sums: here what was there before is gone.


def test_long_chunks_of_closing_gates_stay_in_range():
    """Gates at their least, in the longest chunk: no overflow, and no gradient lost."""
    length, limit = 200, gated._LONGEST_CHUNK
    x = jnp.asarray(np.random.default_rng(0).normal(size=(length, H)), jnp.float32)
    params = {"gate": jnp.zeros((H, H)), "gate_bias": jnp.full(H, -100.0)}

    def loss(x, params):
        return jnp.sum(gated.gated_linear(x, x, x, params=params, chunk_size=limit))

    grads = jax.grad(loss, (0, 1))(x, params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    few = gated.gated_linear(x, x, x, params=params, chunk_size=3)
    many = gated.gated_linear(x, x, x, params=params, chunk_size=limit)
    np.testing.assert_allclose(few, many, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`chunk_size` must be at most 32.*but is 33"):
        gated.gated_linear(x, x, x, params=params, chunk_size=limit + 1)


def test_initial_parameters_are_those_of_the_papers():
    keys = jax.random.split(jax.random.key(0), 2_000)
    many = {name: jax.vmap(lambda k, i=i: i(k, 8))(keys) for name, i in INITS.items()}
    exponent = many["retention"]["exponent"]
    assert 5 <= exponent.min() < 5.1 and 11.9 < exponent.max() <= 12
    step = jax.nn.softplus(many["ssd"]["gate_bias"])
    np.testing.assert_allclose([step.min(), step.max()], [1e-3, 1e-1], rtol=0.03)
    rate = jnp.exp(many["ssd"]["log_rate"])
    assert 1 <= rate.min() < 1.1 and 15.9 < rate.max() <= 16.01
    np.testing.assert_allclose(many["gated_linear"]["gate"].std(), 8**-0.5, rtol=0.02)
    assert not many["delta_net"]["gate_bias"].any()


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments_are_named(name, arrays):
    fn, params = resolve(name).fn, INITS[name](jax.random.key(0), H)
    with pytest.raises(ValueError, match=f"`{name}` needs as many keys as queries"):
        fn(arrays["query"][:5], arrays["key"], arrays["value"], params=params)
    with pytest.raises((ValueError, TypeError), match="params"):
        fn(**arrays, params={})
    step = getattr(gated, f"{name}_step")
    state = getattr(gated, f"{name}_init_state")(H, V + 1)
    token = {n: x[0] for n, x in arrays.items()}
    with pytest.raises(ValueError, match="state.memory"):
        step(state, **token, params=params)
