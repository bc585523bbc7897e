"""Residual ∇-DB (Zhang et al., ICLR 2025, arXiv 2412.07775): the loss and its gradient.

The policy should sample P(x) ∝ P_base(x)^κ R(x)^β. For a transition x → y from time t to t':

    forward  ‖ s_θ − [κ s_# + credit(y)] ‖²           s = −(y − μ)/σ²,             ∇_y log p(y|x)
    reverse  ‖ r_θ − [κ r_# − G(x,t) − g_φ(x,t)] ‖²   r = (∂μ/∂x)ᵀ(y − μ)/σ²,      ∇_x log p(y|x)
    terminal ‖ g_φ(x_T, 0) ‖²                         at the last transition, in place of the reverse term
    reg      λ ‖ ε_θ − ε_θ† ‖²

every ‖·‖² a mean over latent elements. The reverse term trains φ only: r and G are constants.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.algorithms.base import Metrics, Model, reward_gradient
from nabla_gfn_jax.algorithms.credit import GAMMAS, Prediction, adjoint_credit, guess_cotangent, score_change
from nabla_gfn_jax.algorithms.transitions import Transition, Transitions, flatten, number_of_bins, select
from nabla_gfn_jax.diffusion.sampler import Trajectory
from nabla_gfn_jax.diffusion.schedule import Schedule, clean_prediction, expand, step_mean
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, Scores


@dataclass(frozen=True, kw_only=True)
class ResidualNablaDB(Checked):
    """Residual ∇-DB with a choice of credit.

    The credits are "lookahead": G + g_φ, the paper's; "guess": G alone, with no φ and no reverse term; "adjoint": the
    reward gradient at the trajectory's end pulled back through the base model, with no φ and the forward term weighted
    by σ². Without that weight the nearly noiseless last steps, where the score is largest, outweigh all others.
    """

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    output_regularisation: float = option(0.0, "λ, how strongly ε_θ is held at ε_θ†", minimum=0)
    prior_strength: float = option(1.0, "κ, the base model's exponent", minimum=0)
    credit: Literal["lookahead", "guess", "adjoint"] = option("lookahead", "what each step is told of the reward")
    gamma: Literal["alpha_bar", "sqrt_alpha_bar", "one"] = option("alpha_bar", "γ_t, the trust in the guess at time t")
    variance_weighted: bool = option(False, "weight the forward term by σ², as the adjoint always does")
    flow_gradient_from_forward: bool = option(True, "train φ by the forward term too, as in the paper")
    credit_clip: float = option(
        math.inf,
        "for the adjoint, the largest σ·(root mean square) of a transition's credit; it biases towards zero",
        above=0,
        infinite=True,
    )
    transition_fraction: float = option(0.1, "fraction of the steps trained on, beside the last", above=0, maximum=1)
    uneven_bins: bool = option(False, "let the bins that steps are drawn from divide a step between two")

    @property
    def uses_flow(self) -> bool:
        return self.credit == "lookahead"

    def bins(self, num_steps: int) -> int:
        """Into how many a trajectory's steps are divided. Raises `UserError` if that cannot be."""
        return number_of_bins(num_steps, self.transition_fraction, uneven=self.uneven_bins)

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of so many steps."""
        self.bins(num_steps)

    def transitions(
        self,
        params: Params,
        model: Model,
        keys: PRNGKeys,
        trajectory: Trajectory,
        schedule: Schedule,
        condition: PyTree[Any],
        draws: int,
    ) -> Transitions:
        """1 + ⌊T·fraction⌋ transitions of each trajectory, drawn anew `draws` times, with their credit if it is the
        adjoint, which is computed once."""
        bins = self.bins(schedule.num_steps)
        credit = None
        if self.credit == "adjoint":
            credit = adjoint_credit(model, trajectory, schedule, condition, self.beta)
        pick = partial(select, keys, trajectory, schedule, condition, bins, credit)
        return jax.vmap(pick)(jnp.arange(draws))

    def value_and_grad(
        self, params: Params, model: Model, transitions: Transitions
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """Loss, its four terms (they add up to it) and its gradient; a mean over all transitions."""
        ordinary, last = flatten(transitions.ordinary), transitions.last
        total = len(ordinary.x) + len(last.x)
        if self.credit == "adjoint":
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ordinary, last)
            parts = [self.with_adjoint(params, model, both)]
        else:
            parts = [self.ordinary(params, model, ordinary), self.last(params, model, last)]
        metrics, gradient = jax.tree.map(lambda *leaves: sum(leaves) / total, *parts)
        return (sum(metrics.values()), metrics), gradient

    def ordinary(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over transitions with t' > 0, under "lookahead" or "guess"."""
        x, y, step, condition = transition.x, transition.y, transition.step, transition.condition
        mean = lambda eps, x: step_mean(eps, x, step)  # noqa: E731
        # One network's activations at a time: each is done with, at y and in the base model, before the next begins.
        at_y = Prediction(model, params["lora"], y, step.next_timestep, condition)
        guess_y = at_y.to_x(*self._guess(model, at_y, step.alpha_bar_next, condition))
        x, guess_y = jax.lax.optimization_barrier((x, guess_y))
        base = Prediction(model, None, x, step.timestep, condition)
        base_eps = base.eps
        if self.uses_flow:
            base_reverse = base.to_x(mean, -score(base.eps, transition))
            x, base_eps, base_reverse = jax.lax.optimization_barrier((x, base_eps, base_reverse))
        at_x = Prediction(model, params["lora"], x, step.timestep, condition)
        if self.uses_flow:
            # r_θ + G(x, t) is linear in the cotangents at ε_θ(x, t): one pull-back
            clean, guess = self._guess(model, at_x, step.alpha_bar, condition)
            score_and_guess = at_x.to_x(
                lambda eps, x: (mean(eps, x), clean(eps, x)), (-score(at_x.eps, transition), guess)
            )

        def terms(eps: Latents, phi: Params) -> dict[str, Scores]:
            credit = guess_y
            out = {}
            if self.uses_flow:
                flow_y = model.flow(phi, y, step.next_timestep, condition)
                credit = credit + (flow_y if self.flow_gradient_from_forward else jax.lax.stop_gradient(flow_y))
                flow_x = model.flow(phi, x, step.timestep, condition)
                out["loss_reverse"] = mean_square(score_and_guess - self.prior_strength * base_reverse + flow_x)
            residual = self._policy_minus_prior(eps, base_eps, transition) - credit
            return out | {
                "loss_forward": self._forward(residual, step),
                "loss_reg": self._regularisation(eps, transition),
            }

        return _pull_back(terms, at_x, params)

    def last(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over last transitions, under "lookahead" or "guess": y is the sample, its own x̂."""
        x, y, step, condition = transition.x, transition.y, transition.step, transition.condition
        at_x = Prediction(model, params["lora"], x, step.timestep, condition)
        base_eps = model.predict(None, x, step.timestep, condition)
        scale = self.beta * GAMMAS[self.gamma](step.alpha_bar_next)
        credit = expand(scale, y) * reward_gradient(model, y, condition)

        def terms(eps: Latents, phi: Params) -> dict[str, Scores]:
            residual = self._policy_minus_prior(eps, base_eps, transition) - credit
            out = {"loss_forward": self._forward(residual, step), "loss_reg": self._regularisation(eps, transition)}
            if self.uses_flow:
                out["loss_terminal"] = mean_square(model.flow(phi, y, step.next_timestep, condition))
            return out

        return _pull_back(terms, at_x, params)

    def with_adjoint(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over any transitions, under "adjoint"; for κ = 1, σ² ‖(μ_θ − μ_#)/σ² − a_{t+1}‖²."""
        step, adjoint = transition.step, transition.adjoint
        assert adjoint is not None
        size = step.sigma * jnp.sqrt(mean_square(adjoint.gradient))
        scale = jnp.where(size > self.credit_clip, self.credit_clip / size, 1.0)
        credit = expand(scale, adjoint.gradient) * adjoint.gradient
        at_x = Prediction(model, params["lora"], transition.x, step.timestep, transition.condition)

        def terms(eps: Latents, phi: Params) -> dict[str, Scores]:
            residual = self._policy_minus_prior(eps, adjoint.base_prediction, transition) - credit
            return {
                "loss_forward": self._forward(residual, step),
                "loss_reg": self._regularisation(eps, transition),
            }

        return _pull_back(terms, at_x, params)

    def _guess(self, model: Model, at: Prediction, alpha_bar: Float[Array, " batch"], condition: PyTree[Any]) -> Any:
        """x̂ as a function of (ε, x), and the cotangent there whose pull-back to x is G."""
        scale = self.beta * GAMMAS[self.gamma](alpha_bar)
        cotangent = guess_cotangent(model, at.eps, at.x, alpha_bar, scale, condition)
        return (lambda eps, x: clean_prediction(eps, x, alpha_bar)), cotangent

    def _forward(self, residual: Latents, step: Schedule) -> Scores:
        weighted = self.variance_weighted or self.credit == "adjoint"
        return (step.sigma**2 if weighted else 1.0) * mean_square(residual)

    def _policy_minus_prior(self, eps: Latents, base_eps: Latents, transition: Transition) -> Latents:
        """s_θ − κ s_#, as (s_θ − s_#) + (1 − κ) s_#."""
        change = score_change(eps, base_eps, transition.step)
        return change + (1 - self.prior_strength) * score(base_eps, transition)

    def _regularisation(self, eps: Latents, transition: Transition) -> Scores:
        return self.output_regularisation * mean_square(eps - transition.noise_prediction)


def score(eps: Latents, transition: Transition) -> Latents:
    """s = −(y − μ)/σ², the gradient of log p(y|x) in y."""
    mean = step_mean(eps, transition.x, transition.step)
    return (mean - transition.y) / expand(transition.step.sigma, mean) ** 2


def mean_square(residual: Latents) -> Scores:
    """‖·‖², a mean over latent elements."""
    return (residual**2).reshape(len(residual), -1).mean(axis=1)


def _pull_back(terms: Any, at_x: Prediction, params: Params) -> tuple[Metrics, Params]:
    """Sums of `terms(ε_θ(x, t), φ)` over transitions and the gradient of their total in LoRA and φ."""

    def total(eps: Latents, phi: Params) -> tuple[Float[Array, ""], Metrics]:
        sums = {name: value.sum() for name, value in terms(eps, phi).items()}
        return jnp.asarray(sum(sums.values())), sums

    names = ("loss_forward", "loss_reverse", "loss_terminal", "loss_reg")
    (_, sums), (eps_cotangent, phi) = jax.value_and_grad(total, (0, 1), has_aux=True)(at_x.eps, params["flow"])
    zeros = dict.fromkeys(names, jnp.zeros((), jnp.float32))
    return zeros | sums, {"lora": at_x.to_lora(eps_cotangent), "flow": phi}
