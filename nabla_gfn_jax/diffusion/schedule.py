"""The discrete noise schedule of Stable Diffusion, and the times that each sampler visits."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.errors import UserError

Sampler = Literal["ddpm", "ddpm_early", "sde_dpm_solver"]

# The fields of Stable Diffusion's scheduler_config.json that affect the result.
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

# diffusers' defaults for the fields of the noise schedule. The other fields of a scheduler_config.json belong to the
# sampler that it names, which is not used.
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
_SCHEDULES = ("linear", "scaled_linear")


def alphas_cumprod(config: Mapping[str, Any]) -> Float[np.ndarray, "1000"]:
    """ᾱ[0..999] of the noise schedule in a scheduler_config.json, in float64. The sampler that it names does not
    matter.

    With `rescale_betas_zero_snr`, √ᾱ is shifted and scaled so that ᾱ[999] = 0 and ᾱ[0] is unchanged (Lin et al. 2024,
    arXiv 2305.08891, algorithm 1).

    Raises:
        UserError: a field is missing or has a value that is not implemented.
    """
    said = _DEFAULTS | dict(config)
    if said["num_train_timesteps"] != 1000:
        raise UserError(_unsupported("num_train_timesteps", said["num_train_timesteps"], "1000"))
    try:
        betas = np.asarray(_betas(said), np.float64)
    except (TypeError, ValueError, OverflowError):
        betas = np.zeros(0)
    if betas.shape != (1000,) or not ((betas > 0) & (betas < 1)).all():
        raise UserError("scheduler_config.json: the betas are not 1000 numbers between 0 and 1; it is damaged")
    signal = np.cumprod(1 - betas)
    if not said["rescale_betas_zero_snr"]:
        return signal
    root = np.sqrt(signal)
    rescaled: np.ndarray = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return rescaled


def _betas(said: Mapping[str, Any]) -> Any:
    if said["trained_betas"] is not None:
        return said["trained_betas"]
    for field in ("beta_start", "beta_end"):
        if field not in said:
            raise UserError(f"scheduler_config.json: {field} is missing; Stable Diffusion's files state it")
        if type(said[field]) not in (int, float) or not 0 < said[field] < 1:
            raise UserError(_unsupported(field, said[field], "a number between 0 and 1"))
    if said["beta_schedule"] not in _SCHEDULES:
        raise UserError(_unsupported("beta_schedule", said["beta_schedule"], " or ".join(_SCHEDULES)))
    power = 2 if said["beta_schedule"] == "scaled_linear" else 1
    return np.linspace(said["beta_start"] ** (1 / power), said["beta_end"] ** (1 / power), 1000) ** power


def _unsupported(field: str, value: Any, supported: str) -> str:
    return f"scheduler_config.json: {field} is {value!r}; only {supported} is supported"


def visited_times(
    sampler: Sampler, num_steps: int, *, from_the_last: bool = False
) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
    """The times t of x and t' of y of each step, (T,) each, decreasing; the last t' is 0.

    "ddpm": the times are 1, 1 + Δ, 1 + 2Δ, … with Δ = 1000 // num_steps (diffusers' `leading` spacing with offset 1).
    "ddpm_early": DDPM with three quarters of its steps in the noisier half of the times, evenly in each half; 4 to 333
    steps. That is where a path is decided (docs/credit.md).
    "sde_dpm_solver": equal steps from 999 to 0 (diffusers' `linspace` spacing with `final_sigmas_type="sigma_min"`).
    All end at ᾱ[0] < 1, so the last σ > 0.

    With `from_the_last`, both forms of DDPM start at 999; "ddpm" goes down in steps of 1000 / num_steps (diffusers'
    `trailing` spacing). A schedule that ends without signal needs this, because its state is pure noise only at time
    999.

    Raises:
        UserError: there is no such sampler, or `num_steps` is not in its range.
    """
    last = STABLE_DIFFUSION["num_train_timesteps"] - 1
    if not 1 <= num_steps <= last:
        raise UserError(f"num_steps is {num_steps}; choose 1 to {last}")
    if sampler not in get_args(Sampler):
        raise UserError(f"sampler is {sampler!r}; choose one of {', '.join(get_args(Sampler))}")
    if sampler == "ddpm_early":
        if not 4 <= num_steps <= 333:
            raise UserError(f"num_steps is {num_steps}; the sampler ddpm_early can take 4 to 333")
        early = round(0.75 * num_steps)
        ends = [np.linspace(last + 2, 501, early + 1), np.linspace(501, 1, num_steps - early + 1)]
        # Each half without its noisier end, or with it, shifted so that the first time is 999.
        times = np.concatenate([half[:-1] - 2 for half in ends] if from_the_last else [half[1:] for half in ends])
        times = times.round().astype(int)
        return times, np.append(times[1:], 0)
    if sampler == "ddpm" and from_the_last:
        times = np.round((last + 1) * np.arange(num_steps, 0, -1) / num_steps).astype(int) - 1
        return times, np.maximum(times - (last + 1) // num_steps, 0)
    if sampler == "ddpm":
        spacing = (last + 1) // num_steps
        times = np.arange(num_steps)[::-1] * spacing + 1
        return times, np.maximum(times - spacing, 0)
    times = np.linspace(last, 0, num_steps + 1).round().astype(int)
    return times[:-1], times[1:]
