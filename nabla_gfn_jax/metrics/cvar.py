"""The left tail of rewards: the conditional value at risk, which is the mean of the worst samples.

A mean hides whether a model improves all samples or only those that were good already. The mean of the worst fifth
shows the second.
"""

import numpy as np

from nabla_gfn_jax.metrics.tilt import Strata, Values

SHARE = 0.2  # of the samples of a prompt


def left_cvar(values: Values, weights: Values, strata: Strata, share: float = SHARE) -> float:
    """The mean over prompts of the mean of the lowest values of a prompt that have together `share` of its weight.

    The value at the border counts with the part of its weight that is needed.
    """
    return float(np.mean([_of_prompt(values[p], weights[p], share) for p in strata.slices]))


def _of_prompt(values: Values, weights: Values, share: float) -> float:
    order = np.argsort(values)
    weight = weights[order] / weights.sum()
    below = np.cumsum(weight) - weight
    counted = np.clip(share - below, 0.0, weight)
    return float(counted @ values[order] / counted.sum())
