"""How an encoder learns the order of its tokens: one small module a kind, by name.

| name | where the order enters | parameters |
|---|---|---|
| "none" | nowhere | 0 |
| "sinusoidal" | a fixed table, added to the input | 0 |
| "learned" | a learned table, added to the input | max_length · D |
| "shaw" | learned vectors per clipped offset, every block | L · 2(2·clip + 1) · D |
| "floater" | b(t) added to queries, keys and values | 6D · F + 2F + 3D + L · 3D |
| "floater_input" | p(t), added to the input | 2D · F + 2F + 2D |
| "sinusoidal_floater" | a sinusoid; b(t) as above | 2D · F + 2F + 2D + L · 3D |
| "rotation_flow" | p(t), added to the input | 2D · F + F + 2.5D |
| "rope" | a rotation of queries and keys, every block | 0 |
| "alibi" | a fixed bias −m · |t − s| of the scores, every block | 0 |
| "t5" | a learned bias of the scores, the same in all blocks | N · num_buckets |

All but "learned" take sequences longer than those of training.

Letters: B batch, T positions, D = N · H width, N heads of size H, L blocks, F units of
FLOATER's hidden layer.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attn_jax.attention.softmax import dot_product
from attn_jax.nn._positions import Positions, _PositionedFn, shared_tables
from attn_jax.nn.attention_fn import AttentionFn, ModuleAttentionFn, as_attention_fn
from attn_jax.positions import (
    _NEAR,
    _rotary,
    alibi,
    alibi_slopes,
    floater,
    floater_init,
    frequencies,
    learned_init,
    sinusoidal_1d,
    t5_bias,
)
from attn_jax.variant import require

__all__ = [
    "LearnedPositions",
    "POSITIONS",
    "Positions",
    "make_positions",
    "shared_tables",
    "num_parameters",
]


class LearnedPositions(nnx.Module):
    """Adds a learned table to the embeddings, y[t] = x[t] + P[t].

    Args:
      length: largest number of positions it will see.
      dim: size of the embedding.
      stddev: standard deviation of the first values.
      rngs: `nnx.Rngs` with a `params` (or default) stream.
      param_dtype: dtype of the table; it is cast to the input's when added.

    Reference: Gehring et al., 2017, arXiv:1705.03122, section 3.1.

    >>> add = LearnedPositions(5, 3, rngs=nnx.Rngs(0))
    >>> add(jnp.zeros((2, 4, 3))).shape
    (2, 4, 3)
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        stddev: float = 0.02,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.table = nnx.Param(
            learned_init(rngs.params(), length, dim, stddev=stddev, dtype=param_dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Add the first T rows of the table to `x[..., T, dim]`."""
        table = self.table[...]
        length, dim = table.shape
        if x.ndim < 2 or x.shape[-1] != dim or x.shape[-2] > length:
            raise ValueError(
                f"`x` must be [..., T, dim] with dim={dim} and T ≤ {length} (that of "
                f"the table), but has shape {x.shape}."
            )
        rows = table[: x.shape[-2]].astype(x.dtype)
        return x + rows.reshape((1,) * (x.ndim - 2) + rows.shape)


class _Sinusoidal(Positions):
    """Adds the fixed table of `sinusoidal_1d` to the input.

    Args:
      max_wavelength: see `sinusoidal`.
    """

    name = "sinusoidal"

    def __init__(self, *, max_wavelength: float = 10_000.0, **common: Any) -> None:
        super().__init__(**common)
        self.max_wavelength = max_wavelength
        if self.dim % 2:
            raise ValueError(
                f"positions 'sinusoidal' need an even `dim`, but it is {self.dim}."
            )

    def embed(self, x: jax.Array) -> jax.Array:
        table = sinusoidal_1d(
            x.shape[1], self.dim, max_wavelength=self.max_wavelength, dtype=x.dtype
        )
        return x + table[None]


class _Learned(Positions):
    """Adds a learned table, `LearnedPositions`, to the input.

    Args:
      stddev: standard deviation of its first values.
    """

    name = "learned"

    def __init__(self, *, stddev: float = 0.02, **common: Any) -> None:
        super().__init__(**common)
        max_length = common["max_length"]
        if max_length is None:
            raise ValueError(
                "positions 'learned' need `max_length`, the longest sequence."
            )
        self.max_length = max_length
        self.add = LearnedPositions(
            max_length, self.dim, stddev=stddev, rngs=common["rngs"]
        )

    def embed(self, x: jax.Array) -> jax.Array:
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"the sequence has length {x.shape[1]}, but positions 'learned' were "
                f"made with max_length={self.max_length} and know no others: make them "
                "longer, or use a kind that extrapolates."
            )
        return self.add(x)


class _Shaw(Positions):
    """Has every block's attention be `shaw`, with tables of its own.

    Args:
      clip: the largest offset that has a vector of its own.
    """

    name = "shaw"

    def __init__(self, *, clip: int = 16, **common: Any) -> None:
        super().__init__(**common)
        self.layers = nnx.List(
            [
                as_attention_fn(
                    "shaw",
                    num_heads=self.num_heads,
                    head_dim=self.head_dim,
                    rngs=common["rngs"],
                    clip=clip,
                )
                for _ in range(self.depth)
            ]
        )

    def attention_fn(
        self, block_index: int, inner: AttentionFn | ModuleAttentionFn
    ) -> AttentionFn | ModuleAttentionFn | _PositionedFn:
        self._check_block(block_index)
        if inner.variant.fn is not dot_product:
            raise ValueError(
                "positions 'shaw' are an attention of their own, which stands for "
                "plain 'dot_product' alone, but the block's attention is "
                f"{inner.variant.name!r}; 'rope' and 'floater' go with all."
            )
        return self.layers[block_index]


class _Floater(Positions):
    """Adds b_q(t), b_k(t), b_v(t) to every block's queries, keys and values.

    The three are one state of `floater`, of size 3D. All blocks share its flow θ, and
    each has a start of its own (equation 10 of the paper).

    Args:
      hidden_dim: size F of the flow's hidden layer; None means D.
      scale: see `floater_init`; at 0 the model begins as one without positions.
      step, adjoint, activation, solver, steps_per_position: see `floater`.
    """

    name = "floater"
    in_blocks = True

    def __init__(
        self,
        *,
        hidden_dim: int | None = None,
        scale: float = 0.0,
        step: float = 0.1,
        adjoint: Literal["direct", "adjoint"] = "direct",
        activation: Literal["tanh", "relu"] = "tanh",
        solver: Literal["heun", "bosh3", "tsit5"] = "heun",
        steps_per_position: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        size, num_starts = (
            (3 * self.dim, self.depth) if self.in_blocks else (self.dim, 1)
        )
        flow = floater_init(
            common["rngs"].params(),
            size,
            hidden_dim=self.dim if hidden_dim is None else hidden_dim,
            scale=scale,
        )
        del flow["out_time"]
        self.start = nnx.Param(jnp.tile(flow.pop("start")[None], (num_starts, 1)))
        self.flow = nnx.Dict({name: nnx.Param(leaf) for name, leaf in flow.items()})
        self.step = step
        self.adjoint = adjoint
        self.activation = activation
        self.solver = solver
        self.steps_per_position = steps_per_position
        floater(flow | {"start": self.start[0]}, 1, **self._how())  # for its errors

    def _how(self) -> dict[str, Any]:
        names = ("step", "adjoint", "activation", "solver", "steps_per_position")
        return {name: getattr(self, name) for name in names}

    def tables(self, length: int) -> jax.Array:
        start = self.start[...]
        params = {name: leaf[...] for name, leaf in self.flow.items()}
        params["start"] = start[0]
        return floater(params, length, start=start, **self._how())

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        length, *head = query.shape[-3:]
        offsets = tables[block_index].astype(query.dtype).reshape(length, 3, *head)
        offsets = offsets.reshape((1,) * (query.ndim - 3) + offsets.shape)
        return {
            name: array + offsets[..., index, :, :]
            for index, (name, array) in enumerate(
                (("query", query), ("key", key), ("value", value))
            )
        }


class _FloaterInput(_Floater):
    """Adds p(t), the codes of `floater`, to the input; options as "floater"."""

    name = "floater_input"
    in_blocks = False

    def embed(self, x: jax.Array) -> jax.Array:
        return x + self.tables(x.shape[1]).astype(x.dtype)


class _SinusoidalFloater(_Sinusoidal):
    """Adds the sinusoid to the input, and a flow to queries, keys and values.

    This is FLOATER as its authors' code has it: one flow h of size D for b_q(t),
    b_k(t) and b_v(t) of all blocks, each with a start of its own; linear, ReLU, linear;
    time enters both layers; .01 of it passes from one position to the next; solved by
    the classical method of order 4. Theirs makes five steps a position, which is the
    same up to rounding, and lets the flow learn in one update of 400, which is not
    done here.

    Args:
      hidden_dim: size F of the flow's hidden layer; None means D.
      scale: of the flow's last layer and of the starts, over what the authors' code
        draws; at 0 the model begins as one with the sinusoid alone.
      adjoint, steps_per_position: see `floater`.
    """

    name = "sinusoidal_floater"
    in_blocks = True

    def __init__(
        self,
        *,
        hidden_dim: int | None = None,
        scale: float = 1.0,
        adjoint: Literal["direct", "adjoint"] = "direct",
        steps_per_position: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        rngs, size = common["rngs"], (self.depth, 3, self.dim)
        flow = floater_init(rngs.params(), self.dim, hidden_dim=hidden_dim, scale=scale)
        del flow["start"]
        reach = scale * (6 / ((3 + self.depth) * self.dim)) ** 0.5
        start = jax.random.uniform(rngs.params(), size, minval=-reach, maxval=reach)
        self.start = nnx.Param(start)
        self.flow = nnx.Dict({name: nnx.Param(leaf) for name, leaf in flow.items()})
        self.adjoint = adjoint
        self.steps_per_position = steps_per_position
        jax.eval_shape(lambda: self.tables(2))  # for its errors

    def tables(self, length: int) -> jax.Array:
        start = self.start[...]
        return floater(
            {name: leaf[...] for name, leaf in self.flow.items()} | {"start": start},
            length,
            step=0.01,
            start=start,
            adjoint=self.adjoint,
            activation="relu",
            solver="rk4",
            steps_per_position=self.steps_per_position,
        )

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        added = tables[block_index].astype(query.dtype)
        added = added.reshape(3, *(1,) * (query.ndim - 3), *query.shape[-3:])
        return {
            "query": query + added[0],
            "key": key + added[1],
            "value": value + added[2],
        }


class _RotationFlow(Positions):
    """Adds p(t), which follows an autonomous flow from the sinusoid's first row.

    p' = ω × p + W_out tanh(W_state p + b) + b_out: at first W_out is zero and ω turns
    each pair as the sinusoid does, so that p(t) is the sinusoid; both are learned. No
    time enters, and what is added to the rotation is bounded.

    Args:
      hidden_dim: size F of the hidden layer; None means D.
      max_wavelength: of the sinusoid it starts as.
    """

    name = "rotation_flow"

    def __init__(
        self,
        *,
        hidden_dim: int | None = None,
        max_wavelength: float = 10_000.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        flow = floater_init(common["rngs"].params(), self.dim, hidden_dim=hidden_dim)
        del flow["time"], flow["out_time"]
        rates = frequencies(self.dim, max_wavelength)
        flow["rates"] = jnp.asarray(rates, jnp.float32)
        flow["start"] = sinusoidal_1d(1, self.dim)[0]
        self.flow = nnx.Dict({name: nnx.Param(leaf) for name, leaf in flow.items()})

    def embed(self, x: jax.Array) -> jax.Array:
        # Four steps a position: the fastest pair turns by one radian in that time.
        codes = floater(
            {name: leaf[...] for name, leaf in self.flow.items()},
            x.shape[1],
            step=1.0,
            solver="rk4",
            steps_per_position=4,
        )
        return x + codes[None].astype(x.dtype)


class _Rope(Positions):
    """Turns queries and keys of every block with `rotary`.

    Args:
      max_wavelength: see `rotary`.
    """

    name = "rope"
    in_blocks = True

    def __init__(self, *, max_wavelength: float = 10_000.0, **common: Any) -> None:
        super().__init__(**common)
        if self.head_dim % 2:
            raise ValueError(
                "positions 'rope' need an even head size dim / num_heads, but it is "
                f"{self.dim} / {self.num_heads} = {self.head_dim}."
            )
        self.max_wavelength = max_wavelength

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        length = query.shape[-3]
        turn = functools.partial(
            _rotary,
            positions=jnp.arange(length, dtype=jnp.int32),
            max_wavelength=self.max_wavelength,
            near=length <= _NEAR,
        )
        of_heads = jax.vmap(jax.vmap(turn, in_axes=1, out_axes=1))

        def rotated(x: jax.Array) -> jax.Array:
            return of_heads(x.reshape(-1, *x.shape[-3:])).reshape(x.shape)

        return {"query": rotated(query), "key": rotated(key), "value": value}


class _Biased(Positions):
    """Adds a bias to the scores, [1, N, T, T] of `tables`, the same in every block."""

    in_blocks = True

    def attention_fn(
        self, block_index: int, inner: AttentionFn | ModuleAttentionFn
    ) -> AttentionFn | ModuleAttentionFn | _PositionedFn:
        try:
            require(inner.variant, "bias")
        except ValueError as error:
            raise ValueError(
                f"positions {self.name!r} add a bias to the scores: {error}"
            ) from None
        return super().attention_fn(block_index, inner)

    def operands(
        self,
        tables: Any,
        block_index: int,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> dict[str, Any]:
        return {"query": query, "key": key, "value": value, "bias": tables}


class _Alibi(_Biased):
    """Adds −m_h · |t − s| to the scores of head h, `alibi` with `alibi_slopes`."""

    name = "alibi"

    def tables(self, length: int) -> jax.Array:
        slopes = alibi_slopes(self.num_heads)
        return jax.vmap(lambda slope: alibi(length, slope=slope))(slopes)[None]


class _T5(_Biased):
    """Adds a learned bias per bucket of offsets, `t5_bias`, one table for all blocks.

    The scores stay scaled by 1/√H, unlike in T5.

    Args:
      num_buckets: number of buckets, both directions together.
      max_distance: from here on all distances share the last bucket.
      stddev: standard deviation of the first values; None means 1/√D.
    """

    name = "t5"

    def __init__(
        self,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        stddev: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.max_distance = max_distance
        stddev = self.dim**-0.5 if stddev is None else stddev
        rng = common["rngs"].params()
        self.table = nnx.Param(
            stddev * jax.random.normal(rng, (self.num_heads, num_buckets))
        )
        jax.eval_shape(lambda: self.tables(1))  # for its errors

    def tables(self, length: int) -> jax.Array:
        def of_head(table: jax.Array) -> jax.Array:
            return t5_bias(table, length, max_distance=self.max_distance)

        return jax.vmap(of_head)(self.table[...])[None]


_KINDS: Mapping[str, type[Positions]] = {
    kind.name: kind
    for kind in (
        Positions,
        _Sinusoidal,
        _Learned,
        _Shaw,
        _Floater,
        _FloaterInput,
        _SinusoidalFloater,
        _RotationFlow,
        _Rope,
        _Alibi,
        _T5,
    )
}

POSITIONS: tuple[str, ...] = tuple(_KINDS)
"""The names that `make_positions` takes."""


def make_positions(
    name: str,
    *,
    dim: int,
    num_heads: int,
    depth: int,
    max_length: int | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> Positions:
    """Makes a kind of positions by its name, for `Encoder(..., positions=...)`.

    Args:
      name: a name in `POSITIONS`; the table on top of this module tells them apart.
      dim: width D of the encoder.
      num_heads: its number of heads N.
      depth: its number of blocks L.
      max_length: the longest sequence T; "learned" needs it.
      **options: of the kind: `max_wavelength` ("sinusoidal", "rope"), `stddev`
        ("learned", "t5", "floater", "floater_input"), `clip` ("shaw"), `num_buckets`
        and `max_distance` ("t5"), `hidden_dim`, `step`, `adjoint` and the others of
        `floater` ("floater", "floater_input").

    Returns:
      A module with `embed(x[B, T, D]) -> [B, T, D]`, for the input of the encoder, and
      `attention_fn(block_index, inner)`, for the attention of each block.

    Raises:
      ValueError: for an unknown name, or sizes that the kind cannot take.
      TypeError: for an option that the kind does not have.

    References:
      Vaswani et al., arXiv:1706.03762 (sinusoidal); Gehring et al., arXiv:1705.03122
      (learned); Shaw et al., arXiv:1803.02155; Liu et al., arXiv:2003.09229 (FLOATER);
      Su et al., arXiv:2104.09864 (RoPE); Press et al., arXiv:2108.12409 (ALiBi);
      Raffel et al., arXiv:1910.10683 (T5).

    >>> positions = make_positions("t5", dim=8, num_heads=2, depth=3, rngs=nnx.Rngs(0))
    >>> num_parameters(positions)
    64
    """
    if name not in _KINDS:
        raise ValueError(
            f"`name` must be one of {', '.join(POSITIONS)}, but is {name!r}."
        )
    kind = _KINDS[name]
    known = _options(kind)
    for option in options:
        if option not in known:
            raise TypeError(
                f"positions {name!r} take no option `{option}`; they take: "
                f"{', '.join(known) or 'none'}."
            )
    return kind(
        dim=dim,
        num_heads=num_heads,
        depth=depth,
        max_length=max_length,
        rngs=rngs,
        **options,
    )


def _options(kind: type[Positions]) -> list[str]:
    """What a kind takes beyond what all take."""
    common = inspect.signature(vars(Positions)["__init__"]).parameters
    # Of the class itself: that of its metaclass is (*args, **kwargs).
    own = inspect.signature(kind.__init__).parameters
    return [name for name in own if name not in (*common, "common")]


def num_parameters(module: nnx.Module) -> int:
    """Counts the numbers in the parameters of a module, shared ones once.

    >>> num_parameters(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    16
    """
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)
