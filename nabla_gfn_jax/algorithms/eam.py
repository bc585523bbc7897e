"""Efficient adjoint matching (Shin et al. 2026, arXiv 2605.11480), derived here for a variance-preserving chain.

In adjoint matching (arXiv 2409.08861), the uncontrolled process has the base model's drift. Here it is the linear
process that turns N(0, 1) into N(0, 1), and the terminal reward is log P_base(z) + β log R(z) − log N(z). The target is
the same. The adjoint of a linear process is a scalar times the gradient of the terminal reward, and a state given its
end point is the noised end point. Let z be a sample of the policy, noised to x = √ᾱ z + √(1−ᾱ) ε:

    score of the target at x  =  E[ −x + √ᾱ (z + ∇log P_base(z) + β ∇log R(z)) | x ]
    target  ε* = −√(1−ᾱ) (that of z),    ∇log P_base(z) ≈ −ε_#(z, t)/√(1−ᾱ_t) at the least noisy level (Tweedie)
    loss    Σ_k ‖μ_θ − μ*‖²/(2σ_k²), in nats of a path, + λ ‖ε_θ − ε_θ†‖²

No gradient is pulled back along a path. The base model enters only through its score at the least noisy level.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    Metrics,
    Model,
    PolicyAlone,
    Rollout,
    Unweighted,
    output_change,
    reward_gradient,
)
from nabla_gfn_jax.algorithms.noising import Noised, noise_samples, step_nats
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PerSample


@flax.struct.dataclass
class Ends:
    """Noised samples, and the target's score at the samples z, leaves (B, …)."""

    noised: Noised  # leaves (B, noisings, …)
    score: Latents  # ∇log P_base(z) + β ∇log R(z)


@dataclass(frozen=True, kw_only=True)
class Eam(Checked, Unweighted, PolicyAlone):
    """EAM: regression of the policy's steps on the closed-form adjoint."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    noisings: int = option(6, "number of noised copies of each sample in an update", minimum=1)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_adjoint": "the regression on the closed-form adjoint, in nats per path, up to a constant",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`noisings` noised copies of each sample for every update, and the target's score at each sample."""
        z, level = rollout.trajectory.samples, model.chain[-1].at.each(len(rollout.keys))
        noise = level.noise(model.predict(None, z, level, rollout.prompt_id), z)
        score = self.beta * reward_gradient(model, z, rollout.prompt_id) - noise / expand(jnp.sqrt(1 - level.signal), z)
        noised = noise_samples(params if self.output_regularisation else None, model, rollout, updates, self.noisings)
        return Batch(data=Ends(noised, jnp.broadcast_to(score, (updates, *score.shape))))

    def value_and_grad(
        self, params: Params, model: Model, data: Ends, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, its terms and the gradient, as means over samples and noised copies."""
        now, score = flatten(data.noised), jnp.repeat(data.score, self.noisings, axis=0)
        step = model.chain[now.index]
        signal = expand(step.at.signal, now.x)
        noise = jnp.sqrt(1 - signal) * (now.x - jnp.sqrt(signal) * (now.sample + score))

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(lora, now.x, step.at, now.prompt_id)
            error = (step.at.noise(output, now.x) - noise) / expand(step.at.noise_o, now.x)  # as a change of output
            terms = {
                "loss_adjoint": model.chain.num_steps * step_nats(step, error).mean(),
                "loss_reg": jnp.zeros(()),
            }
            if now.output is not None:
                terms["loss_reg"] = self.output_regularisation * output_change(output, now.output, step.at).mean()
            return terms["loss_adjoint"] + terms["loss_reg"], terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}
