"""Efficient adjoint matching (arXiv 2605.11480), as derived in algorithms/eam.py, on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=eam
    python -m nabla_gfn_jax.train --config=eam:emoji     on the emoji model, minutes on 2 cores

The configs are `aesthetic.py`, and `emoji.py` with β = 8, with this algorithm. The paper has other numbers, because it
finetunes Stable Diffusion 3.5 as a flow. An update needs no gradient through the network except that of the loss. Time
and memory on an accelerator have not been measured. `:emoji` has not been compared yet; docs/exact_target.md has
results in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with EAM as the algorithm; with the variant `emoji`, `emoji.py` with EAM."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    beta = 8.0 if variant else c.algorithm.beta
    c.algorithm = ConfigDict({"name": "eam", "beta": beta, "noisings": 6, "output_regularisation": 0.0})
    c.training.clip = 1.0
    c.training.learning_rate = 3e-4
    return c
