"""DDPO with importance sampling (Black et al., ICLR 2024, arXiv 2305.13301, sections 4.3 and appendix C).

Denoising is a decision process whose every step x → y is an action. With the trajectories of the parameters θ†

    ρ = p_θ(y|x) / p_θ†(y|x)
    loss = mean over samples and steps of −min(A ρ, A clip(ρ, 1 − c, 1 + c))
    A = clip((log R − mean) / (std + 10⁻⁶), ±5),  mean and std of the prompt's own last rewards

No gradient of the reward is taken. As in the authors' program log p is a mean over latent elements, to which the clip
c = 10⁻⁴ belongs, and a prompt that has been seen fewer than `min_count` times takes mean and std of the epoch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import Batch, HeadKind, Metrics, Model, Rollout
from nabla_gfn_jax.algorithms.transitions import Transition, share_out, take
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PerSample

_LEAST_STD = 1e-6


@flax.struct.dataclass
class PromptRewards:
    """Each prompt's last log rewards, a ring of them a prompt; on the host."""

    ring: Float[np.ndarray, "prompts size"]
    seen: Int[np.ndarray, " prompts"]  # how many a prompt has had so far


@dataclass(frozen=True, kw_only=True)
class Ddpo(Checked):
    """DDPO-IS. An epoch's updates share out the steps of each trajectory, in random order."""

    ratio_clip: float = option(1e-4, "c, how far the ratio of densities may be from 1", above=0, infinite=True)
    advantage_clip: float = option(5.0, "largest size of an advantage", above=0, infinite=True)
    buffer_size: int = option(32, "how many last rewards of a prompt its mean and std are taken of", minimum=1)
    min_count: int = option(16, "rewards of a prompt below which the epoch's mean and std are used", minimum=1)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_policy": "the clipped policy gradient's loss",
        "ratios_clipped": "fraction of the ratios of densities that are clipped",
    }

    def heads(self) -> Mapping[str, HeadKind]:
        return {}

    def validate(self, num_steps: int) -> None:
        """Any number of steps will do."""

    def first_stats(self, num_prompts: int) -> PromptRewards:
        return PromptRewards(np.zeros((num_prompts, self.buffer_size), np.float32), np.zeros(num_prompts, np.int32))

    def weigh(
        self, stats: PromptRewards, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PromptRewards]:
        """The advantages, after this epoch's rewards have been remembered."""
        rewards = np.asarray(scalars["log_reward"], np.float64)
        ring, seen = stats.ring.copy(), stats.seen.copy()
        for prompt, reward in zip(prompt_id, rewards, strict=True):
            ring[prompt, seen[prompt] % self.buffer_size] = reward
            seen[prompt] += 1
        mean, std = np.full_like(rewards, rewards.mean()), np.full_like(rewards, rewards.std())
        for prompt in np.unique(prompt_id):
            own = ring[prompt, : min(seen[prompt], self.buffer_size)].astype(np.float64)
            if len(own) >= self.min_count:
                mean[prompt_id == prompt], std[prompt_id == prompt] = own.mean(), own.std()
        advantages = (rewards - mean) / (std + _LEAST_STD)
        return np.clip(advantages, -self.advantage_clip, self.advantage_clip).astype(np.float32), PromptRewards(
            ring, seen
        )

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """Every step of each trajectory in one update, ⌊T/updates⌋ in each of several."""
        num_steps = model.chain.num_steps
        steps = share_out(rollout.keys, num_steps, updates, max(num_steps // updates, 1))
        return Batch(data=jax.vmap(lambda steps: take(steps, rollout))(steps))

    def value_and_grad(
        self, params: Params, model: Model, data: Transition, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The clipped loss, and how often the ratio left its interval; one step of all trajectories at a time."""

        def of_step(lora: Params, now: Transition) -> tuple[Float[Array, ""], Array]:
            step = model.chain[now.index]
            output = model.predict(lora, now.x, step.at, now.prompt_id)
            ratio = jnp.exp(log_ratio(output, now, step))
            clipped = jnp.clip(ratio, 1 - self.ratio_clip, 1 + self.ratio_clip)
            loss = jnp.maximum(-weight * ratio, -weight * clipped).mean()
            return loss, (jnp.abs(ratio - 1) > self.ratio_clip).astype(jnp.float32).mean()

        def add(total: Any, now: Transition) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(of_step, has_aux=True)(params["lora"], now)), None

        zero = jnp.zeros(())
        start = ((zero, zero), jax.tree.map(jnp.zeros_like, params["lora"]))
        total, _ = jax.lax.scan(add, start, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), data))
        (loss, clipped), lora = jax.tree.map(lambda a: a / data.index.shape[1], total)
        return (loss, {"loss_policy": loss, "ratios_clipped": clipped}), {"lora": lora}


def log_ratio(output: Latents, now: Transition, step: Chain) -> PerSample:
    """log p_θ(y|x) − log p_θ†(y|x), means over latent elements, without the cancellation of two large numbers."""
    before = (now.y - step.mean(now.output, now.x)) / expand(step.sigma, now.y)
    change = expand(step.mean_o / step.sigma, now.y) * (output - now.output)
    return ((before - 0.5 * change) * change).reshape(len(change), -1).mean(axis=1)
