"""FLOATER: codes of positions that follow a learned flow; see `attn_jax.positions`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype

__all__ = ["floater", "floater_init"]


def floater_init(
    rng: jax.Array,
    dim: int,
    *,
    hidden_dim: int | None = None,
    scale: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, jax.Array]:
    """Parameters of `floater`: a flow that stands still, or nearly so, and p(0) = 0.

    Kernels are drawn as Xavier normal, the last one times `scale`; biases are zero.

    Args:
      rng: a JAX random key.
      dim: size D of a position's code.
      hidden_dim: size F of the hidden layer; None means D.
      scale: 0 starts from no position information, p ≡ 0, which yet has a gradient:
        the form in which a trained model gets FLOATER without a change. 1 is what the
        authors' code draws.
      dtype: dtype of the parameters.

    Returns:
      {"state": [D, F], "time": [F], "bias": [F], "out": [F, D], "out_time": [D],
      "out_bias": [D], "start": [D]}; all but the last are θ.

    Raises:
      ValueError: if a size is not positive or `scale` is negative.
      TypeError: if a size is no int.

    Reference: Liu et al., 2020, arXiv:2003.09229.

    >>> floater_init(jax.random.key(0), 4, hidden_dim=6)["state"].shape
    (4, 6)
    """
    dim = _checks.check_int("dim", dim, 1)
    hidden_dim = (
        dim if hidden_dim is None else _checks.check_int("hidden_dim", hidden_dim, 1)
    )
    if scale < 0:
        raise ValueError(f"`scale` must be at least 0, but is {scale}.")
    rng_in, rng_out = jax.random.split(rng)
    deviation = (2 / (dim + 1 + hidden_dim)) ** 0.5
    kernel = jax.random.normal(rng_in, (dim + 1, hidden_dim), dtype)
    kernel = jnp.asarray(deviation, dtype) * kernel
    out = jax.random.normal(rng_out, (hidden_dim + 1, dim), dtype)
    out = jnp.asarray(scale * deviation, dtype) * out
    return {
        "state": kernel[:dim],
        "time": kernel[dim],
        "bias": jnp.zeros(hidden_dim, dtype),
        "out": out[:hidden_dim],
        "out_time": out[hidden_dim],
        "out_bias": jnp.zeros(dim, dtype),
        "start": jnp.zeros(dim, dtype),
    }


# What diffrax calls them; orders 2, 3, 4 and 5.
_SOLVERS = {"heun": "Heun", "bosh3": "Bosh3", "rk4": "", "tsit5": "Tsit5"}


@functools.cache
def _method(solver: str) -> Any:
    """A solver of diffrax, which has not the classical one of order 4."""
    import diffrax

    if solver != "rk4":
        return getattr(diffrax, _SOLVERS[solver])()

    class RungeKutta4(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([1 / 2, 1 / 2, 1]),
            b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
            b_error=np.zeros(4),
            a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0, 0, 1.0])),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    return RungeKutta4()


def floater(
    params: Mapping[str, jax.Array],
    num_positions: int,
    *,
    step: float = 0.1,
    start: jax.Array | None = None,
    adjoint: Literal["direct", "adjoint"] = "direct",
    activation: Literal["tanh", "relu"] = "tanh",
    solver: Literal["heun", "bosh3", "rk4", "tsit5"] = "heun",
    steps_per_position: int = 1,
) -> jax.Array:
    """A learned code of positions that follow a flow, for sequences of any length.

    P[t] = p(t · Δt),  p(τ) = p(0) + ∫₀^τ h(s, p(s); θ) ds,
    h(s, p; θ) = W_out φ(W_state p + w_time s + b) + u_time s + b_out + ω × p

    The first codes are the same however many follow. Equal to no code where the last
    layer, ω and p(0) are zero. Needs the package `diffrax`.

    Args:
      params: θ and p(0), by `floater_init`. Without "time" and "out_time" the flow is
        autonomous. "rates", ω [D/2], turn each pair of p, in radians a unit of time,
        as the sinusoidal table turns.
      num_positions: number of positions T.
      step: Δt, the time between two positions.
      start: `[..., D]`, other values of p(0), which share θ; None means
        `params["start"]`.
      adjoint: how gradients are made: "direct" differentiates the solver's steps and
        is exact for them; "adjoint" solves the adjoint equation backwards, as in the
        paper, and is exact up to the solver's error.
      activation: φ; the paper's code has "relu", under which a flow may grow
        exponentially beyond the lengths of training; under "tanh" h is bounded.
      solver: a Runge-Kutta method of order 2, 3, 4 or 5, with 2, 3, 4 or 6 evaluations
        of h a step.
      steps_per_position: the solver's steps from one position to the next.

    Returns:
      `[..., T, D]`, in the dtype of the parameters.

    Raises:
      ImportError: if `diffrax` is not installed.
      TypeError: if a size is no int, or `start` not of the parameters' dtype.
      ValueError: on an unknown name, a size or `step` that is not positive, or a wrong
        shape.

    Reference: Liu et al., 2020, arXiv:2003.09229, section 3.

    >>> params = floater_init(jax.random.key(0), 4)
    >>> floater(params | {"out_bias": jnp.ones(4)}, 3, step=0.5)[:, 0].tolist()
    [0.0, 0.5, 1.0]
    """
    num_positions = _checks.check_int("num_positions", num_positions, 1)
    steps_per_position = _checks.check_int("steps_per_position", steps_per_position, 1)
    _checks.check_positive("step", step)
    _checks.check_choice("adjoint", adjoint, ("direct", "adjoint"))
    _checks.check_choice("activation", activation, ("tanh", "relu"))
    _checks.check_choice("solver", solver, tuple(_SOLVERS))
    dim, dtype = params["start"].shape[-1], params["state"].dtype
    wide = score_dtype(dtype)
    start = params["start"] if start is None else jnp.asarray(start)
    if start.ndim < 1 or start.shape[-1] != dim:
        raise ValueError(
            f"`start` must be [..., D] with D={dim}, but has shape {start.shape}."
        )
    if start.dtype != dtype:
        raise TypeError(
            f"`start` must be {dtype}, as `params` are, but is {start.dtype}."
        )
    if num_positions == 1:
        return start[..., None, :]
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(
            "floater solves its equation with the package diffrax, which is not "
            "installed: `pip install diffrax`"
        ) from error
    act = jnp.tanh if activation == "tanh" else jax.nn.relu

    # A unit of time is a position here, so that the solver meets each one exactly.
    def flow(time: Any, state: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
        now, known = jnp.asarray(step * time, wide), params["bias"]
        if "time" in params:
            known = params["time"] * now + known
        hidden = act(state @ params["state"] + known[None])
        also = params["out_bias"]
        if "out_time" in params:
            also = params["out_time"] * now + also
        slope = hidden @ params["out"] + also[None]
        if "rates" in params:
            sine, cosine = state[:, ::2], state[:, 1::2]
            turned = (
                jnp.stack([cosine, -sine], axis=-1) * params["rates"][None, :, None]
            )
            slope = slope + turned.reshape(state.shape)
        return step * slope

    # A code is a long sum of small steps, and far times are large: no narrow dtype.
    first = start.reshape(-1, dim).astype(wide)
    theta = {n: leaf.astype(wide) for n, leaf in params.items() if n != "start"}
    term, method = diffrax.ODETerm(flow), _method(solver)
    steps = (num_positions - 1) * steps_per_position
    if adjoint == "direct":
        # The number of steps is known, so a scan will do: it compiles in a third of
        # the time of `diffeqsolve`, and has derivatives of all modes.
        ends = jnp.arange(steps + 1, dtype=wide) / steps_per_position

        def advance(carry: Any, times: tuple[jax.Array, jax.Array]) -> Any:
            state, memory = carry
            state, _, _, memory, _ = method.step(
                term, *times, state, theta, memory, made_jump=False
            )
            return (state, memory), state

        memory = method.init(term, ends[0], ends[1], first, theta)
        carry = _checks.varying((first, memory), first, theta)
        _, later = jax.lax.scan(advance, carry, (ends[:-1], ends[1:]))
        codes = jnp.concatenate(
            [first[None], later[steps_per_position - 1 :: steps_per_position]]
        )
    else:
        later_times = jnp.arange(1, num_positions, dtype=wide)
        solution = diffrax.diffeqsolve(
            term,
            method,
            t0=0.0,
            t1=float(num_positions - 1),
            dt0=1.0 / steps_per_position,
            y0=first,
            args=theta,
            saveat=diffrax.SaveAt(t0=True, ts=later_times),
            adjoint=diffrax.BacksolveAdjoint(solver=method),
            # Steps that are no binary fraction may need one more to a position.
            max_steps=steps + num_positions,
            throw=False,
        )
        assert solution.ys is not None
        codes = solution.ys
    codes = jnp.moveaxis(codes, 0, 1)  # [starts, T, D]
    return codes.astype(dtype).reshape(*start.shape[:-1], num_positions, dim)
