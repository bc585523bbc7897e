"""Residual ∇-DB on Stable Diffusion 1.5 towards HPSv2.1: the paper's second experiment.

python -m nabla_gfn_jax.train --config=configs/hps.py --workdir=runs/hps

The variants `:forward_only` and `:fast` and all other numbers are in `configs/paper.py`. β, λ and the prompts (HPDv2's
photo and painting styles, 10 of each held out) are the paper's.

Devices: any divisor of 16, because 4 micro-batches split the 64 trajectories; start the same command on each machine.
Time on an accelerator has not been measured. docs/scaling.md has the memory according to the compilers. With full-size
random weights, an update was made on a CPU (`tests/test_sd15_end_to_end.py`). If the memory is too small, raise
`--config.training.micro_batches`; the numbers stay the same.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config(variant: str = "") -> ConfigDict:
    """`paper.py` with the reward, its prompts, β and λ."""
    c = load_config("paper", variant)
    c.reward = "hps"
    c.prompts = "hpd_photo_paintings"
    c.algorithm.beta = 500_000.0
    c.algorithm.output_regularisation = 5000.0
    return c
