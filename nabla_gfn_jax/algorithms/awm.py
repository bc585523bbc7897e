"""AWM, advantage weighted matching (Xue et al., ICML 2026, arXiv 2509.25050).

A policy gradient that uses minus the pre-training loss as the log likelihood. Samples z of the policy are noised to x:

    log p = −‖o_θ(x) − o*‖²,   o* the output whose clean prediction is z (ε, for ε-prediction)
    ρ = exp(log p_θ − log p_θ†)
    loss = mean of −min(A ρ, A clip(ρ, 1 − c, 1 + c)) + β₀ ‖o_θ − o_#‖² + λ ‖ε_θ − ε_θ†‖²

A is the advantage (advantages.py) divided by its clip, so |A| ≤ 1. The reward's gradient is not used. The defaults are
those of the authors' program: c = 1, six noisings of each sample, λ = 1, β₀ = .003 (.0001 for PickScore). Their program
also offers powers of ‖·‖² in log p, and omits the last tenth of the times.

β₀ is not the exponent of a target distribution. It weights a squared difference of outputs, equally at all times,
against the reward.
"""

from dataclasses import dataclass
from typing import ClassVar

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
    mean_square,
    output_change,
)
from nabla_gfn_jax.algorithms.noising import Noised, noise_samples
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Params, PerSample


@dataclass(frozen=True, kw_only=True)
class Awm(Advantages, PolicyAlone):
    """AWM: the pre-training loss weighted by advantages."""

    noisings: int = option(6, "number of noised copies of each sample in an update", minimum=1)
    ratio_clip: float = option(1.0, "c, largest distance of the likelihood ratio from 1", above=0, infinite=True)
    base_regularisation: float = option(0.003, "β₀, the weight of ‖o_θ − o_#‖²", minimum=0)
    output_regularisation: float = option(1.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_policy": "the clipped policy-gradient loss",
        "loss_base": "β₀ ‖o_θ − o_#‖²",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_clip == float("inf"):
            raise UserError("algorithm.advantage_clip = inf makes every advantage divided by it 0; give a number")

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`noisings` noised copies of each sample for every update."""
        return Batch(data=noise_samples(params, model, rollout, updates, self.noisings))

    def value_and_grad(
        self, params: Params, model: Model, data: Noised, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, its terms and the gradient, as means over samples and noised copies."""
        advantage = jnp.repeat(weight, self.noisings) / self.advantage_clip
        now = flatten(data)
        assert now.output is not None
        level = model.chain[now.index].at
        base, target = model.predict(None, now.x, level, now.prompt_id), now.target(level)

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(lora, now.x, level, now.prompt_id)
            ratio = jnp.exp(mean_square(now.output - target) - mean_square(output - target))
            clipped = jnp.clip(ratio, 1 - self.ratio_clip, 1 + self.ratio_clip)
            terms = {
                "loss_policy": jnp.maximum(-advantage * ratio, -advantage * clipped).mean(),
                "loss_base": self.base_regularisation * mean_square(output - base).mean(),
                "loss_reg": self.output_regularisation * output_change(output, now.output, level).mean(),
            }
            return jnp.asarray(sum(terms.values())), terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}
