"""Residual ∇-DB on Stable Diffusion 1.5 towards ImageReward: the paper's third experiment.

python -m nabla_gfn_jax.train --config=configs/image_reward.py --workdir=runs/image_reward

The variants `:forward_only` and `:fast` and all other numbers are in `configs/paper.py`. β, λ and the prompts
(DrawBench, 2 of each category held out) are the paper's.

Devices: any divisor of 16, because 4 micro-batches split the 64 trajectories; start the same command on each machine.
Time and memory on an accelerator have not been measured; `plan` estimates them (docs/scaling.md has the estimate for
hps). With full-size random weights, an update was made on a CPU (`tests/test_sd15_end_to_end.py`). If the memory is too
small, raise `--config.training.micro_batches`; the numbers stay the same.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config


def get_config(variant: str = "") -> ConfigDict:
    """`paper.py` with the reward, its prompts, β and λ."""
    c = load_config("paper", variant)
    c.reward = "image_reward"
    c.prompts = "drawbench"
    c.algorithm.beta = 10_000.0
    c.algorithm.output_regularisation = 5000.0
    return c
