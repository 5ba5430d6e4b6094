"""Checks of meshes: one program on several devices, local parts or explicit axes.

Both only trace, under a mesh that no device stands behind, so one device suffices.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from attn_jax.multihead import multi_head
from attn_jax.testing.outcome import Fault, Finding
from attn_jax.testing.trial import NUM_QUERIES, Arrays, Trial, joined, split_moving

__all__ = ["explicit_mesh", "shard_map"]

# Examples, or heads, on each of the two devices of an axis.
_EACH = 2


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


def shard_map(trial: Trial) -> Finding:
    """Traces in `jax.shard_map` with its defaults, over the batch, forward and back.

    What a loop carries must vary over the mesh as what it becomes: zeros alone do not.
    """
    variant = trial.variant
    # Automatic axes: the default of jax 0.12 is explicit ones, that of 0.10 is not.
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,))
    # Some hold causal attention to T = S.
    arrays = trial.neutral(
        trial.inputs(num_keys=NUM_QUERIES if variant.causal else None)
    )
    batched = {"query", "key", "value", "bias", "mask", "key_mask"} & set(arrays)
    # Parameters and the key for randomness are the same everywhere; and the other way.
    splits = {"the batch": batched}
    if "rng" in arrays:
        splits["the random keys"] = {"rng"}

    for what, split in splits.items():
        axes = {name: 0 if name in split else None for name in arrays}
        specs = {
            name: PartitionSpec(*(["data"] if name in split else [])) for name in arrays
        }
        whole = {
            name: jnp.stack([x] * 2 * _EACH) if name in split else x
            for name, x in arrays.items()
        }
        for is_causal in (False, True) if variant.causal else (False,):

            def local(
                arrays: Arrays, axes: Arrays = axes, is_causal: bool = is_causal
            ) -> Any:
                moving, fixed = split_moving(arrays)

                def of(moving: Arrays) -> jax.Array:
                    return jax.vmap(
                        lambda one: trial.call(one, is_causal=is_causal),
                        in_axes=(axes,),
                    )(joined(moving, fixed))

                out, pullback = jax.vjp(of, moving)
                return out, pullback(out)[0]

            grads = {k: specs[k] for k in split_moving(whole)[0]}
            sharded = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs,),
                out_specs=(PartitionSpec("data"), grads),
            )
            try:
                jax.eval_shape(sharded, whole)
            except Exception as error:
                raise Fault(
                    f"{what} split over a mesh"
                    f"{', is_causal=True' if is_causal else ''}: {_said(error)}"
                ) from None
    return Finding("traced over two devices, forward and backward")


def explicit_mesh(trial: Trial) -> Finding:
    """Traces by `multi_head` on arrays sharded along explicit axes of a mesh."""
    variant = trial.variant
    mesh = AbstractMesh((2, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    spec = PartitionSpec("data", None, "model")

    def sharded(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    size = 2 * _EACH
    arrays: Arrays = {}
    num_keys = NUM_QUERIES if variant.causal else None
    for name, x in trial.full(trial.inputs(num_keys=num_keys)).items():
        if name == "rng":
            arrays[name] = x
        elif name == "params":
            arrays[name] = jax.tree.map(
                lambda leaf: sharded(
                    np.broadcast_to(leaf, (size, *jnp.shape(leaf))),
                    PartitionSpec("model"),
                ),
                x,
            )
        else:
            arrays[name] = sharded(
                np.broadcast_to(x[:, None], (size, x.shape[0], size, x.shape[1])), spec
            )
    if variant.key_mask:
        ones = np.ones((size, arrays["key"].shape[1]), bool)
        arrays["key_mask"] = sharded(ones, PartitionSpec("data"))
    options = {"is_causal": True} if variant.causal else {}

    def both(arrays: Arrays) -> Any:
        moving, fixed = split_moving(arrays)
        out, pullback = jax.vjp(
            lambda moving: multi_head(variant)(**joined(moving, fixed), **options),
            moving,
        )
        return out, pullback(out)[0]

    try:
        out, grads = jax.eval_shape(both, arrays)
    except Exception as error:
        raise Fault(f"raises {_said(error)}") from None
    for name, array in (("the output", out), ("dQ", grads["query"])):
        got = array.sharding.spec
        if got != PartitionSpec("data", None, "model", None):
            raise Fault(f"{name} of arrays sharded as {spec} is sharded as {got}")
    return Finding("[B, T, N, H] sharded over batch and heads stays so, with gradients")
