"""Exact dot-product attention on whole arrays, and which implementation makes it.

Letters: B batch, N query heads, K key/value heads, and those of `attn_jax.attention`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from attn_jax import masks, multihead
from attn_jax.attention import _checks
from attn_jax.attention._scores import zero_unseen_arrays
from attn_jax.attention.blockwise_attention import blockwise
from attn_jax.attention.softmax import dot_product
from attn_jax.multihead import multi_head

__all__ = ["Implementation", "dot_product_attention"]

# From this many scores per head on, accelerators get the blockwise implementation.
_BLOCKWISE_FROM_SCORES = 2048 * 2048

Implementation = Literal["reference", "blockwise", "xla", "cudnn", "tokamax"]

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

    None takes, on CPU, "blockwise" where T·S ≥ 128² and else "reference"; on a GPU
    "cudnn" where it is sure to serve (bfloat16 or float16, H = V ≤ 128 a multiple of 8,
    no bias and no mask but causal or a window to the left); and else "blockwise" where
    T·S ≥ 2048², "reference" below. The platform is that of `jax.default_backend()`
    while the function is traced: name the implementation when you lower for another one
    with `jax.export`.

    Unlike in `jax.nn`, a query that may attend to nothing gives zeros whatever the
    implementation. One whose bias is −∞ for every key gives zeros with "reference" and
    "blockwise" alone: say such things with a mask.

    "blockwise" and "cudnn" have derivatives in reverse mode alone, "cudnn" once: for
    `jax.jvp`, `jax.jacfwd` and the like give implementation="reference".

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
            **options,
        )
        real = masks.from_lengths(query_seq_lengths, sizes["T"])
        return jnp.where(real[:, :, None, None], out, 0)
    if implementation is None:
        pairs_given = any(x is not None for x in (bias, mask, key_mask))
        implementation = _choose(query, key, value, pairs_given, is_causal, sides)
    _checks.check_choice("implementation", implementation, get_args(Implementation))
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
