"""The mean log reward of images."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nabla_gfn_jax.metrics.base import Batch, Samples, Weighting
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.rewards.reward import Reward


class LogReward:
    """log R(image | prompt), not multiplied by β; its state has "log_reward"."""

    def __init__(self, reward: Reward):
        self._reward = reward
        self._mesh = all_devices()
        self._params = place(reward.params, self._mesh)
        self._score = split(reward.score, self._mesh, (EVERYWHERE, SPLIT, SPLIT), SPLIT)
        self._features: Any = None
        self._rows = 0  # of a batch, the largest so far: shorter ones are filled up, so that one program serves all

    @property
    def name(self) -> str:
        return "reward"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raises `UserError` for a prompt that the reward cannot judge."""
        self._features = jax.tree.map(np.asarray, self._reward.encode_prompts(list(prompts)))

    def update(self, batch: Batch) -> Samples:
        count = len(batch.prompt)
        self._rows = max(self._rows, -(-count // self._mesh.size) * self._mesh.size)
        rows = np.minimum(np.arange(self._rows), count - 1)
        features = jax.tree.map(lambda a: a[batch.prompt[rows]], self._features)
        log_reward = self._score(self._params, *place((batch.images[rows], features), self._mesh, SPLIT))
        return Samples(batch.prompt, {"log_reward": gather(log_reward, self._mesh)[:count].astype(np.float64)})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        state = state.by_prompt()
        weighting = weighting or Weighting.equal(state.prompt)
        return weighting.estimate(lambda weights: {"log_reward": float(weights @ state.values["log_reward"])})
