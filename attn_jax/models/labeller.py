"""Sequence labelling: a set of vectors in, one label a vector out.

The contestants of one story under one interface: a fully connected network for each
vector by itself, over a window of neighbours, a 1-D convolution, a bidirectional
recurrent network, and self-attention. All share input layer and head; padding changes
no result of any of them. With ``pool="mean"`` the labels of a whole sequence come from
one more reduction.

Letters: B batch, T length, K ids a token, F size of an input vector, D width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_jax.attention import _checks
from attn_jax.nn.encoder import Encoder, MlpBlock, zero_head
from attn_jax.nn.positional import make_positions
from attn_jax.nn.recurrent import run_cell, turned
from attn_jax.nn.state_space import StateSpace
from attn_jax.variant import Variant

__all__ = [
    "BODIES",
    "IdInput",
    "Labeller",
    "RecurrentBody",
    "StateSpaceBody",
    "TransformerBody",
    "VectorInput",
    "WindowBody",
    "ConvolutionBody",
]

DType = jax.typing.DTypeLike


def _where_real(x: jax.Array, key_mask: jax.Array) -> jax.Array:
    """Zeros at padding: [B, T, D]."""
    return jnp.where(key_mask[:, :, None], x, jnp.zeros((), x.dtype))


def _many(count: int, make: Callable[..., nnx.Module], *args: Any, **kw: Any) -> Any:
    """Several layers of one kind."""
    return nnx.List([make(*args, **kw) for _ in range(count)])


class IdInput(nnx.Module):
    """A token with K ids, such as word, suffix and shape, as the sum of their vectors.

    x = Σ_k E_k[id_k], one table E_k for each of the K.

    Args:
      sizes: number of rows of each table.
      dim: width D.

    >>> IdInput((10, 4), 8, rngs=nnx.Rngs(0))(jnp.zeros((2, 3, 2), jnp.int32)).shape
    (2, 3, 8)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dim: int,
        *,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.sizes = tuple(sizes)
        self.dtype = dtype
        # One table: one gather, and one scatter in the backward pass.
        self.embed = nnx.Embed(
            sum(self.sizes),
            dim,
            embedding_init=nnx.initializers.normal(1.0 / math.sqrt(len(self.sizes))),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids [B, T, K], of any integer dtype, to [B, T, D].

        Raises:
          ValueError: for another shape, or a known id that its table does not have. A
            traced one gives NaN.
          TypeError: for ids that are no integers.
        """
        if ids.ndim != 3 or ids.shape[-1] != len(self.sizes):
            raise ValueError(
                f"`inputs` must be ids [B, T, {len(self.sizes)}], one for each table, "
                f"but has shape {tuple(ids.shape)}."
            )
        ids = _checks.check_ids("inputs", ids, self.sizes)
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        rows = ids + jnp.asarray(starts, jnp.int32)[None, None]
        table = self.embed.embedding[...]
        table = table if self.dtype is None else table.astype(self.dtype)
        return _checks.rows_at(table, jnp.where(ids < 0, -1, rows)).sum(axis=2)


class VectorInput(nnx.Module):
    """Vectors such as speech frames, by one linear map.

    Args:
      features: size F of an input vector.
      dim: width D.

    >>> VectorInput(40, 8, rngs=nnx.Rngs(0))(jnp.zeros((2, 3, 40))).shape
    (2, 3, 8)
    """

    def __init__(
        self, features: int, dim: int, *, dtype: DType | None = None, rngs: nnx.Rngs
    ):
        self.features = features
        self.linear = nnx.Linear(features, dim, dtype=dtype, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        """Maps vectors [B, T, F] to [B, T, D]."""
        if vectors.ndim != 3 or vectors.shape[-1] != self.features:
            raise ValueError(
                f"`inputs` must be vectors [B, T, {self.features}], but has shape "
                f"{tuple(vectors.shape)}."
            )
        return self.linear(vectors)


def side_by_side(x: jax.Array, window: int, dilation: int = 1) -> jax.Array:
    """Each vector with its neighbours beside it, zeros beyond the ends.

    Args:
      x: [B, T, D].
      window: number w of neighbours on either side.
      dilation: how far apart neighbours are; 0 = each is the vector itself.

    Returns:
      [B, T, (2w + 1) · D].

    >>> side_by_side(jnp.arange(1.0, 4.0).reshape(1, 3, 1), 1)[0].tolist()
    [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 0.0]]
    """
    length, reach = x.shape[1], window * dilation
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    starts = (i * dilation for i in range(2 * window + 1))
    return jnp.concatenate([padded[:, i : i + length] for i in starts], axis=-1)


class WindowBody(nnx.Module):
    """A fully connected network over each vector and its w neighbours on either side.

    With w = 0 it sees every vector by itself. The number of parameters grows with w,
    and a window over the whole sequence has w = longest length − 1.

    Args:
      dim: width D.
      depth: number of residual blocks after the layer over the window.
      mlp_dim: hidden width of the blocks.
      window: w.
      dropout_rate: of hidden units while training.

    >>> body = WindowBody(8, depth=2, mlp_dim=16, window=3, rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        mlp_dim: int,
        window: int = 0,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        if window < 0:
            raise ValueError(f"`window` must be 0 or more, but is {window}.")
        self.window = window
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)
        self.mix = nnx.Linear((2 * window + 1) * dim, dim, dtype=dtype, rngs=rngs)
        mlp = dict(dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)
        self.blocks = _many(depth, MlpBlock, dim, mlp_dim, **mlp)
        self.norms = _many(depth + 1, nnx.LayerNorm, dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] with real tokens ``key_mask`` bool [B, T] to [B, T, D]."""
        seen = side_by_side(_where_real(self.norm(x), key_mask), self.window)
        x = x + self.mix(seen)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x), deterministic=deterministic, rngs=rngs)
        return self.norms[-1](x)


class ConvolutionBody(nnx.Module):
    """Residual blocks of a 1-D convolution and a position-wise network.

    Args:
      dim: width D.
      depth: number of blocks L.
      mlp_dim: hidden width of the position-wise networks.
      kernel: width K of a convolution, odd.
      dilations: of the L convolutions, by default 1 each: an output sees
        (K − 1)/2 · Σ dilations vectors on either side. One of dilation 0 sees its own
        vector K times: as many parameters and FLOPs, no wider field.
      dropout_rate: of hidden units while training.

    Raises:
      ValueError: for an even kernel, or dilations that are not L whole numbers ≥ 0.

    >>> body = ConvolutionBody(8, depth=2, mlp_dim=16, kernel=3, rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        mlp_dim: int,
        kernel: int = 5,
        dilations: Sequence[int] | None = None,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.dilations = (1,) * depth if dilations is None else tuple(dilations)
        if len(self.dilations) != depth or min(self.dilations, default=0) < 0:
            raise ValueError(
                f"`dilations` must be depth={depth} numbers of 0 or more, but is "
                f"{self.dilations}."
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"`kernel` must be odd and at least 1, but is {kernel}.")
        self.kernel = kernel
        common: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        # A convolution as one product over the window: XLA:CPU's own for one axis is
        # several times slower.
        self.convolutions = _many(depth, nnx.Linear, kernel * dim, dim, **common)
        self.blocks = _many(
            depth, MlpBlock, dim, mlp_dim, dropout_rate=dropout_rate, **common
        )
        self.convolution_norms = _many(depth, nnx.LayerNorm, dim, **common)
        self.mlp_norms = _many(depth, nnx.LayerNorm, dim, **common)
        self.norm = nnx.LayerNorm(dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] with real tokens ``key_mask`` bool [B, T] to [B, T, D]."""
        for dilation, norm, convolution, mlp_norm, block in zip(
            self.dilations,
            self.convolution_norms,
            self.convolutions,
            self.mlp_norms,
            self.blocks,
            strict=True,
        ):
            real = _where_real(norm(x), key_mask)
            seen = side_by_side(real, self.kernel // 2, dilation)
            x = x + jax.nn.gelu(convolution(seen))
            x = x + block(mlp_norm(x), deterministic=deterministic, rngs=rngs)
        return self.norm(x)


class RecurrentBody(nnx.Module):
    """Bidirectional recurrent layers of Flax's cells, run by `run_cell`.

    Each layer is ``x ← x + W [forward(norm(x)); backward(norm(x))]``.

    Args:
      dim: width D; each direction has D hidden units.
      depth: number of layers.
      cell: "gru" or "lstm".
      dropout_rate: of the layers' outputs while training.

    Reference: Cho et al., 2014, arXiv:1406.1078; Graves & Schmidhuber, 2005, framewise
    phoneme classification with bidirectional LSTM.

    >>> body = RecurrentBody(8, depth=1, rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        cell: Literal["gru", "lstm"] = "gru",
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        cells = {"gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}
        if cell not in cells:
            raise ValueError(f"`cell` must be 'gru' or 'lstm', but is {cell!r}.")

        def direction() -> nnx.RNN:
            return nnx.RNN(cells[cell](dim, dim, dtype=dtype, rngs=rngs), rngs=rngs)

        self.layers = nnx.List(
            [
                nnx.Bidirectional(direction(), direction(), rngs=rngs)
                for _ in range(depth)
            ]
        )
        common: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.norms = _many(depth + 1, nnx.LayerNorm, dim, **common)
        self.outs = _many(depth, nnx.Linear, 2 * dim, dim, **common)
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
        for norm, layer, out in zip(self.norms, self.layers, self.outs, strict=False):
            h, both = _where_real(norm(x), key_mask), cast(Any, layer)
            forward = run_cell(both.forward_rnn.cell, h)
            backward = run_cell(both.backward_rnn.cell, turned(h, lengths))
            h = jnp.concatenate([forward, turned(backward, lengths)], axis=-1)
            h = self.dropout(h, deterministic=deterministic, rngs=rngs)
            x = x + out(h)
        return self.norms[-1](x)


class TransformerBody(nnx.Module):
    """Self-attention, alternating with fully connected layers: `Encoder`.

    Args:
      dim, depth, num_heads, mlp_dim, attention, max_length, dropout_rate, dtype, rngs:
        see `Encoder`.
      positions: name of the position encoding, see `attn_jax.nn.positional`.
      position_options: its options, such as ``{"clip": 8}``.

    >>> body = TransformerBody(8, depth=1, num_heads=2, mlp_dim=16, max_length=5,
    ...                        rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        max_length: int,
        attention: str | Callable | Variant = "dot_product",
        positions: str = "sinusoidal",
        position_options: Mapping[str, Any] | None = None,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.encoder = Encoder(
            depth,
            dim,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            attention=attention,
            positions=make_positions(
                positions,
                dim=dim,
                num_heads=num_heads,
                depth=depth,
                max_length=max_length,
                rngs=rngs,
                **(position_options or {}),
            ),
            max_length=max_length,
            dropout_rate=dropout_rate,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps [B, T, D] with real tokens ``key_mask`` bool [B, T] to [B, T, D]."""
        return self.encoder(
            x, key_mask=key_mask, deterministic=deterministic, rngs=rngs
        )


class StateSpaceBody(nnx.Module):
    """Diagonal state spaces of both directions, S4D.

    Each layer is ``x ← x + state_space(norm(x))``, see `StateSpace`.

    Args:
      dim: width D.
      depth: number of layers.
      state_dim: N, numbers that a channel remembers.
      dropout_rate: of the layers' outputs while training.

    Reference: Gu et al., 2022, arXiv:2206.11893.

    >>> body = StateSpaceBody(8, depth=1, rngs=nnx.Rngs(0))
    >>> body(jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool)).shape
    (2, 5, 8)
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        state_dim: int = 64,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.layers = _many(depth, StateSpace, dim, state_dim=state_dim, **common)
        self.norms = _many(depth + 1, nnx.LayerNorm, dim, **common)
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
        for norm, layer in zip(self.norms, self.layers, strict=False):
            h = layer(_where_real(norm(x), key_mask))
            x = x + self.dropout(h, deterministic=deterministic, rngs=rngs)
        return self.norms[-1](x)


BODIES: Mapping[str, Callable[..., nnx.Module]] = {
    "window": WindowBody,
    "cnn": ConvolutionBody,
    "gru": RecurrentBody,
    "lstm": RecurrentBody,
    "s4d": StateSpaceBody,
    "transformer": TransformerBody,
}
"""What stands between input layer and head, by name."""


class Labeller(nnx.Module):
    """Input layer, body and head: labels for each vector, or for the whole sequence.

    Args:
      inputs: number of rows of the tables of ids (see `IdInput`), or the size F of the
        input vectors (see `VectorInput`).
      num_classes: number of labels.
      body: a key of `BODIES`: "window" (fully connected; ``window=0`` for each vector
        by itself), "cnn", "gru", "lstm", "s4d" or "transformer".
      dim: width D.
      pool: None for one label a vector; "mean" for one label a sequence, from the mean
        over its real vectors.
      max_length: the longest sequence; a longer one is an error.
      dropout_rate: of the body while training.
      **options: of the body, see its class.

    Raises:
      ValueError: for an unknown body or pool, or an option that the body has not.

    >>> model = Labeller(40, 6, body="window", dim=8, depth=1, mlp_dim=16, window=2,
    ...                  max_length=9, rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 9, 40)), jnp.ones((2, 9), bool)).shape
    (2, 9, 6)
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        num_classes: int,
        *,
        body: str,
        dim: int,
        max_length: int,
        pool: Literal["mean"] | None = None,
        dropout_rate: float = 0.0,
        dtype: DType | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if body not in BODIES:
            raise ValueError(
                f"`body` must be one of {', '.join(BODIES)}, but is {body!r}."
            )
        if pool not in (None, "mean"):
            raise ValueError(f"`pool` must be None or 'mean', but is {pool!r}.")
        self.max_length = max_length
        self.pool = pool
        common: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.input: nnx.Module
        if isinstance(inputs, int | np.integer):
            self.input = VectorInput(inputs, dim, **common)
        else:
            self.input = IdInput(inputs, dim, **common)
        if body in ("gru", "lstm"):
            options["cell"] = body
        if body == "transformer":
            options["max_length"] = max_length
        make = BODIES[body]
        # Of the class itself: that of its metaclass is (*args, **kwargs).
        names = inspect.signature(vars(make)["__init__"]).parameters
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise ValueError(f"options: the body {body!r} does not take {unknown}.")
        self.body = make(dim, dropout_rate=dropout_rate, **options, **common)
        self.dropout = nnx.Dropout(dropout_rate)
        self.head = zero_head(dim, num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        inputs: jax.Array,
        key_mask: jax.Array,
        *,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Maps ids [B, T, K] or vectors [B, T, F] to logits [B, T or none, classes].

        Arguments and errors are those of `features`; logits at padding mean nothing.
        """
        return self.head(
            self.features(inputs, key_mask, deterministic=deterministic, rngs=rngs)
        )

    def features(
        self,
        inputs: jax.Array,
        key_mask: jax.Array,
        *,
        pool: bool = True,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """What the head reads: [B, T, D], or [B, D] where the model pools.

        Args:
          inputs: ids or vectors, padded at the end.
          key_mask: bool [B, T], True = a real vector.
          pool: whether to pool, where the model does.
          deterministic: whether dropout is off.
          rngs: stream "dropout", where it is on.

        Raises:
          ValueError: for wrong shapes, an empty sequence, or one longer than
            ``max_length``.
        """
        if key_mask.shape != inputs.shape[:2] or key_mask.dtype != jnp.bool_:
            raise ValueError(
                f"`key_mask` must be bool [B, T] = {list(inputs.shape[:2])}, but is "
                f"{key_mask.dtype} {list(key_mask.shape)}."
            )
        length = inputs.shape[1]
        if not 1 <= length <= self.max_length:
            raise ValueError(
                f"`inputs` must have 1 to max_length={self.max_length} vectors a "
                f"sequence, but has {length}."
            )
        # Padding may hold anything: a row of zeros, or ids of 0, has finite gradients.
        x = self.input(_where_real(inputs, key_mask))
        x = self.dropout(x, deterministic=deterministic, rngs=rngs)
        x = self.body(x, key_mask, deterministic=deterministic, rngs=rngs)
        return self.pooled(x, key_mask) if pool and self.pool == "mean" else x

    def pooled(self, x: jax.Array, key_mask: jax.Array) -> jax.Array:
        """The mean [B, D] of features [B, T, D] over the real vectors."""
        count = jnp.maximum(key_mask.sum(axis=1, keepdims=True), 1)
        return _where_real(x, key_mask).sum(axis=1) / count.astype(x.dtype)
