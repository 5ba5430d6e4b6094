"""Long short-term memory: over a sequence at once, or token by token with a state.

Letters: B batch, T length, D width, N hidden units.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.attention import _checks

DType = jax.typing.DTypeLike

__all__ = ["BidirectionalLstm", "LstmLayer", "LstmState"]


class LstmState(NamedTuple):
    """The carry of an LSTM layer: output and memory cell, each [B, hidden units]."""

    hidden: jax.Array
    cell: jax.Array


def _advance(
    kernel: jax.Array, state: LstmState, gates: jax.Array
) -> tuple[LstmState, jax.Array]:
    """A token of an LSTM layer: U [N, 4 N], the state, and W x + b, [B, 4 N]."""
    wide = jnp.promote_types(state.hidden.dtype, kernel.dtype)
    gates = gates + state.hidden.astype(wide) @ kernel.astype(wide)
    write, keep, new, show = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(keep) * state.cell
    cell = cell + jax.nn.sigmoid(write) * jnp.tanh(new)
    hidden = jax.nn.sigmoid(show) * jnp.tanh(cell)
    # The state keeps its dtype, whatever that of the input is.
    kept = (
        new.astype(old.dtype) for new, old in zip((hidden, cell), state, strict=True)
    )
    return LstmState(*kept), hidden


def _scan(gates: jax.Array, kernel: jax.Array, state: LstmState) -> jax.Array:
    """Outputs [T, B, N] of all tokens: W x + b [T, B, 4 N], U [N, 4 N], the state."""
    return jax.lax.scan(functools.partial(_advance, kernel), state, gates)[1]


_recurrence = jax.custom_vjp(_scan)


def _forward(
    gates: jax.Array, kernel: jax.Array, state: LstmState
) -> tuple[jax.Array, Any]:
    hidden, pull = jax.vjp(lambda g, s: _scan(g, kernel, s), gates, state)
    return hidden, (pull, hidden, kernel, state.hidden)


def _backward(kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    """U's gradient is one product after the loop, not a sum that grows in it.

    Summed in the loop, it would be added up over the devices at every token.
    """
    pull, hidden, kernel, first = kept
    gates, state = pull(cotangent)
    before = jnp.concatenate([first[None].astype(hidden.dtype), hidden[:-1]])
    grown = jnp.einsum("tbn,tbm->nm", before.astype(gates.dtype), gates)
    return gates, grown.astype(kernel.dtype), state


_recurrence.defvjp(_forward, _backward)


class LstmLayer(nnx.Module):
    """A layer of long short-term memory, with a map back to the width of its input.

    i, f, g, o = W x_t + U h_{t−1} + b,  c_t = σ(f) c_{t−1} + σ(i) tanh(g),
    h_t = σ(o) tanh(c_t),  output = V h_t

    W x is one product for the whole sequence; only U h waits for the token before.
    The forget gate begins open, with a bias of one.

    Args:
      dim: width D of input and output.
      hidden_dim: number of hidden units.

    Reference: Hochreiter and Schmidhuber, 1997, long short-term memory; the bias as in
    Jozefowicz et al., 2015, an empirical exploration of recurrent networks.

    >>> layer = LstmLayer(8, 10, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 8))).shape
    (2, 5, 8)
    """

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        bias = np.repeat(np.array([0, 1, 0, 0], np.float32), hidden_dim)
        self.hidden_dim = hidden_dim
        self.into = nnx.Linear(
            dim, 4 * hidden_dim, bias_init=lambda *_: jnp.asarray(bias), rngs=rngs
        )
        self.recur = nnx.Linear(
            hidden_dim,
            4 * hidden_dim,
            use_bias=False,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )
        self.out = nnx.Linear(hidden_dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Maps [B, T, D] to [B, T, D], from the beginning; nothing is random."""
        batch, length, dim = x.shape
        # Flat with the batch first: so XLA keeps a batch split over devices as it is.
        gates = self.into(x.reshape(-1, dim)).reshape(batch, length, -1)
        state = self.init_state(batch, length)
        kernel = self.recur.kernel[...]
        gates = jnp.swapaxes(gates, 0, 1)
        given = _checks.varying((gates, kernel, state), gates, kernel)
        hidden = _recurrence(*given)
        hidden = jnp.swapaxes(hidden, 0, 1).reshape(batch * length, -1)
        return self.out(hidden).reshape(batch, length, dim)

    def init_state(
        self, batch: int, length: int, dtype: DType | None = None
    ) -> LstmState:
        """The state before the first token, zeros; it has room for any length."""
        del length
        dtype = self.recur.kernel.dtype if dtype is None else dtype
        zeros = jnp.zeros((batch, self.hidden_dim), dtype)
        return LstmState(zeros, zeros)

    def step(
        self,
        state: LstmState,
        position: jax.Array,
        x: jax.Array,
        rng: jax.Array | None = None,
    ) -> tuple[LstmState, jax.Array]:
        """Maps the next token [B, D], wherever it stands, to (state, [B, D])."""
        state, hidden = _advance(self.recur.kernel[...], state, self.into(x))
        return state, self.out(hidden)


def _turned(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sequences [B, T, D] from their last of so many tokens to their first.

    >>> _turned(jnp.arange(3.0).reshape(1, 3, 1), jnp.array([2])).ravel().tolist()
    [1.0, 0.0, 2.0]
    """
    at = lengths[:, None] - 1 - jnp.arange(x.shape[1], dtype=lengths.dtype)[None]
    return jnp.take_along_axis(x, (at % x.shape[1])[:, :, None], axis=1)


class BidirectionalLstm(nnx.Module):
    """Layers of long short-term memory that read from both ends.

    Each layer is ``x ← x + forward(norm(x)) + backward(norm(x))``, and the last is
    normalised.

    Args:
      dim: width D.
      depth: number of layers.
      hidden_dim: hidden units of each direction; None = D.
      dropout_rate: of what each layer adds, while training.

    Reference: Graves and Schmidhuber, 2005, framewise phoneme classification with
    bidirectional LSTM.

    >>> body = BidirectionalLstm(8, depth=2, rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        hidden_dim: int | None = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        hidden_dim = dim if hidden_dim is None else hidden_dim

        def layers() -> nnx.List:
            return nnx.List(
                [LstmLayer(dim, hidden_dim, rngs=rngs) for _ in range(depth)]
            )

        self.forward, self.backward = layers(), layers()
        norms = [nnx.LayerNorm(dim, rngs=rngs) for _ in range(depth + 1)]
        self.norms = nnx.List(norms)
        self.dropout = nnx.Dropout(dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] with real tokens ``key_mask`` bool [B, T] to [B, T, D].

        Padding must come last: the backward direction begins at the last real token.
        """
        lengths = key_mask.sum(axis=1)
        for norm, forward, backward in zip(
            self.norms, self.forward, self.backward, strict=False
        ):
            h = jnp.where(key_mask[:, :, None], norm(x), jnp.zeros((), x.dtype))
            h = forward(h) + _turned(backward(_turned(h, lengths)), lengths)
            x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        return self.norms[-1](x)
