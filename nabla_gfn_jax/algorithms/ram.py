"""RAM, reinforce adjoint matching (Bergmeister et al. 2026, arXiv 2605.10759, eq. 17).

The optimal process of KL-regularised control tilts the distribution of samples and keeps the noising process. Samples z
of the policy are noised to x:

    target  o_#(x) + A (o* − o_θ†(x)),   o* the output whose clean prediction is z,  A = β (log R(z) − baseline)
    loss    mean of ‖o_θ(x) − target‖² + λ ‖ε_θ − ε_θ†‖²

The reward's gradient is not used. By the REINFORCE identity, the mean of A (o* − o_θ) given x is, up to scale, the
gradient of the policy's mean of β log R(z) given x. The exact target would also subtract the nats that the policy
spends after x. The paper omits them, which is exact at the base model and inaccurate far from it.

The paper divides the advantage by its standard deviation and multiplies it by m (100 to 1000), so m is β times the
standard deviation. Here A is not divided, so β is an exponent. Each sample is noised 8 times, at times of density ∝ t.
The baseline changes no mean. But if A < −1, an error of o_θ grows, because the target contains −A o_θ. With
`baseline = "least"`, the least log R of the prompt in the epoch, no A is negative.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.advantages import Advantages, PromptRewards
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
from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Params, PerSample


@dataclass(frozen=True, kw_only=True)
class Ram(Advantages, PolicyAlone):
    """RAM. `advantage_clip` limits (log R − mean)/std; A is then β std times the clipped value."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    baseline: Literal["mean", "least"] = option("mean", "the value that is subtracted from a prompt's log rewards")
    advantage_clip: float = option(float("inf"), "largest (log R − mean)/std", above=0, infinite=True)
    noisings: int = option(8, "number of noised copies of each sample in an update", minimum=1)
    time_power: float = option(1.0, "α; the times have a density ∝ t^α", minimum=0, maximum=100)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_matching": "‖o_θ − target‖²; the target is the base model's output shifted by the reward",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def weigh(
        self, stats: PromptRewards, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PromptRewards]:
        """A = β (log R − baseline), (all,), with `advantage_clip` applied, and the new memory."""
        rewards = np.asarray(scalars["log_reward"], np.float64)
        mean, std, stats = self.moments(stats, rewards, prompt_id)
        largest = self.advantage_clip * std if np.isfinite(self.advantage_clip) else np.full_like(std, np.inf)
        weight = self.beta * np.clip(rewards - mean, -largest, largest)
        if self.baseline == "least":
            for prompt in np.unique(prompt_id):
                weight[prompt_id == prompt] -= weight[prompt_id == prompt].min()
        return weight.astype(np.float32), stats

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`noisings` noised copies of each sample for every update."""
        return Batch(data=noise_samples(params, model, rollout, updates, self.noisings, self.time_power))

    def value_and_grad(
        self, params: Params, model: Model, data: Noised, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, its terms and the gradient, as means over samples and noised copies."""
        now = flatten(data)
        assert now.output is not None
        level = model.chain[now.index].at
        move = expand(jnp.repeat(weight, self.noisings), now.x) * (now.target(level) - now.output)
        target = model.predict(None, now.x, level, now.prompt_id) + move

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(lora, now.x, level, now.prompt_id)
            terms = {
                "loss_matching": mean_square(output - target).mean(),
                "loss_reg": self.output_regularisation * output_change(output, now.output, level).mean(),
            }
            return terms["loss_matching"] + terms["loss_reg"], terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}
