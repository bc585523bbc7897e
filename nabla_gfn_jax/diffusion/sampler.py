"""The sampler: one scan from noise to a sample, which records the trajectory the losses are written on."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.diffusion.schedule import Schedule, step_mean
from nabla_gfn_jax.typing import Latents, PRNGKeys, Timesteps

Predict = Callable[[Latents, Timesteps, PyTree[Any]], Latents]  # (x, t, condition) → ε(x, t), guided


@flax.struct.dataclass
class Trajectory:
    """States and noise predictions of T steps, in sampling order."""

    latents: Float[Array, "states batch *shape"]  # T+1 of them: x_T noise first, the sample last
    noise_predictions: Float[Array, "steps batch *shape"]  # ε at latents[k], by the parameters that sampled

    @property
    def samples(self) -> Latents:
        return self.latents[-1]


def draw_noise(keys: PRNGKeys, draw: int | Array, shape: tuple[int, ...]) -> Latents:
    """Standard normal noise (B, *shape), each sample from its own key: the start is draw 0, step k is k+1.

    So a sample depends on its key alone, not on the batch or the device it is drawn in.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def sample(
    predict: Predict, schedule: Schedule, keys: PRNGKeys, shape: tuple[int, ...], condition: PyTree[Any]
) -> Trajectory:
    """Draws x_T ~ N(0, 1), then y ~ N(μ(x), σ²) step after step.

    Args:
        predict: noise prediction of the policy, (x, t (B,), condition) → ε.
        schedule: T steps.
        keys: (B,), one per sample; every random draw comes from the sample's own.
        shape: of one latent.
        condition: what `predict` takes beside x and t; leaves with leading axis B.
    """

    def step(x: Latents, inputs: tuple[Array, Schedule]) -> tuple[Latents, tuple[Latents, Latents]]:
        index, coefficients = inputs
        eps = predict(x, jnp.broadcast_to(coefficients.timestep, keys.shape), condition)
        noise = draw_noise(keys, index + 1, shape)
        y = step_mean(eps, x, coefficients) + coefficients.sigma * noise
        return y, (y, eps)

    start = draw_noise(keys, 0, shape)
    _, (latents, noise_predictions) = jax.lax.scan(step, start, (jnp.arange(schedule.num_steps), schedule))
    return Trajectory(
        latents=jnp.concatenate([start[None], latents]),
        noise_predictions=noise_predictions,
    )
