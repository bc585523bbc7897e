"""The discrete noise schedule of Stable Diffusion, and which of its times a sampler visits."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.errors import UserError

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


def alphas_cumprod(config: Mapping[str, Any]) -> Float[np.ndarray, "1000"]:
    """ᾱ[0..999] from a scheduler_config.json's `beta_start`, `beta_end` and `beta_schedule`, float64.

    Raises:
        UserError: a field is missing or has a value this sampler does not implement.
    """
    for field, supported in _SUPPORTED.items():
        value = config.get(field, _DIFFUSERS_DEFAULTS[field])
        if value != supported:
            raise UserError(f"scheduler_config.json: {field} is {value!r}; only {supported!r} is supported")
    for field in ("beta_start", "beta_end"):
        if field not in config:
            raise UserError(f"scheduler_config.json: {field} is missing; Stable Diffusion's files state it")
    root_betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000)
    return np.cumprod(1 - root_betas**2)


def visited_times(sampler: Sampler, num_steps: int) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
    """The times t of x and t' of y of each step, falling, t' = 0 at the last.

    "ddpm": equal steps Δ = 1000 // num_steps up from 1, diffusers' `leading` spacing with offset 1. "sde_dpm_solver":
    from 999 in equal steps to 0, its `linspace` spacing, and to the least noise of the schedule at last
    (`final_sigmas_type="sigma_min"`). Either ends at ᾱ[0] < 1, so the last σ > 0.

    Raises:
        UserError: there is no such sampler, or `num_steps` is not in 1 to 999.
    """
    last = STABLE_DIFFUSION["num_train_timesteps"] - 1
    if not 1 <= num_steps <= last:
        raise UserError(f"num_steps is {num_steps}; choose 1 to {last}")
    if sampler not in get_args(Sampler):
        raise UserError(f"sampler is {sampler!r}; choose one of {', '.join(get_args(Sampler))}")
    if sampler == "ddpm":
        spacing = (last + 1) // num_steps
        times = np.arange(num_steps)[::-1] * spacing + 1
        return times, np.maximum(times - spacing, 0)
    times = np.linspace(last, 0, num_steps + 1).round().astype(int)
    return times[:-1], times[1:]
