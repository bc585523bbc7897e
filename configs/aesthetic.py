"""Residual ∇-DB on Stable Diffusion 1.5 towards LAION's aesthetic score: the paper's first experiment.

python -m nabla_gfn_jax.train --config=configs/aesthetic.py --workdir=runs/aesthetic

Variants `:forward_only` and `:fast`, and every other number: `configs/paper.py`. β, λ and the prompts
(the 45 simple animals) are the paper's.

Devices: any number that divides the 64 trajectories and their 4 micro-batches, 16 at most; the same command on each.
Time and memory on an accelerator: not measured; `plan` says what its compiler says (docs/scaling.md has hps). With
random weights at full size an update was made on a CPU (`tests/test_sd15_end_to_end.py`: with the lookahead, or with
which variant). On a device with less memory raise `--config.training.micro_batches`: the numbers stay the same.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config(variant: str = "") -> ConfigDict:
    """`paper.py` with the reward, its prompts, β and λ."""
    c = load_config("paper", variant)
    c.reward = "aesthetic"
    c.prompts = "simple_animals"
    c.algorithm.beta = 10_000.0
    c.algorithm.output_regularisation = 2000.0
    return c
