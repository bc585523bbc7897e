"""Noises the policy's samples as pre-training noises data; the forward-process algorithms train on the result.

    x = √ᾱ z + √(1−ᾱ) ε,  z a sample of the policy, ε new noise, ᾱ of a level that the sampler visits

The path that led to z is not used, so any sampler may have drawn z.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import Latents, Params, PromptIds


@flax.struct.dataclass
class Noised:
    """Noised samples, with any leading axes."""

    x: Latents
    sample: Latents  # z
    output: Latents | None  # o_θ† at x, from the parameters θ† that sampled; None if they were not given
    index: Int[Array, "*noisings"]  # the step that begins at the level of x
    prompt_id: PromptIds

    def target(self, level: Level) -> Latents:
        """The output o* whose clean prediction is the sample, x̂ = z. For ε-prediction it is ε."""
        return (self.sample - expand(level.clean_x, self.x) * self.x) / expand(level.clean_o, self.x)


def noise_samples(
    params: Params | None, model: Model, rollout: Rollout, updates: int, each: int, power: float = 0.0
) -> Noised:
    """`each` noised copies of every sample for every update, leaves (updates, B, each, …).

    The times have a density ∝ t^power over the chain's times. They are stratified: one time in each of `each` equally
    likely intervals. If `params` are given, their output at x is computed too.
    """
    num_steps, shape = model.chain.num_steps, rollout.trajectory.samples.shape[1:]

    def of_sample(key: Array, update: Array) -> tuple[Int[Array, " each"], Float[Array, "each *shape"]]:
        times, noise = jax.random.split(jax.random.fold_in(stream(key, "noising"), update))
        quantile = (jnp.arange(each, dtype=jnp.float32) + jax.random.uniform(times, (each,))) / each
        index = ((1 - quantile ** (1 / (1 + power))) * num_steps).astype(jnp.int32)
        return jnp.minimum(index, num_steps - 1), jax.random.normal(noise, (each, *shape))

    def of_update(update: Array) -> Noised:
        index, noise = jax.vmap(of_sample, (0, None))(rollout.keys, update)
        sample = jnp.broadcast_to(rollout.trajectory.samples[:, None], noise.shape)
        prompt_id = jnp.broadcast_to(rollout.prompt_id[:, None], index.shape)
        flat = _flatten((index, noise, sample, prompt_id))
        level = model.chain[flat[0]].at
        signal = expand(level.signal, flat[1])
        x = jnp.sqrt(signal) * flat[2] + jnp.sqrt(1 - signal) * flat[1]
        output = model.predict(params["lora"], x, level, flat[3]).reshape(noise.shape) if params else None
        return Noised(x.reshape(noise.shape), sample, output, index, prompt_id)

    return jax.vmap(of_update)(jnp.arange(updates))


def step_nats(step: Chain, error: Latents) -> Float[Array, " batch"]:
    """‖μ − μ'‖²/(2σ²), (B,), of two outputs that differ by `error`: the KL divergence of the step, in nats.

    It is a sum over latent elements.
    """
    return 0.5 * jnp.square(expand(step.mean_o / step.sigma, error) * error).reshape(len(error), -1).sum(axis=1)


def _flatten(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape((-1, *leaf.shape[2:])), tree)
