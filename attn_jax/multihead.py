"""From one head of one example to whole arrays: the only place that maps.

Letters: B batch, N query heads, K key/value heads (N a multiple of K), and those of
`attn_jax.attention`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attn_jax import masks
from attn_jax.attention import _checks
from attn_jax.attention._scores import score_dtype
from attn_jax.variant import Variant, require, resolve

__all__ = [
    "multi_head",
    "multi_head_init",
    "multi_head_state",
    "multi_head_step",
    "multi_head_update",
    "state_leaves",
]

MapHeads = Literal["auto", "vmap", "loop"]

# From this many scores per head on, plain matrix products in a loop over heads are
# faster on CPU than one batched product (which XLA:CPU runs at a fraction of the
# speed of a plain one).
_LOOP_FROM_SCORES = 512 * 512

# From this many scores per head on, `blockwise`, and what else has a form on whole
# arrays, is faster so on CPU.
CPU_BLOCKWISE_FROM_SCORES = 128 * 128

Operands = dict[str, Any]


def _with_automatic_axes(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Lets `attend` take arrays that are sharded along explicit axes of a mesh.

    With explicit axes each operation must be told how its result is sharded wherever
    that is not plain. Inside of `attend` they are automatic: XLA propagates them. The
    result is sharded as the query is, and whole along V.
    """

    @functools.wraps(attend)
    def wrapped(
        query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **kwargs: Any
    ) -> jax.Array:
        def is_array(given: Any) -> bool:
            return any(isinstance(x, jax.Array) for x in jax.tree.leaves(given))

        arrays = {name: given for name, given in kwargs.items() if is_array(given)}
        operands = ((query, key, value, *args), arrays)
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
        explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
        if not explicit:
            return attend(query, key, value, *args, **kwargs)
        rest = {name: given for name, given in kwargs.items() if name not in arrays}
        spec = PartitionSpec(*jax.typeof(query).sharding.spec[:3])

        def run(args: tuple[Any, ...], arrays: dict[str, Any]) -> jax.Array:
            return attend(*args, **arrays, **rest)

        automatic = jax.sharding.auto_axes(
            run,
            axes=explicit[0].explicit_axes,
            out_sharding=NamedSharding(explicit[0], spec),
        )
        return automatic(*operands)

    return wrapped


def _lift(
    fn: Callable[[Operands], jax.Array],
    varies: Mapping[str, bool],
    how: Literal["vmap", "loop"],
) -> Callable[[Operands], jax.Array]:
    """Maps `fn` over the leading axis of those operands that vary along it."""
    if how == "vmap":
        axes = {name: 0 if varies[name] else None for name in varies}
        return jax.vmap(fn, in_axes=(axes,))

    def looped(operands: Operands) -> jax.Array:
        moving = {name: leaf for name, leaf in operands.items() if varies[name]}
        fixed = {name: leaf for name, leaf in operands.items() if not varies[name]}
        return jax.lax.map(lambda one: fn({**fixed, **one}), moving)

    return looped


def _split_heads(array: jax.Array, num_kv_heads: int, axis: int) -> jax.Array:
    """Splits an axis of N heads into K groups of N/K, or leaves it where N = K."""
    shape = array.shape
    if shape[axis] == num_kv_heads:
        return array
    groups = (num_kv_heads, shape[axis] // num_kv_heads)
    return array.reshape(*shape[:axis], *groups, *shape[axis + 1 :])


def multi_head(
    fn: str | Callable[..., jax.Array] | Variant,
    *,
    map_heads: MapHeads = "auto",
) -> Callable[..., jax.Array]:
    """Lifts an attention function from one head of one example to whole arrays.

    O[b, :, n] = fn(Q[b, :, n], K[b, :, k], V[b, :, k], bias[b, n], mask[b, n])
    with k = ⌊nK/N⌋

    Query heads are grouped over key/value heads as in `jax.nn.dot_product_attention`
    (N = K is multi-head, K = 1 multi-query attention). Batch and head axes of size 1 in
    bias and mask are shared, never copied; `fn` sees the bias in float32, as scores
    are. A mask of shape [.., .., 1, S] says which keys are real, and reaches a function
    that takes `key_mask` as such; a function that takes `mask` alone gets `key_mask`
    and `is_causal` as part of it.

    Args:
      fn: a function that keeps the contract, its `Variant`, or its name as understood
        by `attn_jax.resolve`.
      map_heads: "vmap" makes batched products, "loop" plain ones head by head;
        "auto" loops on CPU when a head is large, unless arrays might be sharded over
        batch or heads (there are several devices, and this is not inside of
        `jax.shard_map`): "loop" then brings all arrays to every device. The numbers
        are the same.

    Returns:
      `f(query[B, T, N, H], key[B, S, K, H], value[B, S, K, V], bias=None, mask=None,
      *, key_mask=None, params=None, rng=None, dropout_rng=None,
      broadcast_dropout=False, **options) -> [B, T, N, V]`, where bias and mask are
      [B or 1, N or 1, T or 1, S or 1], key_mask is [B, S], the leaves of params lead
      with N, and options are the function's own, checked by its signature. What a
      random function is, `rng` draws once a head, for all examples: where a sequence
      stands in the batch is nothing to it. Dropout is drawn from `dropout_rng` (or
      `rng`, where nothing else is drawn) for every example and head, or once for all
      with `broadcast_dropout`.

    Raises:
      ValueError: (most from `f`) on wrong shapes or a capability that `fn` lacks.
      TypeError: (most from `f`) on wrong dtypes or an unknown option.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> multi_head("dot_product")(x, x[:, :, :2], x[:, :, :2], is_causal=True).shape
    (2, 5, 4, 8)
    """
    variant = resolve(fn)
    _checks.check_choice("map_heads", map_heads, get_args(MapHeads))
    takes = variant.arguments

    @_with_automatic_axes
    def mapped(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        key_mask: jax.Array | None = None,
        params: Any = None,
        rng: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        broadcast_dropout: bool = False,
        **options: Any,
    ) -> jax.Array:
        sizes = _checks.check_arrays(query, key, value, bias, mask, key_mask)
        batch, num_heads, num_kv_heads = sizes["B"], sizes["N"], sizes["K"]
        num_queries, num_keys = sizes["T"], sizes["S"]
        if num_queries != num_keys:
            require(variant, "cross")
        if sizes["V"] != query.shape[3]:
            require(variant, "value_dim")

        # Masks reach the function in the cheapest form that it takes: one that is
        # the same for every query as a mask of keys, and the other way round.
        given_mask = mask
        mask_of_keys = None if key_mask is None else key_mask[:, None]
        if mask is not None and mask.shape[2] == 1 and variant.key_mask:
            keys = jnp.broadcast_to(mask[:, :, 0], (*mask.shape[:2], num_keys))
            mask_of_keys, mask = masks.combine(mask_of_keys, keys), None
        elif mask_of_keys is not None and variant.mask and not variant.key_mask:
            mask, mask_of_keys = masks.combine(mask, mask_of_keys[:, :, None]), None
        if options.get("is_causal") and variant.mask and not variant.causal:
            mask = masks.combine(mask, masks.causal(num_queries, num_keys)[None, None])
            del options["is_causal"]
        options = variant.asked(options)
        for name, given in (("bias", bias), ("mask", mask), ("key_mask", mask_of_keys)):
            if given is not None:
                require(variant, name)
        if params is not None and "params" not in takes:
            raise ValueError(
                f"attention variant {variant.name!r} has no parameters, but got "
                "`params`; leave it out."
            )
        if params is None and variant.needs("params"):
            raise ValueError(
                f"attention variant {variant.name!r} needs `params`; make them with "
                "`multi_head_init(variant, rng, num_heads, head_dim)`."
            )
        if rng is None and variant.needs("rng"):
            raise ValueError(
                f"attention variant {variant.name!r} is random and needs `rng`, a "
                "`jax.random.key(...)`."
            )

        # Two kinds of randomness: what the variant is, and what it drops out.
        if not variant.stochastic:
            rng, dropout_rng = None, rng if dropout_rng is None else dropout_rng
        of_dropout = "dropout_rng" if "dropout_rng" in takes else "rng"
        if variant.stochastic and of_dropout == "rng":
            if options.get("dropout_rate"):
                raise ValueError(
                    f"attention variant {variant.name!r} draws by `rng` what it is, so "
                    "dropout needs a key of its own: an argument `dropout_rng=None`."
                )
            dropout_rng = None
        if of_dropout not in takes:
            dropout_rng = None

        # The form on whole arrays serves only where it can be given all that is asked.
        whole = variant.arrays
        if whole is not None:
            given_options = {**variant.options, **options}
            for_whole = {
                n: given
                for n, given in given_options.items()
                if n != "dropout_rate" or given
            }
            known = set(inspect.signature(whole).parameters) - {
                *_checks.LAYOUTS,
                "key_mask",
            }
            random = rng is not None or dropout_rng is not None
            if for_whole.keys() - known or params is not None or random:
                whole = None
        how = map_heads
        if how == "auto":
            least = _LOOP_FROM_SCORES if whole is None else CPU_BLOCKWISE_FROM_SCORES
            large = num_queries * num_keys >= least
            loops = large and jax.default_backend() == "cpu"
            if loops and _checks.may_be_sharded(query, key, value):
                loops = False  # a loop would gather what lies along its axis
            how = "loop" if loops else "vmap"
        if how == "loop" and whole is not None:
            out = whole(
                query, key, value, bias, given_mask, key_mask=key_mask, **for_whole
            )
            expected = (batch, num_queries, num_heads, sizes["V"])
            if jnp.shape(out) != expected:
                raise ValueError(
                    f"`arrays` of attention variant {variant.name!r} must return [B, "
                    f"T, N, V] = {expected}, but returned shape {jnp.shape(out)}."
                )
            return out

        # Every operand gets leading axes [B, K, N/K], less those it does not vary
        # along. Head-major order keeps each head's matrices contiguous.
        operands: Operands = {
            "query": _split_heads(query.transpose(0, 2, 1, 3), num_kv_heads, 1),
            "key": key.transpose(0, 2, 1, 3),
            "value": value.transpose(0, 2, 1, 3),
        }
        varies = {
            "query": (True, True, True),
            "key": (True, True, False),
            "value": (True, True, False),
        }
        full = (batch, num_heads, num_queries, num_keys)
        if bias is not None and bias.shape != full:
            # Scores are float32, and so are the sums in a shared bias's gradient.
            bias = bias.astype(score_dtype(query.dtype))
        for name, shared in (
            ("bias", bias),
            ("mask", mask),
            ("key_mask", mask_of_keys),
        ):
            if shared is None:
                continue
            over_batch, over_heads = shared.shape[0] > 1, shared.shape[1] > 1
            varies[name] = (over_batch, over_heads, over_heads)
            if over_heads:
                shared = _split_heads(shared, num_kv_heads, 1)
            else:
                shared = jnp.squeeze(shared, 1)
            operands[name] = shared if over_batch else jnp.squeeze(shared, 0)
        if params is not None:
            for path, leaf in jax.tree_util.tree_leaves_with_path(params):
                if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_heads:
                    raise ValueError(
                        f"`params{jax.tree_util.keystr(path)}` must lead with one "
                        f"entry a head, N={num_heads}, but has shape {jnp.shape(leaf)}."
                    )
            operands["params"] = jax.tree.map(
                lambda leaf: _split_heads(leaf, num_kv_heads, 0), params
            )
            varies["params"] = (False, True, True)
        if rng is not None:
            keys = jax.random.split(rng, num_heads)
            operands["rng"] = _split_heads(keys, num_kv_heads, 0)
            varies["rng"] = (False, True, True)
        if dropout_rng is not None:
            if not broadcast_dropout:
                keys = jax.random.split(dropout_rng, (batch, num_heads))
                dropout_rng = _split_heads(keys, num_kv_heads, 1)
            operands[of_dropout] = dropout_rng
            varies[of_dropout] = (not broadcast_dropout,) * 3

        def one_head(operands: Operands) -> jax.Array:
            arguments = dict(operands)
            if "bias" in arguments:
                arguments["bias"] = arguments["bias"].astype(score_dtype(query.dtype))
            for name in ("bias", "mask"):
                if name in arguments and not variant.shared_axes:
                    arguments[name] = jnp.broadcast_to(
                        arguments[name], (num_queries, num_keys)
                    )
            out = variant.fn(
                arguments.pop("query"),
                arguments.pop("key"),
                arguments.pop("value"),
                **arguments,
                **options,
            )
            if jnp.shape(out) != (num_queries, sizes["V"]):
                raise ValueError(
                    f"attention variant {variant.name!r} must return [T, V] with "
                    f"T={num_queries}, V={sizes['V']}, but returned shape "
                    f"{jnp.shape(out)}."
                )
            return out

        lifted: Callable[[Operands], jax.Array] = one_head
        # A third level only for grouped heads: an axis of size 1 would cost a product
        # that is not in XLA's canonical form.
        levels = 2 if num_heads == num_kv_heads else 3
        for level in reversed(range(levels)):
            along = {name: flags[level] for name, flags in varies.items()}
            lifted = _lift(lifted, along, how)
        out = lifted(operands)  # [B, K, T, V] or [B, K, N/K, T, V]
        out = out.reshape(batch, num_heads, *out.shape[levels:])
        return out.transpose(0, 2, 1, 3)

    mapped.__name__ = f"multi_head_{variant.name}"
    mapped.__doc__ = f"`{variant.name}` on [B, T, N, H]; see `attn_jax.multi_head`."
    return mapped


def multi_head_init(
    fn: str | Callable[..., jax.Array] | Variant,
    rng: jax.Array,
    num_heads: int,
    head_dim: int,
    **options: Any,
) -> Any:
    """Parameters of a variant for N heads: each leaf leads with N.

    Args:
      fn: variant, function or name, as for `multi_head`.
      rng: random key, split over the heads.
      num_heads: N.
      head_dim: H.
      **options: passed to the variant's `init`, checked against its signature.

    Returns:
      The pytree that `multi_head(fn)` takes as `params`, or None if the variant has no
      parameters.

    Raises:
      ValueError: if the function takes `params` but has no `init`.
      TypeError: if `init` takes no such option.

    >>> multi_head_init("additive", jax.random.key(0), 4, 8)["score"].shape
    (4, 8)
    >>> multi_head_init("dot_product", jax.random.key(0), 4, 8) is None
    True
    """
    variant = resolve(fn)

    def make(rng: jax.Array) -> Any:
        return variant.make(rng, head_dim, **options)

    if variant.init is None:
        return make(rng)
    return jax.vmap(make)(jax.random.split(rng, num_heads))


def multi_head_update(
    fn: str | Callable[..., jax.Array] | Variant,
    params: Mapping[str, Any],
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
) -> dict[str, Any]:
    """The untrained state of a variant after it has seen a batch, such as centroids.

    Each head learns from all examples, which share its state. A key that no query may
    attend to is padding, and so is the token where T = S: of a mask nothing else is
    read. No gradient passes.

    Args:
      fn: variant, function or name, as for `multi_head`.
      params: each leaf leads with N.
      query: [B, T, N, H].
      key: [B, S, K, H], with N a multiple of K.
      mask: bool [B or 1, N or 1, T or 1, S or 1], True = attend, or None.
      key_mask: bool [B, S], True = a real token, or None.

    Returns:
      The leaves of `params` that are state, as they are now; none if the variant has
      no `update`.

    Raises:
      ValueError: on wrong shapes, or if the variant's `update` returns what is no leaf
        of `params`, or a leaf of another shape or dtype.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> params = multi_head_init("routing", jax.random.key(0), 4, 8, num_clusters=3)
    >>> multi_head_update("routing", params, x, x)["centroid"].shape
    (4, 3, 8)
    """
    variant = resolve(fn)
    update = variant.update
    if update is None:
        return {}
    sizes = _checks.check_arrays(query, key, key, None, mask, key_mask)
    num_heads, num_keys = sizes["N"], sizes["S"]
    real = None
    if mask is not None:
        real = jnp.broadcast_to(mask.any(axis=2), (*mask.shape[:2], num_keys))
    if key_mask is not None:
        real = key_mask[:, None] if real is None else real & key_mask[:, None]
    key = jnp.repeat(key, num_heads // sizes["K"], axis=2)
    operands: Operands = {
        name: x.transpose(2, 0, 1, 3).reshape(num_heads, -1, x.shape[3])
        for name, x in (("query", query), ("key", key))
    }
    if real is not None:
        real = jnp.broadcast_to(real, (sizes["B"], num_heads, num_keys))
        operands["key_mask"] = real.swapaxes(0, 1).reshape(num_heads, -1)
    params, operands = jax.lax.stop_gradient((dict(params), operands))
    new = jax.vmap(lambda params, x: dict(update(params, **x)))(params, operands)
    for name, leaves in new.items():
        was, now = (
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)
            for tree in (params.get(name), leaves)
        )
        if name not in params or was != now:
            raise ValueError(
                f"the `update` of attention variant {variant.name!r} must return "
                f"leaves of `params` as they are, but `{name}` of one head and all is "
                f"{now} where `params` have {was}."
            )
    return jax.lax.stop_gradient(new)


def state_leaves(
    fn: str | Callable[..., jax.Array] | Variant,
    params: Any,
    num_heads: int,
    head_dim: int,
) -> tuple[str, ...]:
    """Names of the leaves of a variant's parameters that are untrained state.

    Args:
      fn: variant, function or name, as for `multi_head`.
      params: of `multi_head_init`, or their shapes.
      num_heads: N.
      head_dim: H.

    Returns:
      Names, sorted; none if the variant has no `update`.

    Raises:
      ValueError: as `multi_head_update`.

    >>> params = multi_head_init("routing", jax.random.key(0), 4, 8)
    >>> state_leaves("routing", params, 4, 8)
    ('centroid',)
    """
    variant = resolve(fn)
    if variant.update is None:
        return ()
    x = jax.ShapeDtypeStruct((1, 8, num_heads, head_dim), jnp.float32)
    update = functools.partial(multi_head_update, variant)
    return tuple(sorted(jax.eval_shape(update, params, x, x)))


def multi_head_state(
    fn: str | Callable[..., jax.Array] | Variant,
    batch: int,
    num_heads: int,
    *,
    length: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Any:
    """The state of `multi_head_step` before any token: leaves lead with [B, N].

    Args:
      fn: variant with a `step`, function or name, as for `multi_head`.
      batch: B.
      num_heads: N.
      length: tokens there must be room for.
      head_dim: H.
      value_dim: V; None means H.
      dtype: of queries, keys and values.

    Raises:
      ValueError: if the variant has no `step`.

    >>> multi_head_state("linear", 2, 4, length=9, head_dim=8).memory.shape
    (2, 4, 8, 8)
    """
    value_dim = head_dim if value_dim is None else value_dim
    sizes = {"length": length, "head_dim": head_dim, "value_dim": value_dim}
    one = resolve(fn).start(**sizes, dtype=dtype)
    shared = (batch, num_heads)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*shared, *jnp.shape(x))), one)


def multi_head_step(
    fn: str | Callable[..., jax.Array] | Variant,
) -> Callable[..., tuple[Any, jax.Array]]:
    """Lifts a variant's `step` from one head of one example to whole arrays.

    Args:
      fn: variant with a `step`, function or name, as for `multi_head`.

    Returns:
      `f(state, position, query[B, N, H], key[B, N, H], value[B, N, V], *, params=None,
      rng=None) -> (state, out[B, N, V])`, with the position int32 [], params and rng as
      for `multi_head`, whose row at that position it gives.

    Raises:
      ValueError: if the variant has no `step`.

    >>> state, x = multi_head_state("linear", 2, 4, length=9, head_dim=8), jnp.ones(8)
    >>> x = jnp.broadcast_to(x, (2, 4, 8))
    >>> multi_head_step("linear")(state, jnp.int32(0), x, x, x)[1].shape
    (2, 4, 8)
    """
    variant = resolve(fn)
    require(variant, "step")

    def mapped(
        state: Any,
        position: jax.Array,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        params: Any = None,
        rng: jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        rngs = None
        if variant.stochastic and rng is not None:
            rngs = jax.random.split(rng, query.shape[1])

        def one(state: Any, tokens: Any, params: Any, rng: Any) -> Any:
            return variant.advance(
                state, position=position, **tokens, params=params, rng=rng
            )

        heads = jax.vmap(one, in_axes=(0, 0, 0, 0))
        tokens = {"query": query, "key": key, "value": value}
        return jax.vmap(heads, in_axes=(0, 0, None, None))(state, tokens, params, rngs)

    return mapped
