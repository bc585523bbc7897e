"""Entropies estimated from samples, corrected for the bias of small samples.

To first order, the plain entropy −Σ p̂ ln p̂ of n samples of K kinds is too low by (K−1)/(2n) (Miller 1955, "Note on
the bias of information estimates"). For weighted samples it is too low by ½ Σ_i Var(p̂_i)/p_i, which is the same for
equal weights. Compare two entropies at the same effective sample size, because the remaining bias is then similar.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import hypergeom


def plain_entropy(counts: Float[np.ndarray, " kinds"] | Int[np.ndarray, " kinds"]) -> float:
    """−Σ p ln p of the frequencies of the kinds, in nats, uncorrected."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def entropy(kinds: Int[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None) -> float:
    """The entropy of independent samples in nats, corrected to first order.

    `kinds` has the kind of each sample, an integer from 0. The weights may have any positive sum.
    """
    weights = np.ones(len(kinds)) if weights is None else weights
    weights = weights / weights.sum()
    p, squares = np.bincount(kinds, weights), np.bincount(kinds, weights**2)
    p, squares = p[p > 0], squares[p > 0]
    variance = squares * (1 - 2 * p) + p**2 * squares.sum()  # the variance of p if samples are independent
    return plain_entropy(p) + float((variance / p).sum() / 2)


def rarefied_entropy(counts: Float[np.ndarray, " kinds"] | Int[np.ndarray, " kinds"], samples: int) -> float:
    """The mean of `entropy` over all subsets with `samples` (at least 1) of the counted samples, in nats."""
    total = int(counts.sum())
    samples = max(1, min(samples, total))
    sizes, how_many = np.unique(counts[counts > 0].astype(int), return_counts=True)
    drawn = np.arange(1, min(samples, sizes.max()) + 1)
    probability = hypergeom.pmf(drawn[None], total, sizes[:, None], samples)  # of `drawn` samples of a kind
    share = drawn / samples
    plain = how_many @ (probability @ -(share * np.log(share)))
    kinds_seen = how_many @ probability.sum(axis=1)
    return float(plain + (kinds_seen - 1) / (2 * samples))
