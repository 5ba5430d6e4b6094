"""A mesh of all devices, arrays on it, and processes of a cluster that agree."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh, axis "data", over all devices of all processes."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of a cluster share a batch evenly.

    Those of one process share any batch, see `evenly`.
    """
    if jax.process_count() > 1 and batch_size % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the number of devices, got "
            f"{batch_size} for {mesh.size} devices."
        )


def put(value: PyTree, mesh: Mesh, *axes: str | None) -> PyTree:
    """Places host arrays on a mesh, split along named axes, else replicated.

    Every process passes the whole value; each device keeps its part.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))

    def one(x: Any) -> jax.Array:
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(
            host.shape, sharding, lambda index: host[index]
        )

    return jax.tree.map(one, value)


def rows(batch: PyTree, axis: int = 0) -> int:
    """Size of an axis that all arrays of a batch have."""
    return int(jax.tree.leaves(batch)[0].shape[axis])


def place(batch: PyTree, mesh: Mesh, axis: int = 0) -> PyTree:
    """Places a batch, split over the devices along an axis where that is even.

    Else every device has all of it, and `evenly` splits it inside the program.
    """
    even = rows(batch, axis) % mesh.size == 0
    return put(batch, mesh, *((None,) * axis + ("data",) if even else ()))


def evenly(batch: PyTree, mesh: Mesh) -> PyTree:
    """Inside a program: splits a batch that devices cannot share evenly.

    XLA fills it up with rows that count nothing, so that no number depends on how many
    devices there are, but for rounding.
    """
    if rows(batch) % mesh.size == 0:
        return batch
    split = NamedSharding(mesh, PartitionSpec("data"))
    return jax.lax.with_sharding_constraint(batch, split)


def apart(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, axis: int = 0
) -> jax.Array:
    """Inside a program: ``function(x)``, each device on rows of its own.

    For what has loops whose length depends on the data: else devices agree on each
    turn. Rows that devices cannot share evenly are computed together.

    Args:
      function: of an array; it treats each row by itself and keeps the axes before.
      x: with the rows of a batch along ``axis``.
      axis: of the batch.
    """
    mesh = data_mesh()
    if mesh.size == 1 or rows(x, axis) % mesh.size:
        return function(x)
    split = PartitionSpec(*(None,) * axis, "data")
    # Carries of loops begin the same on all devices, which its check does not allow.
    return jax.shard_map(
        function, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )(x)


@functools.lru_cache(maxsize=64)
def _split(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    return jax.jit(lambda params, batch: function(params, evenly(batch, mesh)))


def call(function: Callable[..., Any], params: PyTree, batch: PyTree) -> PyTree:
    """``function(params, batch)`` with the batch split over all devices, on the host.

    Args:
      function: pure, jitted or not; the same object compiles once.
      params: host arrays, or as training left them.
      batch: host arrays with a common leading axis.

    Returns:
      NumPy arrays, the same on every process of a cluster.
    """
    mesh = data_mesh()
    return jax.tree.map(fetch, _split(function, mesh)(params, place(batch, mesh)))


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, wherever its parts are."""
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def all_finite(tree: PyTree) -> bool:
    """Whether no number in a tree of arrays is infinite or none."""
    return all(
        bool(np.isfinite(np.asarray(leaf)).all())
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def agree(value: int) -> int:
    """Process 0's value, on every process of a cluster."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree_any(value: int) -> int:
    """The largest value of all processes, on every process of a cluster."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(value)).max())


def agree_on(value: Any) -> Any:
    """Process 0's value, any that can be pickled, on every process of a cluster."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = agree(len(data))
    filled = np.resize(data, size)  # others' own length may differ
    return pickle.loads(multihost_utils.broadcast_one_to_all(filled).tobytes())
