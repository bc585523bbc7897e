"""Value gradient on the emoji model: the algorithm that comes nearest to its target, at the β that is asked for.

    python -m nabla_gfn_jax.train --config=emoji_exact                     starts from the guess β γ_t log R(x̂)
    python -m nabla_gfn_jax.train --config=emoji_exact:without_gradient    takes no gradient of the reward

Hardware: 2 CPU cores without AVX-512 (EPYC, 2.4 GHz): 45 s an epoch of `without_gradient`, so 2 hours for 160; 6 GB.
Expect: not known yet for the whole run. After 15 epochs of a run of 45, `without_gradient`, docs/credit.md has what was
measured. `emoji_exact` with the guess has not been run.

How it differs from `emoji.py`, and why:

- `value_gradient` at β = 8: the policy follows a learned value, not a clipped adjoint (docs/credit.md).
- 20 sampling steps in place of 50: they draw as well, and cost less than half.
- `lora_until_step = 18`: in the last two steps, where σ is nearly 0, the least change of the output costs most nats and
  gains nothing. With the LoRA in all steps the first epochs spent 1.5, .6 and .2 nats to no gain; with this, .06 and
  .007, and from the third on the policy gains.
- Eight small updates an epoch: the value has much to learn from each path, and sampling is half of the cost.
- A running mean of the LoRA, over about fifty updates, is what is saved.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`emoji.py` with the value gradient in place of the algorithm; `without_gradient` takes none of the reward's."""
    if variant not in ("", "without_gradient"):
        raise UserError(f"there is no variant {variant!r}; use none, or without_gradient")
    c = load_config("emoji")
    c.sampling.num_steps = 20
    c.sampling.lora_until_step = 18
    c.algorithm = ConfigDict(
        {
            "name": "value_gradient",
            "beta": 8.0,
            "guess": not variant,
            "steps": 1,
            "states": 10,
            "weight_clip": 20.0,
            "output_regularisation": 0.0,
        }
    )
    c.lora.rank = 16
    c.training.num_epochs = 160
    c.training.trajectories = 64
    c.training.micro_batches = 2
    c.training.updates_per_epoch = 8
    c.training.learning_rate = 7e-4
    c.training.decline = "cosine"
    c.training.average = 0.98
    c.logging.checkpoint_every = 5
    return c
