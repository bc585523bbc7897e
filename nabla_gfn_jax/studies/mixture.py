"""A Gaussian mixture in the plane, for which all diffusion quantities have closed forms, and distances to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ndtr

from nabla_gfn_jax.diffusion.chain import Chain

Points = Float[Array, "batch 2"]


class Mixture(NamedTuple):
    """A mixture of isotropic Gaussians with the same standard deviation."""

    weights: Float[np.ndarray, " modes"]
    means: Float[np.ndarray, "modes 2"]
    std: float

    def tilted(self, k: Float[np.ndarray, "2"]) -> "Mixture":
        """The density ∝ p(x) exp(k·x), which is a mixture whose modes are shifted by std² k and reweighted."""
        log_weights = np.log(self.weights) + self.means @ k
        weights = np.exp(log_weights - log_weights.max())
        return Mixture(weights / weights.sum(), self.means + self.std**2 * k, self.std)

    def log_z(self, k: Float[np.ndarray, "2"]) -> float:
        """log E[exp(k·x)]."""
        log_weights = np.log(self.weights) + self.means @ k
        largest = log_weights.max()
        return float(largest + np.log(np.exp(log_weights - largest).sum()) + self.std**2 * (k @ k) / 2)

    def log_density(self, x: Points) -> Float[Array, " batch"]:
        """log p(x)."""
        squares = ((x[:, None] - jnp.asarray(self.means, jnp.float32)[None]) ** 2).sum(-1)
        logits = jnp.log(jnp.asarray(self.weights, jnp.float32))[None] - squares / (2 * self.std**2)
        return jax.nn.logsumexp(logits, axis=1) - float(np.log(2 * np.pi * self.std**2))

    def noise_prediction(self, x: Points, signal: Float[Array, " batch"]) -> Points:
        """E[ε | x = √ᾱ x₀ + √(1−ᾱ) ε] = −√(1−ᾱ) ∇ log p(x), the output of a perfectly trained network."""
        root, noise = jnp.sqrt(signal)[:, None], jnp.sqrt(1 - signal)[:, None]
        responsibility, offsets = self._responsibilities(x, root, noise)
        variance = root**2 * self.std**2 + noise**2
        return noise * (responsibility[..., None] * offsets).sum(1) / variance

    def velocity(self, x: Points, s: Float[Array, " batch"]) -> Points:
        """E[ε − x₀ | x = (1−s) x₀ + s ε], the velocity field of a rectified flow."""
        scale, noise = 1 - s[:, None], s[:, None]
        responsibility, offsets = self._responsibilities(x, scale, noise)
        variance = scale**2 * self.std**2 + noise**2
        slope = (noise - scale * self.std**2) / variance
        of_mode = slope[..., None] * offsets - jnp.asarray(self.means, jnp.float32)[None]
        return (responsibility[..., None] * of_mode).sum(1)

    def _responsibilities(
        self, x: Points, scale: Float[Array, "batch 1"], noise: Float[Array, "batch 1"]
    ) -> tuple[Float[Array, "batch modes"], Float[Array, "batch modes 2"]]:
        """The posterior probability of each mode given x = scale · x₀ + noise · ε, and x − scale · the mode's mean."""
        offsets = x[:, None, :] - scale[..., None] * jnp.asarray(self.means, jnp.float32)[None]
        variance = scale**2 * self.std**2 + noise**2
        logits = jnp.log(jnp.asarray(self.weights, jnp.float32))[None] - (offsets**2).sum(-1) / (2 * variance)
        return jax.nn.softmax(logits), offsets

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Independent samples, (size, 2)."""
        modes = rng.choice(len(self.weights), size, p=self.weights)
        return self.means[modes] + self.std * rng.normal(size=(size, 2))

    def mean(self) -> Float[np.ndarray, "2"]:
        """E[x]."""
        return self.weights @ self.means

    def nearest_mode(self, points: np.ndarray) -> np.ndarray:
        """The index of the mode whose mean is nearest to each point, (B,)."""
        return ((points[:, None] - self.means) ** 2).sum(-1).argmin(1)


def sampled(data: Mixture, chain: Chain) -> Mixture:
    """The distribution that the chain's steps sample if the network's output is exact for `data`.

    Within a mode, x̂ is linear in x, so the steps are a linear Gaussian recursion for the mode's mean and variance.
    Modes that are far apart keep their weights. With 50 steps, the modes are narrower than those of the data.
    """
    mean, variance = 0.0, 1.0  # the mean as a multiple of the mode's mean
    at, steps = jax.tree.map(lambda a: np.asarray(a, np.float64), (chain.at, chain))
    on_clean = steps.mean_o / at.clean_o  # μ = on_x x + on_clean x̂
    on_x = steps.mean_x - on_clean * at.clean_x
    gain = at.signal**0.5 * data.std**2 / (at.signal * data.std**2 + 1 - at.signal)  # x̂ = m + gain (x − √ᾱ m)
    for k in range(chain.num_steps):
        slope = on_x[k] + on_clean[k] * gain[k]
        mean = slope * mean + on_clean[k] * (1 - gain[k] * at.signal[k] ** 0.5)
        variance = slope**2 * variance + steps.sigma[k] ** 2
    return Mixture(data.weights, mean * data.means, float(variance) ** 0.5)


class Distance(NamedTuple):
    """KL divergences between a policy's samples and a target, in nats."""

    forward: float  # KL(policy ‖ target)
    reverse: float  # KL(target ‖ policy)
    weights: tuple[float, ...]  # share of samples that are nearest to each mode


def distance(points: np.ndarray, target: Mixture, minimum: int = 20) -> Distance:
    """KL in both directions: of the mode weights, plus that of Gaussians fitted to the samples of each mode.

    The modes are far apart, so the KL is that of the weights plus the weighted mean of those within modes (chain rule).
    A mode with fewer than `minimum` samples contributes only through its weight, and counts as at least half a sample.
    """
    modes = target.nearest_mode(points)
    counts = np.bincount(modes, minlength=len(target.weights))
    weights = np.maximum(counts, 0.5) / np.maximum(counts, 0.5).sum()
    forward = float(np.sum(weights * np.log(weights / target.weights)))
    reverse = float(np.sum(target.weights * np.log(target.weights / weights)))
    covariance = target.std**2 * np.eye(2)
    for mode, count in enumerate(counts):
        if count < minimum:
            continue
        mine = points[modes == mode]
        mean, fitted = mine.mean(0), np.cov(mine.T)
        forward += weights[mode] * _gaussian_kl(mean, fitted, target.means[mode], covariance)
        reverse += target.weights[mode] * _gaussian_kl(target.means[mode], covariance, mean, fitted)
    return Distance(forward, reverse, tuple(float(w) for w in counts / len(points)))


def cell_kl(points: np.ndarray, target: Mixture, cell: float = 0.15) -> float:
    """KL(policy ‖ target) of the shares of samples in square cells, with the target's exact shares.

    It makes no assumption about shapes. It is biased upwards by about (occupied cells)/(2·samples), which
    `cell_kl(target.sample(...), target)` measures.
    """
    cells, counts = np.unique(np.floor(points / cell).astype(int), axis=0, return_counts=True)
    shares = counts / len(points)
    edges = cells[:, None, :] * cell - target.means  # (cells, modes, 2)
    inside = _interval(edges / target.std, (edges + cell) / target.std).prod(-1)
    return float(np.sum(shares * np.log(shares / np.maximum(inside @ target.weights, 1e-300))))


def _interval(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Φ(high) − Φ(low), accurate in both tails."""
    return np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))


def _gaussian_kl(mean: np.ndarray, covariance: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray) -> float:
    inverse, offset = np.linalg.inv(covariance_2), mean_2 - mean
    log_ratio = np.linalg.slogdet(covariance_2)[1] - np.linalg.slogdet(covariance)[1]
    return float(0.5 * (np.trace(inverse @ covariance) + offset @ inverse @ offset - len(mean) + log_ratio))
