"""Saves and restores a training run with Orbax. A save is atomic, and only the newest saves are kept."""

from pathlib import Path
from typing import Any, Self

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp

from nabla_gfn_jax.errors import UserError


class Checkpoints:
    """The saves of one tree of arrays under `folder`, by step. An interrupted save is never the latest.

    This is a context manager, which frees Orbax's threads. `keep` is the number of newest saves to keep.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest save; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree`, unless the newest save has this step already."""
        if step != self.latest:
            state = jax.tree.map(_one_copy, flax.serialization.to_state_dict(tree))
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """The newest save as a tree like `like`. Raises `UserError` if it is damaged or has another structure."""
        state = flax.serialization.to_state_dict(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        try:
            read = self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds
            reason = str(error).splitlines()[0]
            where = f"{self._manager.directory}/{self.latest}"
            raise UserError(f"{where} cannot be restored ({reason}); delete it to use the save before") from error
        return flax.serialization.from_state_dict(like, read)


def _one_copy(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A host copy of an array that is the same on all devices. One shard per device takes Orbax six times as long."""
    return np.asarray(array) if isinstance(array, np.ndarray) or array.is_fully_replicated else array
