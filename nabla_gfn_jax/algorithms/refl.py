"""ReFL, reward feedback learning (Xu et al., NeurIPS 2023, arXiv 2304.05977, algorithm 1).

    loss = max(0, margin − log R(x̂_θ(x_k, t_k))),  k uniform among the last steps, x_k sampled without a gradient

Only one network evaluation is differentiated: the clean prediction at a random late step. The released program samples
in 40 steps, chooses among the last 10, and has a margin of 2 on the scale of ImageReward. The paper calls the map from
reward to loss φ. It adds a pre-training loss on images and weights the reward with 10⁻³ against it. Here there are no
training images, so both the loss and the factor are omitted.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    Metrics,
    Model,
    PolicyAlone,
    Rollout,
    Unweighted,
    output_change,
)
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds


@flax.struct.dataclass
class LateState:
    """A state of each trajectory, leaves with leading axis B."""

    x: Latents
    output: Latents  # o_θ† at x, from the parameters θ† that sampled
    index: Int[Array, " batch"]  # the step that begins at x
    prompt_id: PromptIds


@dataclass(frozen=True, kw_only=True)
class Refl(Checked, Unweighted, PolicyAlone):
    """ReFL. An update evaluates the network once and the reward once per sample."""

    late_steps: int = option(10, "number of last steps from which the state is chosen", minimum=1)
    margin: float = option(2.0, "samples with a higher log reward have no gradient", infinite=True)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_reward": "the loss, a decreasing function of log R",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if `late_steps` is more than a trajectory has."""
        if self.late_steps > num_steps:
            raise UserError(
                f"algorithm.late_steps = {self.late_steps} is more than sampling.num_steps = {num_steps}; lower it"
            )

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """One state of each trajectory for each update."""
        num_steps, rows = model.chain.num_steps, jnp.arange(len(rollout.keys))

        def choose(update: Array) -> LateState:
            index = num_steps - 1 - late_offsets(rollout.keys, self.late_steps, update)
            path = rollout.trajectory
            return LateState(path.latents[index, rows], path.outputs[index, rows], index, rollout.prompt_id)

        return Batch(data=jax.vmap(choose)(jnp.arange(updates)))

    def value_and_grad(
        self, params: Params, model: Model, data: LateState, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        level = model.chain[data.index].at

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(lora, data.x, level, data.prompt_id)
            log_reward = model.log_reward(level.clean(output, data.x), data.prompt_id)
            terms = {
                "loss_reward": jnp.maximum(self.margin - log_reward, 0.0).mean(),
                "loss_reg": self.output_regularisation * output_change(output, data.output, level).mean(),
            }
            return terms["loss_reward"] + terms["loss_reg"], terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}


def late_offsets(keys: PRNGKeys, late_steps: int, update: Array) -> Int[Array, " batch"]:
    """For each sample, a distance from the last step, uniform in 0 … late_steps − 1."""

    def of_sample(key: Array) -> Array:
        return jax.random.randint(jax.random.fold_in(stream(key, "ReFL"), update), (), 0, late_steps)

    return jax.vmap(of_sample)(keys)
