"""The mean shift of states, from how the log value and the clean sample move together along paths; NumPy, on the host.

Where a path will end differs between the target P_base · R^β and the base model, #, by the mean shift

    m(x_k) = E_*[x_T | x_k] − E_#[x_T | x_k]
           = E_#[ Σ_{j≥k} e^{V_j − V_k} (e^{V_{j+1} − V_j} − 1) (x̂_{j+1} − x̂_j) | x_k ]

because e^V, V(x) = log E_#[R^β | x], and x̂(x) = E_#[x_T | x] are martingales of the base model's paths: under the
target, a martingale drifts by its covariation with V (Girsanov 1960). Each path gives one draw of it. The plain draw
(R^β/e^V − 1)(x_T − x̂) has the same mean, but also the products of V's and x̂'s moves in different steps. Those have mean
0 and most of the noise. No gradient is taken, of the reward or of V.

A path of a policy θ† counts each step with q_j = p_#/p_θ†(x_{j+1} | x_j).
"""

import numpy as np
from jaxtyping import Float

_LARGEST = 3.0  # |V_{j+1} − V_j| and |log q_j| of a step; more is a misfit of V, or one rare step


def mean_shifts(
    value: Float[np.ndarray, "paths states"],
    log_ratio_from: Float[np.ndarray, "paths states"],
    clean: Float[np.ndarray, "paths states elements"],
) -> Float[np.ndarray, "paths states-1 elements"]:
    """A draw of the mean shift at every state but the last, from one path each.

    Args:
        value: V, up to a constant of the path.
        log_ratio_from: log Π p_#/p_θ† over the steps after each state; 0 for paths of the base model.
        clean: x̂_#, the base model's clean sample. The sum ends at the last state.
    """
    log_q = log_ratio_from[:, :-1] - log_ratio_from[:, 1:]
    moves = np.clip(np.diff(value, axis=1), -_LARGEST, _LARGEST)
    q = np.exp(np.clip(log_q, -_LARGEST, _LARGEST))
    found = np.diff(clean, axis=1)
    found *= (q * np.expm1(moves))[..., None]
    onwards = q * np.exp(moves)
    for state in range(found.shape[1] - 2, -1, -1):
        found[:, state] += onwards[:, state, None] * found[:, state + 1]
    return found
