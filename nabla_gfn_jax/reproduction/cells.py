"""The runs of a grid: their order, and the choice of a learning rate."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.reproduction.grid import Grid
from nabla_gfn_jax.settings import Settings

FIRST, TUNING, SEEDS = "first", "tuning", "seeds"  # the stages of a grid

Score = Callable[["Cell"], float]  # NaN: the cell has none


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    stage: str
    base: str
    method: str
    config: str
    rate: float
    seed: int
    settings: Settings
    beta: float | None  # of the target by which the cell is measured

    @property
    def folder(self) -> Path:
        """Its workdir within the folder of the grid."""
        return Path("cells") / self.base / self.method / f"rate{self.rate:g}" / f"seed{self.seed}"

    @property
    def name(self) -> str:
        """A short name for messages."""
        return f"{self.method} on {self.base}, rate {self.rate:g}, seed {self.seed}"

    @property
    def epochs(self) -> int:
        """The epochs of the run, with those that only sample."""
        return self.settings.training.num_epochs + (1 if self.settings.algorithm.on_policy else 2)


def cell(grid: Grid, stage: str, base: str, method: str, rate: float, seed: int) -> Cell:
    """The run of a method."""
    settings = grid.settings(base, method, rate, seed)
    return Cell(stage, base, method, grid.config(base, method), rate, seed, settings, grid.betas[base])


def in_order(grid: Grid, score: Score) -> Iterator[Cell]:
    """The cells in the order that answers most first.

    The first seed of every method, at the method's first rate; then its other rates; then the other seeds, at the rate
    with the best score. `score` is asked for the cells of the first two stages when the third begins.
    """
    first, *others = grid.shared.seeds
    pairs = [(base, method) for base in grid.bases for method in grid.methods]
    for pair in pairs:
        yield cell(grid, FIRST, *pair, grid.rates(*pair)[0], first)
    for pair in pairs:
        for rate in grid.rates(*pair)[1:]:
            yield cell(grid, TUNING, *pair, rate, first)
    for seed in others:
        for pair in pairs:
            yield cell(grid, SEEDS, *pair, best_rate(grid, *pair, score), seed)


def best_rate(grid: Grid, base: str, method: str, score: Score) -> float:
    """The rate whose run with the first seed has the best score; the first rate if no run has one."""
    rates = grid.rates(base, method)
    if len(rates) == 1:
        return rates[0]
    sign = 1.0 if grid.shared.tuning.best == "lowest" else -1.0
    scores = [score(cell(grid, TUNING, base, method, rate, grid.shared.seeds[0])) for rate in rates]
    known = [(sign * value, place) for place, value in enumerate(scores) if not math.isnan(value)]
    return rates[min(known)[1]] if known else rates[0]


def planned(grid: Grid) -> list[Cell]:
    """As many cells as `in_order` gives. Those of the last stage have the first rate, because the best is not known."""
    return list(in_order(grid, lambda cell: math.nan))


def epochs_of(cells: Sequence[Cell]) -> int:
    """The epochs of all cells together."""
    return sum(cell.epochs for cell in cells)
