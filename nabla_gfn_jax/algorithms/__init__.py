"""Algorithms by name. A new one is a file with a class and a line in `ALGORITHMS`."""

from typing import Any

from nabla_gfn_jax.algorithms.ddpo import Ddpo
from nabla_gfn_jax.algorithms.draft import Draft
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.path_regression import PathRegression
from nabla_gfn_jax.algorithms.refl import Refl

ALGORITHMS: dict[str, type[Any]] = {
    "residual_nabla_db": ResidualNablaDB,
    "ddpo": Ddpo,
    "refl": Refl,
    "draft": Draft,
    "path_regression": PathRegression,
}
