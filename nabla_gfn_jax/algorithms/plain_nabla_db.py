"""Plain ∇-DB (Zhang et al., ICLR 2025, arXiv 2412.07775): the gradient of detailed balance, without a base model.

The balance equation p_θ(y|x) F(x) = q(x|y) F(y), with the noising kernel q, is differentiated with respect to y and x.
For a transition x → y from time t to t', ∇log F(x) = G(x,t) + g_φ(x,t), where G is the gradient of the one-step guess
β γ_t log R(x̂):

    forward  ‖ s_θ − [∇_y log q(x|y) + G(y) + g_φ(y)] ‖²         s = ∇_y log p_θ(y|x) = −(y − μ)/σ²
    reverse  ‖ r_θ − [∇_x log q(x|y) − G(x) − g_φ(x)] ‖²         r = ∇_x log p_θ(y|x); trains φ only
    terminal ‖ g_φ(x_T, 0) ‖²                                    at the last transition, where G(y) = β ∇log R(y)
    reg      λ ‖ ε_θ − ε_θ† ‖²

The target is R^β *alone*; the base model is only the starting point of the training. Residual ∇-DB (nabla_db.py) is the
difference of these equations for the policy and for the base model, so its target is P_base R^β.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    HeadKind,
    Metrics,
    Model,
    Rollout,
    Unweighted,
    mean_square,
    output_change,
    reward_gradient,
)
from nabla_gfn_jax.algorithms.credit import GAMMAS, Prediction, guess_cotangent
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB, pull_back, score
from nabla_gfn_jax.algorithms.transitions import FromBins, Transition, Transitions, flatten, select
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@dataclass(frozen=True, kw_only=True)
class PlainNablaDB(FromBins, Unweighted):
    """∇-DB with the paper's lookahead credit G + g_φ."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)
    gamma: Literal["alpha_bar", "sqrt_alpha_bar", "one"] = option("alpha_bar", "γ_t, the trust in the guess at time t")
    variance_weighted: bool = option(False, "weight the forward term by σ²")

    on_policy: ClassVar[bool] = False  # λ keeps ε_θ near the previous epoch's policy θ†
    columns: ClassVar[dict[str, str]] = ResidualNablaDB.columns

    def heads(self) -> Mapping[str, HeadKind]:
        return {"correction": "vector"}

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """1 + ⌊T·fraction⌋ transitions of each trajectory, a new choice for each update."""
        bins = self.bins(model.chain.num_steps)
        return Batch(data=jax.vmap(lambda update: select(rollout, bins, None, update))(jnp.arange(updates)))

    def value_and_grad(
        self, params: Params, model: Model, data: Transitions, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, the four terms whose sum it is, and the gradient, as means over all transitions."""
        ordinary, last = flatten(data.ordinary), data.last
        total = len(ordinary.x) + len(last.x)
        parts = [self.ordinary(params, model, ordinary), self.last(params, model, last)]
        metrics, gradient = jax.tree.map(lambda *leaves: sum(leaves) / total, *parts)
        return (sum(metrics.values()), metrics), gradient

    def ordinary(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Terms and gradient, summed over transitions with t' > 0."""
        x, y, prompt_id = transition.x, transition.y, transition.prompt_id
        step = model.chain[transition.index]
        kernel = kernel_score(transition, step)
        at_y = Prediction(model, params["lora"], y, step.to, prompt_id)
        guess_y = at_y.to_x(step.to.clean, self._guess(model, at_y, step.to, prompt_id))
        at_x = Prediction(model, params["lora"], x, step.at, prompt_id)
        # r_θ + G(x, t) is linear in the cotangents at o_θ(x, t), so it needs one pull-back
        score_and_guess = at_x.to_x(
            lambda o, x: (step.mean(o, x), step.at.clean(o, x)),
            (-score(at_x.output, transition, step), self._guess(model, at_x, step.at, prompt_id)),
        )

        def terms(output: Latents, heads: Params) -> dict[str, PerSample]:
            correct = partial(model.heads["correction"], heads["correction"], prompt_id=prompt_id)
            forward = score(output, transition, step) - expand(step.noising_scale, y) * kernel - guess_y
            return {
                "loss_forward": self._forward(forward - correct(y, step.to), step),
                "loss_reverse": mean_square(score_and_guess + kernel + correct(x, step.at)),
                "loss_reg": self.output_regularisation * output_change(output, transition.output, step.at),
            }

        return pull_back(terms, at_x, params)

    def last(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Terms and gradient, summed over last transitions, where y is the sample and equals x̂."""
        y, prompt_id, step = transition.y, transition.prompt_id, model.chain[transition.index]
        at_x = Prediction(model, params["lora"], transition.x, step.at, prompt_id)
        target = expand(step.noising_scale, y) * kernel_score(transition, step)
        target = target + expand(self._scale(step.to), y) * reward_gradient(model, y, prompt_id)

        def terms(output: Latents, heads: Params) -> dict[str, PerSample]:
            correction = model.heads["correction"](heads["correction"], y, step.to, prompt_id=prompt_id)
            return {
                "loss_forward": self._forward(score(output, transition, step) - target, step),
                "loss_terminal": mean_square(correction),
                "loss_reg": self.output_regularisation * output_change(output, transition.output, step.at),
            }

        return pull_back(terms, at_x, params)

    def _scale(self, level: Level) -> PerSample:
        """β γ_t."""
        return self.beta * GAMMAS[self.gamma](level.signal)

    def _guess(self, model: Model, at: Prediction, level: Level, prompt_id: PromptIds) -> Latents:
        """The cotangent at x̂ whose pull-back to x is G."""
        return guess_cotangent(model, at.output, at.x, level, self._scale(level), prompt_id)

    def _forward(self, residual: Latents, step: Chain) -> PerSample:
        return (step.sigma**2 if self.variance_weighted else 1.0) * mean_square(residual)


def kernel_score(transition: Transition, step: Chain) -> Latents:
    """−∇_x log q(x|y) = (x − n y)/s² for q = N(n y, s²), (B, …). Multiplied by n it is ∇_y log q(x|y)."""
    difference = transition.x - expand(step.noising_scale, transition.y) * transition.y
    return difference / expand(step.noising_sigma, difference) ** 2
