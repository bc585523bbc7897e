"""Algorithms by name. A new one is a file with a class and a line in `ALGORITHMS`."""

from typing import Any

from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.reward_maximiser import RewardMaximiser

ALGORITHMS: dict[str, type[Any]] = {"residual_nabla_db": ResidualNablaDB, "reward_maximiser": RewardMaximiser}
