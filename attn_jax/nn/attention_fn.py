"""Any attention variant inside Flax's own multi-head layers, nnx and linen.

`as_attention_fn` turns a variant into what `flax.nnx.MultiHeadAttention` and
`flax.linen.MultiHeadDotProductAttention` take as `attention_fn`. The projections,
the decoding cache and the parameters stay Flax's; only the attention is ours.

What the two layers hand over, and what becomes of it:

* `mask`: bool, or the {0, 1} numbers that `make_causal_mask`, `combine_masks` and
  the decoding cache of Flax produce (float32 unless told otherwise). Numbers are
  converted here and nowhere else in this package: 1 = attend. Other numbers, such as
  an additive mask of 0 and −∞, are an error; where their values are not known while
  tracing, they turn the whole output into NaN rather than into a wrong answer.
* `dropout_rate`, `dropout_rng`, `deterministic`, `broadcast_dropout`: dropout on the
  attention weights where the variant can, else an error. `broadcast_dropout=True`
  (Flax's default) drops the same weights in every example and head. It says nothing
  about what a random variant *is*, such as its random features: that is drawn once a
  head, for all examples.
* `dtype`: query, key, value and the variant's parameters are cast to it. The softmax
  runs in float32 whatever it is, so `force_fp32_for_softmax` holds always.
* `precision`: the precision of every matrix product of the variant, forward and
  backward. (With a precision, derivatives are reverse-mode only.)
* `module` (from `sow_weights=True`): the weights are sown as Flax sows them: with
  `force_fp32_for_softmax`, which linen has, in float32, else in the dtype computed in.
* `is_causal`: from nnx. linen has no such argument; give it to `as_attention_fn`. While
  a layer decodes, one query comes with all keys of the cache, and a mask that says
  which of them came before: that is what makes it causal, and nothing is added.
* whether it is training: `deterministic`, which Flax's layers do not pass on where they
  have no dropout. There `layer.train()` and `layer.eval()` of nnx say it (or
  `nnx.view(layer, deterministic=...)`), in linen whether the collection
  `attention_state` is mutable, and in both `with training(True):` around the call,
  which goes before all and is what the models here do. In training calls a variant's
  untrained state learns (`Variant.update`), and noise for training is on.
* Custom einsums (`qk_attn_weights_einsum`, ...) are refused.

One difference from Flax is meant: a query that may attend to nothing gives zeros
here, and the mean of all values there.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.errors import TraceContextError
from jax.typing import DTypeLike

from attn_jax.attention._scores import score_dtype
from attn_jax.attention.softmax import dot_product
from attn_jax.exact import Implementation, dot_product_attention
from attn_jax.multihead import (
    MapHeads,
    multi_head,
    multi_head_init,
    multi_head_update,
    state_leaves,
)
from attn_jax.nn._operands import (
    bool_mask,
    check_unambiguous,
    to_4d,
    with_precision,
)
from attn_jax.variant import Variant, require, resolve

__all__ = [
    "AttentionFn",
    "AttentionState",
    "LinenAttentionFn",
    "ModuleAttentionFn",
    "as_attention_fn",
    "as_linen_attention_fn",
    "training",
]

VariantLike = str | Callable[..., jax.Array] | Variant

_STATE = "attention_state"  # the collection of untrained state in linen

_TRAINING: contextvars.ContextVar[bool | None] = contextvars.ContextVar(
    "attn_jax_training", default=None
)


@contextlib.contextmanager
def training(on: bool) -> Iterator[None]:
    """Says to the attention of Flax's layers whether the calls inside are training.

    Flax's multi-head layers tell it by `deterministic` alone, and pass that on only if
    they have dropout. It is read while a call is traced.

    Args:
      on: whether untrained state learns, and noise for training is on.

    >>> with training(True):
    ...     pass  # out = layer(x)
    """
    token = _TRAINING.set(on)
    try:
        yield
    finally:
        _TRAINING.reset(token)


class AttentionState(nnx.Variable):
    """What a variant learns without a gradient, such as centroids: no `nnx.Param`.

    It moves in training calls, by `Variant.update`, as the statistics of `BatchNorm`
    do; optimisers of `nnx.Param` do not see it. Split it off by its type:
    `nnx.split(model, nnx.Param, AttentionState, ...)`.
    """


def _check_implementation(variant: Variant, implementation: str | None) -> None:
    """Checks that a whole-array implementation can stand for the variant."""
    if implementation is None:
        return
    known = ("auto", *get_args(Implementation))
    if implementation not in known:
        raise ValueError(
            f"`implementation` must be None or one of {', '.join(known)}, but is "
            f"{implementation!r}."
        )
    if variant.base is not dot_product:
        raise ValueError(
            "`implementation` chooses how 'dot_product' is computed; attention variant "
            f"{variant.name!r} has one way alone, so leave it out."
        )
    for name in variant.options:
        if name not in ("scale", "is_causal"):
            raise ValueError(
                f"implementation={implementation!r} takes the options scale and "
                f"is_causal alone, not `{name}`; leave one of the two out."
            )


def _identity_values(key: jax.Array) -> jax.Array:
    """Values [B, S, K, S] for keys [B, S, K, H] for which weights come out."""
    batch, length, num_kv_heads, _ = key.shape
    identity = jnp.eye(length, dtype=key.dtype)[None, :, None, :]
    return jnp.broadcast_to(identity, (batch, length, num_kv_heads, length))


def _cast(leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A parameter in a dtype; integers stay what they are."""
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


class _FlaxCall:
    """`__call__` with the arguments of Flax's `dot_product_attention`, written once."""

    variant: Variant
    map_heads: MapHeads
    implementation: Implementation | Literal["auto"] | None = None
    deterministic: bool | None = None

    def _keep(self, state: Mapping[str, Any]) -> None:
        """Takes over what untrained state has become."""
        raise AssertionError("as_attention_fn has seen to it")

    def _trains(self, deterministic: bool, dropout_rate: float) -> bool:
        """Whether a call is one of training, as far as it is said."""
        said = _TRAINING.get()
        if said is not None:
            return said
        if dropout_rate == 0.0 and self.deterministic is not None:
            return not self.deterministic  # Flax would say True whatever was asked
        return not deterministic

    def _head_params(self, num_heads: int, head_dim: int) -> Any:
        """Parameters with leading axis N, or None."""
        return None

    def _next_rng(self, dropout_rng: jax.Array | None) -> jax.Array:
        """A key for a variant that is random even without dropout."""
        raise AssertionError("as_attention_fn has seen to it")

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: nnx.Module | linen.Module | None = None,
        *,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Any] | None = None,
        qk_attn_weights_einsum: Callable[..., Any] | None = None,
        attn_weights_value_einsum: Callable[..., Any] | None = None,
    ) -> jax.Array:
        """Attention on whole arrays, called by the Flax layer.

        Args:
          query: [batch..., T, N, H].
          key: [batch..., S, K, H].
          value: [batch..., S, K, V].
          bias: broadcastable to [batch..., N, T, S], or None.
          mask: broadcastable to [batch..., N, T, S], bool or {0, 1}, or None. One with
            fewer axes must fit in one way alone.
          broadcast_dropout: whether all examples and heads drop the same weights.
          dropout_rng: random key for dropout.
          dropout_rate: fraction of the weights to drop.
          deterministic: whether dropout is off.
          dtype: dtype to compute in; None takes that of the arrays.
          precision: precision of the matrix products; None takes JAX's setting.
          module: Flax module that the weights are sown into, or None.
          is_causal: whether query t attends only to keys s ≤ t, aligned at the top
            left, as Flax does it. One query with a mask and more keys than one is a
            decoding layer's, whose mask says it all.
          force_fp32_for_softmax: the softmax is in float32 whether asked or not; if
            asked, the weights are sown so as well.
          einsum_dot_general: must be None.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.

        Returns:
          [batch..., T, N, V].

        Raises:
          ValueError: on what the variant cannot honour, and on wrong shapes.
          TypeError: on wrong dtypes.
        """
        variant = self.variant
        for name, given in (
            ("einsum_dot_general", einsum_dot_general),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum),
            ("attn_weights_value_einsum", attn_weights_value_einsum),
        ):
            if given is not None:
                raise ValueError(
                    f"attention variants of attn_jax take no `{name}`; leave it out of "
                    "the Flax layer, or use Flax's own attention there."
                )
        if query.ndim < 3:
            raise ValueError(
                f"`query` must be [batch..., T, N, H], but has shape {query.shape}."
            )
        batch = query.shape[:-3]
        for name, array in (("key", key), ("value", value)):
            if array.ndim != query.ndim or array.shape[:-3] != batch:
                raise ValueError(
                    f"`{name}` must have the batch sizes {batch} of `query`, but has "
                    f"shape {array.shape} (query: {query.shape})."
                )
        if dtype is None:
            dtype = jnp.result_type(query, key, value)
        operands: dict[str, Any] = {
            name: array.astype(dtype).reshape(math.prod(batch), *array.shape[-3:])
            for name, array in (("query", query), ("key", key), ("value", value))
        }
        is_mask = None
        if bias is not None:
            operands["bias"] = to_4d("bias", bias, batch)
        if mask is not None:
            mask, is_mask = bool_mask(mask)
            check_unambiguous(mask, query)
            operands["mask"] = to_4d("mask", mask, batch)
        params = self._head_params(*query.shape[-2:])
        if params is not None:
            operands["params"] = jax.tree.map(lambda leaf: _cast(leaf, dtype), params)
        trains = self._trains(deterministic, dropout_rate)

        always = variant.options.get("is_causal", False)
        options: dict[str, Any] = {"is_causal": bool(always or is_causal)}
        num_queries, num_keys = query.shape[-3], key.shape[-3]
        masked = mask is not None and mask.shape[-1] == num_keys
        if options["is_causal"] and masked and num_queries == 1 < num_keys:
            # A step of a decoding layer. Aligned at the top left it would see key 0.
            options["is_causal"] = False
            if always:
                variant = variant.bind(is_causal=False)
        elif always and num_queries < num_keys:
            raise ValueError(
                f"is_causal=True was given for every call, but here T={num_queries} "
                f"queries meet S={num_keys} keys, and which keys came before them is "
                "not known: leave `is_causal` out, and give a mask [T, S] that says so."
            )
        drops = not deterministic and dropout_rate > 0.0
        if drops:
            require(variant, "dropout")
            if self.implementation is not None:
                raise ValueError(
                    f"implementation={self.implementation!r} cannot drop attention "
                    "weights; leave it out of as_attention_fn, or set dropout_rate=0."
                )
            if dropout_rng is None:
                raise ValueError(
                    f"dropout_rate={dropout_rate} needs `dropout_rng`, or "
                    "deterministic=True for evaluation."
                )
        # A variant that is random by nature draws once; its weights, where they are
        # sown, come from the same draw as its output. One that can do without, as by
        # noise for training, does without where all is deterministic.
        if variant.stochastic and (variant.needs("rng") or trains):
            operands["rng"] = self._next_rng(dropout_rng if drops else None)
        if drops:
            operands["dropout_rng"] = dropout_rng

        def attend(options: Mapping[str, Any], operands: Any) -> Any:
            return multi_head(variant, map_heads=self.map_heads)(
                **operands, **options, broadcast_dropout=broadcast_dropout
            )

        def run(call: Callable[[Any], jax.Array]) -> jax.Array:
            out = with_precision(call, precision)(operands)
            if is_mask is not None:
                out = jnp.where(is_mask, out, jnp.asarray(jnp.nan, out.dtype))
            return out.reshape(*batch, *out.shape[1:])

        def fast(operands: Any) -> jax.Array:
            how = None if self.implementation == "auto" else self.implementation
            how_said = {**variant.options, **options, "implementation": how}
            return dot_product_attention(**operands, **how_said)

        if module is not None:
            # As in Flax, what is sown are the weights before dropout.
            require(variant, "value_dim")
            revealing = dict(options)

            def reveal(operands: Any) -> Any:
                if force_fp32_for_softmax:  # nothing is rounded on the way out
                    wide = score_dtype(jnp.dtype(dtype))
                    operands = jax.tree.map(lambda leaf: _cast(leaf, wide), operands)
                identity = _identity_values(operands["key"])
                return attend(revealing, {**operands, "value": identity})

            weights = jnp.swapaxes(run(reveal), -2, -3)
            if isinstance(module, nnx.Module):
                module.sow(nnx.Intermediate, "attention_weights", weights)
            else:
                module.sow("intermediates", "attention_weights", weights)
        if self.implementation is not None:
            return run(fast)
        if drops:
            options["dropout_rate"] = dropout_rate
        out = run(functools.partial(attend, options))
        if variant.update is not None and trains:
            seen = (operands["query"], operands["key"], operands.get("mask"))
            self._keep(multi_head_update(variant, params, *seen))
        return out


@dataclasses.dataclass(frozen=True)
class AttentionFn(_FlaxCall):
    """A variant without parameters as `attention_fn` of a Flax layer, nnx or linen.

    Hashable and comparable, so that Flax can treat it as static. Made by
    `as_attention_fn`.

    Attributes:
      variant: the record of the variant, with its options bound.
      map_heads: see `attn_jax.multi_head`.
      implementation: see `as_attention_fn`.
    """

    variant: Variant
    map_heads: MapHeads = "auto"
    implementation: Implementation | Literal["auto"] | None = None


@dataclasses.dataclass(frozen=True)
class _Restore:
    """Parameters of N heads from the variables of `head_params`."""

    names: tuple[str, ...]
    tree: Any

    def __call__(self, params: Mapping[str, nnx.Variable]) -> Any:
        return jax.tree.unflatten(self.tree, [params[name][...] for name in self.names])


def head_params(
    variant: Variant,
    num_heads: int,
    head_dim: int,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
) -> tuple[nnx.Dict, _Restore]:
    """A variant's parameters for N heads as variables, and what makes a pytree of them.

    Those that are trained are `nnx.Param`, those that `Variant.update` moves are
    `AttentionState`, and an index or the like is neither.
    """
    params = multi_head_init(variant, rngs.params(), num_heads, head_dim)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    state = state_leaves(variant, params, num_heads, head_dim)
    kept: dict[str, nnx.Variable] = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.partition("/")[0] in state:
            kept[name] = AttentionState(_cast(leaf, dtype))
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            kept[name] = nnx.Param(leaf.astype(dtype))
        else:
            kept[name] = nnx.Variable(leaf)
    return nnx.Dict(kept), _Restore(tuple(kept), tree)


class ModuleAttentionFn(_FlaxCall, nnx.Module):
    """A variant with parameters or randomness of its own, as a part of an nnx layer.

    Its parameters are `nnx.Param`s under `params`, each leading with the number of
    heads N, so that `nnx.split` of the layer finds them; those that `Variant.update`
    moves are `AttentionState`. Made by `as_attention_fn`.

    Args:
      variant: the record of the variant, with its options bound.
      map_heads: see `attn_jax.multi_head`.
      num_heads: N.
      head_dim: H.
      rngs: streams `params` and, for a random variant, `attention` (or a default).
      param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        variant: Variant,
        map_heads: MapHeads = "auto",
        *,
        num_heads: int,
        head_dim: int,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.variant = variant
        self.map_heads = map_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.params, self.restore = head_params(
            variant, num_heads, head_dim, rngs, param_dtype
        )
        self.rngs = rngs.attention.fork() if variant.stochastic else None
        self.deterministic = None

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
          deterministic: whether calls are no training; see `training`.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _keep(self, state: Mapping[str, Any]) -> None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(state)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            self.params[name][...] = leaf

    def _head_params(self, num_heads: int, head_dim: int) -> Any:
        if (num_heads, head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"as_attention_fn was told num_heads={self.num_heads}, "
                f"head_dim={self.head_dim}, but the layer has {num_heads} heads of "
                f"size {head_dim} (head_dim is qkv_features // num_heads)."
            )
        return self.restore(self.params)

    def _next_rng(self, dropout_rng: jax.Array | None) -> jax.Array:
        stream = self.rngs
        assert stream is not None
        try:
            key = stream()
        except TraceContextError:
            # `nnx.merge` inside jit or grad makes modules of its own, but keeps the
            # variables that it is given, which an inner trace may not change. So a
            # copy counts on. (In a module from outside, this line raises as well.)
            stream.count = stream.count.copy()
            key = stream()
        if dropout_rng is not None:
            # New at each call, even where the state of the stream is not carried on.
            key = jax.random.fold_in(key, jax.random.bits(dropout_rng))
        return key


class LinenAttentionFn(_FlaxCall, linen.Module):
    """A variant as a part of a linen layer, with its parameters in `params`.

    They stand under `attention_fn/head` of the layer, each leading with the number of
    heads N. What `Variant.update` moves stands there in the collection
    `attention_state`: it is to be mutable in training, as `batch_stats` are. A random
    variant draws from the stream `attention`. Made by `as_linen_attention_fn`.

    Attributes:
      variant: the record of the variant, with its options bound.
      map_heads: see `attn_jax.multi_head`.
      param_dtype: dtype of the parameters.
    """

    variant: Variant
    map_heads: MapHeads = "auto"
    param_dtype: DTypeLike = jnp.float32

    __call__ = linen.compact(_FlaxCall.__call__)

    def _head_params(self, num_heads: int, head_dim: int) -> Any:
        if self.variant.init is None:
            return None

        def init(rng: jax.Array) -> Any:
            params = multi_head_init(self.variant, rng, num_heads, head_dim)
            return jax.tree.map(lambda leaf: _cast(leaf, self.param_dtype), params)

        if self.variant.update is None:
            return self.param("head", init)
        params = jax.eval_shape(init, jax.random.key(0))
        state = state_leaves(self.variant, params, num_heads, head_dim)

        def part(rng: jax.Array, of_state: bool) -> Any:
            return {k: x for k, x in init(rng).items() if (k in state) == of_state}

        learnt = self.variable(
            _STATE, "head", lambda: part(self.make_rng("params"), True)
        ).value
        if len(state) == len(params):
            return dict(learnt)
        return {**self.param("head", part, False), **learnt}

    def _trains(self, deterministic: bool, dropout_rate: float) -> bool:
        if self.is_initializing():
            return False
        trains = super()._trains(deterministic, dropout_rate)
        if _TRAINING.get() is None and dropout_rate == 0.0 and self.variant.update:
            return trains or self.is_mutable_collection(_STATE)
        return trains

    def _keep(self, state: Mapping[str, Any]) -> None:
        self.put_variable(_STATE, "head", dict(state))

    def _next_rng(self, dropout_rng: jax.Array | None) -> jax.Array:
        return self.make_rng("attention")


def as_attention_fn(
    variant: VariantLike,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    rngs: nnx.Rngs | None = None,
    param_dtype: DTypeLike = jnp.float32,
    max_length: int | None = None,
    map_heads: MapHeads = "auto",
    implementation: Implementation | Literal["auto"] | None = None,
    **options: Any,
) -> AttentionFn | ModuleAttentionFn:
    """Makes a variant the `attention_fn` of a Flax multi-head layer.

    A variant without parameters serves `flax.nnx.MultiHeadAttention` and
    `flax.linen.MultiHeadDotProductAttention` alike. One with parameters, or one that
    is random by nature, becomes an `nnx.Module` whose state registers in the nnx
    layer; it needs `num_heads`, `head_dim` and `rngs`. (They may be given for any
    variant, so that a model can treat all alike.) For linen, `as_linen_attention_fn`
    makes such a variant a linen module.

    A random variant draws from a stream that is part of the layer's state, as the
    streams of `nnx.Dropout` are: under `nnx.jit` it moves on by itself; with
    `nnx.split` and `nnx.merge` inside `jax.jit` it moves on where the state is split
    off again and returned. A state that is frozen gives the same draw at every call,
    unless dropout on the attention weights is on: its key is then mixed in.

    Args:
      variant: name, `path/file.py:function`, function, or `Variant`.
      num_heads: N of the layer, where the variant has parameters.
      head_dim: H of the layer, `qkv_features // num_heads`.
      rngs: random streams for its parameters.
      param_dtype: dtype of its parameters.
      max_length: the longest sequence that the layer will see, for an `init` whose
        parameters depend on it; other variants need none.
      map_heads: see `attn_jax.multi_head`.
      implementation: how "dot_product" is computed on whole arrays, a name that
        `attn_jax.dot_product_attention` takes, such as "cudnn", or "auto" for its
        choice. None maps the variant's function, which alone can drop weights.
      **options: of its function or its `init`, such as `scale` or `hidden_dim`; see
        `Variant.bind`. `is_causal=True` makes every call causal, which is how a linen
        layer asks for it; the steps of a decoding layer, which are causal by their
        mask, are as without. Other calls with fewer queries than keys raise.

    Returns:
      What the layer takes as `attention_fn`.

    Raises:
      ValueError: if the variant is unknown, needs what was not given, or has no such
        implementation.
      TypeError: if it takes no such option.

    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=as_attention_fn("blockwise", is_causal=True))
    >>> layer(jnp.ones((1, 5, 8))).shape
    (1, 5, 8)
    """
    record = resolve(variant).bind(**options)
    if max_length is not None:
        record = record.fit(max_length=max_length)
    _check_implementation(record, implementation)
    if record.init is None and not record.stochastic:
        record.make(jax.random.key(0), 1)  # raises if it takes `params`
        return AttentionFn(record, map_heads, implementation)
    if num_heads is None or head_dim is None or rngs is None:
        what = "is random" if record.init is None else "has parameters"
        raise ValueError(
            f"attention variant {record.name!r} {what}: give as_attention_fn "
            "`num_heads`, `head_dim` (qkv_features // num_heads) and `rngs` for an nnx "
            "layer; for a linen layer use as_linen_attention_fn."
        )
    return ModuleAttentionFn(
        record,
        map_heads,
        num_heads=num_heads,
        head_dim=head_dim,
        rngs=rngs,
        param_dtype=param_dtype,
    )


def as_linen_attention_fn(
    variant: VariantLike,
    *,
    param_dtype: DTypeLike = jnp.float32,
    map_heads: MapHeads = "auto",
    **options: Any,
) -> LinenAttentionFn:
    """Makes any variant, also one with parameters, a part of a linen layer.

    Args:
      variant: name, `path/file.py:function`, function, or `Variant`.
      param_dtype: dtype of its parameters.
      map_heads: see `attn_jax.multi_head`.
      **options: of its function or its `init`; see `as_attention_fn`.

    Returns:
      A linen module for `flax.linen.MultiHeadDotProductAttention(attention_fn=...)`.

    Raises:
      ValueError: if the variant is unknown, or takes `params` but has no `init`.
      TypeError: if it takes no such option.

    >>> layer = linen.MultiHeadDotProductAttention(
    ...     num_heads=2, attention_fn=as_linen_attention_fn("additive"))
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 5, 8)))
    >>> variables["params"]["attention_fn"]["head"]["score"].shape
    (2, 4)
    """
    record = resolve(variant).bind(**options)
    if record.init is None:
        record.make(jax.random.key(0), 1)  # raises if it takes `params`
    return LinenAttentionFn(record, map_heads, param_dtype)
