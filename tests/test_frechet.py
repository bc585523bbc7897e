"""The Fréchet distance against its formula, its influences against differences, its errors against repeated draws."""

import numpy as np
import pytest
import scipy.linalg

from nabla_gfn_jax.metrics.base import Samples
from nabla_gfn_jax.metrics.fid import FID
from nabla_gfn_jax.metrics.frechet import frechet_distance


def by_definition(x, y):
    """pytorch-fid's formula, with SciPy's square root of the product of the covariances."""
    (m, c), (n, d) = ((features.mean(0), np.cov(features, rowvar=False)) for features in (x, y))
    root = scipy.linalg.sqrtm(c @ d).real
    return (m - n) @ (m - n) + np.trace(c) + np.trace(d) - 2 * np.trace(root)


def drawn(rng, count, width, shift=0.0):
    """Correlated features of unequal scales."""
    mixing = np.random.default_rng(5).normal(size=(width, width)) * np.linspace(0.2, 2.0, width)
    return (rng.normal(size=(count, width)) @ mixing + shift).astype(np.float32)


@pytest.mark.parametrize(("counts", "width"), [((90, 60), 20), ((300, 200), 50)])
def test_the_distance_is_pytorch_fids(counts, width):
    rng = np.random.default_rng(0)
    x, y = drawn(rng, counts[0], width), drawn(rng, counts[1], width, 0.3)
    found = frechet_distance(x, y).value
    assert found == pytest.approx(by_definition(x.astype(np.float64), y.astype(np.float64)), rel=1e-6)
    assert found > 1.0


def test_few_samples_span_a_plane_in_which_the_distance_is_the_same():
    """20 samples in 500 dimensions, rotated from 10 dimensions, where the covariances have full rank."""
    rng = np.random.default_rng(1)
    x, y = drawn(rng, 20, 10), drawn(rng, 25, 10, 0.5)
    axes = np.linalg.qr(rng.normal(size=(500, 10)))[0].T
    wide = frechet_distance(x @ axes, y @ axes).value
    assert wide == pytest.approx(by_definition(x.astype(np.float64), y.astype(np.float64)), rel=1e-6)
    assert frechet_distance(x, x).value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(400, 6), (40, 120)])
def test_influence_is_the_slope_in_a_samples_weight(count, width):
    """A sample that is there k times more often changes the distance by its influence, to first order."""
    rng = np.random.default_rng(2)
    x, y = drawn(rng, count, width), drawn(rng, count, width, 0.3)
    found = frechet_distance(x, y)

    def weighted(weights):
        """The distance of the weighted set x, by the definition with singular values of the weighted rows."""
        mean = weights @ x
        a = np.sqrt(weights * count / (count - 1.0))[:, None] * (x - mean)
        b = (y - y.mean(0)) / np.sqrt(count - 1.0)
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        return ((mean - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root

    equal = np.full(count, 1.0 / count)
    for i in (0, 7):
        towards = np.eye(count)[i] - equal
        slope = (weighted(equal + 1e-6 * towards) - weighted(equal - 1e-6 * towards)) / 2e-6
        assert found.influence[i] == pytest.approx(slope, rel=1e-4)
    assert found.influence.sum() == pytest.approx(0.0, abs=1e-6 * np.abs(found.influence).sum())
    np.testing.assert_allclose(found.other_influence, frechet_distance(y, x).influence, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "width", "shift", "scale", "most"),
    [(100, 8, 2.0, 1.5, 1.2), (100, 8, 0.0, 1.0, 1.7), (16, 60, 0.4, 1.0, 1.5)],
)
def test_standard_errors_are_those_of_repeated_draws(count, width, shift, scale, most):
    """Of two prompts. For equal distributions and for few samples, they may be too large, but not too small."""
    rng = np.random.default_rng(3)
    prompt = np.repeat([0, 1], count)

    def state(shift, scale):
        parts = [scale * drawn(rng, count, width) + shift, scale * drawn(rng, count, width) + 2.0 + shift]
        return Samples(prompt, {"features": np.concatenate(parts)})

    found = [FID.compare(object.__new__(FID), state(shift, scale), state(0.0, 1.0)) for _ in range(100)]
    for name in ("fid_per_prompt", "fid_pooled"):
        values, errors = zip(*(draw[name] for draw in found), strict=True)
        assert 0.8 < np.mean(errors) / np.std(values, ddof=1) < most


def test_the_mean_over_prompts_and_the_whole():
    rng = np.random.default_rng(4)
    prompt = np.array([1, 0] * 30)
    mine, theirs = drawn(rng, 60, 12, 0.2), drawn(rng, 60, 12)
    found = FID.compare(object.__new__(FID), *(Samples(prompt, {"features": f}) for f in (mine, theirs)))
    each = [frechet_distance(mine[prompt == p], theirs[prompt == p]).value for p in (0, 1)]
    assert found["fid_per_prompt"].value == pytest.approx(np.mean(each))
    assert found["fid_pooled"].value == pytest.approx(frechet_distance(mine, theirs).value)
    single = Samples(np.arange(60), {"features": mine})
    assert FID.compare(object.__new__(FID), single, single).keys() == {"fid_pooled"}
