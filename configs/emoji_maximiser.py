"""The baseline that collapses: DRaFT-10 on the emoji model, towards how positive a face looks.

    python -m nabla_gfn_jax.train --config=configs/emoji_maximiser.py

`emoji.py` with the reward of the sample itself, differentiated through the last ten steps (arXiv 2309.17400). Expect:
log R .45 after 8 updates with the faces still apart, .60 after 18 and a fifth no face any more (README: the table).
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config() -> ConfigDict:
    """`emoji.py` with the reward of the sample itself, differentiated through the last ten steps."""
    c = load_config("emoji")
    c.algorithm = ConfigDict({"name": "reward_maximiser", "tail": 10})
    c.training.updates_per_epoch = 1
    c.training.num_epochs = 30
    return c
