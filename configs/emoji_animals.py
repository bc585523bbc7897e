"""Residual ∇-DB on the emoji model that ships with the package, towards animals that a network recognises.

    python -m nabla_gfn_jax.train --config=configs/emoji_animals.py

This is `emoji.py` with 45 prompts and a reward that depends on the prompt: log p(the animal | image) of a network.
Hardware: 2 CPU cores, 8.4 minutes, peak 3.6 GB. Expected result: the mean log R rises from -.57 ± .03 to -.43 ± .02 in
seeds 0 to 2 (docs/results.md). With β = 4 the reward did not rise, with 25 it ended at -.49, and with 100 at -.43. The
entropies over vendors and drawings did not change with any of them, so β is 100.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config() -> ConfigDict:
    """`emoji.py` with another reward, other prompts and another β."""
    c = load_config("emoji")
    c.reward = "recognisability"
    c.prompts = "simple_animals"
    c.algorithm.beta = 100.0
    return c
