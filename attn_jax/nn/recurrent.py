"""Recurrent layers whose backward pass is that of products, but for the recurrence.

`LstmLayer` has two forms, over a sequence at once and token by token with a state;
`run_cell` runs Flax's cells over whole sequences.

Letters: B batch, T length, D width, N hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.attention import _checks

DType = jax.typing.DTypeLike

__all__ = ["GruState", "LstmLayer", "LstmState", "run_cell", "turned"]


class LstmState(NamedTuple):
    """The carry of an LSTM layer: output and memory cell, each [B, hidden units]."""

    hidden: jax.Array
    cell: jax.Array


class GruState(NamedTuple):
    """The carry of a gated recurrent unit: its output [B, hidden units]."""

    hidden: jax.Array


def _lstm(
    state: LstmState, given: jax.Array, product: jax.Array
) -> tuple[LstmState, jax.Array]:
    """A token of an LSTM, of W x + b and of U h, each [B, 4 N]: i, f, g, o."""
    write, keep, new, show = jnp.split(given + product, 4, axis=-1)
    cell = jax.nn.sigmoid(keep) * state.cell
    cell = cell + jax.nn.sigmoid(write) * jnp.tanh(new)
    hidden = jax.nn.sigmoid(show) * jnp.tanh(cell)
    # The state keeps its dtype, whatever that of the input is.
    kept = (
        new.astype(old.dtype) for new, old in zip((hidden, cell), state, strict=True)
    )
    return LstmState(*kept), hidden


def _gru(
    state: GruState, given: jax.Array, product: jax.Array
) -> tuple[GruState, jax.Array]:
    """A token of a GRU, of W x + b and of U h, each [B, 3 N]: r, z, n."""
    reset, keep, new = jnp.split(given, 3, axis=-1)
    of_reset, of_keep, of_new = jnp.split(product, 3, axis=-1)
    kept = jax.nn.sigmoid(keep + of_keep)
    new = jnp.tanh(new + jax.nn.sigmoid(reset + of_reset) * of_new)
    hidden = (1.0 - kept) * new + kept * state.hidden
    return GruState(hidden.astype(state.hidden.dtype)), hidden


def _product(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = jnp.promote_types(hidden.dtype, kernel.dtype)
    return hidden.astype(wide) @ kernel.astype(wide)


def _recurrence(gates: Any, *, summed: bool) -> Callable[..., jax.Array]:
    """A recurrent layer over time, whose U has its gradient after the loop.

    Summed up in the loop, as `jax.grad` has it, the gradient of U would be read and
    written at every token, and added up over the devices at every token.

    Args:
      gates: ``(state, W x + b, U h) -> (state, hidden)``, of one token.
      summed: whether these enter as their sum alone, so that one cotangent is both's.

    Returns:
      ``(W x + b [T, B, ·], U [N, ·], state) -> hidden [T, B, N]`` of all tokens.
    """

    def scan(given: Any, more: Any, kernel: jax.Array, state: Any) -> jax.Array:
        def advance(state: Any, now: Any) -> Any:
            given, more = now
            product = _product(state.hidden, kernel)
            return gates(state, given, product if more is None else product + more)

        return jax.lax.scan(advance, state, (given, more))[1]

    @jax.custom_vjp
    def run(given: jax.Array, kernel: jax.Array, state: Any) -> jax.Array:
        return scan(given, None, kernel, state)

    def forward(
        given: jax.Array, kernel: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        # Zeros whose cotangent is that of U h.
        wide = jnp.promote_types(state.hidden.dtype, kernel.dtype)
        zeros = None if summed else jnp.zeros(given.shape, wide)
        hidden, pull = jax.vjp(
            lambda given, more, state: scan(given, more, kernel, state),
            given,
            _checks.varying(zeros, given, kernel, state),
            state,
        )
        return hidden, (pull, hidden, kernel, state.hidden)

    def backward(kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        pull, hidden, kernel, first = kept
        given, more, state = pull(cotangent)
        of_product = given if summed else more
        before = jnp.concatenate([first[None].astype(hidden.dtype), hidden[:-1]])
        grown = jnp.einsum("tbn,tbm->nm", before.astype(of_product.dtype), of_product)
        return given, grown.astype(kernel.dtype), state

    run.defvjp(forward, backward)
    return run


_run_lstm = _recurrence(_lstm, summed=True)
_run_gru = _recurrence(_gru, summed=False)


def run_cell(cell: nnx.GRUCell | nnx.OptimizedLSTMCell, x: jax.Array) -> jax.Array:
    """One of Flax's recurrent cells over whole sequences, from a state of zeros.

    The numbers are those of `flax.nnx.RNN`. W x is one product for all tokens, and the
    gradient of U is one after them.

    Args:
      cell: with the standard gates.
      x: [B, T, D].

    Returns:
      [B, T, hidden units].

    >>> cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> run_cell(cell, jnp.ones((2, 5, 3))).shape
    (2, 5, 4)
    """
    batch, length, dim = x.shape
    gru = isinstance(cell, nnx.GRUCell)
    # Flat with the batch first: so XLA keeps a batch split over devices as it is.
    given = cell.dense_i(x.reshape(-1, dim)).reshape(batch, length, -1)
    if gru and cell.dense_h.bias is not None:
        raise ValueError("`cell` must be a GRU without a bias beside U h, as Flax has.")
    if cell.dense_h.bias is not None:
        given = given + cell.dense_h.bias[...].astype(given.dtype)[None, None]
    kernel = cell.dense_h.kernel[...].astype(given.dtype)
    given = jnp.swapaxes(given, 0, 1)
    zeros = jnp.zeros((batch, kernel.shape[0]), given.dtype)
    state: Any = GruState(zeros) if gru else LstmState(zeros, zeros)
    operands = _checks.varying((given, kernel, state), given, kernel)
    hidden = (_run_gru if gru else _run_lstm)(*operands)
    return jnp.swapaxes(hidden, 0, 1)


def turned(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Sequences [B, T, D] from their last of so many tokens to their first.

    >>> turned(jnp.arange(3.0).reshape(1, 3, 1), jnp.array([2])).ravel().tolist()
    [1.0, 0.0, 2.0]
    """
    last = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    at = last - jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(x, (at % x.shape[1])[:, :, None], axis=1)


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
        hidden = _run_lstm(*given)
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
        product = _product(state.hidden, self.recur.kernel[...])
        state, hidden = _lstm(state, self.into(x), product)
        return state, self.out(hidden)
