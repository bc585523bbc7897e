"""The diversity of a prompt's images: the mean distance of two of them, by features of norm 1.

The distance of e and f is their cosine distance 1 − e·f, which is |e − f|²/2.
"""

import numpy as np
from jaxtyping import Float

from nabla_gfn_jax.metrics.base import Samples, Weighting
from nabla_gfn_jax.metrics.tilt import Estimate, Strata, Values

FEATURES = "features"  # the name of the unit features in a state


def mean_distance(state: Samples, weighting: Weighting | None = None) -> Estimate:
    """The mean over prompts of the mean distance of two different images of a prompt.

    `state` is sorted by prompt. A pair has the product of the images' weights. In the bootstrap, an image and its copy
    are no pair. The value is NaN if a prompt has a single image.
    """
    weighting = weighting or Weighting.equal(state.prompt)
    features = state.values[FEATURES]
    distances = [1.0 - _products(features[p]) for p in weighting.strata.slices]

    def figures(weights: Values) -> dict[str, float]:
        of_prompts = [_of_pairs(d, weights[p]) for d, p in zip(distances, weighting.strata.slices, strict=True)]
        return {"distance": float(np.mean(of_prompts))}

    return weighting.estimate(figures)["distance"]


def variance(state: Samples, number: int) -> Estimate | None:
    """Σ_ij |e_i − e_j|²/(2n(n−1)) of the first n = `number` images of a prompt, averaged over prompts.

    It is None if a prompt has fewer images.
    """
    first = state.numbers(0, number)
    if Strata(state.prompt).sizes.min() < number:
        return None
    return mean_distance(first)


def _products(features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n n"]:
    exact = np.asarray(features, np.float64)
    return exact @ exact.T


def _of_pairs(distances: Float[np.ndarray, "n n"], weights: Values) -> float:
    """The weighted mean over ordered pairs of different images."""
    share = weights / weights.sum()
    pairs = 1.0 - share @ share
    total = share @ distances @ share - (share**2) @ np.diag(distances)
    return float(total / pairs) if pairs > 1e-12 else float("nan")
