"""The policy that follows a learned log value exactly: no LoRA stands between them.

With δ_k = s σ ∇_x V(x̂_#(x)) at every one of its steps (the `gradient` of `algorithms/fitted_value.py`), it is what a
perfect pupil would be. Its certificate therefore says what the teacher is worth, and the difference to a LoRA's says
what the pupil is worth. A step costs about three evaluations of the base model, because V's gradient is pulled back
through it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nabla_gfn_jax.algorithms import value_network
from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.algorithms.credit import Prediction
from nabla_gfn_jax.algorithms.value_memory import ValueMemory
from nabla_gfn_jax.algorithms.value_network import Points
from nabla_gfn_jax.diffusion.chain import Level
from nabla_gfn_jax.diffusion.sampler import PredictChange
from nabla_gfn_jax.typing import Latents, PromptIds


def value_slope(memory: ValueMemory, clean: Latents, state: Int[Array, ""], prompt_id: PromptIds) -> Latents:
    """∂V/∂x̂ (B, …) at clean samples x̂ of one state, 0 to S − 1: `Fit.gradients`, but on the device.

    V must not see log R(x̂).
    """
    centre, basis, middle, unit = (jnp.asarray(a) for a in (memory.centre, memory.basis, memory.middle, memory.unit))

    def total(clean: Latents) -> Array:
        components = (clean.reshape(len(clean), -1) - centre[None]) @ basis
        seen = (components - middle[state][None]) / unit[state]
        features = jnp.concatenate([seen, jnp.zeros((len(clean), 1), seen.dtype)], axis=1)
        time = jnp.full(len(clean), state / max(len(unit) - 1, 1), seen.dtype)
        return value_network.log_value(memory.network.average, Points(features, time, prompt_id)).sum()  # type: ignore[arg-type]

    return jax.grad(total)(clean)


def following(model: Model, scale: float, until: int) -> PredictChange:
    """The base model, and the policy that follows V's gradient times `scale` in the first `until` steps.

    In a LoRA's place it takes memories of V (`algorithms/value_memory.py`), whose mean is followed. From step
    `until` on, 0 to T, the change is 0.
    """
    times = jnp.asarray(model.chain.at.time)

    def predict_change(
        lora: Sequence[ValueMemory], x: Latents, level: Level, condition: PromptIds
    ) -> tuple[Latents, Latents]:
        index = jnp.argmin(jnp.abs(times - level.time[0]))
        step = model.chain[index]

        def follow(x: Latents) -> tuple[Latents, Latents]:
            at_x = Prediction(model, None, x, level, condition)
            clean = level.clean(at_x.output, x)
            slopes = [value_slope(memory, clean, index, condition) for memory in lora]
            by_x = at_x.to_x(level.clean, sum(slopes[1:], slopes[0]) / len(slopes))
            return at_x.output, scale * step.sigma**2 / step.mean_o * by_x

        def rest(x: Latents) -> tuple[Latents, Latents]:
            return model.predict(None, x, level, condition), jnp.zeros_like(x)

        output, change = jax.lax.cond(index < until, follow, rest, x)
        return output, change

    return predict_change
