"""Residual ∇-DB with the terminal credit (Reward Score Matching, arXiv 2604.17415), on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=terminal
    python -m nabla_gfn_jax.train --config=terminal:emoji     on the emoji model, minutes on 2 cores

The configs are `aesthetic.py` and `emoji.py` with another credit: γ_t = ᾱ times the reward's gradient at the end of the
path, without a pull-back. Time and memory on an accelerator have not been measured. `:emoji` (β = 8) has not been
compared yet; docs/exact_target.md has results in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with the terminal credit; with the variant `emoji`, `emoji.py` with the terminal credit."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm.credit = "terminal"
    c.algorithm.variance_weighted = True
    if variant:
        c.algorithm.beta = 8.0
    return c
