"""Algorithms by name. A new algorithm is a file with a class, and a line in `ALGORITHMS`."""

from typing import Any

from nabla_gfn_jax.algorithms.awm import Awm
from nabla_gfn_jax.algorithms.dag_db import DagDB
from nabla_gfn_jax.algorithms.ddpo import Ddpo
from nabla_gfn_jax.algorithms.draft import Draft
from nabla_gfn_jax.algorithms.eam import Eam
from nabla_gfn_jax.algorithms.fitted_value import FittedValue
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.nft import Nft
from nabla_gfn_jax.algorithms.path_regression import PathRegression
from nabla_gfn_jax.algorithms.plain_nabla_db import PlainNablaDB
from nabla_gfn_jax.algorithms.ram import Ram
from nabla_gfn_jax.algorithms.refl import Refl
from nabla_gfn_jax.algorithms.residual_db import ResidualDB
from nabla_gfn_jax.algorithms.value_gradient import ValueGradient

ALGORITHMS: dict[str, type[Any]] = {
    "residual_nabla_db": ResidualNablaDB,
    "plain_nabla_db": PlainNablaDB,
    "residual_db": ResidualDB,
    "dag_db": DagDB,
    "path_regression": PathRegression,
    "eam": Eam,
    "ram": Ram,
    "awm": Awm,
    "nft": Nft,
    "ddpo": Ddpo,
    "refl": Refl,
    "draft": Draft,
    "value_gradient": ValueGradient,
    "fitted_value": FittedValue,
}
