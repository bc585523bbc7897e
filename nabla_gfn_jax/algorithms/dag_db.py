"""DAG-DB, diffusion alignment with GFlowNet (Zhang et al. 2024, arXiv 2406.00633).

    Δ = log F(x) + log p_θ(y|x) − log q(x|y) − log F(y)        (scalar_db.py, p₀ = q)

The noising kernel q(x|y) is the backward policy, so the target is R^β *alone*. Training starts from the base model, but
only the term with λ = 1 keeps the policy near it. If meaningless images also get a high reward, the policy drifts to
them.

As in the authors' program, the guess is not weighted (γ = 1). Their program trains on all steps of a trajectory with a
learning rate of 3·10⁻⁴. Its reward_exp is 100, which is β = 100 D with D latent elements; it grows linearly to this
value over the first half of the run.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from nabla_gfn_jax.algorithms.base import LAMBDA, Model
from nabla_gfn_jax.algorithms.scalar_db import ScalarDB
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, PerSample


@dataclass(frozen=True, kw_only=True)
class DagDB(ScalarDB):
    """Detailed balance with the noising kernel as the backward policy."""

    output_regularisation: float = option(1.0, LAMBDA, minimum=0)

    def log_ratio(self, model: Model, step: Chain, output: Latents, now: Transition) -> PerSample:
        back = (now.x - expand(step.noising_scale, now.y) * now.y) / expand(step.noising_sigma, now.y)
        backward = -0.5 * jnp.square(back).reshape(len(back), -1).mean(axis=1) - jnp.log(step.noising_sigma)
        return step.log_density(now.y, output, now.x) - jnp.log(step.sigma) - backward
