"""Residual DB, with a scalar flow and no gradient of the reward, on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=residual_db
    python -m nabla_gfn_jax.train --config=residual_db:emoji     on the emoji model, minutes on 2 cores

`aesthetic.py`, the paper of residual ∇-DB's numbers, and `emoji.py` at β = 8, with this algorithm; `correction` is the
UNet of log F, averaged over the latent. Time and memory on an accelerator: not measured. `:emoji`: not yet compared;
docs/exact_target.md has it in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with residual DB in place of the algorithm, or, as `emoji`, `emoji.py`."""
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
