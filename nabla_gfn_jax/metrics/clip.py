"""CLIP score and CLIP diversity, by OpenAI's CLIP ViT-L/14, from one pass of the images through its image tower."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from nabla_gfn_jax.metrics.base import Batch, Released, Samples, Weighting
from nabla_gfn_jax.metrics.on_devices import OnDevices, as_saved
from nabla_gfn_jax.metrics.pairwise import FEATURES, mean_distance
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.rewards import clip_score
from nabla_gfn_jax.rewards.clip_score import VIT_L, CLIPConfig
from nabla_gfn_jax.rewards.reward import Reward


class CLIP:
    """The agreement of images with their prompts, and the distance of images of a prompt. A sample takes 3 KiB."""

    def __init__(self, reward: Reward, config: CLIPConfig = VIT_L):
        """`reward` is the CLIP score of `rewards.clip_score` of this size."""
        self._encode = reward.encode_prompts
        self._features = OnDevices(partial(clip_score.image_features, config), reward.params["image"])
        self._prompts = np.zeros((0, config.embed_dim), np.float32)

    @property
    def name(self) -> str:
        return "clip"

    def prepare(self, prompts: Sequence[str]) -> None:
        """Encodes the prompts. All prompts are accepted."""
        self._prompts = np.asarray(self._encode(list(prompts)))

    def update(self, batch: Batch) -> Samples:
        features = self._features(as_saved(batch.images))
        score = (features * self._prompts[batch.prompt]).sum(axis=1).astype(np.float64)
        return Samples(batch.prompt, {FEATURES: features, "score": score})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        """clip_score, the mean cosine of image and prompt, and clip_distance_x100, 100 times the mean distance."""
        state = state.by_prompt()
        weighting = weighting or Weighting.equal(state.prompt)
        distance = mean_distance(state, weighting)
        found = weighting.estimate(lambda weights: {"clip_score": float(weights @ state.values["score"])})
        return found | {"clip_distance_x100": Estimate(100.0 * distance.value, 100.0 * distance.error)}


def clip() -> Released:
    """The metric with the released weights. Raises `UserError` that says how to get a missing file."""
    reward = clip_score.clip()
    return Released(CLIP(reward), reward.files)
