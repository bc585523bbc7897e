"""Sampling that keeps only the end of each path and its divergence from the base model's path distribution."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange, draw_noise, policy_or_base
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys


class Paths(NamedTuple):
    """The ends of sampled paths and their nats (`metrics.certificate`), which are zero if the base model sampled."""

    latents: Latents
    spent: Float[Array, "batch steps"]  # ‖μ_θ − μ_#‖²/(2σ²) at each step's state, summed over elements
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
    along_base: bool = False,
    active: Bool[np.ndarray, " steps"] | None = None,
    predict_change: PredictChange | None = None,
) -> Paths:
    """Samples the same numbers as `diffusion.sampler.sample`, but keeps one state in memory instead of all.

    With δ = (μ_θ − μ_#)/σ and y = μ_θ + σ z, log p_#(y|x) − log p_θ(y|x) = −‖δ + z‖²/2 + ‖z‖²/2 = −‖δ‖²/2 − δ·z. On the
    base model's path, y = μ_# + σ z, it is ‖z − δ‖²/2 − ‖z‖²/2 = ‖δ‖²/2 − δ·z.

    Args:
        predict: the network.
        lora: the policy's LoRA; None for the base model.
        chain: T steps; with `nats`, every σ must be above 0.
        keys: (B,), one per sample.
        shape: the shape of one latent.
        condition: leaves with leading axis B.
        nats: also evaluate the base model at each state, which doubles the cost.
        along_base: the paths are the base model's, and the policy is evaluated at their states. This needs `nats`.
        active: (T,), the steps that the policy takes; the base model takes the others. None: all steps.
        predict_change: evaluates policy and base model as one network. δ is then more precise in half precision, and
            the samples agree with the sampler's up to rounding.
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
            output = base if along_base else base + change
        else:
            output = policy_or_base(predict, lora, x, level, condition, on)
            if compare:
                base = predict(None, x, level, condition)
                output, change = base if along_base else output, output - base
        if change is not None:
            delta = now.mean_o / now.sigma * change
            spent = jnp.square(delta).sum(across) / 2
            log_ratio = (spent if along_base else -spent) - (delta * noise).sum(across)
        return now.mean(output, x) + now.sigma * noise, (spent, log_ratio)

    steps = (jnp.arange(chain.num_steps), chain, None if active is None else jnp.asarray(active))
    latents, (spent, log_ratio) = jax.lax.scan(step, draw_noise(keys, 0, shape), steps)
    return Paths(latents, spent.T, log_ratio.sum(axis=0))
