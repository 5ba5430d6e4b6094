"""Exact dot-product attention on whole arrays, and which implementation makes it.

Letters: B batch, N query heads, K key/value heads, and those of `attn_jax.attention`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attn_jax import masks, multihead
from attn_jax.attention import _checks
from attn_jax.attention._scores import zero_unseen_arrays
from attn_jax.attention.blockwise_attention import blockwise
from attn_jax.attention.ring_attention import ring
from attn_jax.attention.softmax import dot_product
from attn_jax.multihead import multi_head

__all__ = ["Implementation", "dot_product_attention"]

# From this many scores per head on, accelerators get the blockwise implementation.
_BLOCKWISE_FROM_SCORES = 2048 * 2048

Implementation = Literal["reference", "blockwise", "xla", "cudnn", "tokamax", "ring"]

_OTHERS = "use implementation='reference' or 'blockwise'."


def _on_nvidia_gpu() -> bool:
    """Whether programs are compiled for an NVIDIA GPU here, and cuDNN is at hand."""
    if jax.default_backend() not in ("gpu", "cuda"):
        return False
    return "cuda" in jax.devices()[0].client.platform_version


def _refusal(
    implementation: Implementation,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sides: tuple[int | None, int | None],
) -> str | None:
    """Why a library's implementation cannot serve, as known statically, or None."""
    batch, num_queries, _, head_dim = query.shape
    if implementation != "cudnn" and jax.default_backend() == "cpu":
        if query.dtype == jnp.float16:
            return (
                f"implementation={implementation!r} has no products of float16 on CPU; "
                f"cast to bfloat16 or float32, or {_OTHERS}"
            )
        single = batch == key.shape[2] == num_queries == key.shape[1] == 1
        if query.dtype == jnp.bfloat16 and (head_dim == 1 or single):
            return (
                f"implementation={implementation!r} asks XLA:CPU for products of "
                "bfloat16 that it has not where H=1 or B=K=T=S=1, and for which it can "
                f"end the whole process; cast to float32, or {_OTHERS}"
            )
    if implementation != "tokamax" and query.shape[3] != value.shape[3]:
        return (
            f"implementation={implementation!r} needs V = H, but V={value.shape[3]} "
            f"and H={query.shape[3]}; {_OTHERS}"
        )
    if implementation == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return (
            "implementation='tokamax' needs the package `tokamax`, which is not "
            f"installed: `pip install tokamax`, or {_OTHERS}"
        )
    if implementation != "cudnn":
        return None
    if not _on_nvidia_gpu():
        return (
            "implementation='cudnn' needs an NVIDIA GPU, but this process runs on "
            f"{jax.default_backend()}; {_OTHERS}"
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            "implementation='cudnn' needs bfloat16 or float16, but the inputs are "
            f"{query.dtype}; cast them, or {_OTHERS}"
        )
    left, right = sides
    if left is not None and right != 0:
        return (
            "implementation='cudnn' has no window to the right: give `is_causal=True` "
            f"or a `local_window_size` of (left, 0), or {_OTHERS}"
        )
    return None


def _choose(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pairs_given: bool,
    is_causal: bool,
    sides: tuple[int | None, int | None],
) -> Implementation:
    """The implementation that suits the platform and the sizes.

    What cuDNN takes of bias and mask depends on shapes and versions, and it leaves out
    some gradients of a bias: neither is chosen without being asked for.
    """
    scores = query.shape[1] * key.shape[1]
    if jax.default_backend() == "cpu":
        large = scores >= multihead.CPU_BLOCKWISE_FROM_SCORES
        return "blockwise" if large else "reference"
    aligned = query.shape[3] % 8 == 0 and query.shape[3] <= 128
    banded = is_causal or sides != (None, None)
    sure = aligned and not pairs_given
    sure = sure and not (banded and query.shape[1] != key.shape[1])
    if sure and _refusal("cudnn", query, key, value, sides) is None:
        return "cudnn"
    return "blockwise" if scores >= _BLOCKWISE_FROM_SCORES else "reference"


def _mesh_axis(query: jax.Array, mesh_axis: str | None) -> tuple[Any, Any]:
    """The mesh, and its axis over which the sequence [B, T, N, H] is to be split."""
    known = jax.typeof(query).sharding  # tells of explicit axes alone
    if isinstance(query, jax.Array) and not isinstance(query, jax.core.Tracer):
        known = query.sharding
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = known.mesh if isinstance(known, NamedSharding) else mesh
    if mesh.empty:
        raise ValueError(
            "implementation='ring' splits the sequence over a mesh, and there is none: "
            "trace it in `with jax.set_mesh(mesh)`, or place the arrays on one."
        )
    if mesh_axis is None and isinstance(known, NamedSharding):
        mesh_axis = (*known.spec, None, None)[1]
    if mesh_axis not in mesh.axis_names:
        names = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(
            "`mesh_axis` must name the axis of the mesh that implementation='ring' "
            f"splits the sequence over, of {names}, but is {mesh_axis!r}."
        )
    return mesh, mesh_axis


def _in_a_ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None,
    mesh_axis: str | None,
    **options: Any,
) -> jax.Array:
    """`ring` for all heads, on whole arrays or, in `jax.shard_map`, on local ones."""
    mesh, axis = _mesh_axis(query, mesh_axis)
    attend = functools.partial(
        multi_head(ring, map_heads="vmap"), axis_name=axis, **options
    )
    kind = mesh.axis_types[mesh.axis_names.index(axis)]
    if kind == AxisType.Manual:
        return attend(query, key, value, key_mask=key_mask)
    size = mesh.shape[axis]
    for letter, length in (("T", query.shape[1]), ("S", key.shape[1])):
        if length % size:
            raise ValueError(
                f"implementation='ring' needs {letter} to be a multiple of the {size} "
                f"devices along {axis!r}, but {letter}={length}: pad the sequence, and "
                "give `key_mask`."
            )

    spec, names = PartitionSpec(None, axis), {axis}
    arrays = [x for x in (query, key, value, key_mask) if x is not None]
    if mesh.explicit_axes:  # what is known to be split stays so: all of it is local
        batch, _, heads = (*jax.typeof(query).sharding.spec, None, None, None)[:3]
        spec, names = PartitionSpec(batch, axis, heads), {axis, *mesh.explicit_axes}
    specs = tuple(PartitionSpec(*spec[: x.ndim]) for x in arrays)
    if mesh.explicit_axes:
        arrays = [
            jax.sharding.reshard(x, NamedSharding(mesh, one))
            for x, one in zip(arrays, specs, strict=True)
        ]

    def local(query: Any, key: Any, value: Any, key_mask: Any = None) -> jax.Array:
        return attend(query, key, value, key_mask=key_mask)

    split = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=spec, axis_names=names
    )
    return split(*arrays)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    key_mask: jax.Array | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    mesh_axis: str | None = None,
) -> jax.Array:
    """Exact dot-product attention on whole arrays, by the implementation that suits.

    O[b, :, n] = softmax(scale · Q Kᵀ + bias) V for every example b and head n.

    | implementation | what it is | memory |
    |---|---|---|
    | "reference" | `dot_product`, batched | O(B·N·T·S) |
    | "blockwise" | `blockwise`, on one CPU in a loop over heads | O(B·N·(T+S)) |
    | "xla" | `jax.nn.dot_product_attention` | O(B·N·T·S) |
    | "cudnn" | cuDNN's flash kernel: NVIDIA GPU, bfloat16 or float16 | O(B·N·(T+S)) |
    | "tokamax" | `tokamax.dot_product_attention`, where installed | its own choice |
    | "ring" | `ring`: the sequence split over devices | O(B·N·(T+S) / devices) |

    None takes, on CPU, "blockwise" where T·S ≥ 128² and else "reference"; on a GPU
    "cudnn" where it is sure to serve (bfloat16 or float16, H = V ≤ 128 a multiple of 8,
    no bias and no mask but causal or a window to the left); and else "blockwise" where
    T·S ≥ 2048², "reference" below. The platform is that of `jax.default_backend()`
    while the function is traced: name the implementation when you lower for another one
    with `jax.export`.

    Unlike in `jax.nn`, a query that may attend to nothing gives zeros whatever the
    implementation. One whose bias is −∞ for every key gives zeros with "reference" and
    "blockwise" alone: say such things with a mask.

    "blockwise", "ring" and "cudnn" have derivatives in reverse mode alone, the last one
    once: for `jax.jvp`, `jax.jacfwd` and the like give implementation="reference".

    Args:
      query: [B, T, N, H].
      key: [B, S, K, H], with N a multiple of K.
      value: [B, S, K, V].
      bias: [B or 1, N or 1, T or 1, S or 1] or None.
      mask: bool of such a shape, True = attend, or None.
      key_mask: bool [B, S], True = a real token, or None.
      query_seq_lengths: int [B], queries of each example, or None for all: zeros come
        out for those behind, as in `jax.nn`.
      key_value_seq_lengths: int [B], keys of each example, or None for all; the same as
        `key_mask=masks.from_lengths(key_value_seq_lengths, S)`.
      local_window_size: (left, right): query t attends only to keys t − left ≤ s ≤
        t + right, as in `jax.nn`; one number for both; None for all. "blockwise" and
        "cudnn" take O(T · (left + right)) time for it.
      implementation: a name of the table, or None.
      mesh_axis: for "ring", the mesh axis that T and S are split over; None takes the
        one that T of the query is known to be split over. It has no bias, mask and
        window; the mesh is the current one (`jax.set_mesh`) or the arrays'; inside of
        `jax.shard_map` arrays are the shares of this device.

    Returns:
      [B, T, N, V], in the dtype of the inputs.

    Raises:
      ValueError: on wrong shapes, or if the named implementation cannot serve.
      TypeError: on wrong dtypes.

    Reference: Vaswani et al., 2017, arXiv:1706.03762.

    >>> x = jnp.ones((2, 5, 4, 8))
    >>> dot_product_attention(x, x, x, implementation="blockwise").shape
    (2, 5, 4, 8)
    """
    sizes = _checks.check_arrays(query, key, value, bias, mask, key_mask)
    _checks.check_dtypes(query, key, value)
    sides = masks.window_sides(local_window_size, is_causal)
    lengths = {"query_seq_lengths": query_seq_lengths}
    lengths["key_value_seq_lengths"] = key_value_seq_lengths
    for name, given in lengths.items():
        if given is not None:
            _checks.check_shape(name, jnp.asarray(given), ("B",), sizes)
    if key_value_seq_lengths is not None:
        real = masks.from_lengths(key_value_seq_lengths, sizes["S"])
        key_mask = real if key_mask is None else key_mask & real
    options: dict[str, Any] = {"scale": scale, "is_causal": is_causal}
    if query_seq_lengths is not None:
        out = dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            key_mask=key_mask,
            local_window_size=local_window_size,
            implementation=implementation,
            mesh_axis=mesh_axis,
            **options,
        )
        real = masks.from_lengths(query_seq_lengths, sizes["T"])
        return jnp.where(real[:, :, None, None], out, 0)
    if implementation is None:
        pairs_given = any(x is not None for x in (bias, mask, key_mask))
        implementation = _choose(query, key, value, pairs_given, is_causal, sides)
    _checks.check_choice("implementation", implementation, get_args(Implementation))
    if implementation == "ring":
        unserved: dict[str, Any] = dict(bias=bias, mask=mask)
        unserved["local_window_size"] = local_window_size
        for name, pairs in unserved.items():
            if pairs is not None:
                raise ValueError(
                    f"implementation='ring' has no `{name}`; {_OTHERS.rstrip('.')}, or "
                    "say what may be seen by `is_causal` and `key_mask`."
                )
        options |= dict(key_mask=key_mask, mesh_axis=mesh_axis)
        return _in_a_ring(query, key, value, **options)
    arrays = (query, key, value, bias)
    if implementation == "blockwise":
        options["local_window_size"] = local_window_size
        return multi_head(blockwise)(*arrays, mask, key_mask=key_mask, **options)
    band = None
    if local_window_size is not None:
        band = masks.window(sizes["T"], *sides, key_length=sizes["S"])[None, None]
    if implementation == "reference":
        if band is not None:
            mask, options["is_causal"] = masks.combine(mask, band), False
        return multi_head(dot_product)(*arrays, mask, key_mask=key_mask, **options)
    refusal = _refusal(implementation, query, key, value, sides)
    if refusal is not None:
        raise ValueError(refusal)
    if key_mask is not None:
        mask = masks.combine(mask, key_mask[:, None, None, :])
    query, key, value = zero_unseen_arrays(query, key, value, mask, None, *sides)
    options["local_window_size"] = local_window_size
    if implementation == "tokamax":
        if band is not None and sizes["T"] != sizes["S"]:  # its window takes T = S
            mask = masks.combine(mask, band)
            options |= {"is_causal": False, "local_window_size": None}
        attend = importlib.import_module("tokamax").dot_product_attention
    else:
        attend = jax.nn.dot_product_attention
        options["implementation"] = implementation
    with jax.numpy_dtype_promotion("standard"):  # jax.nn promotes bfloat16 scores
        out = attend(query, key, value, bias, mask, **options)
    if is_causal and band is None:
        band = masks.causal(sizes["T"], sizes["S"])[None, None]
    if band is not None and (mask is not None or sizes["T"] > sizes["S"]):
        mask = masks.combine(mask, band)
    if mask is None:
        return out
    sees_any = mask.any(axis=3).transpose(0, 2, 1)[..., None]  # [B|1, T|1, N|1, 1]
    return jnp.where(sees_any, out, 0.0)
