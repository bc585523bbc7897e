"""Detailed balance with a scalar flow F: the common part of residual DB and DAG-DB, which differ in the reference p₀.

For a transition x → y from time t to t', with the reference density p₀:

    Δ = log F(x) + log p_θ(y|x) − log p₀ − log F(y),   log F(x) = h_φ(x, t) + β γ_t log R(x̂_θ(x, t))
    loss = mean of Δ² + λ ‖ε_θ − ε_θ†‖²                log F(y) = β log R(y) at the last transition

h_φ is the head "flow". The forward-looking guess β γ_t log R(x̂) (Pan et al. 2023, arXiv 2302.01687) is a constant with
respect to θ. The reward's gradient is not used. If Δ = 0 for all transitions, the samples have the target density given
by the reference and the reward.

As in the program of DAG's authors, where log p is a mean over latent elements, Δ and h_φ are counted per element: nats
divided by the number D of elements. β is still an exponent; their `reward_exp` is β/D.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.struct
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
    output_change,
)
from nabla_gfn_jax.algorithms.credit import GAMMAS
from nabla_gfn_jax.algorithms.transitions import FromBins, Transition, Transitions, flatten, select
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample


@flax.struct.dataclass
class RewardedTransitions:
    """Transitions of trajectories, and the log reward of the trajectories' samples, leading axis B."""

    transitions: Transitions
    log_reward: PerSample


@dataclass(frozen=True, kw_only=True)
class ScalarDB(FromBins, Unweighted, ABC):
    """Detailed balance; a subclass defines the reference density."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    gamma: Literal["alpha_bar", "sqrt_alpha_bar", "one"] = option("one", "γ_t, the weight of the guess at time t")
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = False  # λ keeps ε_θ near the previous epoch's policy θ†
    columns: ClassVar[dict[str, str]] = {
        "loss_balance": "Δ², the squared violation of detailed balance, per latent element",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    @abstractmethod
    def log_ratio(self, model: Model, step: Chain, output: Latents, now: Transition) -> PerSample:
        """log p_θ(y|x) − log p₀, (B,), as a mean over latent elements. `output` is o_θ(x)."""

    def heads(self) -> Mapping[str, HeadKind]:
        return {"flow": "scalar"}

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """1 + ⌊T·fraction⌋ transitions of each trajectory, a new choice for each update."""
        bins = self.bins(model.chain.num_steps)

        def choose(update: Array) -> RewardedTransitions:
            return RewardedTransitions(select(rollout, bins, None, update), rollout.log_reward)

        return Batch(data=jax.vmap(choose)(jnp.arange(updates)))

    def value_and_grad(
        self, params: Params, model: Model, data: RewardedTransitions, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, its terms and the gradient, as means over all transitions including the last ones."""
        ordinary, last = flatten(data.transitions.ordinary), data.transitions.last
        now: Transition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ordinary, last)
        step, to = model.chain[now.index], model.chain[ordinary.index].to
        flow = model.heads["flow"]
        scale = self.beta / now.x[0].size
        at_y = to.clean(model.predict(params["lora"], ordinary.y, to, ordinary.prompt_id), ordinary.y)
        guess_y = scale * GAMMAS[self.gamma](to.signal) * model.log_reward(at_y, ordinary.prompt_id)

        def loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(params["lora"], now.x, step.at, now.prompt_id)
            at_x = jax.lax.stop_gradient(step.at.clean(output, now.x))
            guess_x = scale * GAMMAS[self.gamma](step.at.signal) * model.log_reward(at_x, now.prompt_id)
            before = guess_x + flow(params["flow"], now.x, step.at, prompt_id=now.prompt_id)
            after = guess_y + flow(params["flow"], ordinary.y, to, prompt_id=ordinary.prompt_id)
            after = jnp.concatenate([after, scale * data.log_reward])
            delta = before + self.log_ratio(model, step, output, now) - after
            terms = {
                "loss_balance": jnp.square(delta).mean(),
                "loss_reg": self.output_regularisation * output_change(output, now.output, step.at).mean(),
            }
            return terms["loss_balance"] + terms["loss_reg"], terms

        return jax.value_and_grad(loss, has_aux=True)(params)
