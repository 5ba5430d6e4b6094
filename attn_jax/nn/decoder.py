"""A causal decoder: in parallel over a sequence, or token by token with a state.

`Decoder` predicts the next symbol of a sequence. What mixes tokens over time is any
attention variant that has a step, or an LSTM; the rest is the same pre-norm
Transformer. Each has two forms that share all parameters: ``decoder(tokens)`` over a
whole sequence, for training, and ``decoder.step(state, token)`` for one token, which
`attn_jax.generate` runs.

Letters: B batch, T length, D width, N heads, H size of a head, O size of an output.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax import generation
from attn_jax.attention import _checks
from attn_jax.multihead import multi_head, multi_head_state, multi_head_step
from attn_jax.nn.attention_fn import head_params
from attn_jax.nn.encoder import MlpBlock
from attn_jax.positions import learned_init, sinusoidal_1d
from attn_jax.variant import Variant, require, resolve

DType = jax.typing.DTypeLike

__all__ = [
    "CausalAttention",
    "Decoder",
    "DecoderFunctions",
    "DecoderState",
    "LstmLayer",
    "decoder_functions",
]


class CausalAttention(nnx.Module):
    """Causal multi-head self-attention with a parallel and a recurrent form.

    Args:
      dim: width D.
      num_heads: N; D must be a multiple of it.
      variant: name, `path/file.py:function`, function, or `Variant`, with a step.
      max_length: the longest sequence, for a variant whose parameters depend on it.

    Raises:
      ValueError: if D is no multiple of N, or the variant has no step.

    >>> layer = CausalAttention(8, num_heads=2, variant="linear", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 5, 8)), jax.random.key(0)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        variant: str | Callable[..., jax.Array] | Variant,
        max_length: int | None = None,
        rngs: nnx.Rngs,
    ):
        if dim % num_heads:
            raise ValueError(
                f"`dim` must be a multiple of `num_heads`, but they are {dim} and "
                f"{num_heads}."
            )
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.variant = resolve(variant)
        require(self.variant, "step")
        if max_length is not None:
            self.variant = self.variant.fit(max_length=max_length)
        # One product for all three, over two axes, is what XLA:CPU is fast at.
        self.project = nnx.Linear(dim, 3 * dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        if self.variant.init is not None:
            sizes = (num_heads, self.head_dim)
            self.params, self.restore = head_params(self.variant, *sizes, rngs)

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value, each [..., N, H], of [..., D]."""
        flat = self.project(x.reshape(-1, x.shape[-1]))
        query, key, value = (
            part.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
            for part in jnp.split(flat, 3, axis=-1)
        )
        return query, key, value

    def _merge(self, out: jax.Array) -> jax.Array:
        flat = out.reshape(-1, self.num_heads * self.head_dim)
        return self.out(flat).reshape(*out.shape[:-2], flat.shape[-1])

    def _carried(self, rng: jax.Array) -> dict[str, Any]:
        """Parameters and key of the variant, for both forms alike."""
        has = self.variant.init is not None
        return {
            "params": self.restore(self.params) if has else None,
            "rng": rng if self.variant.stochastic else None,
        }

    def __call__(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]; ``rng`` is the key of a random variant."""
        attend = multi_head(self.variant)
        # A variant without `is_causal` is causal by itself, as its step is.
        causal = {"is_causal": True} if self.variant.causal else {}
        return self._merge(attend(*self._heads(x), **self._carried(rng), **causal))

    def init_state(self, batch: int, length: int, dtype: DType | None = None) -> Any:
        """The state before the first token, with room for ``length`` of them."""
        return multi_head_state(
            self.variant,
            batch,
            self.num_heads,
            length=length,
            head_dim=self.head_dim,
            dtype=self.project.kernel.dtype if dtype is None else dtype,
        )

    def step(
        self, state: Any, position: jax.Array, x: jax.Array, rng: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Maps the token [B, D] at a position to (state, [B, D])."""
        step = multi_head_step(self.variant)
        state, out = step(state, position, *self._heads(x), **self._carried(rng))
        return state, self._merge(out)


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


class DecoderBlock(nnx.Module):
    """Pre-norm block: ``x ← x + mix(norm(x))``, then ``x ← x + mlp(norm(x))``.

    Args:
      dim: width D.
      make_mix: makes the layer that mixes tokens over time.
      mlp_dim: hidden width of the feed-forward network; None = there is none, as in the
        LSTM of the textbook, which has norm and residual connection alone.
    """

    def __init__(
        self,
        dim: int,
        make_mix: Callable[[], CausalAttention | LstmLayer],
        *,
        mlp_dim: int | None,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mix = make_mix()
        self.has_mlp = mlp_dim is not None
        if mlp_dim is not None:
            self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
            self.mlp = MlpBlock(dim, mlp_dim, rngs=rngs)

    def _finish(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.mlp_norm(x)) if self.has_mlp else x

    def __call__(self, x: jax.Array, rng: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        return self._finish(x + self.mix(self.norm(x), rng))

    def step(
        self, state: Any, position: jax.Array, x: jax.Array, rng: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Maps the token [B, D] at a position to (state, [B, D])."""
        state, h = self.mix.step(state, position, self.norm(x), rng)
        return state, self._finish(x + h)


class DecoderState(NamedTuple):
    """What `Decoder.step` remembers of the tokens so far.

    Attributes:
      position: int32 [], how many there were.
      layers: the state of each block.
    """

    position: jax.Array
    layers: tuple[Any, ...]


class Decoder(nnx.Module):
    """Causal decoder: output t says what symbol comes after symbols 0 … t.

    Args:
      num_symbols: number of symbols of the input, a start symbol among them.
      num_outputs: size O of an output, such as one logit a symbol.
      mixer: what mixes tokens over time: "lstm", or an attention variant that has a
        step, as `attn_jax.resolve` takes it. `Variant.bind` gives it options.
      dim: width D.
      depth: number of blocks.
      max_length: the longest sequence.
      num_heads: heads N of attention.
      mlp_dim: hidden width of the feed-forward network beside attention; None = 4D.
      hidden_dim: hidden units of an LSTM; None = 5D/4, with which a block has about
        the parameters of an attention block.
      positions: "sinusoidal", "learned", or a fixed table [max_length, D].
      head_bias: first bias [O] of the output layer; None = zeros.

    Raises:
      ValueError: for a mixer without a step, or positions or shapes that do not fit.

    Reference: Katharopoulos et al., 2020, arXiv:2006.16236.

    >>> decoder = Decoder(10, 10, mixer="linear", dim=8, depth=1, num_heads=2,
    ...                   max_length=5, rngs=nnx.Rngs(0))
    >>> decoder(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 10)
    >>> state = decoder.init_state(2, 5)
    >>> state, output = decoder.step(state, jnp.zeros(2, jnp.int32))
    >>> int(state.position), output.shape
    (1, (2, 10))
    """

    def __init__(
        self,
        num_symbols: int,
        num_outputs: int,
        *,
        mixer: str | Callable[..., jax.Array] | Variant,
        dim: int,
        depth: int,
        max_length: int,
        num_heads: int = 1,
        mlp_dim: int | None = None,
        hidden_dim: int | None = None,
        positions: Literal["sinusoidal", "learned"] | np.ndarray = "sinusoidal",
        head_bias: np.ndarray | None = None,
        rngs: nnx.Rngs,
    ):
        self.max_length = max_length
        self.embed = nnx.Embed(
            num_symbols,
            dim,
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.positions: nnx.Variable
        if isinstance(positions, str):
            if positions == "learned":
                table = learned_init(rngs.params(), max_length, dim)
                self.positions = nnx.Param(table)
            elif positions == "sinusoidal":
                self.positions = nnx.Variable(sinusoidal_1d(max_length, dim))
            else:
                raise ValueError(
                    "`positions` must be 'sinusoidal', 'learned' or a table "
                    f"[max_length, D], but is {positions!r}."
                )
        else:
            if positions.shape != (max_length, dim):
                raise ValueError(
                    f"`positions` must be [max_length, D] = {(max_length, dim)}, but "
                    f"has shape {positions.shape}."
                )
            self.positions = nnx.Variable(jnp.asarray(positions, jnp.float32))
        hidden_dim = 5 * dim // 4 if hidden_dim is None else hidden_dim

        recurrent = isinstance(mixer, str) and mixer == "lstm"

        def mix() -> CausalAttention | LstmLayer:
            if recurrent:
                return LstmLayer(dim, hidden_dim, rngs=rngs)
            return CausalAttention(
                dim,
                num_heads=num_heads,
                variant=mixer,
                max_length=max_length,
                rngs=rngs,
            )

        width: int | None = 4 * dim if mlp_dim is None else mlp_dim
        width = None if recurrent else width
        blocks = [
            DecoderBlock(dim, mix, mlp_dim=width, rngs=rngs) for _ in range(depth)
        ]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        bias = np.zeros(num_outputs, np.float32) if head_bias is None else head_bias
        if bias.shape != (num_outputs,):
            raise ValueError(
                f"`head_bias` must be [O] = {(num_outputs,)}, but has shape "
                f"{bias.shape}."
            )
        self.head = nnx.Linear(
            dim,
            num_outputs,
            kernel_init=nnx.initializers.normal(0.1 / math.sqrt(dim)),
            bias_init=lambda *_: jnp.asarray(bias, jnp.float32),
            rngs=rngs,
        )

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        """Tokens [...] as vectors [..., D]; NaN for a traced one that is no symbol."""
        table = self.embed.embedding[...]
        return _checks.rows_at(
            table, _checks.check_ids("tokens", tokens, table.shape[0])
        )

    def _rngs(self, rng: jax.Array | None) -> list[jax.Array]:
        """A key of random attention for every block."""
        rng = jax.random.key(0) if rng is None else rng
        return [jax.random.fold_in(rng, index) for index in range(len(self.blocks))]

    def __call__(self, tokens: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
        """Outputs of all positions at once.

        Args:
          tokens: integers [B, T] of any width, T ≤ max_length.
          rng: key of a random variant; None = the one that `step` uses.

        Returns:
          [B, T, O]; output t depends on tokens 0 … t alone.

        Raises:
          ValueError: on another shape, a sequence that is too long, or a known token
            that is no symbol. A traced one gives NaN.
          TypeError: if tokens are no integers.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.max_length:
            raise ValueError(
                f"`tokens` must be [B, T] with 1 ≤ T ≤ max_length={self.max_length}, "
                f"but has shape {tuple(tokens.shape)}."
            )
        x = self._embedded(tokens)
        x = x + self.positions[...][None, : tokens.shape[1]].astype(x.dtype)
        for block, key in zip(self.blocks, self._rngs(rng), strict=True):
            x = block(x, key)
        x = self.norm(x)
        out = self.head(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], -1)

    def init_state(
        self, batch: int, length: int | None = None, dtype: DType | None = None
    ) -> DecoderState:
        """The state before the first token.

        Args:
          batch: B.
          length: tokens there must be room for; None = max_length.
          dtype: of what `step` remembers, and goes on to; None = the parameters'.

        Raises:
          ValueError: if it is more than max_length.
        """
        length = self.max_length if length is None else length
        if not 1 <= length <= self.max_length:
            raise ValueError(
                f"`length` must be 1 to max_length={self.max_length}, but is {length}."
            )
        layers = tuple(
            block.mix.init_state(batch, length, dtype) for block in self.blocks
        )
        return DecoderState(jnp.zeros((), jnp.int32), layers)

    def step(
        self, state: DecoderState, token: jax.Array
    ) -> tuple[DecoderState, jax.Array]:
        """One token: the new state, and the output for what comes after.

        Equal to row t of the parallel form, t being the number of tokens before.

        Args:
          state: of `init_state`, or of the step before.
          token: integers [B] of any width.

        Returns:
          The state, and the output [B, O].

        Raises:
          ValueError: for a known token that is no symbol, or one more than there is
            room for. Where that is traced, it gives NaN.
          TypeError: if tokens are no integers.
        """
        position = _checks.as_int32("state.position", state.position)
        why = ": the decoder was made for max_length tokens"
        place = _checks.check_ids("state.position", position, self.max_length, why=why)
        code = jax.lax.dynamic_index_in_dim(
            self.positions[...], jnp.maximum(place, 0), keepdims=True
        )
        x = self._embedded(token)
        x = x + jnp.where(place >= 0, code, jnp.nan).astype(x.dtype)
        layers = []
        for block, layer, key in zip(
            self.blocks, state.layers, self._rngs(None), strict=True
        ):
            layer, x = block.step(layer, position, x, key)
            layers.append(layer)
        return DecoderState(position + 1, tuple(layers)), self.head(self.norm(x))


class DecoderFunctions(NamedTuple):
    """A decoder as pure functions of its parameters.

    Attributes:
      apply: ``(params, tokens [B, T], rng=None) -> outputs [B, T, O]``.
      step: ``(params, state, token [B]) -> (state, output [B, O])``.
      init: ``(B, L, dtype=None) -> state``, with room for L tokens.
      num_symbols: number of symbols that there are.
    """

    apply: Callable[..., jax.Array]
    step: Callable[[Any, DecoderState, jax.Array], tuple[DecoderState, jax.Array]]
    init: Callable[..., DecoderState]
    num_symbols: int

    def generate(
        self,
        params: Any,
        prompt: jax.Array,
        steps: int,
        rng: jax.Array,
        sample: generation.Sample = generation.sample_symbols,
    ) -> jax.Array:
        """`attn_jax.generate` with this decoder's step: new tokens [B, steps].

        Raises:
          ValueError: if prompt and steps are longer than the decoder's sequences, or a
            known token is no symbol. After a traced one the new tokens are −1.
        """
        prompt = _checks.check_ids("prompt", prompt, self.num_symbols)
        dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        init = _Init(self.init, widest)
        return generation.generate(
            params, prompt, steps, rng, step=self.step, init=init, sample=sample
        )

    def generate_uncached(
        self,
        params: Any,
        prompt: jax.Array,
        steps: int,
        rng: jax.Array,
        sample: generation.Sample = generation.sample_symbols,
    ) -> jax.Array:
        """The same tokens, by a whole forward pass for each of them."""
        prompt = _checks.check_ids("prompt", prompt, self.num_symbols)
        return generation.generate_uncached(
            params, prompt, steps, rng, apply=self.apply, sample=sample
        )


@dataclasses.dataclass(frozen=True)
class _Init:
    """`DecoderFunctions.init` in a dtype; equal ones are one to a compiled program."""

    init: Callable[..., DecoderState]
    dtype: DType

    def __call__(self, batch: int, length: int) -> DecoderState:
        return self.init(batch, length, self.dtype)


def decoder_functions(decoder: Decoder) -> tuple[DecoderFunctions, Any]:
    """Splits a decoder, once, into pure functions and parameters.

    Args:
      decoder: a module; it is not changed.

    Returns:
      The functions, and the parameters as nested dictionaries of arrays.

    >>> decoder = Decoder(10, 10, mixer="lstm", dim=8, depth=1, max_length=7,
    ...                   rngs=nnx.Rngs(0))
    >>> functions, params = decoder_functions(decoder)
    >>> prompt, rng = jnp.zeros((2, 3), jnp.int32), jax.random.key(0)
    >>> functions.generate(params, prompt, 4, rng).shape
    (2, 4)
    """
    graphdef, *states = nnx.split(decoder, nnx.Param, ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)

    def merge(params: Any) -> Decoder:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        return nnx.merge(graphdef, params, rest)

    def apply(
        params: Any, tokens: jax.Array, rng: jax.Array | None = None
    ) -> jax.Array:
        return merge(params)(tokens, rng=rng)

    def step(
        params: Any, state: DecoderState, token: jax.Array
    ) -> tuple[DecoderState, jax.Array]:
        return merge(params).step(state, token)

    functions = DecoderFunctions(
        apply, step, decoder.init_state, decoder.embed.num_embeddings
    )
    return functions, nnx.to_pure_dict(variables)
