"""Residual DB: detailed balance relative to the base model's steps, so that the target is P_base R^β.

    Δ = log F(x) + log p_θ(y|x) − log p_#(y|x) − log F(y)      (scalar_db.py, p₀ = p_#)

This is the balance equation of p_θ divided by that of p_#; their backward densities are the same and cancel. Residual
∇-DB (Zhang et al., ICLR 2025, arXiv 2412.07775) is its gradient. γ = 1 by default, as in DAG-DB; in residual ∇-DB it is
ᾱ.

With δ = (μ_θ − μ_#)/σ and z = (y − μ_#)/σ, the two log densities differ by δ·z − ‖δ‖²/2. This form avoids subtracting
two large numbers.
"""

from dataclasses import dataclass

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.algorithms.scalar_db import ScalarDB
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.typing import Latents, PerSample


@dataclass(frozen=True, kw_only=True)
class ResidualDB(ScalarDB):
    """Residual detailed balance with a scalar flow F."""

    def log_ratio(self, model: Model, step: Chain, output: Latents, now: Transition) -> PerSample:
        base = model.predict(None, now.x, step.at, now.prompt_id)
        delta = expand(step.mean_o / step.sigma, output) * (output - base)
        noise = (now.y - step.mean(base, now.x)) / expand(step.sigma, output)
        return (delta * (noise - 0.5 * delta)).reshape(len(output), -1).mean(axis=1)
