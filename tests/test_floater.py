from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_jax.positions import floater, floater_init

DIM, HIDDEN, LENGTH = 3, 4, 6
SHAPES = {
    "state": (DIM, HIDDEN),
    "time": (HIDDEN,),
    "bias": (HIDDEN,),
    "out": (HIDDEN, DIM),
    "out_time": (DIM,),
    "out_bias": (DIM,),
    "start": (DIM,),
}


@pytest.fixture(scope="module")
def params(draw):
    return draw(SHAPES)


def by_loops(params, start, length, step, act=np.tanh, substeps=100):
    """The classical Runge-Kutta method in float64 with small steps."""
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}

    def slope(time, code):
        hidden = weights["state"].T @ code + weights["time"] * time + weights["bias"]
        late = weights["out_time"] * time + weights["out_bias"]
        return weights["out"].T @ act(hidden) + late

    small = step / substeps
    codes = [np.asarray(start, np.float64)]
    for t in range(length - 1):
        code = codes[-1]
        for i in range(substeps):
            time = t * step + i * small
            k1 = slope(time, code)
            k2 = slope(time + small / 2, code + small / 2 * k1)
            k3 = slope(time + small / 2, code + small / 2 * k2)
            k4 = slope(time + small, code + small * k3)
            code = code + small / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        codes.append(code)
    return np.stack(codes)


def solve(length=LENGTH, **options):
    """`floater` and the gradients of Σ sin(codes) · t, compiled."""

    def loss(params, start):
        codes = floater(params, length, start=start, **options)
        weight = jnp.arange(length, dtype=jnp.float32)[:, None]
        return jnp.sum(jnp.sin(codes) * jnp.broadcast_to(weight, codes.shape)), codes

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.fixture(scope="module")
def default():
    return solve(step=0.2)


@pytest.fixture(scope="module")
def starts():
    return np.random.default_rng(1).standard_normal((2, DIM), np.float32)


@pytest.fixture(scope="module")
def precise(params, starts):
    """Codes and gradients by short steps."""
    return solve(step=0.2, steps_per_position=32)(params, starts)


def test_codes_solve_the_equation_from_every_start(params, starts, default, precise):
    expected = np.stack([by_loops(params, start, LENGTH, 0.2) for start in starts])
    assert precise[1].shape == (2, LENGTH, DIM)
    np.testing.assert_allclose(precise[1], expected, atol=1e-4)
    # In one step a position, to the order of Heun's method.
    error = np.abs(default(params, starts)[1] - expected).max()
    assert 1e-4 < error < 0.1
    assert np.abs(np.diff(expected, axis=1)).max() > 0.5


def test_halved_steps_other_solver_and_relu(params):
    """A quarter of the error of a method of order 2, where the flow is smooth."""
    calm = {name: 0.3 * leaf for name, leaf in params.items()} | {
        "bias": np.full(HIDDEN, 5.0, np.float32)  # no kink of relu on the way
    }
    expected = by_loops(calm, calm["start"], 4, 0.4, lambda x: np.maximum(x, 0.0))

    @jax.jit
    def codes(params):
        run = functools.partial(floater, params, 4, step=0.4, activation="relu")
        more = [run(solver="tsit5"), run(solver="rk4")]
        return run(), run(steps_per_position=2), *more

    one, two, *best = (np.abs(code - expected).max() for code in codes(calm))
    assert 3.0 < one / two < 5.0
    assert max(best) < 1e-2 * one


def test_the_classical_method_is_of_order_4(params):
    expected = by_loops(params, params["start"], 4, 0.8)

    @jax.jit
    def codes(params):
        run = functools.partial(floater, params, 4, step=0.8, solver="rk4")
        return run(), run(steps_per_position=2), run(adjoint="adjoint")

    one, two, also = codes(params)
    np.testing.assert_allclose(also, one, atol=1e-6)
    one, two = (np.abs(code - expected).max() for code in (one, two))
    assert 10.0 < one / two < 50.0


def test_adjoint_gradients_agree_with_direct_ones(params, starts, precise):
    run = solve(step=0.2, steps_per_position=32, adjoint="adjoint")
    grads, codes = run(params, starts)
    np.testing.assert_allclose(codes, precise[1], atol=1e-5)
    own, expected = jax.tree.leaves(grads), jax.tree.leaves(precise[0])
    for grad, direct in zip(own, expected, strict=True):
        np.testing.assert_allclose(grad, direct, rtol=2e-3, atol=2e-3)
    # Where starts are given, that of the parameters has no part.
    assert not np.any(grads[0]["start"]) and np.abs(grads[1]).min() > 1e-3


def test_gradients_are_slopes(params, starts, default):
    """Of the codes in float32, by central differences along one direction."""
    grads, _ = default(params, starts)
    weight = np.arange(LENGTH)[None, :, None]
    noise = np.random.default_rng(2)
    direction = {
        n: noise.standard_normal(p.shape, np.float32) for n, p in params.items()
    }
    ends = []
    for sign in (1.0, -1.0):
        moved = {
            n: np.float32(p + sign * 1e-2 * direction[n]) for n, p in params.items()
        }
        ends.append(np.sum(np.sin(np.float64(default(moved, starts)[1])) * weight))
    slope = sum(np.sum(grads[0][name] * direction[name]) for name in direction)
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, slope, rtol=1e-2)


def test_first_codes_do_not_depend_on_how_many_follow(params):
    short, long = jax.jit(lambda params: [floater(params, n) for n in (4, 9)])(params)
    np.testing.assert_array_equal(short, long[:4])
    np.testing.assert_array_equal(floater(params, 1), params["start"][None])
    np.testing.assert_array_equal(long[0], params["start"])


def test_it_begins_at_rest_but_can_move(starts, default):
    params = floater_init(jax.random.key(0), DIM, hidden_dim=HIDDEN)
    assert {name: leaf.shape for name, leaf in params.items()} == SHAPES
    rest = np.zeros((2, DIM), np.float32)
    (grads, of_start), codes = default(params, rest)
    np.testing.assert_array_equal(codes, 0.0)
    for grad in (grads["out"], grads["out_bias"], of_start):
        assert np.abs(grad).max() > 0.1
    moving = floater_init(jax.random.key(0), DIM, hidden_dim=HIDDEN, scale=0.01)
    codes = np.asarray(default(moving, rest)[1])
    assert 1e-5 < np.abs(codes).max() < 0.05


def test_wrong_input_is_refused(params, monkeypatch):
    with pytest.raises(ValueError, match="`num_positions` must be at least 1"):
        floater(params, 0)
    with pytest.raises(ValueError, match="`step` must be positive, but is 0"):
        floater(params, 2, step=0.0)
    with pytest.raises(
        ValueError, match="`adjoint` must be 'direct' or 'adjoint', but is"
    ):
        floater(params, 2, adjoint="backsolve")
    with pytest.raises(ValueError, match=r"`start` must be \[..., D\] with D=3, but"):
        floater(params, 2, start=jnp.zeros(4))
    with pytest.raises(TypeError, match="`start` must be float32"):
        floater(params, 2, start=jnp.zeros(3, jnp.bfloat16))
    with pytest.raises(ValueError, match="`scale` must be at least 0"):
        floater_init(jax.random.key(0), 3, scale=-1.0)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="pip install diffrax"):
        floater(params, 2)


def test_a_narrow_dtype_still_counts():
    # A code that goes up by .1 a position: in bfloat16 it would stand still at 32.
    params = floater_init(jax.random.key(0), 1, dtype=jnp.bfloat16)
    params["out_bias"] += jnp.ones((), jnp.bfloat16)
    codes = floater(params, 600)
    assert codes.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        codes[:, 0].astype(jnp.float32), 0.1 * np.arange(600), rtol=2**-8
    )
