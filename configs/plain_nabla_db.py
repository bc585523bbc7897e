"""Plain ∇-DB (arXiv 2412.07775), whose target does not contain the base model, on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=plain_nabla_db
    python -m nabla_gfn_jax.train --config=plain_nabla_db:emoji     on the emoji model, minutes on 2 cores

The configs are `aesthetic.py`, which has the paper's numbers, and `emoji.py` with β = 8, with this algorithm. The
target is R^β alone. Expected result: the reward rises, and the images drift away from the base model's, as the paper
shows; this is the reason for the residual form. Time and memory on an accelerator have not been measured; an update
costs about 1 % less than that of residual ∇-DB. `:emoji` has not been compared yet.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with plain ∇-DB as the algorithm; with the variant `emoji`, `emoji.py` with plain ∇-DB."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "plain_nabla_db",
            "beta": 8.0 if variant else c.algorithm.beta,
            "output_regularisation": 0.0 if variant else c.algorithm.output_regularisation,
            "gamma": "alpha_bar",
            "variance_weighted": bool(variant),
            "transition_fraction": 0.1,
            "uneven_bins": False,
        }
    )
    c.training.clip = 1.0
    return c
