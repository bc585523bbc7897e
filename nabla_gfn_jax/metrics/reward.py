"""The mean log reward of images."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nabla_gfn_jax.metrics.base import Batch, Samples, Weighting
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.rewards.reward import TOTAL, Reward


class LogReward:
    """The mean of log R(image | prompt), without β. Its state has the scores of `Reward.scores`."""

    def __init__(self, reward: Reward):
        self._reward = reward
        self._mesh = all_devices()
        self._params = place(reward.params, self._mesh)
        self._score = split(reward.scores, self._mesh, (EVERYWHERE, SPLIT, SPLIT), SPLIT)
        self._features: Any = None
        self._rows = 0  # rows of the largest batch so far; smaller batches are padded, so that one program serves all

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
        scores = self._score(self._params, *place((batch.images[rows], features), self._mesh, SPLIT))
        found = {name: gather(score, self._mesh)[:count].astype(np.float64) for name, score in scores.items()}
        return Samples(batch.prompt, found)

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        state = state.by_prompt()
        weighting = weighting or Weighting.equal(state.prompt)
        scores = {name: values for name, values in state.values.items() if name.startswith(TOTAL)}
        return weighting.estimate(lambda weights: {name: float(weights @ values) for name, values in scores.items()})
