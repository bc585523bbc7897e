"""DDPO with importance sampling (arXiv 2305.13301) on Stable Diffusion 1.5 towards the aesthetic score.

    python -m nabla_gfn_jax.train --config=ddpo
    python -m nabla_gfn_jax.train --config=ddpo:emoji     on the emoji model, minutes on 2 cores

From the paper: 45 animals, 50 steps at guidance 5, 256 samples per epoch, ratio clip 1e-4, advantages per prompt
clipped at 5. From the authors' second program: the learning rate of 3e-4, a LoRA instead of the whole UNet, and the
buffer of 32 rewards per prompt. An epoch's updates evaluate the network 50 times for each trajectory. The ratio
compares two evaluations of the network. In bfloat16 their rounding errors may exceed the clip, so this config computes
in float32. Time and memory on an accelerator have not been measured. `:emoji` has not been compared yet.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with DDPO as the algorithm; with the variant `emoji`, `emoji.py` with DDPO."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "aesthetic")
    c.algorithm = ConfigDict(
        {
            "name": "ddpo",
            "ratio_clip": 1e-4,
            "advantage_clip": 5.0,
            "buffer_size": 32,
            "min_count": 16,
            "output_regularisation": 0.0,
        }
    )
    c.training.updates_per_epoch = 2
    c.training.learning_rate = 3e-4
    c.training.clip = 1.0
    if not variant:
        c.model_dtype = "float32"
        c.training.trajectories = 256
        c.training.micro_batches = 16
    return c
