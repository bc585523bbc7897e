"""Planes of a report: mean log R against the other figures of the images, beside those of the tilted base model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.reports.evaluated import Evaluated
from nabla_gfn_jax.reports.source import Row
from nabla_gfn_jax.rewards import TOTAL
from nabla_gfn_jax.runs.evaluations import estimate

_NO_FIGURES = (TOTAL, "effective_samples")


@dataclass(frozen=True)
class Beside:
    """A figure of a saved LoRA or, at 0 updates, of the base model. Errors are standard errors.

    `tilted` is the same figure of the base model's samples, weighted by R^b to the same mean log R; None if there is
    none.
    """

    run: int
    updates: int
    reward: float
    value: float
    tilted: float | None
    reward_error: float
    value_error: float
    tilted_error: float | None


@dataclass(frozen=True)
class Figure:
    """A figure over the mean log R. With `as_few`, it was computed at the effective sample size of the tilted base."""

    name: str
    as_few: bool
    points: list[Beside]


def beside(measured: Sequence[Evaluated | None]) -> list[Figure]:
    """A plane for each figure that a model with a mean log R has; those with a tilted base model come first."""
    names = dict.fromkeys(name for e in measured if e is not None for name in e.figures() if name not in _NO_FIGURES)
    planes = [Figure(name, _as_few(measured, name), list(_points(measured, name))) for name in names]
    found = [plane for plane in planes if plane.points]
    return sorted(found, key=lambda plane: all(point.tilted is None for point in plane.points))


def _as_few(measured: Sequence[Evaluated | None], name: str) -> bool:
    rows = [row for e in measured if e is not None for row in e.of.values()]
    return any(estimate(row, "as_few_samples", name) is not None for row in rows)


def _points(measured: Sequence[Evaluated | None], name: str) -> Iterator[Beside]:
    """Points of equal sample sizes: where other models have the figure at fewer samples, one without it is left out."""
    group = "as_few_samples" if _as_few(measured, name) else "figures"
    for number, evaluated in enumerate(measured):
        for updates, row in {} if evaluated is None else evaluated.of.items():
            reward, value, tilted = _reward(row), estimate(row, group, name), estimate(row, "tilted_base", name)
            if reward is not None and value is not None:
                of_tilted = (None, None) if tilted is None else tilted
                yield Beside(
                    number, updates, reward.value, value.value, of_tilted[0], reward.error, value.error, of_tilted[1]
                )


def _reward(row: Row) -> Estimate | None:
    return estimate(row, "certificate", TOTAL) or estimate(row, "figures", TOTAL)
