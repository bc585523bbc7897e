"""The chain of Gaussian steps from noise to a sample, linear in the state x and in the network's output o.

A step goes from x at signal ᾱ to y at signal ᾱ':

    y ~ N(μ, σ²),   μ = √ᾱ' x̂ + √(1 − ᾱ' − σ²) ε,   σ² = η² (1−ᾱ')/(1−ᾱ) (1 − ᾱ/ᾱ')

This is DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12) with η = 0 and DDPM with η = 1. First-order SDE-DPM-Solver++
(Lu et al. 2022, arXiv 2211.01095, eq. 18) is the same step as η = 1: with h the step in log(√ᾱ/√(1−ᾱ)), its
σ² = (1−ᾱ')(1 − e^{−2h}) and its mean are equal to those above. The two samplers differ in the times that they visit.

The prediction type of a network is a pair of linear maps from (x, o) to the clean sample x̂ and the noise ε:

    noise               x̂ = (x − √(1−ᾱ) o)/√ᾱ      ε = o                  (Ho et al. 2020, arXiv 2006.11239)
    velocity            x̂ = √ᾱ x − √(1−ᾱ) o        ε = √(1−ᾱ) x + √ᾱ o    (Salimans & Ho 2022, arXiv 2202.00512)
    rectified flow      x̂ = c x − s o              ε = c x + (1−s) o      (Liu et al. 2023, arXiv 2209.03003)

The state of a rectified flow at time s is (1−s) x₀ + s ε. Divided by c = √((1−s)² + s²), it is variance preserving with
ᾱ = (1−s)²/c². The quotient is the x of the chain; the network sees c x. With η = 1, the steps are those of the
memoryless process that finetuning needs (Domingo-Enrich et al. 2025, arXiv 2409.08861).

All coefficients are computed on the host in float64 and rounded once, because their differences near ᾱ = 1 lose digits
in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from nabla_gfn_jax.diffusion.schedule import Sampler, alphas_cumprod, visited_times
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Latents

_Numbers = Float[np.ndarray, " times"]


@flax.struct.dataclass
class Level:
    """A noise level: the network's inputs there, and the linear maps from its output o to x̂ and ε.

    The leaves have shape () or leading axes.
    """

    time: Num[Array, "*steps"]  # the network's time input
    input_scale: Float[Array, "*steps"]  # the network sees input_scale · x
    signal: Float[Array, "*steps"]  # ᾱ: x = √ᾱ · clean + √(1−ᾱ) · noise
    clean_x: Float[Array, "*steps"]  # x̂ = clean_x · x + clean_o · o
    clean_o: Float[Array, "*steps"]
    noise_x: Float[Array, "*steps"]  # ε = noise_x · x + noise_o · o
    noise_o: Float[Array, "*steps"]

    def __getitem__(self, index: Any) -> "Level":
        return jax.tree.map(lambda leaf: leaf[index], self)

    def clean(self, o: Latents, x: Latents) -> Latents:
        """x̂, the clean sample predicted by the output, (B, …)."""
        return expand(self.clean_x, x) * x + expand(self.clean_o, o) * o

    def noise(self, o: Latents, x: Latents) -> Latents:
        """ε, the noise predicted by the output, (B, …)."""
        return expand(self.noise_x, x) * x + expand(self.noise_o, o) * o

    def each(self, batch: int) -> "Level":
        """Repeats a level with leaves () for every sample of a batch: leaves (B,)."""
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch,)), self)


@flax.struct.dataclass
class Chain:
    """The steps x → y in sampling order, leaves (T,). `chain[k]` is step k; k may also be a slice or an array."""

    at: Level  # of x
    to: Level  # of y
    mean_x: Float[Array, "*steps"]  # μ = mean_x · x + mean_o · o
    mean_o: Float[Array, "*steps"]
    sigma: Float[Array, "*steps"]  # standard deviation of y given x
    noising_scale: Float[Array, "*steps"]  # the forward process: x given y ~ N(noising_scale · y, noising_sigma²)
    noising_sigma: Float[Array, "*steps"]

    def __getitem__(self, index: Any) -> "Chain":
        return jax.tree.map(lambda leaf: leaf[index], self)

    @property
    def num_steps(self) -> int:
        """T, the number of steps."""
        return self.sigma.shape[0]

    def mean(self, o: Latents, x: Latents) -> Latents:
        """μ, the mean of y given x."""
        return expand(self.mean_x, x) * x + expand(self.mean_o, o) * o

    def log_density(self, y: Latents, o: Latents, x: Latents) -> Float[Array, " batch"]:
        """log N(y; μ, σ²), (B,), as a mean over latent elements, without the terms that depend on σ only."""
        error = (y - self.mean(o, x)) / expand(self.sigma, x)
        return -0.5 * jnp.square(error).reshape(len(error), -1).mean(axis=1)


def expand(coefficient: Float[Array, "*batch"], like: Latents) -> Float[Array, "..."]:
    """Returns a scalar unchanged and a (B,) array as (B, 1, …, 1), to multiply `like` (B, …) sample by sample."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - 1)) if coefficient.ndim else coefficient


class _Levels(NamedTuple):
    """`Level` in float64 on the host."""

    time: np.ndarray
    input_scale: _Numbers
    signal: _Numbers
    clean_x: _Numbers
    clean_o: _Numbers
    noise_x: _Numbers
    noise_o: _Numbers


def noise_levels(time: np.ndarray, signal: _Numbers) -> _Levels:
    """The levels of a network that predicts ε."""
    one, zero = np.ones_like(signal), np.zeros_like(signal)
    return _Levels(time, one, signal, signal**-0.5, -((1 / signal - 1) ** 0.5), zero, one)


def velocity_levels(time: np.ndarray, signal: _Numbers) -> _Levels:
    """The levels of a network that predicts v = √ᾱ ε − √(1−ᾱ) x₀."""
    one, root, other = np.ones_like(signal), signal**0.5, (1 - signal) ** 0.5
    return _Levels(time, one, signal, root, -other, other, root)


def flow_levels(time: np.ndarray, s: _Numbers) -> _Levels:
    """The levels of a network that predicts a rectified flow's velocity ε − x₀ at s."""
    scale = np.hypot(1 - s, s)
    return _Levels(time, scale, ((1 - s) / scale) ** 2, scale, -s, scale, 1 - s)


_PREDICTIONS: dict[str, Callable[[np.ndarray, _Numbers], _Levels]] = {
    "epsilon": noise_levels,
    "v_prediction": velocity_levels,
}


def stable_diffusion_chain(
    config: Mapping[str, Any], num_steps: int, eta: float = 1.0, sampler: Sampler = "ddpm"
) -> Chain:
    """The `num_steps` steps of a sampler on the noise schedule in diffusers' `scheduler_config.json`.

    Args:
        config: contents of scheduler/scheduler_config.json. Its fields about a sampler are ignored.
        num_steps: 1 to 999.
        eta: 1 for DDPM, 0 for deterministic DDIM. With 0, σ = 0 and steps have no density, so only sampling is
        possible.
        sampler: determines the times that are visited, see `visited_times`.

    Raises:
        UserError: an argument is out of range or the noise schedule is not implemented.
    """
    kind = config.get("prediction_type", "epsilon")
    if not isinstance(kind, str) or kind not in _PREDICTIONS:
        raise UserError(
            f"scheduler_config.json: prediction_type {kind!r} is not supported; {' or '.join(_PREDICTIONS)} is"
        )
    signal = alphas_cumprod(config)
    if signal[-1] == 0 and kind == "epsilon":
        raise UserError(
            "scheduler_config.json: with rescale_betas_zero_snr the prediction_type cannot be 'epsilon', because ε "
            "does not determine the image where there is no signal; 'v_prediction' can be used"
        )
    times = visited_times(sampler, num_steps, from_the_last=bool(signal[-1] == 0))
    at, to = (_PREDICTIONS[kind](t.astype(np.int32), signal[t]) for t in times)
    return make_chain(at, to, eta)


def rectified_flow_chain(
    num_steps: int, *, end: float = 0.001, shift: float = 1.0, eta: float = 1.0, time_scale: float = 1000.0
) -> Chain:
    """Steps from s = 1 (noise) to `end` of a rectified flow.

    Args:
        num_steps: 1 or more.
        end: the last s, in (0, 1). It is above 0 so that σ > 0 and the last step has a density.
        shift: above 0; maps times as s ↦ shift·s / (1 + (shift − 1) s) (Esser et al. 2024, arXiv 2403.03206, eq. 23).
        eta: 1 for the memoryless process, 0 for its ordinary differential equation.
        time_scale: the network's time input is time_scale · s.

    Raises:
        UserError: an argument is out of range.
    """
    if num_steps < 1 or not 0.0 < end < 1.0 or shift <= 0.0:
        raise UserError(
            f"num_steps = {num_steps}, end = {end}, shift = {shift}; num_steps must be 1 or more, end between 0 and 1, "
            "shift above 0"
        )
    s = np.linspace(1.0, end, num_steps + 1)
    s = shift * s / (1 + (shift - 1) * s)
    return make_chain(flow_levels(time_scale * s[:-1], s[:-1]), flow_levels(time_scale * s[1:], s[1:]), eta)


def make_chain(at: _Levels, to: _Levels, eta: float) -> Chain:
    """The steps from the levels `at` to the levels `to`, of rising signal. Raises `UserError` unless 0 ≤ eta ≤ 1."""
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; choose 0 (DDIM) to 1 (DDPM)")
    ratio = at.signal / to.signal
    variance = eta**2 * (1 - to.signal) / (1 - at.signal) * (1 - ratio)
    on_clean, on_noise = to.signal**0.5, np.maximum(1 - to.signal - variance, 0.0) ** 0.5
    host: Any = Chain(
        at=Level(**at._asdict()),
        to=Level(**to._asdict()),
        mean_x=on_clean * at.clean_x + on_noise * at.noise_x,
        mean_o=on_clean * at.clean_o + on_noise * at.noise_o,
        sigma=variance**0.5,
        noising_scale=ratio**0.5,
        noising_sigma=(1 - ratio) ** 0.5,
    )
    chain: Chain = jax.tree.map(jnp.asarray, host)
    return chain
