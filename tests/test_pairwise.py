"""The mean distance of the images of a prompt, against sums over pairs, weights as copies, and repeated draws."""

import numpy as np
import pytest

from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.metrics.base import Samples, Weighting
from nabla_gfn_jax.metrics.pairwise import mean_distance, variance


def state(rng, prompt, width=5):
    drawn = rng.normal(size=(len(prompt), width)) + np.eye(width)[0]
    return Samples(prompt, {"features": drawn / np.linalg.norm(drawn, axis=1, keepdims=True)})


def test_both_usages_are_their_formulas():
    of = state(np.random.default_rng(0), np.repeat([0, 1], 20))
    each = np.split(of.values["features"], 2)
    pairs = [[1 - a @ b for i, a in enumerate(x) for b in x[:i]] for x in each]
    assert mean_distance(of).value == pytest.approx(np.mean(pairs), rel=1e-12)
    squares = [sum(((a - b) ** 2).sum() for a in x[:16] for b in x[:16]) / (2 * 16 * 15) for x in each]
    assert variance(of, 16).value == pytest.approx(np.mean(squares), rel=1e-12)
    assert variance(of, 21) is None


def test_weights_are_those_of_a_distribution():
    """The weighted mean is that of independent draws of two samples, given that they are not the same sample."""
    rng = np.random.default_rng(1)
    of = state(rng, np.zeros(12, int))
    weights = rng.uniform(size=12)
    weights /= weights.sum()
    weighting = Weighting(tilt.Strata(of.prompt), weights, np.array([weights, weights]))
    distance = 1 - of.values["features"] @ of.values["features"].T
    together = np.outer(weights, weights) * (1 - np.eye(12))
    assert mean_distance(of, weighting).value == pytest.approx((together * distance).sum() / together.sum(), rel=1e-9)


@pytest.mark.thorough
def test_the_standard_error_is_that_of_repeated_draws(monkeypatch):
    monkeypatch.setattr(tilt, "REPLICATES", 60)
    rng = np.random.default_rng(2)
    prompt = np.repeat([0, 1], 25)
    found = [mean_distance(state(rng, prompt)) for _ in range(150)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([estimate.error for estimate in found]) == pytest.approx(spread, rel=0.2)


def test_a_single_image_has_no_distance():
    assert np.isnan(mean_distance(state(np.random.default_rng(3), np.array([0, 0, 1]))).value)
