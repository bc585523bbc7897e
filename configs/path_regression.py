"""Path regression with exact weights, on the emoji model, towards faces that look more positive.

    python -m nabla_gfn_jax.train --config=path_regression
    python -m nabla_gfn_jax.train --config=path_regression:innovation     without any gradient of the reward

This is `emoji.py` with another algorithm and β = 8. Each of an epoch's eight updates takes six steps of every
trajectory, together nearly all of its fifty. `credit_clip` is about the 80 % quantile of the adjoint's size at early
steps, where otherwise a few paths would dominate. Expected result after 160 updates (12 minutes on two busy cores): an
exponent of 1.2, .15 nats spent, and a gap of .83, where the base model's is .99 (docs/credit.md). `:innovation` has not
been run on the emoji model; docs/exact_target.md has both credits in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`emoji.py` with path regression as the algorithm, with the adjoint or, as `innovation`, without a gradient."""
    if variant not in ("", "innovation"):
        raise UserError(f"there is no variant {variant!r}; use none, or innovation")
    c = load_config("emoji")
    c.algorithm = ConfigDict(
        {
            "name": "path_regression",
            "beta": 8.0,
            "credit": variant or "adjoint",
            "steps": 6,
            "weight_clip": 20.0,
            "credit_clip": float("inf") if variant else 0.05,
            "output_regularisation": 0.0,
        }
    )
    c.training.updates_per_epoch = 8
    c.training.learning_rate = 3e-4
    return c
