"""The chain's coefficients, compared with diffusers' schedulers and with their definitions."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from nabla_gfn_jax.diffusion.chain import rectified_flow_chain, stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION as CONFIG
from nabla_gfn_jax.diffusion.schedule import alphas_cumprod
from nabla_gfn_jax.errors import UserError


def test_alphas_cumprod_match_diffusers():
    expected = DDIMScheduler(**CONFIG).alphas_cumprod.numpy()
    actual = alphas_cumprod(CONFIG)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert float(actual[0]) == pytest.approx(0.99915, abs=1e-7)


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50, 600])
def test_times_and_sigmas_match_diffusers(num_steps):
    oracle = DDIMScheduler(**CONFIG)
    oracle.set_timesteps(num_steps)
    chain = stable_diffusion_chain(CONFIG, num_steps)
    np.testing.assert_array_equal(chain.at.time, oracle.timesteps.numpy())
    spacing = 1000 // num_steps
    np.testing.assert_array_equal(chain.to.time, np.maximum(oracle.timesteps.numpy() - spacing, 0))
    variances = [float(oracle._get_variance(t, t - spacing)) for t in oracle.timesteps]
    # diffusers takes 1 - alpha_bar in float32, which leaves it four digits next to t = 0
    np.testing.assert_allclose(chain.sigma**2, variances, rtol=3e-4)
    assert float(chain.sigma.min()) > 0


def test_fifty_steps_are_the_papers():
    chain = stable_diffusion_chain(CONFIG, 50)
    assert chain.at.time[:3].tolist() == [981, 961, 941]
    assert chain.at.time[-2:].tolist() == [21, 1]
    assert chain.to.time[-1] == 0
    assert chain.num_steps == 50


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_batch_of_different_steps_matches_diffusers(eta):
    oracle = DDIMScheduler(**CONFIG)
    oracle.set_timesteps(50)
    chain = stable_diffusion_chain(CONFIG, 50, eta)
    rng = np.random.default_rng(0)
    indices = jnp.asarray([0, 17, 48, 49])
    x, eps, noise = (rng.normal(size=(4, 5, 3, 2)).astype(np.float32) for _ in range(3))
    step = chain[indices]
    y = step.mean(jnp.asarray(eps), jnp.asarray(x)) + step.sigma[:, None, None, None] * noise
    clean = step.at.clean(jnp.asarray(eps), jnp.asarray(x))
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
    oracle, chain = dpm_solver(num_steps), stable_diffusion_chain(CONFIG, num_steps, sampler="sde_dpm_solver")
    np.testing.assert_array_equal(chain.at.time, oracle.timesteps.numpy())
    np.testing.assert_array_equal(chain.to.time, [*oracle.timesteps.numpy()[1:], 0])
    levels = np.append(chain.at.signal, chain.to.signal[-1])
    np.testing.assert_allclose(np.sqrt((1 - levels) / levels), oracle.sigmas.numpy(), rtol=1e-5)
    assert float(chain.sigma.min()) > 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_dpm_solver_trajectory_matches_diffusers(prediction_type):
    """Takes twenty steps with the same noise and a fixed nonlinear function as the network."""
    oracle, chain = (
        dpm_solver(20, prediction_type=prediction_type),
        stable_diffusion_chain(CONFIG | {"prediction_type": prediction_type}, 20, sampler="sde_dpm_solver"),
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    theirs, ours = torch.from_numpy(x), jnp.asarray(x)
    for k in range(20):
        noise = rng.normal(size=x.shape).astype(np.float32)
        output = torch.tanh(theirs) + 0.3 * torch.roll(theirs, 1, 2)
        theirs = oracle.step(output, oracle.timesteps[k], theirs, variance_noise=torch.from_numpy(noise)).prev_sample
        output = jnp.tanh(ours) + 0.3 * jnp.roll(ours, 1, 2)
        step = chain[k]
        ours = step.mean(output, ours) + step.sigma * noise
        assert np.linalg.norm(ours - theirs.numpy()) < 1e-4 * np.linalg.norm(theirs.numpy()), k


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("num_steps", "first", "early"), [(4, 834, 3), (20, 968, 15), (100, 994, 75), (333, 999, 250)])
def test_more_steps_early_match_diffusers(num_steps, first, early):
    """Its DDPM takes any times. Its last step goes to no noise at all, where ours goes to time 0."""
    chain = stable_diffusion_chain(CONFIG, num_steps, sampler="ddpm_early")
    times = chain.at.time.tolist()
    assert (times[0], times[-1], chain.to.time.tolist()) == (first, 1, [*times[1:], 0])
    assert sum(t >= 501 for t in times) == early
    for half in (times[:early], times[early - 1 :]):
        gaps = -np.diff(half)
        assert gaps.max() - gaps.min() <= 1
        assert gaps.min() > 0
    oracle = DDPMScheduler.from_config({**CONFIG, "variance_type": "fixed_small"})
    oracle.set_timesteps(timesteps=times)
    rng = np.random.default_rng(0)
    x, eps = (rng.normal(size=(num_steps, 1, 5)).astype(np.float32) for _ in range(2))
    mean = chain.mean_x[:, None, None] * x + chain.mean_o[:, None, None] * eps
    outputs, states = torch.from_numpy(eps), torch.from_numpy(x)
    for k, t in enumerate(times[:-1]):
        np.testing.assert_allclose(chain.sigma[k] ** 2, float(oracle._get_variance(t)), rtol=3e-4)
        theirs = oracle.step(outputs[k], t, states[k], generator=torch.Generator().manual_seed(k)).prev_sample
        noise = torch.randn(1, 5, generator=torch.Generator().manual_seed(k))
        np.testing.assert_allclose(mean[k] + chain.sigma[k] * noise.numpy(), theirs.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [4, 100, 333])
def test_more_steps_early_of_a_schedule_that_ends_without_signal(num_steps):
    config = CONFIG | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    chain = stable_diffusion_chain(config, num_steps, sampler="ddpm_early")
    assert chain.at.time[0] == 999
    assert (np.diff(chain.at.time) < 0).all()
    assert chain.to.time.tolist() == [*chain.at.time[1:].tolist(), 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(chain))


@pytest.mark.parametrize("num_steps", [3, 334])
def test_too_few_and_too_many_steps_early(num_steps):
    with pytest.raises(UserError, match=f"num_steps is {num_steps}; the sampler ddpm_early can take 4 to 333"):
        stable_diffusion_chain(CONFIG, num_steps, sampler="ddpm_early")


def test_an_unknown_sampler():
    with pytest.raises(UserError, match="sampler is 'heun'; choose one of ddpm, ddpm_early, sde_dpm_solver"):
        stable_diffusion_chain(CONFIG, 20, sampler="heun")


def test_indexing_keeps_the_structure():
    chain = stable_diffusion_chain(CONFIG, 10)
    assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(chain[jnp.asarray([3, 9])]))
    assert chain[3].at.time == 601


# Schedulers that folders name, with the fields that their files differ in.
SCHEDULERS = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "EulerDiscreteScheduler": {"timestep_spacing": "leading", "steps_offset": 1},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"timestep_spacing": "trailing"},
    "LCMScheduler": {},
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_counts_and_not_the_sampler_of_a_file(name):
    """Each file gives the chain of Stable Diffusion's own file, also after diffusers' `from_config`."""
    scheduler = getattr(diffusers, name)
    schedule = {field: CONFIG[field] for field in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    original = schedule | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False}
    for config in (scheduler(**schedule | SCHEDULERS[name]).config, scheduler.from_config(original).config):
        ours = stable_diffusion_chain(json.loads(json.dumps(dict(config))), 50)
        jax.tree.map(np.testing.assert_array_equal, ours, stable_diffusion_chain(CONFIG, 50))


@pytest.mark.parametrize(
    "fields", [{"beta_schedule": "linear"}, {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()}]
)
def test_other_schedules_match_diffusers(fields):
    expected = DDIMScheduler(**CONFIG | fields).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(CONFIG | fields), expected, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5])  # at 1 diffusers' first step is the root of a rounding error below 0
def test_a_schedule_that_ends_without_signal_matches_diffusers(num_steps, eta):
    """Starts from pure noise at 999, with a fixed nonlinear function as the network."""
    config = CONFIG | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    oracle, chain = (
        DDIMScheduler(**config | {"timestep_spacing": "trailing"}),
        stable_diffusion_chain(config, num_steps, eta),
    )
    oracle.set_timesteps(num_steps)
    np.testing.assert_array_equal(chain.at.time, oracle.timesteps.numpy())
    assert chain.at.time[0] == 999
    assert chain.at.signal[0] == 0
    assert jax.tree.all(jax.tree.map(lambda a: bool(np.isfinite(a).all()), chain))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
    theirs, ours = torch.from_numpy(x), jnp.asarray(x)
    for k in range(num_steps):
        noise = rng.normal(size=x.shape).astype(np.float32)
        output = torch.tanh(theirs) + 0.3 * torch.roll(theirs, 1, 2)
        step = oracle.step(output, oracle.timesteps[k], theirs, eta=eta, variance_noise=torch.from_numpy(noise))
        theirs, output = step.prev_sample, jnp.tanh(ours) + 0.3 * jnp.roll(ours, 1, 2)
        ours = chain[k].mean(output, ours) + chain[k].sigma * noise
        # diffusers takes the last variances of small differences in float32
        assert np.linalg.norm(ours - theirs.numpy()) < 2e-4 * np.linalg.norm(theirs.numpy()), k
    stable_diffusion_chain(config, num_steps, eta, "sde_dpm_solver")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"trained_betas": [0.1]}, "betas are not 1000 numbers"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr .* 'v_prediction' can"),
    ],
)
def test_an_unsupported_schedule_is_named(fields, named):
    with pytest.raises(UserError, match=named):
        stable_diffusion_chain({**CONFIG, **fields}, 50)


def test_missing_fields_mean_what_they_mean_in_diffusers():
    stable_diffusion_chain({k: v for k, v in CONFIG.items() if k not in ("prediction_type", "trained_betas")}, 50)
    for field in ("beta_end", "beta_start"):
        with pytest.raises(UserError, match=field):
            stable_diffusion_chain({k: v for k, v in CONFIG.items() if k != field}, 50)


@pytest.mark.parametrize(("num_steps", "eta"), [(0, 1.0), (1000, 1.0), (50, 1.5), (50, -0.1)])
def test_arguments_out_of_range(num_steps, eta):
    with pytest.raises(UserError):
        stable_diffusion_chain(CONFIG, num_steps, eta)


def test_other_predictions_are_refused():
    with pytest.raises(UserError, match="prediction_type 'sample' is not supported"):
        stable_diffusion_chain(CONFIG | {"prediction_type": "sample"}, 50)


CHAINS = {
    "epsilon": stable_diffusion_chain(CONFIG, 50),
    "v_prediction": stable_diffusion_chain(CONFIG | {"prediction_type": "v_prediction"}, 50),
    "without signal": stable_diffusion_chain(
        CONFIG | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 50
    ),
    "rectified flow": rectified_flow_chain(50, shift=3.0),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_outputs_say_what_they_are_made_of(kind):
    """Computes state and output from a clean sample and noise by their definitions, and recovers both."""
    chain, rng = CHAINS[kind], np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 50, 6)).astype(np.float32)
    signal = np.asarray(chain.at.signal, np.float64)[:, None]
    x = np.sqrt(signal) * clean + np.sqrt(1 - signal) * noise
    velocity = np.sqrt(signal) * noise - np.sqrt(1 - signal) * clean
    output = {
        "epsilon": noise,
        "v_prediction": velocity,
        "without signal": velocity,
        "rectified flow": noise - clean,
    }[kind]
    output, x = (jnp.asarray(a, jnp.float32) for a in (output, x))
    size = np.abs(np.asarray(chain.at.clean_o))[:, None] * 2e-6
    assert (np.abs(chain.at.clean(output, x) - clean) < size + 2e-6).all()
    np.testing.assert_allclose(chain.at.noise(output, x), noise, atol=2e-6)


@pytest.mark.parametrize("kind", CHAINS)
def test_the_chain_keeps_the_marginals_of_its_noising(kind):
    """With the true x₀ and ε, y has signal ᾱ'; x sampled from y by the noising kernel has signal ᾱ. In float64."""
    chain = jax.tree.map(lambda a: np.asarray(a, np.float64), CHAINS[kind])
    at, to = chain.at, chain.to
    # x = √ᾱ x₀ + √(1−ᾱ) ε; o such that it gives back x₀ and ε.
    on_clean = (chain.mean_o / at.clean_o, chain.mean_x - chain.mean_o * at.clean_x / at.clean_o)  # of x̂, of x
    from_clean = on_clean[0] + on_clean[1] * np.sqrt(at.signal)
    from_noise = on_clean[1] * np.sqrt(1 - at.signal)
    np.testing.assert_allclose(from_clean, np.sqrt(to.signal), atol=2e-6)
    np.testing.assert_allclose(from_noise**2 + chain.sigma**2, 1 - to.signal, atol=2e-6)
    np.testing.assert_allclose(chain.noising_scale**2 * to.signal, at.signal, atol=2e-7)
    np.testing.assert_allclose(
        chain.noising_scale**2 * (1 - to.signal) + chain.noising_sigma**2, 1 - at.signal, atol=2e-6
    )


def test_a_rectified_flows_state_at_s():
    """The network's input is (1−s) x₀ + s ε, and its times run from noise to nearly clean."""
    chain = rectified_flow_chain(20)
    s = np.asarray(chain.at.time, np.float64) / 1000
    np.testing.assert_allclose(chain.at.input_scale * np.sqrt(chain.at.signal), 1 - s, atol=1e-6)
    np.testing.assert_allclose(chain.at.input_scale * np.sqrt(1 - chain.at.signal), s, atol=1e-6)
    assert s[0] == 1.0
    assert float(chain.to.time[-1]) == pytest.approx(1.0)
    assert float(chain.sigma.min()) > 0


@pytest.mark.parametrize("arguments", [{"num_steps": 0}, {"end": 0.0}, {"end": 1.0}, {"shift": 0.0}, {"eta": 2.0}])
def test_a_rectified_flows_arguments_out_of_range(arguments):
    with pytest.raises(UserError):
        rectified_flow_chain(**{"num_steps": 10} | arguments)
