"""Advantages: a sample's reward compared with the latest rewards of its prompt (Black et al., arXiv 2305.13301).

    A = clip((log R − mean) / (std + 10⁻⁶), ±largest),  mean and std of the prompt's latest rewards

As in the program of DDPO's authors, a prompt with fewer than `min_count` rewards so far uses the mean and std of the
epoch. The reward's gradient is not used.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import flax.struct
import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.options import Checked, option

_LEAST_STD = 1e-6


@flax.struct.dataclass
class PromptRewards:
    """The latest log rewards of each prompt, as a ring buffer per prompt, on the host."""

    ring: Float[np.ndarray, "prompts size"]
    seen: Int[np.ndarray, " prompts"]  # the number of rewards that a prompt has had so far


@dataclass(frozen=True, kw_only=True)
class Advantages(Checked):
    """The options and `weigh` of an algorithm that weights samples by their advantage."""

    advantage_clip: float = option(5.0, "largest absolute value of an advantage", above=0, infinite=True)
    buffer_size: int = option(32, "number of latest rewards of a prompt that give its mean and std", minimum=1)
    min_count: int = option(16, "with fewer rewards of a prompt, the epoch's mean and std are used instead", minimum=1)

    def first_stats(self, num_prompts: int) -> PromptRewards:
        return PromptRewards(np.zeros((num_prompts, self.buffer_size), np.float32), np.zeros(num_prompts, np.int32))

    def weigh(
        self, stats: PromptRewards, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PromptRewards]:
        """The advantages, (all,); the epoch's own rewards are added to the memory first."""
        rewards = np.asarray(scalars["log_reward"], np.float64)
        mean, std, stats = self.moments(stats, rewards, prompt_id)
        advantages = (rewards - mean) / (std + _LEAST_STD)
        return np.clip(advantages, -self.advantage_clip, self.advantage_clip).astype(np.float32), stats

    def moments(
        self, stats: PromptRewards, rewards: Float[np.ndarray, " all"], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], Float[np.ndarray, " all"], PromptRewards]:
        """The mean and the standard deviation for each sample's log reward, (all,) each, and the new memory."""
        ring, seen = stats.ring.copy(), stats.seen.copy()
        for prompt, reward in zip(prompt_id, rewards, strict=True):
            ring[prompt, seen[prompt] % self.buffer_size] = reward
            seen[prompt] += 1
        mean, std = np.full_like(rewards, rewards.mean()), np.full_like(rewards, rewards.std())
        for prompt in np.unique(prompt_id):
            own = ring[prompt, : min(seen[prompt], self.buffer_size)].astype(np.float64)
            if len(own) >= self.min_count:
                mean[prompt_id == prompt], std[prompt_id == prompt] = own.mean(), own.std()
        return mean, std, PromptRewards(ring, seen)
