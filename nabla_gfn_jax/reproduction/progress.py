"""The progress of a grid: a bar over the epochs of all its runs, and the time that is left."""

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from nabla_gfn_jax.reproduction.cells import Cell, epochs_of

_DAY, _HOUR, _MINUTE = 86400.0, 3600.0, 60.0


class Progress:
    """A bar on stderr. The time left assumes the pace of each method's runs so far, with their evaluation.

    A method that has not run yet is assumed to be as fast as the mean of the others.
    """

    def __init__(self, cells: Sequence[Cell]):
        self._left, self._seconds, self._epochs = list(cells), dict[str, float](), dict[str, int]()
        self._bar = tqdm(total=epochs_of(cells), unit="epoch", dynamic_ncols=True, position=1, leave=False)
        self._begun, self._number, self._of = 0.0, 0, len(cells)

    def passes(self, cell: Cell, seconds: float) -> None:
        """A run that is done already. `seconds`: how long it took."""
        self._number += 1
        self._learn(cell, seconds)
        self._bar.update(cell.epochs)

    def begins(self, cell: Cell) -> None:
        """A run begins: prints its name and the time that is left for all."""
        self._number, self._begun = self._number + 1, time.monotonic()
        left = self.left()
        about = "" if left is None else f"; about {duration(left)} left for the grid"
        tqdm.write(f"run {self._number} of {self._of}: {cell.name}{about}", file=sys.stderr)
        self._bar.set_description(f"grid, run {self._number} of {self._of}")

    def epoch(self) -> None:
        """An epoch of the run has ended."""
        self._bar.update()
        left = self.left()
        if left is not None:
            self._bar.set_postfix_str(f"about {duration(left)} left")

    def ends(self, cell: Cell, epochs: int) -> None:
        """The run has ended, after `epochs` calls of `epoch`. The bar counts those of earlier starts too."""
        self._bar.update(cell.epochs - epochs)
        if epochs == cell.epochs:  # a run that was resumed or failed says nothing about the pace
            self._learn(cell, time.monotonic() - self._begun)
        else:
            self._left, self._begun = self._left[1:], 0.0

    def left(self) -> float | None:
        """Seconds until all runs have ended; None if no run has ended yet."""
        if not self._epochs:
            return None
        mean = sum(self._seconds.values()) / sum(self._epochs.values())
        pace = {method: self._seconds[method] / self._epochs[method] for method in self._epochs}
        whole = sum(cell.epochs * pace.get(cell.method, mean) for cell in self._left)
        running = self._left[0] if self._begun and self._left else None
        if running is None:
            return whole
        expected = running.epochs * pace.get(running.method, mean)
        return whole - min(time.monotonic() - self._begun, expected)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()

    def _learn(self, cell: Cell, seconds: float) -> None:
        self._left, self._begun = self._left[1:], 0.0
        self._seconds[cell.method] = self._seconds.get(cell.method, 0.0) + seconds
        self._epochs[cell.method] = self._epochs.get(cell.method, 0) + cell.epochs


def duration(seconds: float) -> str:
    """A duration in the unit that fits: 90 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    return f"{seconds / _HOUR:.1f} h" if seconds < 2 * _DAY else f"{seconds / _DAY:.1f} days"
