"""Sequence to sequence: a Transformer that decides itself how long its output is.

An encoder reads the source at once, a causal decoder writes the target symbol by symbol
and reads what the encoder made. Either may be any attention variant that can, or an
LSTM; what is read is attended to by any variant with `cross`, or is one vector.

Letters: B batch, S length of a source, T of a target, O symbols of the target.
"""

from __future__ import annotations

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
from attn_jax.models.labeller import RecurrentBody
from attn_jax.nn.attention_fn import AttentionState
from attn_jax.nn.decoder import Decoder, DecoderState, Memory, init_like
from attn_jax.nn.encoder import Encoder, Norm
from attn_jax.nn.positional import make_positions
from attn_jax.variant import Variant

__all__ = [
    "EncoderDecoder",
    "EncoderDecoderFunctions",
    "encoder_decoder_functions",
]

Mixer = str | Callable[..., jax.Array] | Variant


class EncoderDecoder(nnx.Module):
    """An encoder and a decoder that reads what it made of a source.

    Args:
      num_source: symbols of a source.
      num_target: symbols O of a target, those that begin and end it among them.
      dim: width D.
      depth: blocks of the encoder, and of the decoder.
      num_heads: heads N.
      mlp_dim: hidden width of the feed-forward networks; None = 4D.
      key_dim: size of a head's queries and keys, of all attention; None = D / N, that
        of its values.
      max_source, max_target: the longest source and target.
      attention: of the encoder: any attention variant; "lstm" = bidirectional LSTM
        layers.
      mixer: of the decoder over its own symbols: a variant with a step, or "lstm".
      cross: of the decoder over the source: a variant with `cross`; "summary" = one
        vector of the whole source is added to each symbol.
      positions: of the encoder's attention: a kind of `make_positions`, or "none".
      target_positions: of the decoder: "sinusoidal", "learned", "rope" or "none".
      norm: "pre" or "post" layer normalisation.
      tied: whether the output layer is the table of the target's symbols.
      shared: whether source and target share one table of symbols.
      dropout_rate: while training, of embedded symbols, of what each part of a block
        adds, and of hidden units.

    Raises:
      ValueError: for variants that lack what they are to do, or sizes that do not fit.

    References: Vaswani et al., 2017, arXiv:1706.03762; with "lstm", Bahdanau et al.,
    2015, arXiv:1409.0473, whose scores are `cross="additive"`, and without attention
    Cho et al., 2014, arXiv:1406.1078.

    >>> model = EncoderDecoder(9, 7, dim=8, depth=1, num_heads=2, max_source=6,
    ...                        max_target=5, rngs=nnx.Rngs(0))
    >>> source, target = jnp.zeros((2, 6), jnp.int32), jnp.zeros((2, 5), jnp.int32)
    >>> model(source, target).shape
    (2, 5, 7)
    """

    def __init__(
        self,
        num_source: int,
        num_target: int,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        max_source: int,
        max_target: int,
        mlp_dim: int | None = None,
        key_dim: int | None = None,
        attention: Mixer = "dot_product",
        mixer: Mixer = "dot_product",
        cross: Mixer = "dot_product",
        positions: str = "sinusoidal",
        target_positions: Literal["sinusoidal", "learned", "rope", "none"] = (
            "sinusoidal"
        ),
        norm: Norm = "pre",
        tied: bool = True,
        shared: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if shared and num_source != num_target:
            raise ValueError(
                "shared=True needs as many symbols of the source as of the target, but "
                f"there are {num_source} and {num_target}."
            )
        self.num_source, self.max_source = num_source, max_source
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.scale = math.sqrt(dim)
        table = functools.partial(
            nnx.Embed,
            num_source,
            dim,
            embedding_init=nnx.initializers.normal(1.0 / self.scale),
            rngs=rngs,
        )
        self.embed = None if shared else table()
        self.encoder: RecurrentBody | Encoder
        if isinstance(attention, str) and attention == "lstm":
            if norm != "pre":
                raise ValueError(
                    "`norm` must be 'pre' with attention='lstm', whose layers have it, "
                    f"but is {norm!r}."
                )
            self.encoder = RecurrentBody(
                dim, depth=depth, cell="lstm", dropout_rate=dropout_rate, rngs=rngs
            )
        else:
            sizes: dict[str, Any] = dict(num_heads=num_heads, max_length=max_source)
            kind = None
            if positions != "none":
                kind = make_positions(
                    positions, dim=dim, depth=depth, rngs=rngs, **sizes
                )
            self.encoder = Encoder(
                depth,
                dim,
                mlp_dim=mlp_dim,
                attention=attention,
                dropout_rate=dropout_rate,
                positions=kind,
                norm=norm,
                drops_weights=False,
                key_dim=key_dim,
                rngs=rngs,
                **sizes,
            )
        self.decoder = Decoder(
            num_target,
            num_target,
            mixer=mixer,
            dim=dim,
            depth=depth,
            max_length=max_target,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            key_dim=key_dim,
            positions=target_positions,
            cross=cross,
            max_memory=max_source,
            norm=norm,
            tied=tied,
            dropout_rate=dropout_rate,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(dropout_rate)

    def encode(
        self,
        source: jax.Array,
        key_mask: jax.Array | None = None,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Memory:
        """What the decoder reads of sources.

        Args:
          source: integers [B, S] of any width, S ≤ max_source.
          key_mask: bool [B, S], True = real, or None; padding comes last.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Raises:
          ValueError: on another shape, or a known symbol that there is not. A traced
            one gives NaN.
          TypeError: if symbols are no integers.
        """
        if source.ndim != 2 or not 1 <= source.shape[1] <= self.max_source:
            raise ValueError(
                f"`source` must be [B, S] with 1 ≤ S ≤ max_source={self.max_source}, "
                f"but has shape {tuple(source.shape)}."
            )
        if key_mask is None:
            key_mask = jnp.ones(source.shape, bool)
        if self.embed is None:
            x = self.decoder.embedded(source, "source")
        else:
            ids = _checks.check_ids("source", source, self.num_source)
            x = self.scale * _checks.rows_at(self.embed.embedding[...], ids)
        # What padding holds, NaN too, has no gradient.
        x = jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype))
        dropout: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        x = self.dropout(x, **dropout)
        if isinstance(self.encoder, Encoder):
            x = self.encoder(x, key_mask=key_mask, **dropout)
        else:
            x = self.encoder(x, key_mask, **dropout)
        return self.decoder.remember(x, key_mask)

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
        key_mask: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Logits of what comes after each symbol of a known target.

        Args:
          source: integers [B, S].
          target: integers [B, T], a symbol that begins it first; T ≤ max_target.
          key_mask: bool [B, S], True = real, or None; padding comes last.
          rng: key of random variants of the decoder.
          deterministic: whether dropout is off.
          rngs: stream `dropout`, where it is on.

        Returns:
          [B, T, O]; row t depends on the source and target symbols 0 … t.

        Raises:
          ValueError, TypeError: as `encode` and `Decoder`.
        """
        dropout: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        memory = self.encode(source, key_mask, **dropout)
        return self.decoder(target, memory, rng=rng, **dropout)


class EncoderDecoderFunctions(NamedTuple):
    """An `EncoderDecoder` as pure functions of its parameters.

    Attributes:
      apply: ``(params, source [B, S], target [B, T], key_mask=None, *, rng=None,
        dropout_rng=None) -> logits [B, T, O]``; with ``dropout_rng``, for training.
      encode: ``(params, source, key_mask=None) -> Memory``, compiled.
      step: ``((params, memory), state, token [B]) -> (state, logits [B, O])``.
      init: ``(B, L, dtype=None) -> state``, with room for L symbols.
      weights: ``(params, source, target, key_mask=None) -> [B, N, T, S]`` of each
        block: what each target symbol, which is known, looks at when the next is to be
        told; compiled.
      num_source, num_target: symbols that there are.
    """

    apply: Callable[..., jax.Array]
    encode: Callable[..., Memory]
    step: Callable[[Any, DecoderState, jax.Array], tuple[DecoderState, jax.Array]]
    init: Callable[..., DecoderState]
    weights: Callable[..., list[jax.Array]]
    num_source: int
    num_target: int

    def _started(
        self, params: Any, source: jax.Array, key_mask: jax.Array | None, start: int
    ) -> tuple[Any, jax.Array]:
        """What `step` takes of a source, and the symbols to begin with."""
        source = _checks.check_ids("source", source, self.num_source)
        _checks.check_ids("start", np.asarray(start), self.num_target)
        memory = self.encode(params, source, key_mask)
        return (params, memory), jnp.full((source.shape[0], 1), start, jnp.int32)

    def generate(
        self,
        params: Any,
        source: jax.Array,
        steps: int,
        rng: jax.Array,
        key_mask: jax.Array | None = None,
        *,
        start: int,
        sample: generation.Sample = generation.sample_symbols,
    ) -> jax.Array:
        """`attn_jax.generate` of targets: symbols [B, steps] after ``start``.

        Raises:
          ValueError: for a known symbol that there is not.
        """
        given, prompt = self._started(params, source, key_mask, start)
        return generation.generate(
            given,
            prompt,
            steps,
            rng,
            step=self.step,
            init=init_like(self.init, params),
            sample=sample,
        )

    def search(
        self,
        params: Any,
        source: jax.Array,
        steps: int,
        key_mask: jax.Array | None = None,
        *,
        start: int,
        end: int,
        num_beams: int = 4,
        length_penalty: float = 0.0,
    ) -> generation.Beams:
        """`attn_jax.beam_search` of targets, which ``start`` begins and ``end`` ends.

        The beams of a source read one memory.

        Raises:
          ValueError: for a known symbol that there is not.
        """
        given, prompt = self._started(params, source, key_mask, start)
        _checks.check_ids("end", np.asarray(end), self.num_target)
        return generation.beam_search(
            given,
            prompt,
            steps,
            step=self.step,
            init=init_like(self.init, params),
            end=end,
            num_beams=num_beams,
            length_penalty=length_penalty,
        )


def encoder_decoder_functions(
    model: EncoderDecoder,
) -> tuple[EncoderDecoderFunctions, Any]:
    """Splits a model, once, into pure functions and parameters.

    Args:
      model: a module; it is not changed.

    Returns:
      The functions, and the parameters as nested dictionaries of arrays; what learns
      without a gradient, an `AttentionState`, is among them.

    >>> model = EncoderDecoder(9, 7, dim=8, depth=1, num_heads=2, max_source=6,
    ...                        max_target=5, rngs=nnx.Rngs(0))
    >>> functions, params = encoder_decoder_functions(model)
    >>> source = jnp.zeros((2, 6), jnp.int32)
    >>> found = functions.search(params, source, 4, start=0, end=1, num_beams=3)
    >>> found.tokens.shape
    (2, 3, 4)
    """
    graphdef, *states = nnx.split(model, (nnx.Param, AttentionState), ...)
    variables, rest = states
    treedef = jax.tree.structure(variables)

    def merge(params: Any) -> EncoderDecoder:
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        return nnx.merge(graphdef, params, rest)

    def apply(
        params: Any,
        source: jax.Array,
        target: jax.Array,
        key_mask: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        rngs = None if dropout_rng is None else nnx.Rngs(dropout=dropout_rng)
        return merge(params)(
            source, target, key_mask, rng=rng, deterministic=rngs is None, rngs=rngs
        )

    @jax.jit
    def encode(
        params: Any, source: jax.Array, key_mask: jax.Array | None = None
    ) -> Memory:
        return merge(params).encode(source, key_mask)

    def step(
        params: Any, state: DecoderState, token: jax.Array
    ) -> tuple[DecoderState, jax.Array]:
        own, memory = params
        return merge(own).decoder.step(state, token, memory)

    @jax.jit
    def weights(
        params: Any,
        source: jax.Array,
        target: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> list[jax.Array]:
        module = merge(params)
        memory = module.encode(source, key_mask)
        return module.decoder.cross_weights(target, memory)

    functions = EncoderDecoderFunctions(
        apply,
        encode,
        step,
        model.decoder.init_state,
        weights,
        model.num_source,
        model.decoder.embed.num_embeddings,
    )
    return functions, nnx.to_pure_dict(variables)
