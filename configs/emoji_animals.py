"""Residual ∇-DB on the emoji model that ships with the package, towards animals that are recognised.

    python -m nabla_gfn_jax.train --config=configs/emoji_animals.py

`emoji.py` with a reward that depends on the prompt, log p(the animal | image) by a network of its own, over 45 prompts.
Hardware: 2 CPU cores, 8.4 minutes, peak 3.6 GB. Expect: mean log R from -.57 ± .03 to -.43 ± .02 in seeds 0 to 2
(docs/results.md). β: 4 did not climb, 25 ended at -.49, 100 at -.43; vendors and drawings stay as they were with
each, so 100.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config() -> ConfigDict:
    """`emoji.py` with another reward, its prompts and its β."""
    c = load_config("emoji")
    c.reward = "recognisability"
    c.prompts = "simple_animals"
    c.algorithm.beta = 100.0
    return c
