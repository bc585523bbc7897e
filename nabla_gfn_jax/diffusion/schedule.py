"""The discrete noise schedule of Stable Diffusion and the Gaussian step x → y between two of its times.

A step goes from timestep t to the next, t', and is

    y ~ N(μ, σ²),   μ = √ᾱ' x̂ + √(1 − ᾱ' − σ²) ε,   x̂ = (x − √(1−ᾱ) ε) / √ᾱ
    σ² = η² (1−ᾱ')/(1−ᾱ) (1 − ᾱ/ᾱ')

which is DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12) with η = 0 and DDPM with η = 1. First-order SDE-DPM-Solver++
(Lu et al. 2022, arXiv 2211.01095, eq. 18) is the very same step: with h the step in log(√ᾱ/√(1−ᾱ)), its
σ² = (1−ᾱ')(1 − e^{−2h}) is η = 1's, and its mean too. The two samplers differ in the times they visit.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Latents

Sampler = Literal["ddpm", "sde_dpm_solver"]

# Stable Diffusion's own scheduler_config.json, as far as it says what is computed.
STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}

# What the sampler implements, by the field's name in diffusers' scheduler_config.json. A missing field stands
# for the value in _DIFFUSERS_DEFAULTS, as it does there.
_SUPPORTED: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
_DIFFUSERS_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "trained_betas": None,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": True,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}


@flax.struct.dataclass
class Schedule:
    """The steps x → y in sampling order (falling t); `schedule[k]` has the leaves of step or steps k."""

    timestep: Int[Array, "*steps"]  # t, the time of x
    next_timestep: Int[Array, "*steps"]  # t', the time of y; 0 at the last step
    alpha_bar: Float[Array, "*steps"]  # ᾱ_t
    alpha_bar_next: Float[Array, "*steps"]  # ᾱ_t'; at t' = 0 it is ᾱ[0] < 1, so σ > 0
    sigma: Float[Array, "*steps"]  # standard deviation of y given x

    def __getitem__(self, index: Any) -> "Schedule":
        return jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def num_steps(self) -> int:
        return self.timestep.shape[0]


def alphas_cumprod(config: Mapping[str, Any]) -> Float[Array, "1000"]:
    """ᾱ[0..999] from a scheduler_config.json's `beta_start`, `beta_end` and `beta_schedule`, float32.

    Raises:
        UserError: a field is missing or has a value this sampler does not implement.
    """
    return jnp.asarray(_alphas_cumprod(config), jnp.float32)


def make_schedule(config: Mapping[str, Any], num_steps: int, eta: float = 1.0, sampler: Sampler = "ddpm") -> Schedule:
    """The `num_steps` steps of a sampler on the noise schedule described by diffusers' `scheduler_config.json`.

    Args:
        config: contents of scheduler/scheduler_config.json (Stable Diffusion's fields; others are ignored).
        num_steps: 1 to 999.
        eta: 1 for DDPM, 0 for deterministic DDIM (σ = 0: no scores, so sampling only).
        sampler: "ddpm": times in equal steps Δ = 1000 // num_steps up from 1, diffusers' `leading` spacing with offset
            1. "sde_dpm_solver": from 999 in equal steps to 0, its `linspace` spacing, and to the least noise of the
            schedule at last (`final_sigmas_type="sigma_min"`). Either ends at ᾱ[0] < 1, so the last σ > 0.

    Raises:
        UserError: an argument is out of range or a field has a value this sampler does not implement.
    """
    alpha_bars = _alphas_cumprod(config)
    if not 1 <= num_steps < len(alpha_bars):
        raise UserError(f"num_steps is {num_steps}; choose 1 to {len(alpha_bars) - 1}")
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; choose 0 (DDIM) to 1 (DDPM)")
    if sampler not in get_args(Sampler):
        raise UserError(f"sampler is {sampler!r}; choose one of {', '.join(get_args(Sampler))}")
    if sampler == "ddpm":
        spacing = len(alpha_bars) // num_steps
        timestep = np.arange(num_steps)[::-1] * spacing + 1
        next_timestep = np.maximum(timestep - spacing, 0)
    else:
        times = np.linspace(len(alpha_bars) - 1, 0, num_steps + 1).round().astype(int)
        timestep, next_timestep = times[:-1], times[1:]
    alpha_bar, alpha_bar_next = alpha_bars[timestep], alpha_bars[next_timestep]
    variance = eta**2 * (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    return Schedule(
        timestep=jnp.asarray(timestep, jnp.int32),
        next_timestep=jnp.asarray(next_timestep, jnp.int32),
        alpha_bar=jnp.asarray(alpha_bar, jnp.float32),
        alpha_bar_next=jnp.asarray(alpha_bar_next, jnp.float32),
        sigma=jnp.asarray(np.sqrt(variance), jnp.float32),
    )


def expand(coefficient: Float[Array, "*batch"], like: Latents) -> Float[Array, "..."]:
    """A scalar as it is; a (B,) array as (B, 1, …, 1), to multiply `like` sample by sample."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - 1)) if coefficient.ndim else coefficient


def clean_prediction(eps: Latents, x: Latents, alpha_bar: Float[Array, "*batch"]) -> Latents:
    """x̂ = (x − √(1−ᾱ) ε) / √ᾱ, the clean latent that the noise prediction implies; ᾱ: () or (B,)."""
    alpha_bar = expand(alpha_bar, x)
    return (x - jnp.sqrt(1 - alpha_bar) * eps) / jnp.sqrt(alpha_bar)


def step_mean(eps: Latents, x: Latents, step: Schedule) -> Latents:
    """μ = √ᾱ' x̂ + √(1 − ᾱ' − σ²) ε, the mean of y given x; `step`: leaves () or (B,)."""
    alpha_bar_next, sigma = expand(step.alpha_bar_next, x), expand(step.sigma, x)
    direction = jnp.sqrt(1 - alpha_bar_next - sigma**2) * eps
    return jnp.sqrt(alpha_bar_next) * clean_prediction(eps, x, step.alpha_bar) + direction


def _alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    for field, supported in _SUPPORTED.items():
        value = config.get(field, _DIFFUSERS_DEFAULTS[field])
        if value != supported:
            raise UserError(f"scheduler_config.json: {field} is {value!r}; only {supported!r} is supported")
    for field in ("beta_start", "beta_end"):
        if field not in config:
            raise UserError(f"scheduler_config.json: {field} is missing; Stable Diffusion's files state it")
    root_betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000)
    return np.cumprod(1 - root_betas**2)
