"""The certificate of a policy as a metric, from the rewards and path statistics of its samples (`certificate`)."""

import numpy as np

from nabla_gfn_jax.metrics.base import Batch, PathStatistics, Samples
from nabla_gfn_jax.metrics.certificate import Certificate, Paths, certify
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.rewards.reward import TOTAL, Reward


class Nats(LogReward):
    """`LogReward` with two more values per sample: the nats spent in each step, and log p_#/p_θ of the path.

    A batch without path statistics counts as sampled by the base model.
    """

    def __init__(self, reward: Reward, num_steps: int, beta: float | None = None):
        super().__init__(reward)
        self._num_steps, self._beta = num_steps, beta

    @property
    def name(self) -> str:
        return "nats"

    def update(self, batch: Batch) -> Samples:
        count = len(batch.prompt)
        paths = batch.paths or PathStatistics(
            np.zeros((count, self._num_steps), np.float32), np.zeros(count, np.float32)
        )
        return Samples(batch.prompt, super().update(batch).values | paths._asdict())

    def certify(self, state: Samples, base: Samples) -> Certificate:
        """The certificate, given the state of base samples with the same prompts, sampler and reward."""
        return certify(_paths(state), _paths(base), self._beta)


def _paths(state: Samples) -> Paths:
    named = {name: state.values[name] for name in (TOTAL, *PathStatistics._fields)}
    return Paths(prompt=state.prompt, **named)
