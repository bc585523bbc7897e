"""DRaFT (arXiv 2309.17400), the baseline that collapses, on Stable Diffusion 1.5 towards the aesthetic score.

    python -m nabla_gfn_jax.train --config=draft          DRaFT-1
    python -m nabla_gfn_jax.train --config=draft:lv       DRaFT-LV, each sample noised twice
    python -m nabla_gfn_jax.train --config=draft:emoji    DRaFT-10 on the emoji model, minutes on 2 cores

The paper finetunes Stable Diffusion 1.4 with LoRA of rank 8 and AdamW (learning rate 4e-4) on batches of 16. All other
numbers are those of `paper.py`. Time and memory on an accelerator have not been measured. `:emoji` reaches log R .46
after 8 updates with distinct faces, and .62 after 18 updates, where an eighth of the samples no longer shows a face
(docs/results.md).
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`aesthetic.py` with DRaFT as the algorithm; with the variant `emoji`, `emoji.py` with DRaFT."""
    if variant not in ("", "lv", "emoji"):
        raise UserError(f"there is no variant {variant!r}; use none, or one of lv, emoji")
    c = load_config("emoji" if variant == "emoji" else "aesthetic")
    last_steps = 10 if variant == "emoji" else 1
    lv = 2 if variant == "lv" else 0
    c.algorithm = ConfigDict({"name": "draft", "last_steps": last_steps, "lv_samples": lv})
    c.algorithm.output_regularisation = 0.0
    c.training.updates_per_epoch = 1
    if variant == "emoji":
        c.training.num_epochs = 30
    else:
        c.training.trajectories = 16
        c.training.micro_batches = 1
        c.training.learning_rate = 4e-4
        c.training.num_epochs = 2000
    return c
