"""A diagonal state space, S4D: a long convolution that is also a recurrence.

Each channel passes through N/2 oscillators that decay,

    s_t = Ā s_{t−1} + B̄ x_t,    y_t = 2 Re(C · s_t) + D x_t,

with Ā = exp(Δ A) and B̄ = (Ā − 1) / A for a diagonal A. Step by step that is
`state_space_step`; over a whole sequence it is a convolution with the kernel
K_t = 2 Re(C Ā^t B̄), `state_space`, in T log T. No attention: it stands beside the
variants as what leads them on Long Range Arena.

Reference: Gu et al., On the Parameterization and Initialization of Diagonal State Space
Models, arXiv:2206.11893; S4D-Lin, A_n = −1/2 + iπn, by zero-order hold.

Letters: T length, D channels, N size of a channel's state (numbers; N/2 complex ones).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = [
    "StateSpace",
    "state_space",
    "state_space_init",
    "state_space_init_state",
    "state_space_kernel",
    "state_space_step",
]

DType = jax.typing.DTypeLike
Params = dict[str, jax.Array]


def state_space_init(
    rng: jax.Array,
    dim: int,
    state_dim: int = 64,
    *,
    slowest: float = 1e-3,
    fastest: float = 1e-1,
) -> Params:
    """Parameters of D channels, each with a rate Δ of its own.

    Args:
      rng: key.
      dim: number of channels D.
      state_dim: N, even.
      slowest, fastest: Δ is drawn evenly between their logarithms.

    Returns:
      "rate" [D], log Δ; "decay" [D, N/2], log −Re A; "frequency" [D, N/2], Im A; "out"
      [D, N/2, 2], real and imaginary part of C; "skip" [D].

    Raises:
      ValueError: N is odd or below 2.

    >>> state_space_init(jax.random.key(0), 3, 8)["out"].shape
    (3, 4, 2)
    """
    if state_dim < 2 or state_dim % 2:
        raise ValueError(f"`state_dim` must be even and 2 or more, but is {state_dim}.")
    half = state_dim // 2
    rate_rng, out_rng, skip_rng = jax.random.split(rng, 3)
    low, high = math.log(slowest), math.log(fastest)
    return dict(
        rate=jax.random.uniform(rate_rng, (dim,), minval=low, maxval=high),
        decay=jnp.full((dim, half), math.log(0.5)),
        frequency=jnp.tile(jnp.pi * jnp.arange(half, dtype=jnp.float32), (dim, 1)),
        out=jax.random.normal(out_rng, (dim, half, 2)) * math.sqrt(0.5),
        skip=jax.random.normal(skip_rng, (dim,)),
    )


def _discrete(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """ΔA, B̄ and C, each complex [D, N/2]."""
    a = jax.lax.complex(-jnp.exp(params["decay"]), params["frequency"])
    step = jnp.exp(params["rate"])[:, None].astype(a.dtype) * a
    c = jax.lax.complex(params["out"][..., 0], params["out"][..., 1])
    return step, jnp.expm1(step) / a, c


def state_space_kernel(params: Params, length: int) -> jax.Array:
    """The convolution of each channel, K_t = 2 Re(C Ā^t B̄).

    Args:
      params: of `state_space_init`.
      length: T.

    Returns:
      float32 [D, T].

    >>> params = state_space_init(jax.random.key(0), 3, 8)
    >>> state_space_kernel(params, 5).shape
    (3, 5)
    """
    step, b, c = _discrete(params)
    times = jnp.arange(length, dtype=jnp.float32).astype(step.dtype)
    powers = jnp.exp(step[:, :, None] * times[None, None])
    return 2 * jnp.einsum("dn,dnt->dt", c * b, powers).real


def state_space(x: jax.Array, params: Params, *, reverse: bool = False) -> jax.Array:
    """The outputs of all steps at once, y = K * x + D x, causal.

    As the size of a state goes to that of the past, any causal convolution; with Δ → ∞
    it forgets all but x_t.

    Args:
      x: [T, D]; padding must be zero.
      params: of `state_space_init`.
      reverse: from the last step to the first.

    Returns:
      [T, D], in the dtype of x; computed in float32.

    Raises:
      ValueError: x has other channels than the parameters.

    >>> params = state_space_init(jax.random.key(0), 3, 8)
    >>> state_space(jnp.ones((5, 3)), params).shape
    (5, 3)
    """
    if x.ndim != 2 or x.shape[1] != params["skip"].shape[0]:
        raise ValueError(
            f"`x` must be [T, {params['skip'].shape[0]}], as many channels as the "
            f"parameters have, but has shape {tuple(x.shape)}."
        )
    length, dtype = x.shape[0], x.dtype
    x = x.astype(jnp.float32)
    signal = (x[::-1] if reverse else x).T
    size = 2 * length  # so that the end does not run into the beginning
    spectrum = jnp.fft.rfft(state_space_kernel(params, length), size, axis=-1)
    y = jnp.fft.irfft(spectrum * jnp.fft.rfft(signal, size, axis=-1), size, axis=-1)
    y = y[:, :length].T
    y = y[::-1] if reverse else y
    return (y + params["skip"][None] * x).astype(dtype)


def state_space_init_state(dim: int, state_dim: int = 64) -> jax.Array:
    """The state before the first step: complex64 [D, N/2]."""
    return jnp.zeros((dim, state_dim // 2), jnp.complex64)


def state_space_step(
    params: Params, state: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step: (state, output) from the state and the input.

    Args:
      params: of `state_space_init`.
      state: complex [D, N/2].
      x: [D].

    >>> params = state_space_init(jax.random.key(0), 3, 8)
    >>> state, y = state_space_step(params, state_space_init_state(3, 8), jnp.ones(3))
    >>> bool(jnp.allclose(y, state_space(jnp.ones((1, 3)), params)[0], atol=1e-5))
    True
    """
    step, b, c = _discrete(params)
    inner = x.astype(jnp.float32)
    state = jnp.exp(step) * state + b * inner[:, None].astype(b.dtype)
    y = 2 * (c * state).sum(axis=1).real + params["skip"] * inner
    return state, y.astype(x.dtype)


class StateSpace(nnx.Module):
    """A layer of both directions: two state spaces, then a gate at each position.

    y = u ⊙ σ(v) with [u; v] = W gelu([forward(x); backward(x)]) + b.

    Args:
      dim: width D.
      state_dim: N of each channel and direction.

    >>> layer = StateSpace(4, state_dim=8, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 4))).shape
    (2, 5, 4)
    """

    def __init__(
        self,
        dim: int,
        *,
        state_dim: int = 64,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        def direction() -> Any:
            made = state_space_init(rngs.params(), dim, state_dim)
            return nnx.Dict({name: nnx.Param(value) for name, value in made.items()})

        self.forward, self.backward = direction(), direction()
        self.mix = nnx.Linear(2 * dim, 2 * dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; what is padding must be zero."""
        both = [
            jax.vmap(lambda one, p=params, r=reverse: state_space(one, p, reverse=r))(x)
            for params, reverse in (
                ({k: v[...] for k, v in self.forward.items()}, False),
                ({k: v[...] for k, v in self.backward.items()}, True),
            )
        ]
        return jax.nn.glu(self.mix(jax.nn.gelu(jnp.concatenate(both, axis=-1))))
