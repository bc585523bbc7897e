"""Regression on paths with exact weights, on the emoji model, towards how positive a face looks.

    python -m nabla_gfn_jax.train --config=path_regression
    python -m nabla_gfn_jax.train --config=path_regression:innovation     without any gradient of the reward

`emoji.py` with another algorithm, at β = 8. An epoch's eight updates take six steps each of every trajectory, nearly
all of its fifty. `credit_clip` is about the 80 % quantile of the adjoint's size at the early steps, where a few paths
would carry all of it. Expect after 160 updates, 12 minutes on two busy cores: an exponent of 1.2, spent .15 nats, a gap
of .83 where the base model's is .99 (docs/credit.md). `:innovation` has not been run on the emoji model;
docs/exact_target.md has both credits in the plane.
"""

from ml_collections import ConfigDict

from nabla_gfn_jax.config_files import load_config
from nabla_gfn_jax.errors import UserError


def get_config(variant: str = "") -> ConfigDict:
    """`emoji.py` with the path regression in place of the algorithm, by the adjoint or, as `innovation`, without."""
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
