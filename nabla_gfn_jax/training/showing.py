"""Keeps a run's pictures for its report, and writes the report while the run trains."""

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nabla_gfn_jax.reports import page
from nabla_gfn_jax.runs import pictures
from nabla_gfn_jax.runs.workdir import Workdir


class Showing:
    """Writes the pictures of a policy, and the report of the run. An error in either never stops the run."""

    def __init__(self, workdir: Workdir, prompts: Sequence[str]):
        """`prompts`: the run's prompts in the order of their ids."""
        self._path, self._prompts = workdir.path, prompts
        self._due, self._told = False, False

    def keep(self, updates: int, images: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        """Writes the pictures of the policy after `updates` updates, from samples in the order of `arranged`."""
        of = pictures.kept(self._prompts, len(images))
        found = {name: tuple(map(float, values[: len(of)])) for name, values in scores.items()}
        file = pictures.place(self._path, updates)
        self._try(lambda: pictures.save(file, pictures.Pictures(of, images[: len(of)], found)))
        self._due = True

    def end_epoch(self) -> None:
        """Writes the report, if the epoch had pictures. The epoch's row is then in the log."""
        if self._due:
            self._try(lambda: page.write(self._path / page.NAME, [self._path]))
        self._due = False

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # the disk may be full, or a file in the workdir damaged
            if not self._told:
                print(f"\nthe report of {self._path} is not written ({error}); the run goes on", file=sys.stderr)
            self._told = True
