"""The log reward of images: its mean, and the mean of the worst samples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from nabla_gfn_jax.metrics.base import Batch, Samples, Weighting
from nabla_gfn_jax.metrics.cvar import left_cvar
from nabla_gfn_jax.metrics.on_devices import OnDevices
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.rewards.reward import TOTAL, Reward


class LogReward:
    """log R(image | prompt), without β: the mean of each of `Reward.scores`, and the worst samples' of the whole."""

    NAME: ClassVar[str] = "reward"

    def __init__(self, reward: Reward, label: str = ""):
        """A `label` tells a second reward from the first: it is appended to the names of the metric and its figures."""
        self._reward, self._ending = reward, label and f"_{label}"
        self._scores = OnDevices(lambda params, rows: reward.scores(params, *rows), reward.params)
        self._features: Any = None

    @property
    def name(self) -> str:
        return self.NAME + self._ending

    def prepare(self, prompts: Sequence[str]) -> None:
        """Raises `UserError` for a prompt that the reward cannot judge."""
        self._features = jax.tree.map(np.asarray, self._reward.encode_prompts(list(prompts)))

    def update(self, batch: Batch) -> Samples:
        features = jax.tree.map(lambda a: a[batch.prompt], self._features)
        found = self._scores((batch.images, features))
        return Samples(batch.prompt, {name: score.astype(np.float64) for name, score in found.items()})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        """The means by the names of the scores and, without a label, the mean of the worst fifth, `log_reward_cvar`."""
        state = state.by_prompt()
        weighting = weighting or Weighting.equal(state.prompt)
        scores = {name: values for name, values in state.values.items() if name.startswith(TOTAL)}

        def figures(weights: np.ndarray) -> dict[str, float]:
            means = {name + self._ending: float(weights @ values) for name, values in scores.items()}
            worst = {} if self._ending else {f"{TOTAL}_cvar": left_cvar(scores[TOTAL], weights, weighting.strata)}
            return means | worst

        return weighting.estimate(figures)
