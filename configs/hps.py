"""Residual ∇-DB on Stable Diffusion 1.5 towards HPSv2.1: the paper's second experiment.

python -m nabla_gfn_jax.train --config=configs/hps.py --workdir=runs/hps

Variants `:forward_only` and `:fast`, and every other number: `configs/paper.py`. β, λ and the prompts
(HPDv2's photo and painting styles, 10 of each held out) are the paper's.

Devices: any number that divides the 64 trajectories and their 4 micro-batches, 16 at most; the same command on each.
Time on an accelerator: not measured. Memory, by the compilers: docs/scaling.md. With random weights at full size an
update was made on a CPU (`tests/test_sd15_end_to_end.py`: with the lookahead, or with which variant). On a device with
less memory raise `--config.training.micro_batches`: the numbers stay the same.
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
