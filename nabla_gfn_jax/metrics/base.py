"""The interface of metrics: a state for each batch of images, states that can be merged, and figures from a state.

A new metric is one file with one class that follows the protocol `Metric`, or `Comparison` if it compares images with
those of the base model, and a line in `registry`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.metrics.tilt import BaseValues, Estimate, Strata, Values, normalise, resamples, tilt_of


class NotAvailable(Exception):
    """The metric cannot be computed for these prompts. The text gives the reason in one line."""


class PathStatistics(NamedTuple):
    """The divergence of each sample's path from the base model's steps; see `metrics.certificate.Paths`."""

    spent: Float[np.ndarray, "batch steps"]
    log_ratio: Float[np.ndarray, " batch"]


@dataclass(frozen=True)
class Batch:
    """Images in [0, 1] that were sampled together."""

    images: Float[np.ndarray, "batch height width 3"]
    prompt: Int[np.ndarray, " batch"]  # of each image: an index into the prompts given to `Metric.prepare`
    paths: PathStatistics | None = None  # None: not recorded, as for the base model itself


class State(Protocol):
    """The data that a metric keeps about the images so far."""

    def merge(self, other: Any) -> Any:
        """The state of this state's images followed by those of the other."""


@runtime_checkable
class Metric(Protocol):
    """A measurement of images: `prepare` once, `update` for each batch, `merge` the states, then `compute`."""

    @property
    def name(self) -> str: ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """Is called before sampling. Raises `NotAvailable` if the metric cannot be computed for these prompts."""

    def update(self, batch: Batch) -> Any:
        """The state of a batch."""

    def compute(self, state: Any, weighting: "Weighting | None" = None) -> dict[str, Estimate]:
        """The figures by name, with equal weights of the samples of a prompt or with the weights of `weighting`."""


@runtime_checkable
class Comparison(Protocol):
    """A measurement of how much images differ from the base model's. It is used as a `Metric`, except for `compare`."""

    @property
    def name(self) -> str: ...

    def prepare(self, prompts: Sequence[str]) -> None:
        """As of a `Metric`."""

    def update(self, batch: Batch) -> "Samples":
        """The state of a batch."""

    def compare(self, state: "Samples", base: "Samples") -> dict[str, Estimate]:
        """The figures by name. `base` has as many samples of each prompt from the base model, and from other noise.

        The noise differs so that the figures of the base model's own samples are the noise floor.
        """


class Released(NamedTuple):
    """A metric whose network was read from files."""

    metric: Metric | Comparison
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Samples:
    """A state with a few numbers per sample: arrays with one common leading axis n."""

    prompt: Int[np.ndarray, " n"]
    values: dict[str, np.ndarray]

    def merge(self, other: "Samples") -> "Samples":
        values = {name: np.concatenate([mine, other.values[name]]) for name, mine in self.values.items()}
        return Samples(np.concatenate([self.prompt, other.prompt]), values)

    def by_prompt(self) -> "Samples":
        """The samples sorted by prompt. Within a prompt, the order is kept."""
        order = np.argsort(self.prompt, kind="stable")
        return Samples(self.prompt[order], {name: array[order] for name, array in self.values.items()})

    def numbers(self, first: int, end: int) -> "Samples":
        """The samples number `first` to `end` − 1 of each prompt, sorted by prompt."""
        ordered = self.by_prompt()
        strata = Strata(ordered.prompt)
        number = np.arange(len(ordered.prompt)) - np.repeat(strata.starts, strata.sizes)
        rows = (number >= first) & (number < end)
        return Samples(ordered.prompt[rows], {name: array[rows] for name, array in ordered.values.items()})


@dataclass(frozen=True)
class Weighting:
    """Weights of samples that are sorted by prompt. Each prompt has the same total weight."""

    strata: Strata
    weights: Values  # sum to 1
    replicates: Float[np.ndarray, "replicates n"]  # the weights in each replicate of the bootstrap

    @classmethod
    def equal(cls, prompt: Int[np.ndarray, " n"], seed: int = 0) -> "Weighting":
        """Equal weights for all samples of a prompt. `seed` is the bootstrap's."""
        strata = Strata(prompt)
        scale = strata.repeat(1.0 / (strata.sizes * len(strata.sizes)))
        replicates = np.array([counts for counts, _ in resamples(strata, strata, seed)])
        return cls(strata, scale, replicates * scale)

    @classmethod
    def tilted(cls, base: Samples, policy: Samples, seed: int = 0) -> "Weighting":
        """Base samples weighted by R^b to the policy's mean log R. Both have "log_reward" and are sorted by prompt."""
        mine, theirs = Strata(policy.prompt), Strata(base.prompt)
        reward, base_reward = policy.values["log_reward"], base.values["log_reward"]

        def weights(counts: Values | None, base_counts: BaseValues | None) -> BaseValues:
            b = tilt_of(mine.mean(reward, counts), base_reward, theirs, base_counts).exponent
            return normalise(np.clip(b, -1e9, 1e9) * base_reward, theirs, base_counts).shares / len(theirs.sizes)

        replicates = np.array([weights(*counts) for counts in resamples(mine, theirs, seed)])
        return cls(theirs, weights(None, None), replicates)

    @property
    def effective(self) -> float:
        """The effective sample size over all prompts."""
        return float(1.0 / np.square(self.weights).sum())

    def estimate(self, figures: Callable[[Values], dict[str, float]]) -> dict[str, Estimate]:
        """The figures for the weights. Their standard errors are the spread over the replicates."""
        values, resampled = figures(self.weights), [figures(weights) for weights in self.replicates]
        return {
            name: Estimate(value, float(np.std([figures[name] for figures in resampled], ddof=1)))
            for name, value in values.items()
        }

    @property
    def effective_of_prompts(self) -> Float[np.ndarray, " prompts"]:
        """The effective sample size of each prompt."""
        return self.strata.sums(self.weights) ** 2 / self.strata.sums(np.square(self.weights))
