"""Runs a network on batches of images, split over all devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from nabla_gfn_jax.images import levels
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.typing import Params


class OnDevices:
    """A pure function (params, rows) → results, compiled to evaluate each row on one of the devices.

    `rows` and results are trees of arrays with one common leading axis. A batch that is smaller than the largest so far
    is padded, so that one program serves all.
    """

    def __init__(self, function: Callable[[Params, Any], Any], params: Params):
        self._mesh = all_devices()
        self._params = place(params, self._mesh)
        self._run = split(function, self._mesh, (EVERYWHERE, SPLIT), SPLIT)
        self._most = 0

    def __call__(self, rows: PyTree[Any]) -> PyTree[np.ndarray]:
        """The results for a batch, in the host's memory."""
        count = len(jax.tree.leaves(rows)[0])
        self._most = max(self._most, -(-count // self._mesh.size) * self._mesh.size)
        padded = np.minimum(np.arange(self._most), count - 1)
        taken = jax.tree.map(lambda a: a[padded], rows)
        found = self._run(self._params, place(taken, self._mesh, SPLIT))
        return jax.tree.map(lambda a: gather(a, self._mesh)[:count], found)


def as_saved(images: Float[np.ndarray, "batch height width 3"]) -> Float[np.ndarray, "batch height width 3"]:
    """Images in [0, 1] rounded to the 256 levels of a file, as the original programs read them."""
    return levels(images).astype(np.float32) / np.float32(255.0)
