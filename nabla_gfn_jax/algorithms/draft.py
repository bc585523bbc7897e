"""DRaFT (Clark et al., ICLR 2024, arXiv 2309.17400): the reward's gradient through the last steps of sampling.

    DRaFT-K     loss = −log R(x_T),  x_{k+1} = μ_θ(x_k) + σ_k n_k  for the last K steps, x_{T−K} and n constants
    DRaFT-LV    loss = −(1/n) Σ_i log R(x̂_θ(x⁽ⁱ⁾)),  x⁽ⁱ⁾ ~ q(x | x_T), the last step's noising kernel of the sample

K is `last_steps` (algorithm 1; K = T is plain DRaFT). LV (section 4.2) lowers the variance of K = 1 by noising the same
sample `lv_samples` times. Nothing holds the policy at the base model: it is the baseline that collapses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Batch, HeadKind, Metrics, Model, Rollout, Unweighted
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@flax.struct.dataclass
class Tail:
    """Where gradients begin, leaves with leading axis B."""

    start: Float[Array, "batch starts *shape"]  # DRaFT-K: one, K steps before the end; LV: each noised sample
    shocks: Float[Array, "batch steps *shape"]  # σ·noise that each of the K steps drew; LV: none are used
    prompt_id: PromptIds


@dataclass(frozen=True, kw_only=True)
class Draft(Checked, Unweighted):
    """DRaFT-K, or, with `lv_samples` > 0, DRaFT-LV."""

    last_steps: int = option(1, "K, the number of last sampling steps that are differentiated", minimum=1)
    lv_samples: int = option(0, "how often DRaFT-LV noises each sample; 0: DRaFT-K", minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {"loss_reward": "the loss, a decreasing function of log R"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lv_samples and self.last_steps != 1:
            raise UserError(
                f"algorithm.lv_samples = {self.lv_samples} is of DRaFT-1 and algorithm.last_steps is "
                f"{self.last_steps}; set one of them to its default, 0 and 1"
            )

    def heads(self) -> Mapping[str, HeadKind]:
        return {}

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if a trajectory has fewer steps than are differentiated."""
        if self.last_steps > num_steps:
            raise UserError(
                f"algorithm.last_steps = {self.last_steps} is more than sampling.num_steps = {num_steps}; lower it"
            )

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """DRaFT-K: the same states and noise for every update. LV: fresh noise for each."""
        make = self._noised if self.lv_samples else self._tail
        return Batch(data=jax.vmap(lambda update: make(model, rollout, update))(jnp.arange(updates)))

    def value_and_grad(
        self, params: Params, model: Model, data: Tail, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """−mean log R of what the policy reaches from the same states with the same noise."""
        reach = self._denoised if self.lv_samples else self._end

        def loss(lora: Params) -> Float[Array, ""]:
            return -reach(lora, model, data).mean()

        value, lora = jax.value_and_grad(loss)(params["lora"])
        return (value, {"loss_reward": value}), {"lora": lora}

    def _tail(self, model: Model, rollout: Rollout, update: Array) -> Tail:
        first = model.chain.num_steps - self.last_steps
        latents, outputs = rollout.trajectory.latents[first:], rollout.trajectory.outputs[first:]
        shocks = latents[1:] - jax.vmap(lambda step, o, x: step.mean(o, x))(model.chain[first:], outputs, latents[:-1])
        return Tail(start=latents[0][:, None], shocks=jnp.swapaxes(shocks, 0, 1), prompt_id=rollout.prompt_id)

    def _noised(self, model: Model, rollout: Rollout, update: Array) -> Tail:
        last, samples = model.chain[-1], rollout.trajectory.samples
        shape = (self.lv_samples, *samples.shape[1:])

        def of_sample(key: Array, sample: Array) -> Array:
            noise = jax.random.normal(jax.random.fold_in(stream(key, "DRaFT-LV"), update), shape)
            return last.noising_scale * sample[None] + last.noising_sigma * noise

        return Tail(
            start=jax.vmap(of_sample)(rollout.keys, samples),
            shocks=jnp.zeros((len(samples), 0, *samples.shape[1:])),
            prompt_id=rollout.prompt_id,
        )

    def _end(self, lora: Params, model: Model, data: Tail) -> PerSample:
        """log R at the end of the last K steps."""
        steps = model.chain[model.chain.num_steps - self.last_steps :]

        @jax.checkpoint
        def step(lora: Params, x: Latents, shock: Latents, now: Chain) -> Latents:
            output = model.predict(lora, x, now.at.each(len(x)), data.prompt_id)
            return now.mean(output, x) + shock

        def scanned(x: Latents, inputs: Any) -> tuple[Latents, None]:
            return step(lora, x, *inputs), None

        final, _ = jax.lax.scan(scanned, data.start[:, 0], (jnp.swapaxes(data.shocks, 0, 1), steps))
        return model.log_reward(final, data.prompt_id)

    def _denoised(self, lora: Params, model: Model, data: Tail) -> PerSample:
        """log R of the clean prediction at each noised sample."""
        x = data.start.reshape(-1, *data.start.shape[2:])
        prompt_id, level = jnp.repeat(data.prompt_id, self.lv_samples), model.chain[-1].at.each(len(x))
        return model.log_reward(level.clean(model.predict(lora, x, level, prompt_id), x), prompt_id)
