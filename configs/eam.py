"""Efficient adjoint matching (arXiv 2605.11480), in our derivation, on Stable Diffusion 1.5.

    python -m nabla_gfn_jax.train --config=eam
    python -m nabla_gfn_jax.train --config=eam:emoji     on the emoji model, minutes on 2 cores

`aesthetic.py` and `emoji.py` at β = 8, with this algorithm; the numbers of the paper, which finetunes Stable Diffusion
3.5 as a flow, are not these. An update needs no pull-back through the network but its own. Time and memory on an
accelerator: not measured. `:emoji`: not yet compared; docs/exact_target.md has it in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with EAM in place of the algorithm, or, as `emoji`, `emoji.py`."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    beta = 8.0 if variant else c.algorithm.beta
    c.algorithm = ConfigDict({"name": "eam", "beta": beta, "noisings": 6, "output_regularisation": 0.0})
    c.training.clip = 1.0
    c.training.learning_rate = 3e-4
    return c
