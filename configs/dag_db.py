"""DAG-DB (arXiv 2406.00633) on Stable Diffusion 1.5 towards ImageReward.

    python -m nabla_gfn_jax.train --config=dag_db
    python -m nabla_gfn_jax.train --config=dag_db:emoji     on the emoji model, minutes on 2 cores

From the authors: DrawBench prompts, 50 steps at guidance 5, 64 samples per epoch, LoRA of rank 4, AdamW with a learning
rate of 3e-4 and weight decay 1e-4 for both networks, λ = 1, 100 epochs, and a reward exponent of 100 per latent
element, which is β = 100·64·64·4. Their exponent grows to this value over the first half of the run; here it is
constant. They train on all 50 steps of a trajectory in 2 updates per epoch. The target is R^β alone. Time and memory on
an accelerator have not been measured. `:emoji` has not been compared yet.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`image_reward.py` with DAG-DB as the algorithm; with the variant `emoji`, `emoji.py` with DAG-DB."""
    if variant not in ("", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or emoji")
    c = load_config(variant or "image_reward")
    c.algorithm = ConfigDict(
        {
            "name": "dag_db",
            "beta": 8.0 if variant else 100.0 * 64 * 64 * 4,
            "gamma": "one",
            "transition_fraction": 0.1,
            "uneven_bins": False,
            "output_regularisation": 1.0,
        }
    )
    c.training.clip = 1.0
    c.training.learning_rate = 3e-4
    if not variant:
        c.lora.rank = 4
        c.training.weight_decay_correction = 1e-4
        c.training.num_epochs = 100
        c.training.updates_per_epoch = 2
    return c
