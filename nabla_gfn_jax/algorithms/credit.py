"""Credit: an estimate of the gradient in y of the log reward still to come. The forward loss moves the policy by it.

The paper's lookahead is a one-step guess G with a learned correction g_φ (in nabla_db). The adjoint is the reward's
gradient at the end of the trajectory, pulled back step by step. The terminal credit is the same without pull-backs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Model, Rollout, reward_gradient
from nabla_gfn_jax.algorithms.transitions import AdjointCredit
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.diffusion.sampler import PredictChange
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

    @property
    def outputs(self) -> tuple[Latents, ...]:
        """What a loss may be a function of."""
        return (self.output,)

    def to_x(self, of_output: Callable[[Latents, Latents], Any], cotangents: Any) -> Latents:
        """(∂f/∂x)ᵀ cotangents of f(x) = of_output(o(x), x); several outputs of f share one pull-back."""
        _, pull = jax.vjp(of_output, self.output, self.x)
        output_cotangent, direct = pull(cotangents)
        return self._pull(output_cotangent)[1] + direct

    def to_lora(self, output_cotangent: Latents) -> Params:
        """(∂o/∂LoRA)ᵀ cotangent."""
        return self._pull(output_cotangent)[0]


class PullBack(NamedTuple):
    """A pull-back through a network that is yet to be evaluated: of f(x) = of_output(o(x), x)."""

    of_output: Callable[[Latents, Latents], Any]
    cotangents: Callable[[Latents], Any]  # of f, given o


@dataclass(frozen=True)
class Comparison:
    """The policy beside the base model at x."""

    base_output: Latents  # o_#
    output: Latents  # o_θ
    change: Latents  # o_θ − o_#
    to_lora: Callable[[Latents], Params]  # (∂o_θ/∂LoRA)ᵀ cotangent
    pulled_back: Latents | None = None  # to x, the sum of what was asked for

    @property
    def outputs(self) -> tuple[Latents, ...]:
        """What a loss may be a function of. The change of both by the LoRA is the same."""
        return (self.output, self.change)


def compare(
    model: Model,
    lora: Params,
    x: Latents,
    level: Level,
    prompt_id: PromptIds,
    pull_backs: tuple[PullBack, PullBack] | None = None,
) -> Comparison:
    """Base model and policy at x, with a pull-back through each, if given; base first."""
    if model.predict_change is not None:
        return _carried(model.predict_change, lora, x, level, prompt_id, pull_backs)
    base, pulled = Prediction(model, None, x, level, prompt_id), None
    if pull_backs:
        of_base, of_policy = pull_backs
        pulled = base.to_x(of_base.of_output, of_base.cotangents(base.output))
    # One network's activations at a time.
    x, base_output, pulled = jax.lax.optimization_barrier((x, base.output, pulled))
    policy = Prediction(model, lora, x, level, prompt_id)
    if pull_backs:
        pulled = pulled + policy.to_x(of_policy.of_output, of_policy.cotangents(policy.output))
    return Comparison(base_output, policy.output, policy.output - base_output, policy.to_lora, pulled)


def compare_with(
    model: Model, lora: Params, x: Latents, level: Level, prompt_id: PromptIds, base_output: Latents
) -> Comparison:
    """Base model and policy at x, where the base model's output is known. It is computed again if it must be exact."""
    if model.predict_change is not None:
        return _carried(model.predict_change, lora, x, level, prompt_id, None)
    policy = Prediction(model, lora, x, level, prompt_id)
    return Comparison(base_output, policy.output, policy.output - base_output, policy.to_lora)


def _carried(
    predict_change: PredictChange,
    lora: Params,
    x: Latents,
    level: Level,
    prompt_id: PromptIds,
    pull_backs: tuple[PullBack, PullBack] | None,
) -> Comparison:
    """Both networks, evaluated together. A cotangent of o_θ = o_# + change is a cotangent of both parts."""
    (base, change), pull = jax.vjp(lambda lora, x: predict_change(lora, x, level, prompt_id), lora, x)
    output, pulled = base + change, None
    if pull_backs:
        of_base, of_policy = pull_backs
        cotangents, direct = [], []
        for (of_output, cotangents_of), o in ((of_base, base), (of_policy, output)):
            one, other = jax.vjp(of_output, o, x)[1](cotangents_of(o))
            cotangents.append(one)
            direct.append(other)
        pulled = pull((cotangents[0] + cotangents[1], cotangents[1]))[1] + direct[0] + direct[1]
    to_lora = lambda cotangent: pull((jnp.zeros_like(cotangent), cotangent))[0]  # noqa: E731
    return Comparison(base, output, change, to_lora, pulled)


def guess_cotangent(
    model: Model, output: Latents, x: Latents, level: Level, scale: PerSample, prompt_id: PromptIds
) -> Latents:
    """β γ_t ∇log R at x̂(o, x); pulled back from x̂ to x it is G(x, t). `scale` is β γ_t."""
    return expand(scale, x) * reward_gradient(model, level.clean(output, x), prompt_id)


def score_change(change: Latents, step: Chain) -> Latents:
    """s_θ − s_# = (μ_θ − μ_#)/σ² = mean_o (o_θ − o_#)/σ², without the cancellation of two large scores."""
    return expand(step.mean_o / step.sigma**2, change) * change


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
