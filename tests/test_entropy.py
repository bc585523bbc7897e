"""Entropies of samples, compared with closed forms; the remaining bias is small."""

import itertools

import numpy as np
import pytest

from nabla_gfn_jax.metrics.entropy import entropy, plain_entropy, rarefied_entropy


def test_plain_entropy_is_the_closed_form_of_a_binomial():
    p = 0.3
    expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert plain_entropy(np.array([30, 0, 70])) == pytest.approx(expected, rel=1e-12)
    assert plain_entropy(np.array([0, 5])) == 0.0


def test_equal_weights_give_millers_correction():
    kinds = np.random.default_rng(0).integers(0, 30, 50)
    expected = plain_entropy(np.bincount(kinds)) + (len(np.unique(kinds)) - 1) / (2 * 50)
    assert entropy(kinds) == pytest.approx(expected, rel=1e-12)
    assert entropy(kinds, np.full(50, 7.0)) == pytest.approx(expected, rel=1e-12)


def test_the_correction_takes_most_of_the_bias_of_weighted_samples():
    """The weights depend on the kind, as with a reward, so the exact frequency of a kind is p times its mean weight."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(20))
    tilt = rng.normal(size=20)
    exact_p = p * np.exp(tilt) / (p * np.exp(tilt)).sum()
    exact = -(exact_p * np.log(exact_p)).sum()
    plain, corrected = [], []
    for _ in range(400):
        kinds = rng.choice(20, 200, p=p)
        weights = np.exp(tilt[kinds] + rng.normal(0, 0.7, 200))
        plain.append(plain_entropy(np.bincount(kinds, weights)))
        corrected.append(entropy(kinds, weights))
    bias = np.mean(plain) - exact
    assert bias < -0.04
    assert abs(np.mean(corrected) - exact) < 0.25 * abs(bias)


def test_rarefied_entropy_is_the_mean_over_all_subsets():
    kinds = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    for samples in (1, 3, 5, 8):
        subsets = [entropy(kinds[list(rows)]) for rows in itertools.combinations(range(8), samples)]
        assert rarefied_entropy(np.bincount(kinds), samples) == pytest.approx(np.mean(subsets), rel=1e-10)


def test_no_more_samples_than_there_are():
    counts = np.array([3, 0, 2])
    assert rarefied_entropy(counts, 99) == rarefied_entropy(counts, 5)
