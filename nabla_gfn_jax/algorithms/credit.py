"""Credit: the gradient in y of the log reward still to come, which the forward loss asks of the policy.

The paper's lookahead is a one-step guess G, corrected by a learned g_φ (in nabla_db). The adjoint is the
reward gradient at the end of the trajectory itself, pulled back step by step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.algorithms.base import Model, reward_gradient
from nabla_gfn_jax.algorithms.transitions import AdjointCredit
from nabla_gfn_jax.diffusion.sampler import Trajectory
from nabla_gfn_jax.diffusion.schedule import Schedule, clean_prediction, expand, step_mean
from nabla_gfn_jax.typing import Latents, Params, Timesteps

GAMMAS: dict[str, Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]] = {
    "alpha_bar": lambda alpha_bar: alpha_bar,
    "sqrt_alpha_bar": jnp.sqrt,
    "one": jnp.ones_like,
}


class Prediction:
    """ε(x, t) and pull-backs through it, all from one evaluation of the network."""

    def __init__(self, model: Model, lora: Params | None, x: Latents, t: Timesteps, condition: PyTree[Any]):
        self.x = x
        self.eps, self._pull = jax.vjp(lambda lora, x: model.predict(lora, x, t, condition), lora, x)

    def to_x(self, of_eps: Callable[[Latents, Latents], Any], cotangents: Any) -> Latents:
        """(∂f/∂x)ᵀ cotangents of f(x) = of_eps(ε(x, t), x); several outputs share one pull-back."""
        _, pull = jax.vjp(of_eps, self.eps, self.x)
        eps_cotangent, direct = pull(cotangents)
        return self._pull(eps_cotangent)[1] + direct

    def to_lora(self, eps_cotangent: Latents) -> Params:
        """(∂ε/∂LoRA)ᵀ cotangent."""
        return self._pull(eps_cotangent)[0]


def guess_cotangent(
    model: Model,
    eps: Latents,
    x: Latents,
    alpha_bar: Float[Array, " batch"],
    scale: Float[Array, " batch"],
    condition: PyTree[Any],
) -> Latents:
    """β γ_t ∇log R at x̂(ε, x, t); pulled back from x̂ to x it is G(x, t). `scale` is β γ_t."""
    clean = clean_prediction(eps, x, alpha_bar)
    return expand(scale, x) * reward_gradient(model, clean, condition)


def score_change(eps: Latents, base_eps: Latents, step: Schedule) -> Latents:
    """s_θ − s_# = (μ_θ − μ_#)/σ², without the cancellation of two large scores: μ is linear in (ε, x)."""
    return step_mean(eps - base_eps, jnp.zeros_like(eps), step) / expand(step.sigma, eps) ** 2


def adjoint_credit(
    model: Model, trajectory: Trajectory, schedule: Schedule, condition: PyTree[Any], beta: float
) -> AdjointCredit:
    """The lean adjoint (Domingo-Enrich et al. 2025, arXiv 2409.08861) along the sampled trajectory.

        a_T = β ∇log R(x_T),     a_t = J_#(x_t)ᵀ a_{t+1},     J_# = ∂μ_#/∂x

    It is the gradient of β log R(x_T) in x_t when every later step adds to the base model's mean what it did
    here. Under the target distribution its mean given x_t is the gradient of the log value at
    x_t, for any κ: unbiased where the lookahead is a guess, but with heavy tails.
    """

    def backward(adjoint: Latents, inputs: tuple[Latents, Schedule]) -> tuple[Latents, AdjointCredit]:
        x, step = inputs
        base = Prediction(model, None, x, jnp.broadcast_to(step.timestep, x.shape[:1]), condition)
        credit = AdjointCredit(gradient=adjoint, base_prediction=base.eps)
        return base.to_x(lambda eps, x: step_mean(eps, x, step), adjoint), credit

    final = beta * reward_gradient(model, trajectory.samples, condition)
    _, credit = jax.lax.scan(backward, final, (trajectory.latents[:-1], schedule), reverse=True)
    return credit
