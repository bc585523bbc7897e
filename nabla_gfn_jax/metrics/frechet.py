"""The Fréchet distance of two sets of features, with its standard error.

The distance of the normal distributions with the means m₁, m₂ and the covariances C₁, C₂ of the sets (Dowson & Landau
1982; Heusel et al. 2017, arXiv 1706.08500) is

    |m₁ − m₂|² + tr C₁ + tr C₂ − 2 tr (C₁C₂)^½

With C_i = A_iᵀA_i, where the rows of A_i are the centred features divided by √(n_i − 1), the last trace is the sum of
the singular values of A₁A₂ᵀ = U S Vᵀ. No root of a matrix is needed, and fewer samples than features are no special
case. The standard error is that of the linearised distance (delta method, or infinitesimal jackknife): a sample's
influence on it follows from the same U, S and V. If the two distributions are equal, the standard error is too large by
a factor of up to 1.5, because the first order then vanishes.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nabla_gfn_jax.metrics.tilt import Values

_Features = Float[np.ndarray, "n features"]


class Distance(NamedTuple):
    """A Fréchet distance, and the influence of each sample of the two sets on it: n dF/dw at equal weights w = 1/n."""

    value: float
    influence: Values
    other_influence: Float[np.ndarray, " m"]


def frechet_distance(x: _Features, y: Float[np.ndarray, "m features"]) -> Distance:
    """The distance of two sets with at least two samples each, computed in float64."""
    a, b = (np.asarray(features, np.float64) for features in (x, y))
    shift = a.mean(0) - b.mean(0)
    a, b = ((features - features.mean(0)) / np.sqrt(len(features) - 1.0) for features in (a, b))
    (rotation, small), (other_rotation, other_small) = _reduced(a), _reduced(b)
    u, s, vt = np.linalg.svd(small @ other_small.T, full_matrices=False)
    value = shift @ shift + np.square(a).sum() + np.square(b).sum() - 2.0 * s.sum()
    return Distance(
        float(value),
        _influence(a, shift, s, u if rotation is None else rotation @ u),
        _influence(b, -shift, s, vt.T if other_rotation is None else other_rotation @ vt.T),
    )


def _reduced(a: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Q and R with a = QR if `a` has more rows than columns; otherwise None and `a`."""
    return np.linalg.qr(a) if len(a) > a.shape[1] else (None, a)


def _influence(a: np.ndarray, shift: np.ndarray, s: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The influence of each row on |shift|² + |a|² − 2 Σ s, where the first is the set's mean minus the other's."""
    n = len(a)
    of_mean = 2.0 * np.sqrt(n - 1.0) * (a @ shift)
    of_trace = n * np.square(a).sum(1) - np.square(a).sum()
    of_root = n * (np.square(u) @ s) - s.sum()
    return np.asarray(of_mean + of_trace - of_root)
