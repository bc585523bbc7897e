"""Sampling that keeps of each path only what it ends at, and how far it went from the base model's on the way."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange, draw_noise, policy_or_base
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys


class Paths(NamedTuple):
    """Where sampled paths end, and their nats (`metrics.certificate`); zeros if the base model itself sampled."""

    latents: Latents
    spent: Float[Array, "batch steps"]  # ‖μ_θ − μ_#‖²/(2σ²) of each step, summed over elements
    log_ratio: Float[Array, " batch"]  # log p_#(path)/p_θ(path), with the noise that was drawn


def sample_paths(
    predict: Predict,
    lora: Params | None,
    chain: Chain,
    keys: PRNGKeys,
    shape: tuple[int, ...],
    condition: PyTree[Any],
    *,
    nats: bool = True,
    active: Bool[np.ndarray, " steps"] | None = None,
    predict_change: PredictChange | None = None,
) -> Paths:
    """Samples as `diffusion.sampler.sample` does, number for number, in the memory of one state.

    `active`: the steps that the policy takes; the others are the base model's. None: all are the policy's.

    For `nats` the base model is evaluated at each state beside the policy, which doubles the cost; every σ must be
    above 0. `lora` None is the base model. With `predict_change` both are evaluated as one: then δ has its precision,
    and the numbers are the sampler's up to rounding.

    With δ = (μ_θ − μ_#)/σ and y = μ_θ + σ z, log p_#(y|x) − log p_θ(y|x) = −‖δ + z‖²/2 + ‖z‖²/2 = −‖δ‖²/2 − δ·z.
    """
    compare = nats and lora is not None
    across = tuple(range(1, 1 + len(shape)))

    def step(x: Latents, inputs: tuple[Array, Chain, Array | None]) -> tuple[Latents, tuple[Array, Array]]:
        index, now, on = inputs
        level = now.at.each(len(keys))
        noise = draw_noise(keys, index + 1, shape)
        spent = log_ratio = jnp.zeros(keys.shape)
        change: Latents | None = None
        if compare and predict_change is not None:
            base, change = predict_change(lora, x, level, condition)
            change = change if on is None else jnp.where(on, change, 0.0)
            output = base + change
        else:
            output = policy_or_base(predict, lora, x, level, condition, on)
            if compare:
                change = output - predict(None, x, level, condition)
        if change is not None:
            delta = now.mean_o / now.sigma * change
            spent = jnp.square(delta).sum(across) / 2
            log_ratio = -spent - (delta * noise).sum(across)
        return now.mean(output, x) + now.sigma * noise, (spent, log_ratio)

    steps = (jnp.arange(chain.num_steps), chain, None if active is None else jnp.asarray(active))
    latents, (spent, log_ratio) = jax.lax.scan(step, draw_noise(keys, 0, shape), steps)
    return Paths(latents, spent.T, log_ratio.sum(axis=0))
