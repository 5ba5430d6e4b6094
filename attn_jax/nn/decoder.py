"""A causal decoder: in parallel over a sequence, or token by token with a state.

`Decoder` predicts the next symbol of a sequence. What mixes tokens over time is any
attention variant that has a step, or an LSTM; the rest is the same Transformer. Each
has two forms that share all parameters: ``decoder(tokens)`` over a whole sequence, for
training, and ``decoder.step(state, token)`` for one token, which `attn_jax.generate`
and `attn_jax.beam_search` run. Where it has a memory to read, such as what an encoder
makes of a sentence, `Decoder.remember` makes it ready once, for both.

Letters: B batch, T length, S length of a memory, D width, N heads, H size of a head, O
size of an output.
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
from attn_jax.nn.causal_attention import CausalAttention
from attn_jax.nn.cross_attention import CrossAttention
from attn_jax.nn.encoder import MlpBlock, Norm, check_norm
from attn_jax.nn.recurrent import LstmLayer
from attn_jax.positions import learned_init, sinusoidal_1d
from attn_jax.variant import Variant

DType = jax.typing.DTypeLike

__all__ = [
    "Decoder",
    "DecoderFunctions",
    "DecoderState",
    "Memory",
    "decoder_functions",
]


class Memory(NamedTuple):
    """What a decoder reads beside its own tokens, made ready by `Decoder.remember`.

    Attributes:
      key_mask: bool [B, S], True = real.
      heads: keys [B, S, N, H] and values [B, S, N, V] of each block; empty with a
        summary.
      summary: [B, D], all of it in one vector; None where tokens attend to it.
    """

    key_mask: jax.Array
    heads: tuple[tuple[jax.Array, jax.Array], ...]
    summary: jax.Array | None


class DecoderBlock(nnx.Module):
    """A block: mix tokens over time, read a memory, a feed-forward network.

    Of each part f: ``x ← x + f(norm(x))``, or post-norm, ``x ← norm(x + f(x))``.

    Args:
      dim: width D.
      make_mix: makes the layer that mixes tokens over time.
      mlp_dim: hidden width of the feed-forward network; None = there is none, as in the
        LSTM of the textbook, which has norm and residual connection alone.
      make_cross: makes the layer that reads a memory; None = there is none.
      norm: "pre" or "post".
      dropout_rate: of each part's output, and of the network's hidden units.
    """

    def __init__(
        self,
        dim: int,
        make_mix: Callable[[], Any],
        *,
        mlp_dim: int | None,
        make_cross: Callable[[], CrossAttention] | None = None,
        norm: Norm = "pre",
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.pre = norm == "pre"
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mix = make_mix()
        self.has_cross = make_cross is not None
        if make_cross is not None:
            self.cross_norm = nnx.LayerNorm(dim, rngs=rngs)
            self.cross = make_cross()
        self.has_mlp = mlp_dim is not None
        if mlp_dim is not None:
            self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
            self.mlp = MlpBlock(dim, mlp_dim, dropout_rate=dropout_rate, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate)

    def _given(self, norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
        """What a part is given."""
        return norm(x) if self.pre else x

    def _joined(
        self, norm: nnx.LayerNorm, x: jax.Array, h: jax.Array, **dropout: Any
    ) -> jax.Array:
        """Tokens, with what a part makes of them."""
        x = x + self.dropout(h, **dropout)
        return x if self.pre else norm(x)

    def _finish(
        self,
        x: jax.Array,
        heads: tuple[jax.Array, jax.Array] | None,
        key_mask: jax.Array | None,
        rng: jax.Array,
        **dropout: Any,
    ) -> jax.Array:
        """What comes after mixing, for tokens [B, T, D]."""
        if self.has_cross:
            assert heads is not None and key_mask is not None
            h = self.cross(self._given(self.cross_norm, x), heads, key_mask, rng)
            x = self._joined(self.cross_norm, x, h, **dropout)
        if self.has_mlp:
            h = self.mlp(self._given(self.mlp_norm, x), **dropout)
            x = self._joined(self.mlp_norm, x, h, **dropout)
        return x

    def __call__(
        self,
        x: jax.Array,
        rng: jax.Array,
        heads: tuple[jax.Array, jax.Array] | None = None,
        key_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] to [B, T, D], with a memory's heads and mask if it reads."""
        dropout: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        h = self.mix(self._given(self.norm, x), rng)
        x = self._joined(self.norm, x, h, **dropout)
        return self._finish(x, heads, key_mask, rng, **dropout)

    def cross_weights(
        self,
        x: jax.Array,
        rng: jax.Array,
        heads: tuple[jax.Array, jax.Array],
        key_mask: jax.Array,
    ) -> jax.Array:
        """How tokens [B, T, D] weigh a memory, [B, N, T, S]."""
        h = self.mix(self._given(self.norm, x), rng)
        x = self._joined(self.norm, x, h, deterministic=True)
        x = self._given(self.cross_norm, x)
        return self.cross.weights(x, heads, key_mask, rng)

    def step(
        self,
        state: Any,
        position: jax.Array,
        x: jax.Array,
        rng: jax.Array,
        heads: tuple[jax.Array, jax.Array] | None = None,
        key_mask: jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        """Maps the token [B · K, D] at a position to (state, [B · K, D]).

        Each K tokens one after the other read one memory of the B.
        """
        state, h = self.mix.step(state, position, self._given(self.norm, x), rng)
        x = self._joined(self.norm, x, h, deterministic=True)
        each = x[None] if heads is None else _by_memory(x, heads[0].shape[0])
        each = self._finish(each, heads, key_mask, rng, deterministic=True)
        return state, each.reshape(x.shape)


def _by_memory(x: jax.Array, count: int) -> jax.Array:
    """Tokens [B · K, D] as [B, K, D], K of them for each of B memories."""
    if x.shape[0] % count:
        raise ValueError(
            f"`token` must be [B] or [B · K] with B={count}, the batch of the memory, "
            f"but there are {x.shape[0]} tokens."
        )
    return x.reshape(count, -1, x.shape[-1])


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
      key_dim: size of a head's queries and keys; None = D / N, that of its values.
      hidden_dim: hidden units of an LSTM; None = 5D/4, with which a block has about
        the parameters of an attention block.
      positions: "sinusoidal", "learned", "rope" (queries and keys are turned), "none",
        or a fixed table [max_length, D].
      head_bias: first bias [O] of the output layer; None = zeros.
      cross: how each block reads a memory beside its own tokens: an attention variant
        that has `cross`, as `mixer`; "summary" = tokens get one vector of all of it
        added, made of its first and its last real vector; None = there is no memory.
      max_memory: the longest memory, for a variant whose parameters depend on it.
      norm: "pre" or "post" layer normalisation.
      tied: whether the output layer is the table of the input, as in the Transformer;
        then O is `num_symbols`, vectors are scaled by √D, and there is no bias.
      dropout_rate: while training, of the embedded tokens, of what each part of a block
        adds, and of hidden units.

    Raises:
      ValueError: for a mixer without a step, or positions or shapes that do not fit.

    References: Vaswani et al., 2017, arXiv:1706.03762; Katharopoulos et al., 2020,
    arXiv:2006.16236; the summary as in Cho et al., 2014, arXiv:1406.1078.

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
        key_dim: int | None = None,
        hidden_dim: int | None = None,
        positions: Literal["sinusoidal", "learned", "rope", "none"]
        | np.ndarray = "sinusoidal",
        head_bias: np.ndarray | None = None,
        cross: str | Callable[..., jax.Array] | Variant | None = None,
        max_memory: int | None = None,
        norm: Norm = "pre",
        tied: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.max_length = max_length
        self.scale = math.sqrt(dim) if tied else 1.0
        self.embed = nnx.Embed(
            num_symbols,
            dim,
            embedding_init=nnx.initializers.normal(1.0 / self.scale),
            rngs=rngs,
        )
        self.positions: nnx.Variable | None
        if isinstance(positions, str):
            if positions == "learned":
                table = learned_init(rngs.params(), max_length, dim)
                self.positions = nnx.Param(table)
            elif positions == "sinusoidal":
                self.positions = nnx.Variable(sinusoidal_1d(max_length, dim))
            elif positions in ("rope", "none"):
                self.positions = None
            else:
                raise ValueError(
                    "`positions` must be 'sinusoidal', 'learned', 'rope', 'none' or a "
                    f"table [max_length, D], but is {positions!r}."
                )
        else:
            if positions.shape != (max_length, dim):
                raise ValueError(
                    f"`positions` must be [max_length, D] = {(max_length, dim)}, but "
                    f"has shape {positions.shape}."
                )
            self.positions = nnx.Variable(jnp.asarray(positions, jnp.float32))
        check_norm(norm)
        hidden_dim = 5 * dim // 4 if hidden_dim is None else hidden_dim

        recurrent = isinstance(mixer, str) and mixer == "lstm"
        rotated = isinstance(positions, str) and positions == "rope"
        if recurrent and rotated:
            raise ValueError(
                "`positions` must be other than 'rope' with mixer='lstm', which has no "
                "queries and keys to turn."
            )

        heads: dict[str, Any] = dict(num_heads=num_heads, key_dim=key_dim, rngs=rngs)

        def mix() -> CausalAttention | LstmLayer:
            if recurrent:
                return LstmLayer(dim, hidden_dim, rngs=rngs)
            return CausalAttention(
                dim, variant=mixer, max_length=max_length, rotated=rotated, **heads
            )

        self.reads: Literal["heads", "summary"] | None = None
        make_cross = None
        if isinstance(cross, str) and cross == "summary":
            self.reads = "summary"
            self.summary = nnx.Linear(2 * dim, dim, rngs=rngs)
        elif cross is not None:
            self.reads = "heads"
            make_cross = functools.partial(
                CrossAttention, dim, variant=cross, max_length=max_memory, **heads
            )

        width: int | None = 4 * dim if mlp_dim is None else mlp_dim
        width = None if recurrent else width
        blocks = [
            DecoderBlock(
                dim,
                mix,
                mlp_dim=width,
                make_cross=make_cross,
                norm=norm,
                dropout_rate=dropout_rate,
                rngs=rngs,
            )
            for _ in range(depth)
        ]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(dim, rngs=rngs) if norm == "pre" else None
        self.dropout = nnx.Dropout(dropout_rate)
        bias = np.zeros(num_outputs, np.float32) if head_bias is None else head_bias
        if bias.shape != (num_outputs,):
            raise ValueError(
                f"`head_bias` must be [O] = {(num_outputs,)}, but has shape "
                f"{bias.shape}."
            )
        if tied and num_outputs != num_symbols:
            raise ValueError(
                "tied=True needs as many outputs as symbols, but there are "
                f"{num_symbols} symbols and {num_outputs} outputs."
            )
        if tied and head_bias is not None:
            raise ValueError("tied=True has no bias: leave `head_bias` out.")
        self.head = (
            None
            if tied
            else nnx.Linear(
                dim,
                num_outputs,
                kernel_init=nnx.initializers.normal(0.1 / math.sqrt(dim)),
                bias_init=lambda *_: jnp.asarray(bias, jnp.float32),
                rngs=rngs,
            )
        )

    def embedded(self, tokens: jax.Array, name: str = "tokens") -> jax.Array:
        """Tokens [...] as vectors [..., D]; NaN for a traced one that is no symbol.

        Args:
          tokens: integers of any width.
          name: of the argument, for messages.
        """
        table = self.embed.embedding[...]
        ids = _checks.check_ids(name, tokens, table.shape[0])
        x = _checks.rows_at(table, ids)
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, x.dtype)

    def _outputs(self, x: jax.Array) -> jax.Array:
        """Outputs [n, O] of [n, D]."""
        x = x if self.norm is None else self.norm(x)
        if self.head is not None:
            return self.head(x)
        return x @ self.embed.embedding[...].T.astype(x.dtype)

    def _of_memory(self, memory: Memory | None) -> list[dict[str, Any]]:
        """What each block is given of a memory."""
        if (memory is not None) != (self.reads is not None):
            needs = "needs" if memory is None else "was made without"
            raise ValueError(
                f"This decoder {needs} a `memory`: see `cross` and `remember`."
            )
        if memory is None or self.reads == "summary":
            return [{} for _ in self.blocks]
        return [dict(heads=heads, key_mask=memory.key_mask) for heads in memory.heads]

    def remember(self, memory: jax.Array, key_mask: jax.Array | None = None) -> Memory:
        """Makes a memory ready to be read, once for all tokens.

        Args:
          memory: [B, S, D].
          key_mask: bool [B, S], True = real, or None; padding comes last.

        Raises:
          ValueError: if the decoder was made without `cross`, or for other shapes.
        """
        if self.reads is None:
            raise ValueError(
                "This decoder was made without a memory: give it `cross` to read one."
            )
        batch, length = _check_memory(memory, self.embed.features)
        if key_mask is None:
            key_mask = jnp.ones((batch, length), bool)
        _checks.check_bool("key_mask", key_mask)
        if key_mask.shape != (batch, length):
            raise ValueError(
                f"`key_mask` must be [B, S] = {(batch, length)}, but has shape "
                f"{tuple(key_mask.shape)}."
            )
        memory = jnp.where(key_mask[:, :, None], memory, 0)
        if self.reads == "heads":
            heads = tuple(block.cross.remember(memory) for block in self.blocks)
            return Memory(key_mask, heads, None)
        last = jnp.maximum(key_mask.sum(axis=1) - 1, 0)
        ends = [memory[:, 0], jnp.take_along_axis(memory, last[:, None, None], 1)[:, 0]]
        summary = self.summary(jnp.concatenate(ends, axis=-1))
        return Memory(key_mask, (), summary)

    def _rngs(self, rng: jax.Array | None) -> list[jax.Array]:
        """A key of random attention for every block."""
        rng = jax.random.key(0) if rng is None else rng
        return [jax.random.fold_in(rng, index) for index in range(len(self.blocks))]

    def __call__(
        self,
        tokens: jax.Array,
        memory: Memory | None = None,
        *,
        rng: jax.Array | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Outputs of all positions at once.

        Args:
          tokens: integers [B, T] of any width, T ≤ max_length.
          memory: of `remember`, where the decoder reads one.
          rng: key of a random variant; None = the one that `step` uses.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B, T, O]; output t depends on tokens 0 … t alone, and on the memory.

        Raises:
          ValueError: on another shape, a sequence that is too long, a memory that is
            missing or not read, or a known token that is no symbol. A traced one gives
            NaN.
          TypeError: if tokens are no integers.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.max_length:
            raise ValueError(
                f"`tokens` must be [B, T] with 1 ≤ T ≤ max_length={self.max_length}, "
                f"but has shape {tuple(tokens.shape)}."
            )
        of_memory = self._of_memory(memory)
        dropout: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        x = self.dropout(self._placed(tokens, memory), **dropout)
        for block, key, given in zip(
            self.blocks, self._rngs(rng), of_memory, strict=True
        ):
            x = block(x, key, **given, **dropout)
        out = self._outputs(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], -1)

    def _placed(self, tokens: jax.Array, memory: Memory | None) -> jax.Array:
        """Tokens [B, T] as the first block is given them, [B, T, D]."""
        x = self.embedded(tokens)
        if self.positions is not None:
            x = x + self.positions[...][None, : tokens.shape[1]].astype(x.dtype)
        if memory is not None and memory.summary is not None:
            x = x + memory.summary[:, None]
        return x

    def cross_weights(self, tokens: jax.Array, memory: Memory) -> list[jax.Array]:
        """How known tokens [B, T] weigh a memory, by block: [B, N, T, S].

        Args:
          tokens: integers.
          memory: of `remember`, of a decoder that attends to it.
        """
        if self.reads != "heads":
            raise ValueError(
                "Weights are of a decoder that attends to a memory, by a variant as "
                "`cross`."
            )
        x, found = self._placed(tokens, memory), []
        for block, key, given in zip(
            self.blocks, self._rngs(None), self._of_memory(memory), strict=True
        ):
            found.append(block.cross_weights(x, key, **given))
            x = block(x, key, **given)
        return found

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
        self, state: DecoderState, token: jax.Array, memory: Memory | None = None
    ) -> tuple[DecoderState, jax.Array]:
        """One token: the new state, and the output for what comes after.

        Equal to row t of the parallel form, t being the number of tokens before.

        Args:
          state: of `init_state`, or of the step before.
          token: integers [B] of any width.
          memory: of `remember`, where the decoder reads one, of B or, where each K
            tokens read the same, as beams do, of B / K.

        Returns:
          The state, and the output [B, O].

        Raises:
          ValueError: for a known token that is no symbol, one more than there is room
            for, or a memory that is missing, not read or of another batch. Where a
            token or the room is traced, it gives NaN.
          TypeError: if tokens are no integers.
        """
        position = _checks.as_int32("state.position", state.position)
        why = ": the decoder was made for max_length tokens"
        place = _checks.check_ids("state.position", position, self.max_length, why=why)
        of_memory = self._of_memory(memory)
        x = self.embedded(token)
        code = jnp.zeros((), x.dtype)
        if self.positions is not None:
            code = jax.lax.dynamic_index_in_dim(
                self.positions[...], jnp.maximum(place, 0), keepdims=True
            )
        x = x + jnp.where(place >= 0, code, jnp.nan).astype(x.dtype)
        if memory is not None and memory.summary is not None:
            each = _by_memory(x, memory.summary.shape[0]) + memory.summary[:, None]
            x = each.reshape(x.shape)
        layers = []
        for block, layer, key, given in zip(
            self.blocks, state.layers, self._rngs(None), of_memory, strict=True
        ):
            layer, x = block.step(layer, position, x, key, **given)
            layers.append(layer)
        return DecoderState(position + 1, tuple(layers)), self._outputs(x)


def _check_memory(memory: jax.Array, dim: int) -> tuple[int, int]:
    """B and S of a memory [B, S, D]."""
    if memory.ndim != 3 or memory.shape[1] < 1 or memory.shape[2] != dim:
        raise ValueError(
            f"`memory` must be [B, S, D] with S ≥ 1 and D={dim}, but has shape "
            f"{tuple(memory.shape)}."
        )
    return memory.shape[0], memory.shape[1]


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
        init = init_like(self.init, params)
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


def init_like(
    init: Callable[..., DecoderState], params: Any
) -> Callable[[int, int], DecoderState]:
    """`Decoder.init_state` in the widest dtype of parameters, for generation."""
    dtypes = {jnp.result_type(leaf) for leaf in jax.tree.leaves(params)}
    return _Init(init, max(dtypes, key=lambda dtype: dtype.itemsize))


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
