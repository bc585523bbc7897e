"""AWM, advantage weighted matching (arXiv 2509.25050), on Stable Diffusion 1.5 towards the aesthetic score.

    python -m nabla_gfn_jax.train --config=awm
    python -m nabla_gfn_jax.train --config=awm:emoji     on the emoji model, minutes on 2 cores

The authors': six noisings of each sample, ratio clip 1, advantages clipped at 5 and divided by it, λ = 1, β₀ = .003,
AdamW with a learning rate of 3e-4, two updates an epoch. They finetune Stable Diffusion 3.5 without guidance, with 24
samples of a prompt in an epoch. Time and memory on an accelerator: not measured. `:emoji`: not yet compared.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with AWM in place of the algorithm, or, as `emoji`, `emoji.py`."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "awm",
            "noisings": 6,
            "ratio_clip": 1.0,
            "advantage_clip": 5.0,
            "buffer_size": 32,
            "min_count": 16,
            "base_regularisation": 0.003,
            "output_regularisation": 1.0,
        }
    )
    c.training.clip = 1.0
    c.training.learning_rate = 3e-4
    c.training.updates_per_epoch = 2
    return c
