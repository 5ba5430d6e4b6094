"""A diagonal state space: its three forms are one, and it is the paper's equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.nn import (
    state_space,
    state_space_init,
    state_space_init_state,
    state_space_kernel,
    state_space_step,
)

LENGTH, DIM, STATE = 11, 3, 8


@pytest.fixture
def params():
    return state_space_init(jax.random.key(1), DIM, STATE, slowest=1e-2, fastest=0.5)


def expected(x, params):
    """The recurrence in float64, channel by channel and step by step."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    y = np.zeros(x.shape)
    for d in range(x.shape[1]):
        a = -np.exp(p["decay"][d]) + 1j * p["frequency"][d]
        a_bar = np.exp(np.exp(p["rate"][d]) * a)
        c = p["out"][d, :, 0] + 1j * p["out"][d, :, 1]
        state = np.zeros(len(a), complex)
        for t in range(len(x)):
            state = a_bar * state + (a_bar - 1) / a * x[t, d]
            y[t, d] = 2 * (c * state).real.sum() + p["skip"][d] * x[t, d]
    return y


def test_all_at_once_is_step_by_step_is_the_equation(params):
    x = np.random.default_rng(0).standard_normal((LENGTH, DIM)).astype(np.float32)
    want = expected(x, params)
    whole = jax.jit(state_space)(x, params)
    np.testing.assert_allclose(whole, want, rtol=0, atol=2e-5)
    _, steps = jax.lax.scan(
        lambda s, one: state_space_step(params, s, one),
        state_space_init_state(DIM, STATE),
        x,
    )
    np.testing.assert_allclose(steps, want, rtol=0, atol=2e-5)
    back = state_space(x[::-1], params, reverse=True)
    np.testing.assert_allclose(back[::-1], want, rtol=0, atol=2e-5)


def test_gradients_are_those_of_the_steps(params):
    x = jax.random.normal(jax.random.key(2), (LENGTH, DIM))
    weights = jax.random.normal(jax.random.key(3), (LENGTH, DIM))

    def by_steps(params):
        start = state_space_init_state(DIM, STATE)
        step = lambda s, one: state_space_step(params, s, one)  # noqa: E731
        return (jax.lax.scan(step, start, x)[1] * weights).sum()

    one = jax.jit(jax.grad(lambda p: (state_space(x, p) * weights).sum()))(params)
    two = jax.jit(jax.grad(by_steps))(params)
    for name, leaf in one.items():
        scale = np.abs(leaf).max()
        np.testing.assert_allclose(leaf, two[name], rtol=0, atol=1e-4 * scale)


def test_nothing_of_the_future_is_seen_and_the_past_fades(params):
    slope = jax.jacobian(lambda x: state_space(x, params)[4, 0])(jnp.ones((9, DIM)))
    assert np.abs(slope[5:]).max() < 1e-5 and np.abs(slope[:, 1:]).max() < 1e-5
    kernel = np.abs(state_space_kernel(params, 400))
    assert kernel[:, -1].max() < 0.2 * kernel[:, :20].max()
    assert not np.isnan(kernel).any()


def test_what_does_not_fit_is_told(params):
    with pytest.raises(ValueError, match="`state_dim` must be even"):
        state_space_init(jax.random.key(0), 3, 7)
    with pytest.raises(ValueError, match=r"`x` must be \[T, 3\]"):
        state_space(jnp.ones((4, 2)), params)
    half = state_space(jnp.ones((4, DIM), jnp.bfloat16), params)
    assert half.dtype == jnp.bfloat16
