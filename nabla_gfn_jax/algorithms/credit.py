"""Credit: the gradient in y of the log reward still to come, which the forward loss asks of the policy.

The paper's lookahead is a one-step guess G, corrected by a learned g_φ (in nabla_db). The adjoint is the
reward gradient at the end of the trajectory itself, pulled back step by step; the terminal credit is the same without
pull-backs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Model, Rollout, reward_gradient
from nabla_gfn_jax.algorithms.transitions import AdjointCredit
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds

GAMMAS: dict[str, Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]] = {
    "alpha_bar": lambda signal: signal,
    "sqrt_alpha_bar": jnp.sqrt,
    "one": jnp.ones_like,
}


class Prediction:
    """o(x, level) and pull-backs through it, all from one evaluation of the network."""

    def __init__(self, model: Model, lora: Params | None, x: Latents, level: Level, prompt_id: PromptIds):
        self.x = x
        self.output, self._pull = jax.vjp(lambda lora, x: model.predict(lora, x, level, prompt_id), lora, x)

    def to_x(self, of_output: Callable[[Latents, Latents], Any], cotangents: Any) -> Latents:
        """(∂f/∂x)ᵀ cotangents of f(x) = of_output(o(x), x); several outputs of f share one pull-back."""
        _, pull = jax.vjp(of_output, self.output, self.x)
        output_cotangent, direct = pull(cotangents)
        return self._pull(output_cotangent)[1] + direct

    def to_lora(self, output_cotangent: Latents) -> Params:
        """(∂o/∂LoRA)ᵀ cotangent."""
        return self._pull(output_cotangent)[0]


def guess_cotangent(
    model: Model, output: Latents, x: Latents, level: Level, scale: PerSample, prompt_id: PromptIds
) -> Latents:
    """β γ_t ∇log R at x̂(o, x); pulled back from x̂ to x it is G(x, t). `scale` is β γ_t."""
    return expand(scale, x) * reward_gradient(model, level.clean(output, x), prompt_id)


def score_change(output: Latents, base_output: Latents, step: Chain) -> Latents:
    """s_θ − s_# = (μ_θ − μ_#)/σ² = mean_o (o_θ − o_#)/σ², without the cancellation of two large scores."""
    return expand(step.mean_o / step.sigma**2, output) * (output - base_output)


def adjoint_credit(model: Model, rollout: Rollout, beta: float) -> AdjointCredit:
    """The lean adjoint (Domingo-Enrich et al. 2025, arXiv 2409.08861) along the sampled trajectory.

        a_T = β ∇log R(x_T),     a_t = J_#(x_t)ᵀ a_{t+1},     J_# = ∂μ_#/∂x

    It is the gradient of β log R(x_T) in x_t when every later step adds to the base model's mean what it did
    here. Under the target distribution its mean given x_t is the gradient of the log value at
    x_t, for any κ: unbiased where the lookahead is a guess, but with heavy tails.
    """
    trajectory, prompt_id = rollout.trajectory, rollout.prompt_id

    def backward(adjoint: Latents, inputs: tuple[Latents, Chain]) -> tuple[Latents, AdjointCredit]:
        x, step = inputs
        base = Prediction(model, None, x, step.at.each(len(x)), prompt_id)
        return base.to_x(step.mean, adjoint), AdjointCredit(gradient=adjoint, base_output=base.output)

    final = beta * reward_gradient(model, trajectory.samples, prompt_id)
    _, credit = jax.lax.scan(backward, final, (trajectory.latents[:-1], model.chain), reverse=True)
    return credit


def terminal_credit(model: Model, rollout: Rollout, beta: float) -> AdjointCredit:
    """β ∇log R(x_T) for every step of its trajectory, as it is (Lee et al. 2026, arXiv 2604.17415)."""
    final = beta * reward_gradient(model, rollout.trajectory.samples, rollout.prompt_id)
    return AdjointCredit(jnp.broadcast_to(final, rollout.trajectory.outputs.shape), base_output=None)


# Credits that are known once a path has ended, by name.
PATH_CREDITS: dict[str, Callable[[Model, Rollout, float], AdjointCredit]] = {
    "adjoint": adjoint_credit,
    "terminal": terminal_credit,
}
