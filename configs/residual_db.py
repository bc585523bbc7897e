"""Residual DB, with a scalar flow and no gradient of the reward, on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=residual_db
    python -m nabla_gfn_jax.train --config=residual_db:emoji     on the emoji model, minutes on 2 cores

The configs are `aesthetic.py`, with the numbers of the paper on residual ∇-DB, and `emoji.py` with β = 8, with this
algorithm. `correction` describes the UNet of log F, whose output is averaged over the latent. Time and memory on an
accelerator have not been measured. `:emoji` has not been compared yet; docs/exact_target.md has results in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with residual DB as the algorithm; with the variant `emoji`, `emoji.py` with residual DB."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "residual_db",
            "beta": 8.0 if variant else c.algorithm.beta,
            "gamma": "one",
            "transition_fraction": 0.1,
            "uneven_bins": False,
            "output_regularisation": 0.0 if variant else c.algorithm.output_regularisation,
        }
    )
    c.training.clip = 1.0
    return c
