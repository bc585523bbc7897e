"""The schedule against diffusers' DDIMScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION as CONFIG
from nabla_gfn_jax.diffusion.schedule import alphas_cumprod, clean_prediction, make_schedule, step_mean
from nabla_gfn_jax.errors import UserError


def test_alphas_cumprod_match_diffusers():
    expected = DDIMScheduler(**CONFIG).alphas_cumprod.numpy()
    actual = alphas_cumprod(CONFIG)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert float(actual[0]) == pytest.approx(0.99915, abs=1e-7)


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 600])
def test_times_and_sigmas_match_diffusers(num_steps):
    oracle = DDIMScheduler(**CONFIG)
    oracle.set_timesteps(num_steps)
    schedule = make_schedule(CONFIG, num_steps)
    np.testing.assert_array_equal(schedule.timestep, oracle.timesteps.numpy())
    spacing = 1000 // num_steps
    np.testing.assert_array_equal(schedule.next_timestep, np.maximum(oracle.timesteps.numpy() - spacing, 0))
    variances = [float(oracle._get_variance(t, t - spacing)) for t in oracle.timesteps]
    # diffusers takes 1 - alpha_bar in float32, which leaves it four digits next to t = 0
    np.testing.assert_allclose(schedule.sigma**2, variances, rtol=3e-4)
    assert float(schedule.sigma.min()) > 0


def test_fifty_steps_are_the_papers():
    schedule = make_schedule(CONFIG, 50)
    assert schedule.timestep[:3].tolist() == [981, 961, 941]
    assert schedule.timestep[-2:].tolist() == [21, 1]
    assert schedule.next_timestep[-1] == 0
    assert schedule.num_steps == 50


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_batch_of_different_steps_matches_diffusers(eta):
    oracle = DDIMScheduler(**CONFIG)
    oracle.set_timesteps(50)
    schedule = make_schedule(CONFIG, 50, eta)
    rng = np.random.default_rng(0)
    indices = jnp.asarray([0, 17, 48, 49])
    x, eps, noise = (rng.normal(size=(4, 5, 3, 2)).astype(np.float32) for _ in range(3))
    step = schedule[indices]
    y = step_mean(jnp.asarray(eps), jnp.asarray(x), step) + step.sigma[:, None, None, None] * noise
    clean = clean_prediction(jnp.asarray(eps), jnp.asarray(x), step.alpha_bar)
    for i, k in enumerate(indices.tolist()):
        expected = oracle.step(
            torch.from_numpy(eps[i]),
            oracle.timesteps[k],
            torch.from_numpy(x[i]),
            eta=eta,
            variance_noise=torch.from_numpy(noise[i]),
        )
        np.testing.assert_allclose(y[i], expected.prev_sample.numpy(), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(clean[i], expected.pred_original_sample.numpy(), rtol=1e-4, atol=1e-4)


def dpm_solver(num_steps, **fields):
    oracle = DPMSolverMultistepScheduler.from_config(
        {**CONFIG, "timestep_spacing": "linspace", **fields},
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        final_sigmas_type="sigma_min",
    )
    oracle.set_timesteps(num_steps)
    return oracle


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
def test_dpm_solver_times_and_noise_levels_match_diffusers(num_steps):
    oracle, schedule = dpm_solver(num_steps), make_schedule(CONFIG, num_steps, sampler="sde_dpm_solver")
    np.testing.assert_array_equal(schedule.timestep, oracle.timesteps.numpy())
    np.testing.assert_array_equal(schedule.next_timestep, [*oracle.timesteps.numpy()[1:], 0])
    levels = np.append(schedule.alpha_bar, schedule.alpha_bar_next[-1])
    np.testing.assert_allclose(np.sqrt((1 - levels) / levels), oracle.sigmas.numpy(), rtol=1e-5)
    assert float(schedule.sigma.min()) > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_dpm_solver_trajectory_matches_diffusers(prediction_type):
    """Twenty steps with the same noise; the network's part is played by a fixed nonlinear function."""
    oracle, schedule = (
        dpm_solver(20, prediction_type=prediction_type),
        make_schedule(CONFIG, 20, sampler="sde_dpm_solver"),
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    theirs, ours = torch.from_numpy(x), jnp.asarray(x)
    for k in range(20):
        noise = rng.normal(size=x.shape).astype(np.float32)
        output = torch.tanh(theirs) + 0.3 * torch.roll(theirs, 1, 2)
        theirs = oracle.step(output, oracle.timesteps[k], theirs, variance_noise=torch.from_numpy(noise)).prev_sample
        output = jnp.tanh(ours) + 0.3 * jnp.roll(ours, 1, 2)
        step = schedule[k]
        if prediction_type == "v_prediction":
            output = jnp.sqrt(step.alpha_bar) * output + jnp.sqrt(1 - step.alpha_bar) * ours
        ours = step_mean(output, ours, step) + step.sigma * noise
        assert np.linalg.norm(ours - theirs.numpy()) < 1e-4 * np.linalg.norm(theirs.numpy()), k


def test_an_unknown_sampler():
    with pytest.raises(UserError, match="sampler is 'heun'; choose one of ddpm, sde_dpm_solver"):
        make_schedule(CONFIG, 20, sampler="heun")


def test_indexing_keeps_the_structure():
    schedule = make_schedule(CONFIG, 10)
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(schedule[jnp.asarray([3, 9])]))
    assert schedule[3].timestep == 601


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("timestep_spacing", "trailing"),
        ("set_alpha_to_one", True),
        ("steps_offset", 0),
        ("clip_sample", True),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_an_unsupported_field_is_named(field, value):
    with pytest.raises(UserError, match=field):
        make_schedule({**CONFIG, field: value}, 50)


def test_missing_fields_mean_what_they_mean_in_diffusers():
    without_spacing = {k: v for k, v in CONFIG.items() if k not in ("timestep_spacing", "prediction_type")}
    make_schedule(without_spacing, 50)
    for field in ("set_alpha_to_one", "beta_start"):
        with pytest.raises(UserError, match=field):
            make_schedule({k: v for k, v in CONFIG.items() if k != field}, 50)


@pytest.mark.parametrize(("num_steps", "eta"), [(0, 1.0), (1000, 1.0), (50, 1.5), (50, -0.1)])
def test_arguments_out_of_range(num_steps, eta):
    with pytest.raises(UserError):
        make_schedule(CONFIG, num_steps, eta)
