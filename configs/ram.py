"""RAM, reinforce adjoint matching (arXiv 2605.10759), on Stable Diffusion 1.5 towards the aesthetic score.

    python -m nabla_gfn_jax.train --config=ram
    python -m nabla_gfn_jax.train --config=ram:emoji     on the emoji model, minutes on 2 cores

From the paper: 8 noised copies of each sample at times of density ∝ t, a learning rate of 3e-4, and no clip of the
gradient. The paper finetunes Stable Diffusion 3.5 with 24 samples per prompt and multiplies normalised advantages by
100 to 1000; here β multiplies log R itself. Time and memory on an accelerator have not been measured. `:emoji` (β = 8,
no negative weights) has not been compared yet; docs/exact_target.md has results in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with RAM as the algorithm; with the variant `emoji`, `emoji.py` with RAM."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "ram",
            "beta": 8.0 if variant else c.algorithm.beta,
            "baseline": "least" if variant else "mean",
            "advantage_clip": float("inf"),
            "buffer_size": 32,
            "min_count": 16,
            "noisings": 8,
            "time_power": 1.0,
            "output_regularisation": 0.0,
        }
    )
    c.training.clip = float("inf")
    c.training.learning_rate = 3e-4
    return c
