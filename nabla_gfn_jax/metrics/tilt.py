"""Samples of several prompts, weighted: the log of a mean weight, effective samples, and the tilt to a mean reward.

NumPy alone. Every mean is the mean over prompts of the mean within a prompt. `counts` say how often each sample counts
(a bootstrap's); without them each counts once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

REPLICATES = 200  # of a bootstrap: standard errors to 5 %
FEW = 20  # effective samples of a prompt, below which log Z is called a lower bound
_LIMIT = 1e8  # of |b| · (spread of log R): beyond it all weight lies on the best samples

Values = Float[np.ndarray, " n"]
BaseValues = Float[np.ndarray, " base"]
OfPrompts = Float[np.ndarray, " prompts"]


class Estimate(NamedTuple):
    """A figure and its standard error; NaN where there is none."""

    value: float
    error: float = float("nan")


class Strata:
    """Where each prompt's samples begin in arrays that are sorted by prompt."""

    def __init__(self, prompt: Int[np.ndarray, " n"]):
        self.prompts, self.starts, self.sizes = np.unique(prompt, return_index=True, return_counts=True)

    def sums(self, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "prompts ..."]:
        return np.add.reduceat(values, self.starts)

    @property
    def slices(self) -> list[slice]:
        return [slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True)]

    def repeat(self, of_prompts: OfPrompts) -> Values:
        return np.repeat(of_prompts, self.sizes)

    def means(self, values: Values, counts: Values | None = None) -> OfPrompts:
        """The mean within each prompt."""
        counts = np.ones(len(values)) if counts is None else counts
        return self.sums(counts * values) / self.sums(counts)

    def mean(self, values: Values, counts: Values | None = None) -> float:
        """Over prompts, of the mean within each."""
        return float(self.means(values, counts).mean())

    def mean_and_error(self, values: Float[np.ndarray, "n ..."]) -> tuple[Any, Any]:
        """`mean` of each column and its standard error, NaN if a prompt has one sample."""
        sizes = self.sizes.reshape(-1, *(1,) * (values.ndim - 1)).astype(float)
        means = self.sums(values) / sizes
        squares = self.sums((values - np.repeat(means, self.sizes, axis=0)) ** 2)
        with np.errstate(invalid="ignore"):
            error = np.sqrt((squares / (sizes * (sizes - 1.0))).sum(0)) / len(sizes)
        return means.mean(0), error


class Weights(NamedTuple):
    """Weights within each prompt, and what was divided out."""

    shares: Values  # sum to 1 within each prompt, counts included
    log_mean: OfPrompts  # log of the mean weight
    effective: OfPrompts  # (Σw)²/Σw²: how many equally weighted samples these are worth


def normalise(log_weight: Values, strata: Strata, counts: Values | None = None) -> Weights:
    """∝ exp(log_weight) within each prompt."""
    counts = np.ones(len(log_weight)) if counts is None else counts
    largest = np.maximum.reduceat(np.where(counts > 0, log_weight, -np.inf), strata.starts)
    weights = np.exp(np.minimum(log_weight - strata.repeat(largest), 0.0))
    totals = strata.sums(counts * weights)
    return Weights(
        shares=counts * weights / strata.repeat(totals),
        log_mean=largest + np.log(totals / strata.sums(counts)),
        effective=totals**2 / strata.sums(counts * weights**2),
    )


class LogZ(NamedTuple):
    """Mean over prompts of the log of a mean weight."""

    value: float  # the jackknife's, which corrects the bias to first order
    error: float  # the jackknife's standard error
    plain: float  # uncorrected: too low by about (1/effective − 1/samples)/2
    effective: float  # samples a prompt, the harmonic mean over prompts
    samples: float  # drawn a prompt, likewise

    @property
    def is_lower_bound(self) -> bool:
        """Whether so few samples carry the weight that the largest weights are likely to be missing."""
        return self.effective < FEW


def log_z(log_weight: Values, prompt: Int[np.ndarray, " n"] | None = None) -> LogZ:
    """log E[w] of samples in any order: w = R^b of base samples, or the path weights of a policy's samples."""
    log_weight, strata = _sort(log_weight, prompt)
    return log_z_of(log_weight, strata)


def log_z_of(log_weight: Values, strata: Strata) -> LogZ:
    """`log_z` of samples that are sorted by prompt."""
    weights = normalise(log_weight, strata)
    sizes = strata.sizes.astype(float)
    others = strata.repeat(np.maximum(sizes - 1.0, 1.0) / sizes)
    change = np.log(np.maximum(1.0 - weights.shares, 1e-15) / others)  # of the log mean, if the sample is left out
    change = np.where(strata.repeat(sizes) > 1, change, 0.0)
    means = strata.means(change)
    squares = strata.sums((change - strata.repeat(means)) ** 2)
    return LogZ(
        value=float(np.mean(weights.log_mean - (sizes - 1.0) * means)),
        error=float(np.sqrt(np.sum((sizes - 1.0) / sizes * squares)) / len(sizes)),
        plain=float(np.mean(weights.log_mean)),
        effective=float(1.0 / np.mean(1.0 / weights.effective)),
        samples=float(1.0 / np.mean(1.0 / sizes)),
    )


class Tilt(NamedTuple):
    """Base samples weighted by R^b to a mean log R. No distribution with that mean is nearer to the base model."""

    exponent: float  # b; infinite where the mean lies beyond the samples'
    needed: float  # b · mean − log Z(b), the KL from the base model in nats; a lower bound if b is infinite


def tilt_to(mean: float, log_reward: Values, prompt: Int[np.ndarray, " n"] | None = None) -> Tilt:
    """The one b for all prompts with which base samples, in any order, have mean log R = `mean`."""
    log_reward, strata = _sort(log_reward, prompt)
    return tilt_of(mean, log_reward, strata)


def tilt_of(mean: float, log_reward: Values, strata: Strata, counts: Values | None = None) -> Tilt:
    """`tilt_to` of samples that are sorted by prompt: Newton's steps on the increasing b ↦ mean, inside a bracket."""
    centre = strata.mean(log_reward, counts)
    centred, goal = log_reward - centre, mean - centre
    scale = strata.mean(centred**2, counts) ** 0.5
    if abs(goal) <= 1e-14 * scale:
        return Tilt(0.0, 0.0)

    def at(b: float) -> tuple[float, float, float]:
        """Tilted mean, its slope in b, and log Z(b)."""
        weights = normalise(b * centred, strata, counts)
        means = strata.sums(weights.shares * centred)
        variance = strata.sums(weights.shares * (centred - strata.repeat(means)) ** 2).mean()
        return float(means.mean()), float(variance), float(weights.log_mean.mean())

    limit = float(np.copysign(_LIMIT / max(scale, 1e-300), goal))
    furthest, _, log_mean = at(limit)
    if abs(furthest) <= abs(goal):
        return Tilt(float(np.copysign(np.inf, goal)), limit * furthest - log_mean)
    low, high, b = 0.0, limit, goal / scale**2  # |low| < |b| < |high|
    for _ in range(200):
        reached, slope, log_mean = at(b)
        if abs(reached - goal) <= 1e-12 * scale:
            break
        low, high = (b, high) if abs(reached) < abs(goal) else (low, b)
        newton = b + (goal - reached) / max(slope, 1e-300)
        middle = float(np.copysign(np.sqrt(max(abs(low), 1e-12 * abs(limit)) * abs(high)), goal))
        b = newton if abs(low) < abs(newton) < abs(high) and newton * goal > 0 else middle
    return Tilt(b, max(b * goal - log_mean, 0.0))


def resamples(mine: Strata, theirs: Strata, seed: int) -> Iterator[tuple[Values, BaseValues]]:
    """A bootstrap over samples of two models: how often each sample counts, prompt by prompt.

    The i-th samples of a prompt have the same noise in both models and count equally often: what they share cancels.
    """
    rng = np.random.default_rng(seed)
    for _ in range(REPLICATES):
        counts, base_counts = [], []
        for n, m in zip(mine.sizes, theirs.sizes, strict=True):
            shared, more = min(n, m), abs(int(n) - int(m))
            both = np.bincount(rng.integers(0, shared, shared), minlength=shared)
            rest = np.bincount(rng.integers(0, more, more), minlength=more) if more else both[:0]
            counts.append(np.concatenate([both, rest]) if n > m else both)
            base_counts.append(np.concatenate([both, rest]) if m > n else both)
        yield np.concatenate(counts).astype(float), np.concatenate(base_counts).astype(float)


def _sort(values: Values, prompt: Int[np.ndarray, " n"] | None) -> tuple[Values, Strata]:
    prompt = np.zeros(len(values), int) if prompt is None else prompt
    order = np.argsort(prompt, kind="stable")
    return np.asarray(values, np.float64)[order], Strata(prompt[order])
