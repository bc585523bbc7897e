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
    found = [plane for plane in (_plane(measured, name) for name in names) if plane.points]
    return sorted(found, key=lambda plane: all(point.tilted is None for point in plane.points))


def _plane(measured: Sequence[Evaluated | None], name: str) -> Figure:
    """A figure at equal sample sizes: if some models have it at fewer samples, those without that are left out."""
    rows = [row for e in measured if e is not None for row in e.of.values()]
    as_few = any(estimate(row, "as_few_samples", name) is not None for row in rows)
    return Figure(name, as_few, list(_points(measured, name, "as_few_samples" if as_few else "figures")))


def _points(measured: Sequence[Evaluated | None], name: str, group: str) -> Iterator[Beside]:
    for number, evaluated in enumerate(measured):
        for updates, row in {} if evaluated is None else evaluated.of.items():
            reward, value, tilted = _reward(row), estimate(row, group, name), estimate(row, "tilted_base", name)
            if reward is not None and value is not None:
                yield Beside(
                    run=number,
                    updates=updates,
                    reward=reward.value,
                    value=value.value,
                    tilted=None if tilted is None else tilted.value,
                    reward_error=reward.error,
                    value_error=value.error,
                    tilted_error=None if tilted is None else tilted.error,
                )


def _reward(row: Row) -> Estimate | None:
    return estimate(row, "certificate", TOTAL) or estimate(row, "figures", TOTAL)
