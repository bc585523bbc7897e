"""Residual ∇-DB (Zhang et al., ICLR 2025, arXiv 2412.07775): the loss and its gradient.

The policy should sample P(x) ∝ P_base(x)^κ R(x)^β. For a transition x → y from time t to t':

    forward  ‖ s_θ − [κ s_# + credit(y)] ‖²           s = −(y − μ)/σ²,             ∇_y log p(y|x)
    reverse  ‖ r_θ − [κ r_# − G(x,t) − g_φ(x,t)] ‖²   r = (∂μ/∂x)ᵀ(y − μ)/σ²,      ∇_x log p(y|x)
    terminal ‖ g_φ(x_T, 0) ‖²                         at the last transition, in place of the reverse term
    reg      λ ‖ ε_θ − ε_θ† ‖²

every ‖·‖² a mean over latent elements. The reverse term trains φ only: r and G are constants.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

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
from nabla_gfn_jax.algorithms.credit import (
    GAMMAS,
    PATH_CREDITS,
    Comparison,
    Prediction,
    PullBack,
    compare,
    compare_with,
    guess_cotangent,
    score_change,
)
from nabla_gfn_jax.algorithms.transitions import (
    FromBins,
    Transition,
    Transitions,
    flatten,
    select,
    with_changes,
)
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@dataclass(frozen=True, kw_only=True)
class ResidualNablaDB(FromBins, Unweighted):
    """Residual ∇-DB with a choice of credit.

    The credits are

    - "lookahead": G + g_φ, the paper's.
    - "guess": G alone, without φ and without the reverse term.
    - "adjoint": the reward's gradient at the trajectory's end, pulled back through the base model. There is no φ, and
      the forward term is weighted by σ². Without this weight the last steps outweigh all others: they have almost no
      noise, and their score is the largest.
    - "terminal": γ_t' times the reward's gradient at the trajectory's end, not pulled back (Lee et al. 2026, arXiv
      2604.17415). It has no φ and the weight σ² too. It takes no evaluation of the network. It is equal to the adjoint
      only at the last step.
    """

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)
    prior_strength: float = option(1.0, "κ, the base model's exponent", minimum=0)
    credit: Literal["lookahead", "guess", "adjoint", "terminal"] = option(
        "lookahead", "the estimate of the reward's gradient that each step follows"
    )
    gamma: Literal["alpha_bar", "sqrt_alpha_bar", "one"] = option("alpha_bar", "γ_t, the trust in the guess at time t")
    variance_weighted: bool = option(False, "weight the forward term by σ², as adjoint and terminal always do")
    correction_from_forward: bool = option(True, "train φ by the forward term too, as in the paper")
    credit_clip: float = option(
        math.inf,
        "for adjoint and terminal, the largest σ·(root mean square) of a transition's credit; it biases towards zero",
        above=0,
        infinite=True,
    )

    on_policy: ClassVar[bool] = False  # λ holds ε_θ at the policy before, θ†
    columns: ClassVar[dict[str, str]] = {
        "loss_forward": "the forward term, the policy's score against its target; times σ² if variance weighted",
        "loss_reverse": "the reverse term, which trains g_φ; 0 without g_φ",
        "loss_terminal": "‖g_φ(y, 0)‖² at clean samples; 0 without g_φ",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def heads(self) -> Mapping[str, HeadKind]:
        return {"correction": "vector"} if self._corrects else {}

    @property
    def _corrects(self) -> bool:
        return self.credit == "lookahead"

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """1 + ⌊T·fraction⌋ transitions of each trajectory, chosen anew for each update, with their credit if it is one
        of the path, which is computed once."""
        bins = self.bins(model.chain.num_steps)
        credit = PATH_CREDITS[self.credit](model, rollout, self.beta) if self.credit in PATH_CREDITS else None
        data = jax.vmap(lambda update: select(rollout, bins, credit, update))(jnp.arange(updates))
        if model.predict_change is not None and self.output_regularisation:
            ordinary, last = (with_changes(model, params["lora"], part) for part in (data.ordinary, data.last))
            data = Transitions(ordinary=ordinary, last=last)
        return Batch(data=data)

    def value_and_grad(
        self, params: Params, model: Model, data: Transitions, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """Loss, its four terms (they add up to it) and its gradient; a mean over all transitions."""
        ordinary, last = flatten(data.ordinary), data.last
        total = len(ordinary.x) + len(last.x)
        if self.credit in PATH_CREDITS:
            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ordinary, last)
            parts = [self.with_path_credit(params, model, both)]
        else:
            parts = [self.ordinary(params, model, ordinary), self.last(params, model, last)]
        metrics, gradient = jax.tree.map(lambda *leaves: sum(leaves) / total, *parts)
        return (sum(metrics.values()), metrics), gradient

    def ordinary(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over transitions with t' > 0, under "lookahead" or "guess"."""
        x, y, prompt_id = transition.x, transition.y, transition.prompt_id
        step = model.chain[transition.index]
        at_y = Prediction(model, params["lora"], y, step.to, prompt_id)
        guess_y = at_y.to_x(step.to.clean, self._guess(model, at_y.output, y, step.to, prompt_id))
        x, guess_y = jax.lax.optimization_barrier((x, guess_y))  # the policy at y is done with before others begin
        # −κ r_#, and r_θ + G(x, t), which is linear in the cotangents at o_θ(x, t): one pull-back through each network
        pull_backs = (
            PullBack(step.mean, lambda o: self.prior_strength * score(o, transition, step)),
            PullBack(
                lambda o, x: (step.mean(o, x), step.at.clean(o, x)),
                lambda o: (-score(o, transition, step), self._guess(model, o, x, step.at, prompt_id)),
            ),
        )
        at_x = compare(model, params["lora"], x, step.at, prompt_id, pull_backs if self._corrects else None)

        def terms(output: Latents, change: Latents, heads: Params) -> dict[str, PerSample]:
            credit = guess_y
            out = {}
            if self._corrects:
                correct = partial(model.heads["correction"], heads["correction"], prompt_id=prompt_id)
                correction = correct(y, step.to)
                credit = credit + (correction if self.correction_from_forward else jax.lax.stop_gradient(correction))
                assert at_x.pulled_back is not None
                out["loss_reverse"] = mean_square(at_x.pulled_back + correct(x, step.at))
            residual = self._policy_minus_prior(change, at_x.base_output, transition, step) - credit
            return out | {
                "loss_forward": self._forward(residual, step),
                "loss_reg": self._regularisation(output, change, transition, step),
            }

        return pull_back(terms, at_x, params)

    def last(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over last transitions, under "lookahead" or "guess": y is the sample, its own x̂."""
        y, prompt_id, step = transition.y, transition.prompt_id, model.chain[transition.index]
        at_x = compare(model, params["lora"], transition.x, step.at, prompt_id)
        credit = expand(self._scale(step.to), y) * reward_gradient(model, y, prompt_id)

        def terms(output: Latents, change: Latents, heads: Params) -> dict[str, PerSample]:
            residual = self._policy_minus_prior(change, at_x.base_output, transition, step) - credit
            out = {
                "loss_forward": self._forward(residual, step),
                "loss_reg": self._regularisation(output, change, transition, step),
            }
            if self._corrects:
                correction = model.heads["correction"](heads["correction"], y, step.to, prompt_id)
                out["loss_terminal"] = mean_square(correction)
            return out

        return pull_back(terms, at_x, params)

    def with_path_credit(self, params: Params, model: Model, transition: Transition) -> tuple[Metrics, Params]:
        """Sums over any transitions, under "adjoint" or "terminal"; for κ = 1, σ² ‖(μ_θ − μ_#)/σ² − a_{t+1}‖²."""
        step, adjoint = model.chain[transition.index], transition.adjoint
        assert adjoint is not None
        trust = GAMMAS[self.gamma](step.to.signal) if self.credit == "terminal" else jnp.ones_like(step.sigma)
        size = trust * step.sigma * jnp.sqrt(mean_square(adjoint.gradient))
        scale = trust * jnp.where(size > self.credit_clip, self.credit_clip / size, 1.0)
        credit = expand(scale, adjoint.gradient) * adjoint.gradient
        where = (model, params["lora"], transition.x, step.at, transition.prompt_id)
        known = adjoint.base_output
        at_x = compare(*where) if known is None else compare_with(*where, known)

        def terms(output: Latents, change: Latents, heads: Params) -> dict[str, PerSample]:
            residual = self._policy_minus_prior(change, at_x.base_output, transition, step) - credit
            return {
                "loss_forward": self._forward(residual, step),
                "loss_reg": self._regularisation(output, change, transition, step),
            }

        return pull_back(terms, at_x, params)

    def _scale(self, level: Level) -> PerSample:
        """β γ_t."""
        return self.beta * GAMMAS[self.gamma](level.signal)

    def _guess(self, model: Model, output: Latents, x: Latents, level: Level, prompt_id: PromptIds) -> Latents:
        """The cotangent at x̂ whose pull-back to x is G."""
        return guess_cotangent(model, output, x, level, self._scale(level), prompt_id)

    def _forward(self, residual: Latents, step: Chain) -> PerSample:
        weighted = self.variance_weighted or self.credit in PATH_CREDITS
        return (step.sigma**2 if weighted else 1.0) * mean_square(residual)

    def _policy_minus_prior(self, change: Latents, base: Latents, transition: Transition, step: Chain) -> Latents:
        """s_θ − κ s_#, as (s_θ − s_#) + (1 − κ) s_#."""
        return score_change(change, step) + (1 - self.prior_strength) * score(base, transition, step)

    def _regularisation(self, output: Latents, change: Latents, transition: Transition, step: Chain) -> PerSample:
        before = transition.change  # o_θ† − o_#, if it is known
        pair = (output, transition.output) if before is None else (change, before)
        return self.output_regularisation * output_change(*pair, step.at)


def score(output: Latents, transition: Transition, step: Chain) -> Latents:
    """s = −(y − μ)/σ², the gradient of log p(y|x) in y."""
    return (step.mean(output, transition.x) - transition.y) / expand(step.sigma, output) ** 2


def pull_back(terms: Any, at_x: Prediction | Comparison, params: Params) -> tuple[Metrics, Params]:
    """Sums of `terms(*outputs, φ)` over transitions and the gradient of their total in LoRA and φ.

    The outputs are o_θ alone of a `Prediction`, o_θ and o_θ − o_# of a `Comparison`.
    """
    heads = {name: phi for name, phi in params.items() if name != "lora"}

    def total(outputs: tuple[Latents, ...], heads: Params) -> tuple[Float[Array, ""], Metrics]:
        sums = {name: value.sum() for name, value in terms(*outputs, heads).items()}
        return jnp.asarray(sum(sums.values())), sums

    (_, sums), (cotangents, heads) = jax.value_and_grad(total, (0, 1), has_aux=True)(at_x.outputs, heads)
    zeros = dict.fromkeys(ResidualNablaDB.columns, jnp.zeros((), jnp.float32))
    return zeros | sums, {"lora": at_x.to_lora(sum(cotangents)), **heads}
