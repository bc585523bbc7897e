"""Kernel value on the emoji model: the algorithm that comes nearest to its target, at the β that is asked for.

    python -m nabla_gfn_jax.train --config=emoji_exact            the log value is a kernel's
    python -m nabla_gfn_jax.train --config=emoji_exact:network    it is a network's: algorithm value_gradient

Hardware: 2 CPU cores.
Expect: see docs/credit.md.

How it differs from `emoji.py`, and why:

- `kernel_value` at β = 8: the policy follows the gradient of a learned log value, not a clipped adjoint
  (docs/credit.md). It takes no gradient of the reward.
- 20 sampling steps in place of 50: they draw as well, and cost less than half.
- `lora_until_step = 16`: in the last steps, where σ is small, the least change of the output costs most nats and gains
  nothing. The value knows .54 nats of where a path will end by step 12, and .56 by the last.
- `after = 512`: the first paths are all the base model's. A value that is fitted to fewer misleads.
- Eight small updates an epoch: sampling is half of the cost.
- A running mean of the LoRA, over about thirty updates, is what is saved.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`emoji.py` with the kernel value in place of the algorithm; `network`: with the value gradient."""
    if variant not in ("", "network"):
        raise UserError(f"there is no variant {variant!r}; use none, or network")
    c = load_config("emoji")
    c.sampling.num_steps = 20
    c.sampling.lora_until_step = 16
    c.algorithm = _network() if variant else _kernel()
    c.lora.rank = 16
    c.lora.layers = "all"
    c.training.num_epochs = 80
    c.training.trajectories = 128
    c.training.micro_batches = 1
    c.training.updates_per_epoch = 8
    c.training.learning_rate = 3e-4
    c.training.decline = "cosine"
    c.training.average = 0.97
    c.logging.checkpoint_every = 5
    return c


def _kernel() -> ConfigDict:
    return ConfigDict(
        {
            "name": "kernel_value",
            "beta": 8.0,
            "steps": 1,
            "memory": 16384,
            "after": 512,
            "components": 32,
            "features": 600,
            "length": 1.5,
            "ridge": 3.0,
            "weight_clip": 20.0,
            "output_regularisation": 0.0,
        }
    )


def _network() -> ConfigDict:
    return ConfigDict(
        {
            "name": "value_gradient",
            "beta": 8.0,
            "guess": False,
            "steps": 1,
            "states": 10,
            "weight_clip": 20.0,
            "output_regularisation": 0.0,
        }
    )
