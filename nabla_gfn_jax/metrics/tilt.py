"""Weighted samples of several prompts: log of the mean weight, effective sample size, and the tilt to a mean reward.

Only NumPy is used. Every mean is the mean over prompts of the mean within a prompt. `counts` says how often each sample
counts, as in a bootstrap; without it each counts once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

REPLICATES = 200  # of a bootstrap; standard errors are then accurate to 5 %
FEW = 20  # with fewer effective samples per prompt, log Z is called a lower bound
_LIMIT = 1e8  # largest |b| · (standard deviation of log R); beyond it all weight is on the best samples

Values = Float[np.ndarray, " n"]
BaseValues = Float[np.ndarray, " base"]
OfPrompts = Float[np.ndarray, " prompts"]


class Estimate(NamedTuple):
    """A figure and its standard error, which is NaN if there is none."""

    value: float
    error: float = float("nan")


class Strata:
    """The ranges of each prompt's samples in arrays that are sorted by prompt."""

    def __init__(self, prompt: Int[np.ndarray, " n"]):
        self.prompts, self.starts, self.sizes = np.unique(prompt, return_index=True, return_counts=True)

    def sums(self, values: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "prompts ..."]:
        """The sum within each prompt."""
        return np.add.reduceat(values, self.starts)

    @property
    def slices(self) -> list[slice]:
        """The range of each prompt's samples."""
        return [slice(start, start + size) for start, size in zip(self.starts, self.sizes, strict=True)]

    def repeat(self, of_prompts: OfPrompts) -> Values:
        """Repeats a value of each prompt for each of its samples."""
        return np.repeat(of_prompts, self.sizes)

    def means(self, values: Values, counts: Values | None = None) -> OfPrompts:
        """The mean within each prompt."""
        counts = np.ones(len(values)) if counts is None else counts
        return self.sums(counts * values) / self.sums(counts)

    def mean(self, values: Values, counts: Values | None = None) -> float:
        """The mean over prompts of the mean within each prompt."""
        return float(self.means(values, counts).mean())

    def mean_and_error(self, values: Float[np.ndarray, "n ..."]) -> tuple[Any, Any]:
        """`mean` of each column and its standard error, which is NaN if a prompt has only one sample."""
        sizes = self.sizes.reshape(-1, *(1,) * (values.ndim - 1)).astype(float)
        means = self.sums(values) / sizes
        squares = self.sums((values - np.repeat(means, self.sizes, axis=0)) ** 2)
        with np.errstate(invalid="ignore"):
            error = np.sqrt((squares / (sizes * (sizes - 1.0))).sum(0)) / len(sizes)
        return means.mean(0), error


class Weights(NamedTuple):
    """Normalised weights within each prompt."""

    shares: Values  # counts · weight, normalised to sum 1 within each prompt
    log_mean: OfPrompts  # log of the mean weight
    effective: OfPrompts  # effective sample size, (Σw)²/Σw²


def normalise(log_weight: Values, strata: Strata, counts: Values | None = None) -> Weights:
    """Normalises the weights exp(log_weight) within each prompt."""
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
    """The mean over prompts of the log of the mean weight."""

    value: float  # the jackknife estimate, which corrects the bias to first order
    error: float  # the jackknife's standard error
    plain: float  # the uncorrected estimate, too low by about (1/effective − 1/samples)/2
    effective: float  # effective samples per prompt, the harmonic mean over prompts
    samples: float  # samples per prompt, the harmonic mean over prompts

    @property
    def is_lower_bound(self) -> bool:
        """Whether there are so few effective samples that the largest weights are probably missing."""
        return self.effective < FEW


def log_z(log_weight: Values, prompt: Int[np.ndarray, " n"] | None = None) -> LogZ:
    """log E[w] of samples in any order. w is R^b of base samples, or the path weights of a policy's samples."""
    log_weight, strata = _sort(log_weight, prompt)
    return log_z_of(log_weight, strata)


def log_z_of(log_weight: Values, strata: Strata) -> LogZ:
    """`log_z` of samples that are sorted by prompt."""
    weights = normalise(log_weight, strata)
    sizes = strata.sizes.astype(float)
    others = strata.repeat(np.maximum(sizes - 1.0, 1.0) / sizes)
    change = np.log(np.maximum(1.0 - weights.shares, 1e-15) / others)  # of the log mean without the sample
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

    exponent: float  # b; infinite if the mean is beyond that of all samples
    needed: float  # b · mean − log Z(b), the KL from the base model in nats; a lower bound if b is infinite


def tilt_to(mean: float, log_reward: Values, prompt: Int[np.ndarray, " n"] | None = None) -> Tilt:
    """The tilt, with one b for all prompts, that gives base samples (in any order) the mean log R `mean`."""
    log_reward, strata = _sort(log_reward, prompt)
    return tilt_of(mean, log_reward, strata)


def tilt_of(mean: float, log_reward: Values, strata: Strata, counts: Values | None = None) -> Tilt:
    """`tilt_to` for samples that are sorted by prompt. The mean increases with b; Newton's method within a bracket."""
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
    """A bootstrap over the samples of two models: yields the counts of each sample, prompt by prompt.

    The i-th samples of a prompt have the same noise in both models. They get the same count, so that their common noise
    cancels in differences.
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
