"""The trade-off plane of a report: mean log R against nats, and the curve that no model can be below."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, kept_base_states
from nabla_gfn_jax.metrics.tilt import FEW, Strata, Values, log_z_of, normalise
from nabla_gfn_jax.reports.evaluated import Evaluated
from nabla_gfn_jax.reports.source import Run
from nabla_gfn_jax.rewards import TOTAL
from nabla_gfn_jax.runs.evaluations import estimate

_POINTS = 240  # of the curve, before those outside the picture are left out
_LARGEST = 1e3  # the largest |b| · (standard deviation of log R)


@dataclass(frozen=True)
class Point:
    """A saved LoRA, or at 0 updates the base model. Errors are standard errors."""

    run: int
    updates: int
    reward: float
    spent: float
    reward_error: float
    spent_error: float


@dataclass(frozen=True)
class Frontier:
    """The nats that a mean log R needs: base samples weighted by R^b, for all b.

    From `sure` on, counted from the point nearest to the base model, so few base samples carry the weight that the
    curve is a lower bound.
    """

    reward: list[float]
    needed: list[float]
    sure: list[bool]
    base: float | None  # the base model's mean log R
    samples: int  # base samples; 0: the curve joins the values of the evaluations


@dataclass(frozen=True)
class Plane:
    """Points of comparable evaluations, and their frontier."""

    points: list[Point]
    frontier: Frontier
    prompts: list[str]
    samples: int  # of each model
    left_out: list[int] = field(default_factory=list)  # runs whose evaluations are of other prompts, sampler or reward


def plane(runs: Sequence[Run], measured: Sequence[Evaluated | None]) -> Plane | None:
    """The plane of the runs whose evaluations are like those of the first; None if no run has nats."""
    rows = {number: _points(number, e) for number, e in enumerate(measured) if e is not None}
    known = [number for number, points in rows.items() if points]
    if not known:
        return None
    first = measured[known[0]]
    assert first is not None
    alike = [number for number in known if (e := measured[number]) is not None and e.what == first.what]
    points = [point for number in alike for point in rows[number]]
    samples = max(int(row.get("certificate", {}).get("samples", 0)) for row in first.of.values())
    curve = _kept(runs, alike, first, points) or _joined(first)
    return Plane(points, curve, list(first.what["prompts"] or ()), samples, [n for n in known if n not in alike])


def frontier(log_reward: Values, prompt: np.ndarray, lowest: float, highest: float) -> Frontier:
    """The curve of base samples from their mean log R to `lowest` and `highest`, and a little further."""
    order = np.argsort(prompt, kind="stable")
    strata, values = Strata(prompt[order]), np.asarray(log_reward, np.float64)[order]
    centre = strata.mean(values)
    scale = strata.mean((values - centre) ** 2) ** 0.5
    room = 0.06 * max(highest - lowest, scale)
    steps = np.geomspace(1e-2, _LARGEST, _POINTS // 2) / max(scale, 1e-300)
    found = []
    for b in (*-steps[::-1], 0.0, *steps):
        weights = normalise(b * (values - centre), strata)
        shift = float(strata.sums(weights.shares * (values - centre)).mean())
        needed = max(b * shift - float(weights.log_mean.mean()), 0.0)
        inside = lowest - room <= centre + shift <= highest + room
        if inside:
            found.append((centre + shift, needed, log_z_of(b * values, strata).effective >= FEW))
    reward, nats, sure = zip(*found, strict=True)
    return Frontier(list(reward), list(nats), list(sure), centre, len(values))


def _points(number: int, evaluated: Evaluated) -> list[Point]:
    found = []
    for updates, row in evaluated.of.items():
        reward, spent = estimate(row, "certificate", "log_reward"), estimate(row, "certificate", "spent")
        if reward is not None and spent is not None:
            found.append(Point(number, updates, reward.value, spent.value, reward.error, spent.error))
    return found


def _kept(runs: Sequence[Run], alike: Sequence[int], first: Evaluated, points: Sequence[Point]) -> Frontier | None:
    """The curve of the base samples that an evaluation kept in one of the workdirs."""
    for number in alike:
        state = kept_base_states(runs[number].path / BASE_SAMPLES, first.what).get("nats")
        if state is not None:
            rewards = [point.reward for point in points]
            mean = Strata(np.sort(state.prompt)).mean(state.by_prompt().values[TOTAL])
            return frontier(state.values[TOTAL], state.prompt, min(mean, *rewards), max(mean, *rewards))
    return None


def _joined(first: Evaluated) -> Frontier:
    """The curve through the needed nats of the evaluations, for a workdir without base samples."""
    rows = [
        (estimate(row, "certificate", "log_reward"), estimate(row, "certificate", "needed"))
        for row in first.of.values()
    ]
    found = sorted((reward.value, needed.value) for reward, needed in rows if reward is not None and needed is not None)
    base = estimate(first.of.get(0, {}), "certificate", "log_reward")
    at_base = None if base is None else base.value
    return Frontier([r for r, _ in found], [n for _, n in found], [True] * len(found), at_base, 0)
