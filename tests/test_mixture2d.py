"""The exact target in the plane: its closed forms, distances to it, and an algorithm that comes close to it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.studies import mixture2d
from nabla_gfn_jax.studies.mixture import Mixture, cell_kl, distance, sampled
from nabla_gfn_jax.studies.mixture2d import BASE, BASES, DATA, REWARDS, Run, draw, make_model, runs, study


def _density(mixture, points):
    squares = ((points[:, None] - mixture.means) ** 2).sum(-1)
    return (np.exp(-squares / (2 * mixture.std**2)) / (2 * np.pi * mixture.std**2)) @ mixture.weights


def _grid(step=0.02):
    axis = np.arange(-5, 5, step) + step / 2
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), step**2


@pytest.mark.parametrize("reward", REWARDS)
def test_the_tilted_mixture_is_the_normalised_product(reward):
    points, area = _grid()
    product = _density(DATA, points) * np.exp(points @ REWARDS[reward])
    np.testing.assert_allclose(
        _density(DATA.tilted(REWARDS[reward]), points), product / (product.sum() * area), atol=1e-6
    )


def test_the_issues_weights():
    np.testing.assert_allclose(DATA.tilted(REWARDS["mild"]).weights, [0.094, 0.695, 0.211], atol=5e-4)


def test_noise_prediction_is_minus_the_scaled_score():
    points = np.random.default_rng(0).normal(size=(40, 2)) * 2
    for alpha_bar in (0.01, 0.4, 0.99):
        std = (alpha_bar * DATA.std**2 + 1 - alpha_bar) ** 0.5
        noised = Mixture(DATA.weights, alpha_bar**0.5 * DATA.means, std)
        step = 1e-5
        shifts = [np.array([step, 0.0]), np.array([0.0, step])]
        log = lambda x, noised=noised: np.log(_density(noised, x) + 1e-300)  # noqa: E731
        score = np.stack([(log(points + h) - log(points - h)) / (2 * step) for h in shifts], -1)
        near = _density(noised, points) > 1e-200
        predicted = DATA.noise_prediction(jnp.asarray(points, jnp.float32), jnp.full(40, alpha_bar, jnp.float32))
        expected = -((1 - alpha_bar) ** 0.5) * score
        np.testing.assert_allclose(predicted[near], expected[near], rtol=2e-4, atol=2e-4)


def test_the_velocity_is_the_mean_of_noise_minus_data():
    """Compares with Bayes' rule on samples of the data: E[ε − x₀ | x], weighted by the density of (x − (1−s) x₀)/s."""
    rng = np.random.default_rng(0)
    data, points = DATA.sample(rng, 200_000), rng.normal(size=(5, 2))
    for s in (0.4, 0.7, 1.0):
        noise = (points[:, None] - (1 - s) * data[None]) / s
        log_weights = -0.5 * (noise**2).sum(-1)
        weights = np.exp(log_weights - log_weights.max(1, keepdims=True))
        expected = (weights[..., None] * (noise - data[None])).sum(1) / weights.sum(1)[:, None]
        found = DATA.velocity(jnp.asarray(points, jnp.float32), jnp.full(5, s, jnp.float32))
        np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("base", BASES)
def test_what_fifty_steps_draw_is_known(base):
    """Tests the noise prediction in DDPM's steps, and the velocity in the memoryless process of a rectified flow."""
    points = np.asarray(draw(None, make_model(REWARDS["mild"], base), 20_000, jax.random.key(0)), np.float64)
    near = distance(points, BASES[base])
    assert near.forward < 3e-3
    assert near.reverse < 3e-3
    assert distance(points, DATA).forward > 5 * near.forward  # 50 steps are not the continuous process


def test_more_steps_come_closer_to_the_data():
    stds = [sampled(DATA, stable_diffusion_chain(STABLE_DIFFUSION, steps)).std for steps in (20, 50, 200)]
    assert stds == sorted(stds)
    assert stds[-1] < DATA.std


def test_distances_of_exact_draws_are_their_bias():
    points = BASE.sample(np.random.default_rng(1), 20_000)
    near = distance(points, BASE)
    assert 0 < near.forward < 1.5e-3
    assert 0 < near.reverse < 1.5e-3
    assert cell_kl(points, BASE) < 0.015


@pytest.mark.parametrize("reward", REWARDS)
def test_distances_of_exact_draws_of_another_mixture(reward):
    """Compares with the integral of p log p/q on a grid."""
    other, target = BASE, BASE.tilted(REWARDS[reward])
    points, area = _grid()
    p, q = _density(other, points) + 1e-300, _density(target, points) + 1e-300
    forward, reverse = (p * np.log(p / q)).sum() * area, (q * np.log(q / p)).sum() * area
    draws = other.sample(np.random.default_rng(2), 50_000)
    measured = distance(draws, target)
    assert measured.forward == pytest.approx(forward, rel=0.03)
    assert measured.reverse == pytest.approx(reverse, rel=0.03)
    assert cell_kl(draws, target) == pytest.approx(forward, rel=0.04)


def test_a_lost_mode_counts():
    points = Mixture(np.array([0.5, 0.5, 0.0]), BASE.means, BASE.std).sample(np.random.default_rng(3), 5000)
    assert distance(points, BASE).reverse > 1.0


def _adjoint() -> Run:
    return next(run for run in runs(3000) if run.name == "adjoint, batch 512")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.thorough
def test_a_few_updates_bring_the_policy_close(base):
    points = np.asarray(draw(None, make_model(REWARDS["doubled"], base), 5000, jax.random.key(0)))
    before = distance(points, BASES[base].tilted(REWARDS["doubled"]))
    run = dataclasses.replace(_adjoint(), updates=400, batch=256, learning_rate=2e-3)
    result, _ = study(run, "doubled", samples=5000, base=base)
    assert before.forward > 0.9
    assert result.kl_policy_target < 0.2 * before.forward


@pytest.mark.slow
@pytest.mark.parametrize("reward", REWARDS)
def test_the_adjoint_reaches_the_target(reward):
    result, _ = study(_adjoint(), reward)
    assert result.kl_policy_target <= 0.02
    assert result.kl_target_policy <= 0.02


@pytest.mark.thorough
def test_the_command_writes_its_table(tmp_path, capsys):
    mixture2d.main(["mixture2d", f"--out={tmp_path}", "--updates=2", "--only=DRaFT-10"])
    assert "DRaFT-10" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["reward"] for r in results] == ["mild"] * 3 + ["doubled"] * 3
    assert len(np.load(tmp_path / "samples.npz").files) == 6
    assert (tmp_path / "table.md").read_text().count("\n") == 8


def test_a_line_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        mixture2d.main(["mixture2d", f"--out={tmp_path}", "--only=nothing"])
    assert exit_info.value.code == 2
    assert "nothing" in capsys.readouterr().err
