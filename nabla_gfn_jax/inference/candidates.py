"""Each image is one of K candidates, chosen in proportion to the weights that turn their paths into the target's.

With the path weight w = R^β Π p_#/p_θ (`metrics.certificate`), candidate k is chosen with probability w_k / Σ_j w_j
(sampling-importance resampling, Rubin 1987). The more candidates there are, the nearer the images are to P_base · R^β,
whatever the policy; with the base model as the policy, w is R^β.

The candidates and the choice are one longer path. Compared with a path on which an evenly chosen candidate is the base
model's,

    log p_#/p_θ = log (Σ_j w_j / K) − β log R,     R that of the chosen image,

so the certificate holds for chosen images as for others, at any β: spent and gap are those of the longer path, which
bound the images' own from above. The gap is log Z − E[log (Σ_j w_j / K)], which falls to 0 (Cremer, Morris and Duvenaud
2017, "Reinterpreting importance-weighted autoencoders").
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.sampling import ImageSampler, Policy
from nabla_gfn_jax.metrics.base import Batch, PathStatistics
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.rewards.reward import TOTAL, Reward


@dataclass(frozen=True)
class Candidates:
    """How many candidates an image has, and how one is chosen."""

    number: int  # K
    beta: float  # β of the path weight
    reward: str  # the name of R
    judge: LogReward  # R, prepared for the prompts

    @classmethod
    def of(
        cls, number: int, name: str, reward: Reward | None, beta: float | None, prompts: Sequence[str]
    ) -> "Candidates | None":
        """None for one candidate. `name` is the reward's.

        Raises `UserError` if there is no reward or no β, or for a prompt that the reward cannot judge.
        """
        if number == 1:
            return None
        if reward is None or beta is None:
            missing = "--reward" if reward is None else "--beta"
            raise UserError(f"candidates are chosen in proportion to R^β, and {missing} is not known; give it")
        judge = LogReward(reward)
        judge.prepare(prompts)
        return cls(number, beta, name, judge)

    @property
    def about(self) -> dict[str, Any]:
        """What images depend on beside the policy."""
        return {"candidates": {"number": self.number, "beta": self.beta, "reward": self.reward}}


def draw_images(
    sampler: ImageSampler,
    policy: Policy | None,
    num: int,
    candidates: Candidates | None,
    *,
    first: int = 0,
    nats: bool = False,
    progress: str | None = None,
) -> Iterator[Batch]:
    """The images number `first` to `num` − 1 of each prompt, as `ImageSampler.images`; each is one of its candidates.

    With K candidates, image i of a prompt is one of the sampler's images number K·i to K·(i + 1) − 1, and has the path
    statistics of the longer path. The choice counts as spent in the last step. Without candidates (None), image i is
    the sampler's. Raises `UserError` if a policy's candidates have steps without noise.
    """
    if candidates is None:
        yield from sampler.images(policy, num, first=first, nats=nats, progress=progress)
        return
    if policy is not None and not sampler.has_nats:
        raise UserError("candidates are chosen by the density of their paths, and eta 0 has none; use an eta above 0")
    k, steps, seed = candidates.number, sampler.chain.num_steps, sampler.how.seed
    prompt, number = np.divmod(np.arange(len(sampler.prompts) * (num - first)), max(num - first, 1))
    draws = np.array([np.random.default_rng((seed, *of)).random() for of in zip(prompt, first + number, strict=True)])
    waiting: list[Batch] = []
    done = 0
    for batch in sampler.images(policy, k * num, first=k * first, nats=True, progress=progress):
        count = len(batch.prompt)
        paths = batch.paths or PathStatistics(np.zeros((count, steps), np.float32), np.zeros(count, np.float32))
        waiting.append(Batch(batch.images, batch.prompt, paths))
        together = _joined(waiting)
        whole = len(together.prompt) // k * k
        waiting = [_rows(together, slice(whole, None))]
        if whole:
            yield _chosen(_rows(together, slice(whole)), candidates, draws[done : done + whole // k])
            done += whole // k


def weigh(
    log_reward: Float[np.ndarray, "groups K"], log_ratio: Float[np.ndarray, "groups K"], beta: float
) -> tuple[Float[np.ndarray, "groups K"], Float[np.ndarray, " groups"]]:
    """With which probability each candidate of a group is chosen, and the log of the group's mean weight.

    `log_ratio` is log p_#/p_θ of the candidates' paths. A candidate whose log R is NaN is not chosen.
    """
    weighted = beta * log_reward.astype(np.float64)
    log_weight = np.where(np.isnan(weighted), -np.inf, weighted + log_ratio)
    log_sum = np.logaddexp.reduce(log_weight, axis=1)
    return np.exp(log_weight - log_sum[:, None]), log_sum - np.log(log_weight.shape[1])


def _chosen(batch: Batch, candidates: Candidates, draws: Float[np.ndarray, " groups"]) -> Batch:
    """One candidate of every K. `draws` are uniform in [0, 1)."""
    assert batch.paths is not None
    log_reward = candidates.judge.update(batch).values[TOTAL].reshape(-1, candidates.number)
    shares, log_mean = weigh(log_reward, batch.paths.log_ratio.reshape(log_reward.shape), candidates.beta)
    up_to = shares.cumsum(axis=1)
    which = (up_to <= (draws * up_to[:, -1])[:, None]).sum(axis=1)
    groups = np.arange(len(which))
    found = _rows(batch, groups * candidates.number + which)
    assert found.paths is not None
    log_ratio = log_mean - candidates.beta * log_reward[groups, which]
    spent = np.array(found.paths.spent, np.float64)
    spent[:, -1] += -log_ratio - spent.sum(axis=1)
    return Batch(found.images, found.prompt, PathStatistics(spent, log_ratio))


def _rows(batch: Batch, rows: slice | Int[np.ndarray, " rows"]) -> Batch:
    assert batch.paths is not None
    return Batch(batch.images[rows], batch.prompt[rows], PathStatistics(*(a[rows] for a in batch.paths)))


def _joined(batches: Sequence[Batch]) -> Batch:
    paths = [batch.paths for batch in batches if batch.paths is not None]
    together = PathStatistics(*(np.concatenate(arrays) for arrays in zip(*paths, strict=True)))
    images, prompt = (np.concatenate([getattr(b, name) for b in batches]) for name in ("images", "prompt"))
    return Batch(images, prompt, together)
