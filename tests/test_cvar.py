"""The mean of the worst samples, against a closed form of the normal distribution and against brute force."""

import numpy as np
import pytest
from scipy import stats

from nabla_gfn_jax.metrics.base import Samples, Weighting
from nabla_gfn_jax.metrics.cvar import left_cvar
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.metrics.tilt import Strata


def test_the_worst_fifth_of_a_normal_distribution():
    """It has the mean −φ(z)/.2, where z is the fifth's quantile."""
    values = np.random.default_rng(0).normal(3.0, 2.0, 100_000)
    z = stats.norm.ppf(0.2)
    found = left_cvar(values, np.ones(len(values)), Strata(np.zeros(len(values), int)))
    assert found == pytest.approx(3.0 - 2.0 * stats.norm.pdf(z) / 0.2, abs=0.02)


@pytest.mark.parametrize("share", [0.2, 0.37, 1.0])
def test_weights_count_as_copies(share):
    rng = np.random.default_rng(1)
    prompt = np.repeat([0, 1], [30, 50])
    values, counts = rng.normal(size=80), rng.integers(0, 4, 80).astype(float)
    found = left_cvar(values, counts, Strata(prompt), share)
    each = []
    for p in (0, 1):
        copies = np.sort(np.repeat(values[prompt == p], 100 * counts[prompt == p].astype(int)))
        each.append(copies[: round(share * len(copies))].mean())
    assert found == pytest.approx(np.mean(each), rel=1e-9)


def test_few_samples_have_their_lowest():
    values = np.array([5.0, 1.0, 3.0])
    assert left_cvar(values, np.ones(3), Strata(np.zeros(3, int))) == 1.0


@pytest.mark.thorough
def test_the_standard_error_is_that_of_repeated_draws():
    rng = np.random.default_rng(2)
    prompt = np.repeat([0, 1], 100)

    def draw():
        state = Samples(prompt, {"log_reward": rng.normal(prompt, 1.0)})
        return LogReward.compute(_unloaded(), state, Weighting.equal(prompt))["log_reward_cvar"]

    drawn = [draw() for _ in range(200)]
    spread = np.std([estimate.value for estimate in drawn], ddof=1)
    assert np.mean([estimate.error for estimate in drawn]) == pytest.approx(spread, rel=0.15)


def _unloaded():
    """A metric without a reward, which `compute` does not need."""
    metric = LogReward.__new__(LogReward)
    metric._ending = ""
    return metric
