"""The selection of the transitions that an update trains on."""

import jax
import numpy as np
import pytest
from test_nabla_db import BATCH, DEFAULTS, MODEL, PARAMS, rollout, sample_keys, sampled_trajectory

from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import number_of_bins, select, select_steps
from nabla_gfn_jax.errors import UserError


def test_one_step_a_bin_and_the_last_never_twice():
    steps = np.asarray(select_steps(sample_keys(3000), 50, 5))
    for i in range(5):
        counts = np.bincount(steps[:, i], minlength=50)
        inside = range(10 * i, 10 * i + (10 if i < 4 else 9))
        assert counts[list(inside)].sum() == 3000
        assert counts[list(inside)].min() > 0.75 * 3000 / len(inside)
    assert np.abs(np.corrcoef(steps.T) - np.eye(5)).max() < 0.08


def test_bins_that_divide_a_step():
    """With 20 steps and 8 bins, each bin is two and a half steps; the last bin does not contain the last step."""
    assert number_of_bins(20, 0.4, uneven=True) == 8
    steps = np.asarray(select_steps(sample_keys(4000), 20, 8))
    edges = np.arange(9) * 2.5
    assert (steps >= np.floor(edges[:-1])).all()
    assert (steps <= np.floor(edges[1:])).all()
    counts = np.bincount(steps.ravel(), minlength=20) / 4000
    assert counts[19] == 0
    np.testing.assert_allclose(counts[:17], 0.4, atol=0.03)
    np.testing.assert_allclose(counts[17:19], [0.5 / 2.5 + 0.5 / 1.5, 1 / 1.5], atol=0.03)


@pytest.mark.thorough
def test_several_updates_share_one_adjoint_and_differ_in_their_steps():
    algorithm = ResidualNablaDB(**DEFAULTS | {"credit": "adjoint"})
    choose = jax.jit(lambda r, n: algorithm.batch(PARAMS, MODEL, r, n).data, static_argnums=1)
    three, one = choose(rollout(), 3), choose(rollout(), 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), three, one)
    steps = np.asarray(three.ordinary.index)
    assert len(np.unique(steps.reshape(3, -1), axis=0)) == 3
    credit = adjoint_credit(MODEL, rollout(), DEFAULTS["beta"]).gradient
    expected = np.asarray(credit)[steps, np.arange(BATCH)[None, :, None]]
    assert np.linalg.norm(three.ordinary.adjoint.gradient - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_selection_belongs_to_the_sample():
    np.testing.assert_array_equal(select_steps(sample_keys(8), 50, 5)[3:5], select_steps(sample_keys(8)[3:5], 50, 5))


def test_selected_transitions_are_the_trajectorys():
    trajectory = sampled_trajectory()
    chosen = select(rollout(), 5)
    steps = select_steps(sample_keys(), 50, 5)
    for b in range(BATCH):
        for i in range(5):
            k = int(steps[b, i])
            np.testing.assert_array_equal(chosen.ordinary.x[b, i], trajectory.latents[k, b])
            np.testing.assert_array_equal(chosen.ordinary.y[b, i], trajectory.latents[k + 1, b])
            np.testing.assert_array_equal(chosen.ordinary.output[b, i], trajectory.outputs[k, b])
            assert chosen.ordinary.index[b, i] == k
            assert chosen.ordinary.prompt_id[b, i] == b
        np.testing.assert_array_equal(chosen.last.y[b], trajectory.samples[b])
        assert chosen.last.index[b] == 49


@pytest.mark.parametrize(("num_steps", "fraction"), [(49, 0.1), (50, 0.01), (50, 1.0), (52, 0.1)])
def test_bins_that_do_not_divide(num_steps, fraction):
    with pytest.raises(UserError, match=str(num_steps)):
        number_of_bins(num_steps, fraction)
