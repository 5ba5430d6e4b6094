"""Checkpoints of a run in progress: Orbax, atomic, only the newest kept."""

from __future__ import annotations

import pathlib
import shutil
import uuid
from typing import Any

import jax

PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names it."""


class Checkpoints:
    """The checkpoints of one run.

    The state is stored as its list of leaves; its structure comes from the code that
    restores it, so a checkpoint never fixes the layout of a Python class.

    Args:
      folder: absolute path of the run's own folder; made by the first save.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def _manager(self) -> Any:
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, create=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: PyTree, progress: dict[str, Any]) -> None:
        """Writes a checkpoint; a crash leaves the one before it.

        Raises:
          CheckpointError: the folder cannot be written.
        """
        import orbax.checkpoint as ocp

        leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
        try:
            with self._manager() as manager:
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(leaves),
                        progress=ocp.args.JsonSave(progress),
                    ),
                )
        except Exception as error:  # tensorstore reports a full disk as ValueError
            reason = str(error).strip().split("\n")[0][:200]
            raise CheckpointError(
                f"cannot write a checkpoint to {self.folder} "
                f"({type(error).__name__}: {reason})"
            ) from error

    def restore(self, state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Returns the newest (state, progress), or None where there is none.

        A half-written checkpoint does not count: it has a temporary name until it is
        whole.

        Args:
          state: a state of the same structure, shapes, dtypes and placement.

        Raises:
          CheckpointError: there is one, but it is damaged or of another state.
        """
        if not self.folder.is_dir():
            return None
        try:
            return self._restore(state)
        except Exception as error:  # whatever a damaged file makes of Orbax
            reason = str(error).strip().split("\n")[0][:200]
            raise CheckpointError(
                f"cannot read the checkpoint in {self.folder} "
                f"({type(error).__name__}: {reason})"
            ) from error

    def _restore(self, state: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree.flatten(state)
        like = {
            str(i): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for i, x in enumerate(leaves)
        }
        with self._manager() as manager:
            step = manager.latest_step()
            if step is None:
                return None
            found = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(like),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        restored = [found.state[str(i)] for i in range(len(leaves))]
        return jax.tree.unflatten(treedef, restored), found.progress

    def set_aside(self) -> pathlib.Path:
        """Moves the folder out of the way; returns where it is now."""
        target = self.folder.with_name(
            f"{self.folder.name}.{uuid.uuid4().hex[:8]}.corrupt"
        )
        self.folder.rename(target)
        return target

    def clear(self) -> None:
        """Removes all checkpoints of the run."""
        shutil.rmtree(self.folder, ignore_errors=True)
