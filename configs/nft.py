"""DiffusionNFT (arXiv 2509.16117) on Stable Diffusion 1.5 towards the aesthetic score.

    python -m nabla_gfn_jax.train --config=nft
    python -m nabla_gfn_jax.train --config=nft:emoji     on the emoji model, minutes on 2 cores

From the authors: b = 1, advantages clipped at 5, β₀ = .0001, AdamW with a learning rate of 3e-4. They finetune Stable
Diffusion 3.5 without guidance, with 24 samples per prompt in an epoch, and sample with a running mean of the LoRA. Time
and memory on an accelerator have not been measured. `:emoji` has not been compared yet.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with DiffusionNFT as the algorithm; with the variant `emoji`, `emoji.py` with DiffusionNFT."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "nft",
            "mixing": 1.0,
            "noisings": 10,
            "advantage_clip": 5.0,
            "buffer_size": 32,
            "min_count": 16,
            "base_regularisation": 1e-4,
            "output_regularisation": 0.0,
        }
    )
    c.training.clip = 1.0
    c.training.learning_rate = 3e-4
    return c
