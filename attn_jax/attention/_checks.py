"""Shape and dtype checks that every attention function runs first, and safe masking.

They look at shapes and dtypes, and at the values of whole numbers where these are
known, so they cost nothing under `jax.jit`. They raise ValueError on a wrong size or
number and TypeError on a wrong dtype or kind; each message names the argument, and says
what would be right and what came.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

LAYOUTS = {
    "query": "[B, T, N, H]",
    "key": "[B, S, K, H]",
    "value": "[B, S, K, V]",
    "bias": "[B or 1, N or 1, T or 1, S or 1]",
    "mask": "[B or 1, N or 1, T or 1, S or 1]",
}

LARGEST_INT = int(np.iinfo(np.int32).max)


def check_shape(
    name: str, array: jax.Array, letters: Sequence[str], sizes: Mapping[str, int]
) -> None:
    """Checks one array's shape against letters, some of which have a known size.

    Args:
      name: argument name, for the message.
      array: the array to check.
      letters: one letter per axis, such as `("T", "S")`.
      sizes: sizes of the letters that are known; others may have any size.
    """
    expected = tuple(sizes.get(letter) for letter in letters)
    try:
        chex.assert_shape(array, expected)
    except AssertionError:
        layout = "[" + ", ".join(letters) + "]"
        known = ", ".join(f"{k}={sizes[k]}" for k in letters if k in sizes)
        raise ValueError(
            f"`{name}` must have shape {layout}"
            + (f" with {known}" if known else "")
            + f", but has shape {tuple(array.shape)}."
        ) from None


def check_bool(name: str, array: jax.Array) -> None:
    """Checks that a mask is boolean."""
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"`{name}` must be bool with True = attend, but has dtype {array.dtype}. "
            f"A 0/1 mask converts with `{name}.astype(bool)`; "
            "numbers to be added to the scores go into `bias`."
        )


def check_float(name: str, array: jax.Array) -> None:
    """Checks that an array holds real floating-point numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be a floating-point array, but has dtype {array.dtype}; "
            f"convert it, for example with `{name}.astype(jnp.float32)`."
        )


def check_dtypes(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Checks that query, key and value hold floating-point numbers of one dtype."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_float(name, array)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            "`query`, `key` and `value` must have one dtype, but have "
            f"{query.dtype}, {key.dtype} and {value.dtype}; cast them first."
        )


def check_inputs(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    *,
    same_head_dim: bool = True,
    one_sequence: tuple[str, str] | None = None,
) -> None:
    """Checks the inputs of an attention function on one head of one example.

    Args:
      query, key, value, bias, mask, key_mask: see `attn_jax.attention`; axes of bias
        and mask may also have size 1.
      same_head_dim: whether query and key must have the same H.
      one_sequence: name of a function that needs T = S, and why.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 2:
            letters = {"query": "[T, H]", "key": "[S, H]", "value": "[S, V]"}[name]
            raise ValueError(
                f"`{name}` must have shape {letters} (one head of one example), but "
                f"has shape {tuple(array.shape)}. For batch and heads wrap the "
                "function: `attn_jax.multi_head(fn)(query[B, T, N, H], ...)`."
            )
    check_dtypes(query, key, value)
    sizes = {"T": query.shape[0], "S": key.shape[0], "H": query.shape[1]}
    if same_head_dim and key.shape[1] != sizes["H"]:
        raise ValueError(
            "`query` [T, H] and `key` [S, H] must have the same H, but have "
            f"H={query.shape[1]} and H={key.shape[1]}."
        )
    check_shape("value", value, ("S", "V"), sizes)
    for name, pairs, check in (("bias", bias, check_float), ("mask", mask, check_bool)):
        if pairs is None:
            continue
        check(name, pairs)
        given = dict(sizes)
        if pairs.ndim == 2:
            given |= {k: 1 for k, n in zip("TS", pairs.shape, strict=True) if n == 1}
        check_shape(name, pairs, ("T", "S"), given)
    if key_mask is not None:
        check_bool("key_mask", key_mask)
        check_shape("key_mask", key_mask, ("S",), sizes)
    if one_sequence is not None:
        check_same_length(one_sequence[0], sizes["T"], sizes["S"], one_sequence[1])


def check_arrays(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    key_mask: jax.Array | None,
) -> dict[str, int]:
    """Checks ranks and sizes of whole arrays; returns the size of each letter."""
    arrays = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask}
    for name, array in arrays.items():
        if array is not None and array.ndim != 4:
            raise ValueError(
                f"`{name}` must have shape {LAYOUTS[name]}, but has shape "
                f"{tuple(array.shape)}; add the missing axes, for example with "
                f"`{name}[None]` for one example."
            )
    batch, num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    sizes = {
        "B": batch,
        "T": num_queries,
        "N": num_heads,
        "S": num_keys,
        "K": num_kv_heads,
        "V": value.shape[3],
    }
    check_shape("key", key, ("B", "S", "K", "H"), sizes)
    check_shape("value", value, ("B", "S", "K", "V"), sizes)
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"`query` has N={num_heads} heads and `key` K={num_kv_heads}: "
            "N must be a multiple of K."
        )
    for name, array in (("bias", bias), ("mask", mask)):
        if array is None:
            continue
        for axis, letter in enumerate("BNTS"):
            if array.shape[axis] not in (1, sizes[letter]):
                raise ValueError(
                    f"`{name}` must have shape {LAYOUTS[name]}, but has shape "
                    f"{tuple(array.shape)} where {letter}={sizes[letter]}."
                )
    if bias is not None:
        check_float("bias", bias)
    if mask is not None:
        check_bool("mask", mask)
    if key_mask is not None:
        check_bool("key_mask", key_mask)
        check_shape("key_mask", key_mask, ("B", "S"), sizes)
    return sizes


def check_dropout(dropout_rate: float, rng: jax.Array | None) -> None:
    """Checks a dropout rate and that a key is there when it is needed."""
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"`dropout_rate` must be in [0, 1), but is {dropout_rate}.")
    if dropout_rate > 0.0 and rng is None:
        raise ValueError(
            f"`dropout_rate`={dropout_rate} needs `rng`, a `jax.random.key(...)`; "
            "pass one, or dropout_rate=0.0 for evaluation."
        )


def check_int(name: str, given: int, least: int, *, multiple_of: int = 1) -> int:
    """A static option as an int of Python, with which no arithmetic wraps around."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise TypeError(
            f"`{name}` must be an int known at trace time, but is "
            f"{type(given).__name__}: {given!r}."
        )
    if given < least:
        raise ValueError(f"`{name}` must be at least {least}, but is {given}.")
    if given % multiple_of:
        raise ValueError(
            f"`{name}` must be a multiple of {multiple_of}, but is {given}."
        )
    return int(given)


def check_sizes(**sizes: int) -> tuple[int, ...]:
    """Checks that all of them are ints of at least 1, as `check_int` does."""
    return tuple(check_int(name, size, 1) for name, size in sizes.items())


def check_positive(name: str, given: float) -> float:
    """Checks that a static number is above zero."""
    if not given > 0:
        raise ValueError(f"`{name}` must be positive, but is {given}.")
    return float(given)


def check_choice(name: str, given: object, choices: Sequence[str]) -> None:
    """Checks that a static option is one of some words."""
    if given not in choices:
        *others, last = map(repr, choices)
        known = f"{', '.join(others)} or {last}"
        raise ValueError(f"`{name}` must be {known}, but is {given!r}.")


def _known(array: object) -> bool:
    """Whether the values of an array can be looked at, here and now."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def as_int32(name: str, given: Any) -> jax.Array:
    """Whole numbers of any dtype as int32, in which index arithmetic does not wrap.

    What int32 cannot hold becomes the nearest number that it can, and so stays out of
    every range that it was out of.

    Args:
      name: argument name, for the message.
      given: integers of any width, signed or not.
    """
    # JAX, without 64 bits, would cut large numbers of numpy short.
    array = given if isinstance(given, jax.Array) else np.asarray(given)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, but has dtype {array.dtype}.")
    if jnp.iinfo(array.dtype).max > LARGEST_INT:
        least = max(jnp.iinfo(array.dtype).min, -LARGEST_INT - 1)
        array = array.clip(least, LARGEST_INT)
    return jnp.asarray(array.astype(jnp.int32))


def check_ids(
    name: str, given: Any, size: int | Sequence[int], *, why: str = ""
) -> jax.Array:
    """Numbers of rows, nodes or kinds: int32 in 0 … size − 1, or −1 for no such thing.

    Args:
      name: argument name, for the message.
      given: integers of any width.
      size: how many there are; several along the last axis if a sequence.
      why: what the message says besides.

    Returns:
      int32, of the same shape. Numbers out of range, which raise where they are known,
      are −1 where they are traced. (JAX itself reads the last row for −1.)
    """
    ids = as_int32(name, given)
    if not _known(given):
        sizes = jnp.asarray(size, jnp.int32)
        sizes = sizes.reshape((1,) * (ids.ndim - sizes.ndim) + sizes.shape)
        return jnp.where((ids >= 0) & (ids < sizes), ids, -1)
    values = np.asarray(given)
    columns: list[tuple[str, np.ndarray, Any]] = [(name, values, size)]
    if isinstance(size, Sequence):
        columns = [(f"{name}[..., {k}]", values[..., k], n) for k, n in enumerate(size)]
    for label, column, number in columns:
        low, high = (int(column.min()), int(column.max())) if column.size else (0, -1)
        if low < 0 or high >= number:
            raise ValueError(
                f"`{label}` must lie in 0 … {number - 1}, but has values from {low} to "
                f"{high}{why}."
            )
    return ids


def rows_at(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., D] of a table [V, D], and NaN for −1, as which `check_ids` tells none.

    >>> rows_at(jnp.array([[1.0], [2.0]]), jnp.array([1, -1])).tolist()
    [[2.0], [nan]]
    """
    return table.at[ids].get(mode="fill", wrap_negative_indices=False)


def check_same_length(name: str, num_queries: int, num_keys: int, why: str) -> None:
    """Checks that there are as many keys as queries, T = S."""
    if num_queries != num_keys:
        raise ValueError(
            f"`{name}` needs as many keys as queries, since {why}, but "
            f"T={num_queries} and S={num_keys}."
        )


def check_params(
    name: str, params: object, layout: Mapping[str, str], **sizes: int
) -> dict[str, int]:
    """Checks names and shapes of one head's parameters, and returns all sizes.

    Args:
      name: of the function, or the call that makes them, for the message.
      params: of one head.
      layout: the letters of each leaf's axes, such as {"key": "CH"}.
      **sizes: of letters that are known. Others may have any size, which is the same
        wherever they stand.
    """
    if not isinstance(params, Mapping) or set(params) != set(layout):
        came = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        maker = name if name.endswith(")") else f"{name}_init(rng, head_dim)"
        raise ValueError(
            f"`params` must be a mapping with {sorted(layout)}, but is {came}; "
            f"`{maker}` makes one."
        )
    for leaf, letters in layout.items():
        shape = jnp.shape(params[leaf])
        if len(shape) == len(letters):
            for letter, size in zip(letters, shape, strict=True):
                sizes.setdefault(letter, size)
        if shape != tuple(sizes.get(letter) for letter in letters):
            known = ", ".join(str(sizes.get(letter, "*")) for letter in letters)
            raise ValueError(
                f"`params[{leaf!r}]` must have shape [{known}], but has shape "
                f"{shape}. Under `multi_head` every leaf leads with the number of "
                "heads N."
            )
    return sizes


def check_longest(name: str, longest: int, **lengths: int) -> None:
    """Checks lengths, by letter, against the longest that parameters are for."""
    for letter, length in lengths.items():
        if length > longest:
            raise ValueError(
                f"`params` are for at most {longest} positions, but {letter}={length}; "
                f"make larger ones with `{name}_init(..., max_length=...)`."
            )


# The identity on tangents, which has a transpose and nothing else: reverse mode never
# computes it, forward mode would.
_reversed_p = core.Primitive("reversed")


def _refuse(*_: Any, message: str, **__: Any) -> Any:
    raise TypeError(message)


_reversed_p.def_impl(_refuse)
_reversed_p.def_abstract_eval(lambda x, message: x)
ad.deflinear2(_reversed_p, lambda cotangent, _, message: [cotangent])
batching.defvectorized(_reversed_p)
mlir.register_lowering(_reversed_p, _refuse)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _marked(message: str, x: jax.Array) -> jax.Array:
    return x


@_marked.defjvp
def _marked_jvp(
    message: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return primals[0], _reversed_p.bind(tangents[0], message=message)


def reverse_mode_only(tree: Any, message: str) -> Any:
    """`tree`, whose derivatives in forward mode are refused: for what has a custom VJP.

    JAX refuses them as well, but cannot say what helps.

    Args:
      tree: pytree of arrays.
      message: of the TypeError, raised where a tangent is computed, under `jax.jit`
        when that is compiled.
    """

    def mark(leaf: jax.Array) -> jax.Array:
        moves = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return _marked(message, leaf) if moves else leaf

    return jax.tree.map(mark, tree)


def _mesh_axes(array: object) -> frozenset[str]:
    """The mesh axes that an array varies over, inside of `jax.shard_map`."""
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def varying(tree: Any, *like: Any) -> Any:
    """`tree`, varying over all mesh axes that an array in `like` varies over.

    In `jax.shard_map` the type of an array says over which axes of the mesh it may
    differ, and what a loop carries must keep its type. So what begins as zeros says
    from the start what it will be after the first step. Elsewhere nothing changes.

    Args:
      tree: pytree of arrays, such as the first carry of a loop.
      *like: pytrees of all arrays that the steps will mix into it.

    Returns:
      The same numbers.
    """
    axes = frozenset().union(*map(_mesh_axes, jax.tree.leaves(like)))

    def mark(leaf: Any) -> Any:
        missing = tuple(sorted(axes - _mesh_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def may_be_sharded(*arrays: jax.Array) -> bool:
    """Whether batch or heads of the arrays might lie on several devices.

    What takes them apart, such as a loop over heads, would then bring all of them to
    every device. Arrays that are traced tell nothing of it, so this asks for devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:  # inside of `jax.shard_map` arrays are local along its axes
        kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        return any(n > 1 and kind != jax.sharding.AxisType.Manual for n, kind in kinds)
    if jax.device_count() == 1:
        return False
    return any(
        isinstance(array, jax.core.Tracer)
        or (isinstance(array, jax.Array) and len(array.sharding.device_set) > 1)
        for array in arrays
    )


def largest(scores: jax.Array, count: int) -> jax.Array:
    """Places of the `count` largest along the last axis, the largest first: int32.

    XLA cannot split its search for them over devices, and would gather the scores; it
    can split a sort, which is slower.
    """
    if may_be_sharded(scores):
        order = jnp.argsort(scores, axis=-1, stable=True, descending=True)
        return order[..., :count].astype(jnp.int32)
    return jax.lax.top_k(scores, count)[1]


def zero_masked(array: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Rows [S, ...] of padding replaced by zeros, so that nothing in them can leak."""
    if key_mask is None:
        return array
    return jnp.where(key_mask.reshape(-1, *(1,) * (array.ndim - 1)), array, 0)


def safe_divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Quotient, and 0 with gradient 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))
