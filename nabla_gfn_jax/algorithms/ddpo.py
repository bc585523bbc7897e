"""DDPO with importance sampling (Black et al., ICLR 2024, arXiv 2305.13301, sections 4.3 and appendix C).

Denoising is a decision process in which every step x → y is an action. θ† are the parameters that sampled:

    ρ = p_θ(y|x) / p_θ†(y|x),   A the advantage (advantages.py)
    loss = mean over samples and steps of −min(A ρ, A clip(ρ, 1 − c, 1 + c)) + λ ‖ε_θ − ε_θ†‖²

The reward's gradient is not used. As in the authors' program, log p is a mean over latent elements; their clip
c = 10⁻⁴ is chosen for this mean.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.advantages import Advantages
from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    Metrics,
    Model,
    PolicyAlone,
    Rollout,
    output_change,
)
from nabla_gfn_jax.algorithms.transitions import Transition, share_out, take
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample


@dataclass(frozen=True, kw_only=True)
class Ddpo(Advantages, PolicyAlone):
    """DDPO-IS. The steps of each trajectory are divided among the epoch's updates in random order."""

    ratio_clip: float = option(1e-4, "c, largest distance of the density ratio from 1", above=0, infinite=True)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_policy": "the clipped policy-gradient loss",
        "ratios_clipped": "fraction of the density ratios that are clipped",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """⌊T/updates⌋ steps of each trajectory for every update, at least 1; a single update gets all steps."""
        num_steps = model.chain.num_steps
        steps = share_out(rollout.keys, num_steps, updates, max(num_steps // updates, 1))
        return Batch(data=jax.vmap(lambda steps: take(steps, rollout))(steps))

    def value_and_grad(
        self, params: Params, model: Model, data: Transition, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The clipped loss, the fraction of clipped ratios, and the gradient.

        One step of all trajectories at a time.
        """

        def of_step(lora: Params, now: Transition) -> tuple[Float[Array, ""], Metrics]:
            step = model.chain[now.index]
            output = model.predict(lora, now.x, step.at, now.prompt_id)
            ratio = jnp.exp(log_ratio(output, now, step))
            clipped = jnp.clip(ratio, 1 - self.ratio_clip, 1 + self.ratio_clip)
            terms = {
                "loss_policy": jnp.maximum(-weight * ratio, -weight * clipped).mean(),
                "ratios_clipped": (jnp.abs(ratio - 1) > self.ratio_clip).astype(jnp.float32).mean(),
                "loss_reg": self.output_regularisation * output_change(output, now.output, step.at).mean(),
            }
            return terms["loss_policy"] + terms["loss_reg"], terms

        def add(total: Any, now: Transition) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(of_step, has_aux=True)(params["lora"], now)), None

        zero = jnp.zeros(())
        start = ((zero, dict.fromkeys(self.columns, zero)), jax.tree.map(jnp.zeros_like, params["lora"]))
        total, _ = jax.lax.scan(add, start, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), data))
        value, lora = jax.tree.map(lambda a: a / data.index.shape[1], total)
        return value, {"lora": lora}


def log_ratio(output: Latents, now: Transition, step: Chain) -> PerSample:
    """log p_θ(y|x) − log p_θ†(y|x), (B,), as a mean over latent elements.

    It is computed from the difference of the outputs, because the two log densities would cancel.
    """
    before = (now.y - step.mean(now.output, now.x)) / expand(step.sigma, now.y)
    change = expand(step.mean_o / step.sigma, now.y) * (output - now.output)
    return ((before - 0.5 * change) * change).reshape(len(change), -1).mean(axis=1)
