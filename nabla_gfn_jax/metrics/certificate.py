"""The divergence of a policy from P_base · R^β in nats, from arrays of rewards and path statistics, with NumPy only.

A path is a sample with the Gaussian steps that led to it. The steps have mean μ_θ for the policy, μ_# for the base
model, and the same σ_k. The figures need four arrays of the policy's paths and the log rewards of base samples
(docs/nats.md):

    spent       S = E_θ[Σ_k ‖μ_θ − μ_#‖²/(2σ_k²)], the KL of the policy's paths from the base model's
    log Z(b)    mean over prompts of log E_base[R^b]
    exponent    b such that base samples weighted by R^b have the policy's mean log R, called r
    needed      b·r − log Z(b). No distribution with mean log R = r is nearer to the base model
    efficiency  needed / spent, at most 1; it is 1 only for the tilted base model P_base · R^b
    gap(β)      S − β·r + log Z(β) = KL(policy's paths ‖ paths of P_base · R^β) ≥ 0. Its minimum, at β = b, is
                spent − needed
    weights     w = R^β · Π p_#(y|x)/p_θ(y|x), constant if and only if the policy is P_base · R^β

Every mean is the mean over prompts of the mean within a prompt; the prompts are fixed. Sample i of a prompt should have
the same noise in both models. Standard errors come from a bootstrap over samples, which assumes so. If there are more
base samples than the policy's, the policy's mean log R is corrected by how lucky its noise is for the base model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from nabla_gfn_jax.metrics.tilt import (
    BaseValues,
    Estimate,
    LogZ,
    Strata,
    Values,
    log_z_of,
    normalise,
    resamples,
    tilt_of,
)

Figures = Callable[[Values | None, BaseValues | None], list[float]]  # counts of each sample → figures


@dataclass(frozen=True)
class Paths:
    """n sampled paths. Paths of the base model have spent = 0 and log_ratio = 0; see `Paths.of_base`."""

    log_reward: Values  # log R of the sample, not multiplied by β
    spent: Float[np.ndarray, "n steps"]  # ‖μ_θ − μ_#‖²/(2σ²) of each step, summed over elements
    log_ratio: Values  # log Π p_#(y|x)/p_θ(y|x) = −Σ_k [‖δ_k‖²/2 + δ_k·z_k], δ = (μ_θ − μ_#)/σ, z the noise
    prompt: Int[np.ndarray, " n"]  # the prompt of each path, as any integers

    @classmethod
    def of_base(cls, log_reward: Values, prompt: Int[np.ndarray, " n"] | None = None) -> "Paths":
        """Paths of the base model with these log rewards. Without `prompt`, all have the same prompt."""
        n = len(log_reward)
        zeros = np.zeros(n)
        return cls(np.asarray(log_reward), zeros[:, None], zeros, np.zeros(n, int) if prompt is None else prompt)

    def by_prompt(self) -> "Paths":
        """The paths in float64, sorted by prompt. Within a prompt, the order is kept."""
        order = np.argsort(self.prompt, kind="stable")
        reward, spent, ratio = (np.asarray(a, np.float64)[order] for a in (self.log_reward, self.spent, self.log_ratio))
        return Paths(reward, spent, ratio, self.prompt[order])


@dataclass(frozen=True)
class AtBeta:
    """The divergence of the policy from P_base · R^β for one β."""

    beta: float
    log_z: LogZ
    log_z_is_policys: bool  # True if log Z comes from the policy's path weights, because base samples are too few
    gap: Estimate  # nats; in expectation a lower bound if log_z is one
    effective_share: Estimate  # effective sample size of the path weights / samples, within a prompt, 1/n to 1
    log_weight_std: Estimate  # standard deviation of log w within a prompt; 0 for P_base · R^β itself


@dataclass(frozen=True)
class Certificate:
    """The reward that a policy reaches and the nats that it spends.

    For the base model, exponent, needed and spent are 0, and the efficiency is NaN.
    """

    samples: int
    base_samples: int
    log_reward: Estimate
    exponent: Estimate  # infinite if the policy's mean log R is above (or below) that of every base sample
    needed: Estimate
    spent: Estimate
    efficiency: Estimate
    at_exponent: AtBeta | None  # for the nearest target; None if the exponent is infinite
    at_beta: AtBeta | None  # for the target of the training, if it is known
    spent_by_step: Float[np.ndarray, " steps"]
    spent_by_step_error: Float[np.ndarray, " steps"]
    warnings: tuple[str, ...]


def certify(policy: Paths, base: Paths, beta: float | None = None, seed: int = 0) -> Certificate:
    """The certificate of a policy, given base samples of the same prompts.

    `beta` is the exponent of the target, `seed` that of the bootstrap. The policy may be the base model itself:
    `certify(base, base, beta)`. Raises `ValueError` if the prompts differ.
    """
    pair = _Pair(policy.by_prompt(), base.by_prompt())
    nearest = pair.overall(None, None)[1]
    targets = [_Target(pair, b) for b in (nearest, beta) if b is not None and np.isfinite(b)]
    (reward, exponent, needed, spent, efficiency), *towards = pair.estimate(
        [pair.overall, *(target.figures for target in targets)], seed
    )
    at = {target.beta: target.at(estimates) for target, estimates in zip(targets, towards, strict=True)}
    by_step, by_step_error = pair.mine.mean_and_error(pair.policy.spent)
    return Certificate(
        samples=len(policy.log_reward),
        base_samples=len(base.log_reward),
        log_reward=reward,
        exponent=exponent,
        needed=needed,
        spent=spent,
        efficiency=efficiency,
        at_exponent=at.get(nearest),
        at_beta=None if beta is None else at[beta],
        spent_by_step=by_step,
        spent_by_step_error=by_step_error,
        warnings=tuple(_warnings(pair, nearest, None if beta is None else at[beta])),
    )


class _Pair:
    """The paths of a policy and of the base model, both sorted by prompt."""

    def __init__(self, policy: Paths, base: Paths):
        self.policy, self.base = policy, base
        self.mine, self.theirs = Strata(policy.prompt), Strata(base.prompt)
        if not np.array_equal(self.mine.prompts, self.theirs.prompts):
            prompts = f"{list(self.mine.prompts)} and {list(self.theirs.prompts)}"
            raise ValueError(f"the samples of the policy and of the base model are of different prompts: {prompts}")
        sizes = np.minimum(self.mine.sizes, self.theirs.sizes)
        self.partners = _partners(self.theirs, sizes)
        self.slope = self._slope(sizes)

    def _slope(self, sizes: Int[np.ndarray, " prompts"]) -> float:
        """By how much a policy's log R rises with that of the base sample from the same noise, within a prompt."""
        alike = _partners(self.mine, sizes)
        strata = Strata(self.policy.prompt[alike])
        mine, theirs = self.policy.log_reward[alike], self.base.log_reward[self.partners]
        size = theirs @ theirs
        mine, theirs = (a - strata.repeat(strata.means(a)) for a in (mine, theirs))
        spread = theirs @ theirs  # only rounding errors if all are equal
        return float(mine @ theirs / spread) if spread > 1e-20 * size else 0.0

    def means(self, counts: Values | None, base_counts: BaseValues | None) -> tuple[float, float]:
        """Mean log R, corrected for the luck of the noise, and mean spent nats.

        The base samples from the policy's noise, its partners, say how lucky that noise is: their mean is compared with
        that of all base samples (a control variate). Without more base samples there is no correction.
        """
        even = np.ones(len(self.partners)) if base_counts is None else base_counts
        alike, all_of_base = (self.theirs.mean(self.base.log_reward, even * of) for of in (self.partners, 1.0))
        reward = self.mine.mean(self.policy.log_reward, counts) - self.slope * (alike - all_of_base)
        return reward, self.mine.mean(self.policy.spent.sum(1), counts)

    def overall(self, counts: Values | None, base_counts: BaseValues | None) -> list[float]:
        """Mean log R, exponent, needed, spent, efficiency."""
        reward, spent = self.means(counts, base_counts)
        tilt = tilt_of(reward, self.base.log_reward, self.theirs, base_counts)
        return [reward, tilt.exponent, tilt.needed, spent, tilt.needed / spent if spent > 0 else np.nan]

    def estimate(self, functions: Sequence[Figures], seed: int) -> list[list[Estimate]]:
        """The figures of each function with standard errors from the bootstrap."""
        with np.errstate(invalid="ignore"):
            resampled = [[f(*counts) for f in functions] for counts in resamples(self.mine, self.theirs, seed)]
            errors = [np.std(figures, axis=0, ddof=1).tolist() for figures in zip(*resampled, strict=True)]
        return [
            [Estimate(*figure) for figure in zip(f(None, None), error, strict=True)]
            for f, error in zip(functions, errors, strict=True)
        ]


def _partners(strata: Strata, sizes: Int[np.ndarray, " prompts"]) -> Bool[np.ndarray, " n"]:
    """Marks the first `sizes` samples of each prompt."""
    number = np.arange(int(strata.sizes.sum())) - np.repeat(strata.starts, strata.sizes)
    return number < np.repeat(sizes, strata.sizes)


class _Target:
    """The target P_base · R^β, estimated from the samples of a pair."""

    def __init__(self, pair: _Pair, beta: float):
        self.beta, self.pair = beta, pair
        self.log_weight = beta * pair.policy.log_reward + pair.policy.log_ratio
        self.log_z, self.is_policys = log_z_of(beta * pair.base.log_reward, pair.theirs), False
        if self.log_z.is_lower_bound:
            other = log_z_of(self.log_weight, pair.mine)
            self.log_z, self.is_policys = max((self.log_z, False), (other, True), key=lambda z: z[0].value)

    def figures(self, counts: Values | None, base_counts: BaseValues | None) -> list[float]:
        """Gap with the uncorrected log Z, effective share and standard deviation of the path weights."""
        mine = self.pair.mine
        weights = normalise(self.log_weight, mine, counts)
        of_base = normalise(self.beta * self.pair.base.log_reward, self.pair.theirs, base_counts)
        reward, spent = self.pair.means(counts, base_counts)
        log_z = (weights if self.is_policys else of_base).log_mean.mean()
        centred = self.log_weight - mine.repeat(mine.means(self.log_weight, counts))
        share = float(np.mean(weights.effective / mine.sizes))
        return [spent - self.beta * reward + float(log_z), share, mine.mean(centred**2, counts) ** 0.5]

    def at(self, estimates: list[Estimate]) -> AtBeta:
        gap, share, std = estimates
        gap = Estimate(gap.value + self.log_z.value - self.log_z.plain, gap.error)
        return AtBeta(self.beta, self.log_z, self.is_policys, gap, share, std)


def _warnings(pair: _Pair, exponent: float, at_beta: AtBeta | None) -> Iterator[str]:
    if not np.isfinite(exponent):
        yield "the policy's mean log R is beyond that of every base sample: needed and efficiency are lower bounds"
    elif (z := log_z_of(exponent * pair.base.log_reward, pair.theirs)).is_lower_bound:
        yield f"needed rests on {z.effective:.1f} effective of {z.samples:.0f} base samples per prompt; draw more"
    if at_beta is None:
        return
    z = log_z_of(at_beta.beta * pair.base.log_reward, pair.theirs)
    if z.is_lower_bound:
        few = f"log Z({at_beta.beta:g}) rests on {z.effective:.1f} effective of {z.samples:.0f} base samples per prompt"
        if at_beta.log_z_is_policys and not at_beta.log_z.is_lower_bound:
            yield f"{few}; the policy's own path weights are used, which miss images that it never samples"
        else:
            yield f"{few}, so log Z and the gap are lower bounds; draw more"
