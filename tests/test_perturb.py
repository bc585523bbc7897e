"""Perturbed drawings: the documented ranges, measured on images that show the perturbation."""

import jax
import numpy as np

from nabla_gfn_jax.emoji.perturb import perturb

COUNT, SIZE, SQUARE = 64, 64, 24


def perturbed(seed: int = 0) -> np.ndarray:
    """Perturbed dark squares in the middle of white images. One compilation serves all tests."""
    images = np.ones((COUNT, SIZE, SIZE, 3), np.float32)
    low, high = (SIZE - SQUARE) // 2, (SIZE + SQUARE) // 2
    images[:, low:high, low:high] = 0.0
    return np.asarray(jax.jit(perturb)(jax.random.key(seed), images), np.float64)


def test_scale_and_shift_stay_within_their_ranges_and_fill_them():
    """The mass and centre of the dark pixels follow scale and shift of the square; blur conserves both."""
    dark = (1.0 - perturbed()).mean(axis=-1)
    dark = np.where(dark > 0.3, dark, 0.0)  # without the noise; half of each blurred edge
    along = [dark.max(axis=axis) > 0.5 for axis in (1, 2)]
    width = np.array([edge.sum(axis=1) for edge in along]).ravel() / SQUARE
    centre = np.array([(edge * np.arange(SIZE)).sum(axis=1) / edge.sum(axis=1) for edge in along]) - (SIZE - 1) / 2
    assert 0.85 - 1.5 / SQUARE < width.min() < 0.92
    assert 1.02 < width.max() < 1.08 + 1.5 / SQUARE
    assert 3.0 < np.abs(centre).max() < 4.5


def test_noise_differs_from_image_to_image_up_to_its_bound():
    """Corners change only by the noise and the clip at white, which gives a standard deviation of .58 σ."""
    corners = perturbed()[:, :8, :8].reshape(COUNT, -1)
    deviation = corners.std(axis=1) / np.sqrt((1 - 1 / np.pi) / 2)
    assert deviation.max() < 0.06 * 1.2
    assert deviation.max() > 0.045
    assert deviation.min() < 0.01
    assert corners.max() <= 1.0


def test_an_images_perturbation_depends_on_the_key_and_its_place_alone():
    first, again, other = perturbed(0), perturbed(0), perturbed(1)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).mean() > 0.01
    assert np.abs(first[0] - first[1]).mean() > 0.01
