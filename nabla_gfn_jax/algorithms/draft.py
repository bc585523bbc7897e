"""DRaFT (Clark et al., ICLR 2024, arXiv 2309.17400): backpropagates the reward through the last steps of sampling.

    DRaFT-K     loss = −log R(x_T),  x_{k+1} = μ_θ(x_k) + σ_k n_k  for the last K steps, x_{T−K} and n constants
    DRaFT-LV    loss = −(1/n) Σ_i log R(x̂_θ(x⁽ⁱ⁾)),  x⁽ⁱ⁾ ~ q(x | x_T), the noising kernel of the last step

K is `last_steps` (algorithm 1; K = T is plain DRaFT). LV (section 4.2) lowers the variance of K = 1 by noising the same
sample `lv_samples` times. No term keeps the policy near the base model: this is the baseline that collapses. The term
λ ‖ε_θ − ε_θ†‖², off by default, keeps it near the parameters θ† that sampled. It is evaluated where gradients begin: at
x_{T−K}, or at the noised samples.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@flax.struct.dataclass
class Tail:
    """The states where gradients begin, leaves with leading axis B."""

    start: Float[Array, "batch starts *shape"]  # DRaFT-K: the state K steps before the end; LV: each noised sample
    before: Float[Array, "batch starts *shape"] | None  # o_θ† at `start`; None in DRaFT-LV if λ is 0
    shocks: Float[Array, "batch steps *shape"]  # σ·noise of each of the K steps; empty for LV
    prompt_id: PromptIds


@dataclass(frozen=True, kw_only=True)
class Draft(Checked, Unweighted, PolicyAlone):
    """DRaFT-K, or DRaFT-LV if `lv_samples` > 0."""

    last_steps: int = option(1, "K, the number of last sampling steps that are differentiated", minimum=1)
    lv_samples: int = option(0, "number of noised copies of each sample in DRaFT-LV; 0: DRaFT-K", minimum=0)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_reward": "the loss, a decreasing function of log R",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lv_samples and self.last_steps != 1:
            raise UserError(
                f"algorithm.lv_samples = {self.lv_samples} needs algorithm.last_steps = 1, but it is "
                f"{self.last_steps}; set algorithm.lv_samples to 0 or algorithm.last_steps to 1"
            )

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if a trajectory has fewer steps than are differentiated."""
        if self.last_steps > num_steps:
            raise UserError(
                f"algorithm.last_steps = {self.last_steps} is more than sampling.num_steps = {num_steps}; lower it"
            )

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """For DRaFT-K, the same states and noise for every update; for LV, new noise for each update."""

        def make(update: Array) -> Tail:
            return self._noised(params, model, rollout, update) if self.lv_samples else self._tail(model, rollout)

        return Batch(data=jax.vmap(make)(jnp.arange(updates)))

    def value_and_grad(
        self, params: Params, model: Model, data: Tail, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """−mean log R of the images that the policy reaches from the recorded states with the recorded noise."""
        reach = self._denoised if self.lv_samples else self._end
        level = model.chain[model.chain.num_steps - self.last_steps].at  # of the starts

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            log_reward, outputs = reach(lora, model, data)
            terms = {"loss_reward": -log_reward.mean(), "loss_reg": jnp.zeros(())}
            if data.before is not None:
                change = output_change(outputs, data.before.reshape(outputs.shape), level)
                terms["loss_reg"] = self.output_regularisation * change.mean()
            return terms["loss_reward"] + terms["loss_reg"], terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}

    def _tail(self, model: Model, rollout: Rollout) -> Tail:
        first = model.chain.num_steps - self.last_steps
        latents, outputs = rollout.trajectory.latents[first:], rollout.trajectory.outputs[first:]
        shocks = latents[1:] - jax.vmap(lambda step, o, x: step.mean(o, x))(model.chain[first:], outputs, latents[:-1])
        return Tail(latents[0][:, None], outputs[0][:, None], jnp.swapaxes(shocks, 0, 1), rollout.prompt_id)

    def _noised(self, params: Params, model: Model, rollout: Rollout, update: Array) -> Tail:
        last, samples = model.chain[-1], rollout.trajectory.samples
        shape = (self.lv_samples, *samples.shape[1:])

        def of_sample(key: Array, sample: Array) -> Array:
            noise = jax.random.normal(jax.random.fold_in(stream(key, "DRaFT-LV"), update), shape)
            return last.noising_scale * sample[None] + last.noising_sigma * noise

        tail = Tail(
            start=jax.vmap(of_sample)(rollout.keys, samples),
            before=None,
            shocks=jnp.zeros((len(samples), 0, *samples.shape[1:])),
            prompt_id=rollout.prompt_id,
        )
        if not self.output_regularisation:
            return tail
        return replace(tail, before=self._outputs(params["lora"], model, tail).reshape(tail.start.shape))

    def _end(self, lora: Params, model: Model, data: Tail) -> tuple[PerSample, Latents]:
        """log R at the end of the last K steps, (B,), and the output at the first of these steps."""
        steps = model.chain[model.chain.num_steps - self.last_steps :]

        @jax.checkpoint
        def step(lora: Params, x: Latents, shock: Latents, now: Chain) -> tuple[Latents, Latents]:
            output = model.predict(lora, x, now.at.each(len(x)), data.prompt_id)
            return now.mean(output, x) + shock, output

        def scanned(x: Latents, inputs: Any) -> tuple[Latents, Latents]:
            return step(lora, x, *inputs)

        final, outputs = jax.lax.scan(scanned, data.start[:, 0], (jnp.swapaxes(data.shocks, 0, 1), steps))
        return model.log_reward(final, data.prompt_id), outputs[0]

    def _denoised(self, lora: Params, model: Model, data: Tail) -> tuple[PerSample, Latents]:
        """log R of the clean prediction at each noised sample, (B·lv_samples,), and the output there."""
        output, x = self._outputs(lora, model, data), flatten(data.start)
        prompt_id = jnp.repeat(data.prompt_id, self.lv_samples)
        return model.log_reward(model.chain[-1].at.clean(output, x), prompt_id), output

    def _outputs(self, lora: Params, model: Model, data: Tail) -> Latents:
        x = flatten(data.start)
        return model.predict(lora, x, model.chain[-1].at.each(len(x)), jnp.repeat(data.prompt_id, self.lv_samples))
