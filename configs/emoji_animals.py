"""Residual ∇-DB on the emoji model that ships with the package, towards animals that are recognised.

python -m nabla_gfn_jax.train --config=configs/emoji_animals.py
"""

from pathlib import Path

from ml_collections import ConfigDict

from nabla_gfn_jax.command_line import load_config


def get_config() -> ConfigDict:
    """`emoji.py` with another reward, and a β for its scale: log p spreads ten times as wide as valence."""
    c = load_config(Path(__file__).with_name("emoji.py"))
    c.reward = "recognisability"
    c.prompts = "simple_animals"
    c.algorithm.beta = 100.0
    return c
