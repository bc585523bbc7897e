"""ReFL (arXiv 2304.05977) on Stable Diffusion 1.5 towards ImageReward.

    python -m nabla_gfn_jax.train --config=refl
    python -m nabla_gfn_jax.train --config=refl:emoji     on the emoji model, minutes on 2 cores

The released program samples 40 steps, chooses one of the last 10, takes ImageReward's margin of 2, batches of 64 and a
learning rate of 1e-5. It finetunes all of Stable Diffusion 1.4's UNet beside a pre-training loss; here a LoRA is
trained, without that loss. Time and memory on an accelerator: not measured. `:emoji` has the learning rate of `emoji`
and a margin that no sample reaches; not yet compared.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`image_reward.py` with ReFL in place of the algorithm, or, as `emoji`, `emoji.py`."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "image_reward")
    margin = 1.0 if variant else 2.0  # valence is a tanh
    c.algorithm = ConfigDict({"name": "refl", "late_steps": 10, "margin": margin, "output_regularisation": 0.0})
    c.training.updates_per_epoch = 1
    if variant:
        c.training.num_epochs = 30
    else:
        c.sampling.num_steps = 40
        c.training.learning_rate = 1e-5
    return c
