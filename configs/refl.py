"""ReFL (arXiv 2304.05977) on Stable Diffusion 1.5 towards ImageReward.

    python -m nabla_gfn_jax.train --config=refl
    python -m nabla_gfn_jax.train --config=refl:emoji     on the emoji model, minutes on 2 cores

The released program samples in 40 steps, chooses one of the last 10, and has a margin of 2 on ImageReward's scale,
batches of 64 and a learning rate of 1e-5. It finetunes the whole UNet of Stable Diffusion 1.4 with an additional
pre-training loss; here a LoRA is trained without this loss. Time and memory on an accelerator have not been measured.
`:emoji` has the learning rate of `emoji` and a margin that no sample reaches; it has not been compared yet.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`image_reward.py` with ReFL as the algorithm; with the variant `emoji`, `emoji.py` with ReFL."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "image_reward")
    margin = 1.0 if variant else 2.0  # valence is a tanh, so it is below 1
    c.algorithm = ConfigDict({"name": "refl", "late_steps": 10, "margin": margin, "output_regularisation": 0.0})
    c.training.updates_per_epoch = 1
    if variant:
        c.training.num_epochs = 30
    else:
        c.sampling.num_steps = 40
        c.training.learning_rate = 1e-5
    return c
