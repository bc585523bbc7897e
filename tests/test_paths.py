"""Nats recorded while sampling, compared with the densities and tested for a known exact policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.algorithms.paths import base_outputs, log_ratio
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.metrics.certificate import Paths, certify
from nabla_gfn_jax.studies.mixture import Mixture
from nabla_gfn_jax.studies.mixture2d import DATA, REWARDS

CHAIN = stable_diffusion_chain(STABLE_DIFFUSION, 50)


@pytest.fixture(autouse=True)
def fewer_replicates(monkeypatch):
    """Uses fewer replicates, for standard errors to a tenth."""
    monkeypatch.setattr(tilt, "REPLICATES", 50)


def keys_of(seed, number):
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(number))


def coefficients(chain):
    """on_x, on_eps and σ of μ = on_x x + on_eps ε, in float64 from the definition."""
    alpha, after, sigma = (np.asarray(a, np.float64) for a in (chain.at.signal, chain.to.signal, chain.sigma))
    on_eps = np.sqrt(1 - after - sigma**2) - np.sqrt(after * (1 - alpha) / alpha)
    return np.sqrt(after / alpha), on_eps, sigma


def certificate(predict, lora, reward, seed=0, number=5000, beta=1.0, chain=CHAIN):
    """The certificate of a policy in the plane, from its samples and the base model's samples with the same noise."""

    def run(lora):
        paths = jax.jit(lambda: sample_paths(predict, lora, chain, keys_of(seed, number), (2,), ()))()
        log_reward = np.asarray(paths.latents, np.float64) @ reward
        return Paths(log_reward, np.asarray(paths.spent), np.asarray(paths.log_ratio), np.zeros(number, int))

    return certify(run(lora), run(None), beta)


def test_it_samples_what_the_sampler_samples_and_its_nats_are_those_of_the_densities():
    rng = np.random.default_rng(0)
    matrices = {True: rng.normal(size=(3, 3)), False: rng.normal(size=(3, 3))}

    def predict(lora, x, level, condition):
        matrix = jnp.asarray(matrices[lora is None], jnp.float32)
        return jnp.tanh(x @ matrix + 1e-3 * level.time.astype(jnp.float32)[:, None] + condition)

    keys, condition = keys_of(1, 5), jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    paths = sample_paths(predict, {}, CHAIN, keys, (3,), condition)
    trajectory = sample(predict, {}, CHAIN, keys, (3,), condition)
    np.testing.assert_allclose(paths.latents, trajectory.samples, rtol=1e-5, atol=1e-5)
    on_x, on_eps, sigma = coefficients(CHAIN)
    states = np.asarray(trajectory.latents, np.float64)
    log_ratio, spent = np.zeros(5), np.zeros((5, 50))
    for k in range(50):
        time = np.asarray(CHAIN.at.time)[k]
        mean = {}
        for base in (False, True):
            eps = np.tanh(states[k] @ matrices[base] + 1e-3 * time + np.asarray(condition, np.float64))
            mean[base] = on_x[k] * states[k] + on_eps[k] * eps
        log_p = {b: -((states[k + 1] - m) ** 2).sum(1) / (2 * sigma[k] ** 2) for b, m in mean.items()}
        log_ratio += log_p[True] - log_p[False]
        spent[:, k] = ((mean[True] - mean[False]) ** 2).sum(1) / (2 * sigma[k] ** 2)
    np.testing.assert_allclose(paths.spent, spent, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(paths.log_ratio, log_ratio, rtol=2e-3, atol=2e-2)
    unchanged = sample_paths(predict, None, CHAIN, keys, (3,), condition)
    assert not np.any(unchanged.spent)
    assert not np.any(unchanged.log_ratio)


@pytest.mark.parametrize("paired", [False, True])
def test_along_the_base_models_paths_the_ratio_is_that_of_the_densities(paired):
    """The paths are the base model's, and the mean of p_θ/p_# over them is 1."""
    rng, count = np.random.default_rng(1), 4000
    matrices = {True: 0.3 * rng.normal(size=(2, 2)), False: 0.02 * rng.normal(size=(2, 2))}

    def change(x, level):
        return jnp.tanh(x @ jnp.asarray(matrices[False], jnp.float32) + 1e-4 * level.time.astype(jnp.float32)[:, None])

    def predict(lora, x, level, condition):
        base = jnp.tanh(x @ jnp.asarray(matrices[True], jnp.float32))
        return base if lora is None else base + 0.2 * change(x, level)

    def predict_change(lora, x, level, condition):
        return predict(None, x, level, condition), 0.2 * change(x, level)

    active = np.arange(50) < 30
    how = {"active": active, "predict_change": predict_change if paired else None}
    keys = keys_of(2, count)
    paths = sample_paths(predict, {}, CHAIN, keys, (2,), jnp.zeros((count, 0)), along_base=True, **how)
    trajectory = sample(predict, None, CHAIN, keys, (2,), jnp.zeros((count, 0)))
    np.testing.assert_allclose(paths.latents, trajectory.samples, rtol=1e-5, atol=1e-5)
    on_x, on_eps, sigma = coefficients(CHAIN)
    states, times = np.asarray(trajectory.latents, np.float64), np.asarray(CHAIN.at.time)
    log_ratio = np.zeros(count)
    for k in np.flatnonzero(active):
        base = np.tanh(states[k] @ matrices[True])
        policy = base + 0.2 * np.tanh(states[k] @ matrices[False] + 1e-4 * times[k])
        log_p = [
            -((states[k + 1] - on_x[k] * states[k] - on_eps[k] * eps) ** 2).sum(1) / (2 * sigma[k] ** 2)
            for eps in (base, policy)
        ]
        log_ratio += log_p[0] - log_p[1]
    np.testing.assert_allclose(paths.log_ratio, log_ratio, rtol=2e-3, atol=2e-3)
    assert log_ratio.std() > 0.05
    weights = np.exp(-np.asarray(paths.log_ratio, np.float64))
    assert weights.mean() == pytest.approx(1.0, abs=4 * weights.std() / np.sqrt(count))


def gaussian(reward, scale):
    """A Gaussian base, whose steps are linear, and `scale` times its exact drift to P_base · R, log R = reward · x.

    Given y after step k, log E[R | y] is linear in y, of slope reward · Π_{j>k} a_j, a_j = ∂μ_j/∂x_j: Doob's transform.
    """
    data = Mixture(np.ones(1), np.array([[0.7, -0.4]]), 0.6)
    on_x, on_eps, sigma = coefficients(CHAIN)
    alpha = np.asarray(CHAIN.at.signal, np.float64)
    slopes = on_x + on_eps * np.sqrt(1 - alpha) / (alpha * data.std**2 + 1 - alpha)
    later = np.append(np.cumprod(slopes[::-1])[::-1], 1.0)
    change = (sigma**2 * later[1:] / on_eps)[:, None] * reward
    table = np.zeros((1000, 2), np.float32)
    table[np.asarray(CHAIN.at.time)] = scale * change

    def predict(lora, x, level, condition):
        eps = data.noise_prediction(x, level.signal)
        return eps if lora is None else eps + jnp.asarray(table)[level.time]

    by_steps = ((sigma * later[1:]) ** 2).sum() * reward @ reward / 2
    return predict, by_steps, later[0] ** 2 * reward @ reward  # and the variance of log R by the start


def test_the_exact_tilt_of_a_gaussian_base_is_efficient():
    reward = np.array([1.5, 0.8])
    predict, nats, by_start = gaussian(reward, 1.0)
    result = certificate(predict, {}, reward)
    assert by_start < 0.01 * nats  # the noise that the sampler starts from is nearly forgotten
    assert result.spent.value == pytest.approx(nats, rel=1e-4)
    assert result.efficiency.value == pytest.approx(1.0, abs=4 * result.efficiency.error)
    assert result.efficiency.error < 0.1
    assert result.exponent.value == pytest.approx(1.0, abs=4 * result.exponent.error)
    assert result.at_beta.gap.value == pytest.approx(0.0, abs=4 * result.at_beta.gap.error)
    assert result.at_beta.log_weight_std.value == pytest.approx(by_start**0.5, rel=0.1)
    assert result.at_beta.effective_share.value > 0.99


def test_a_policy_that_goes_too_far_has_the_known_nats():
    reward = np.array([1.5, 0.8])
    predict, nats, _ = gaussian(reward, 1.4)
    result = certificate(predict, {}, reward)
    assert result.spent.value == pytest.approx(1.4**2 * nats, rel=1e-4)
    assert result.exponent.value == pytest.approx(1.4, abs=4 * result.exponent.error)
    assert result.at_beta.gap.value == pytest.approx(0.4**2 * nats, abs=4 * result.at_beta.gap.error + 1e-3)
    assert result.at_beta.log_weight_std.value == pytest.approx((2 * 0.4**2 * nats) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.thorough
def test_the_tilted_mixtures_own_noise_prediction_nearly_reaches_the_target(name):
    """Its drift is exact for infinitely many steps and nearly exact for 200. The gap comes from the discrete steps."""
    chain, target = stable_diffusion_chain(STABLE_DIFFUSION, 200), DATA.tilted(REWARDS[name])

    def predict(lora, x, level, condition):
        return (DATA if lora is None else target).noise_prediction(x, level.signal)

    result = certificate(predict, {}, REWARDS[name], number=2000, chain=chain)
    assert result.efficiency.value > 0.8
    assert result.exponent.value == pytest.approx(1.0, abs=0.1)
    assert result.at_beta.gap.value < 0.1 * result.spent.value + 2 * result.at_beta.gap.error
    assert result.at_beta.effective_share.value > 0.8


@pytest.mark.parametrize("carried", [False, True])
def test_the_base_model_says_nothing_new_where_it_sampled(carried):
    """o_# is the base model's output at every state, also after the policy's last step, which no LoRA changed."""
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)), jnp.float32)
    lora = {"shift": jnp.asarray([0.3, -0.2, 0.1])}

    def predict(lora, x, level, condition):
        return jnp.tanh(x @ matrix) + (0.0 if lora is None else lora["shift"][None])

    def change(lora, x, level, condition):
        return predict(lora, x, level, condition), jnp.broadcast_to(lora["shift"], x.shape)

    chain = stable_diffusion_chain(STABLE_DIFFUSION, 6)
    keys, ids = keys_of(3, 5), jnp.zeros(5, int)
    path = sample(predict, lora, chain, keys, (3,), ids, lora_steps=4)
    model = Model(chain, predict, lambda z, _: z[:, 0], {}, change if carried else None, lora_steps=4)
    found = base_outputs(model, lora, Rollout(path, path.samples[:, 0], ids, keys))
    expected = jax.vmap(lambda x: predict(None, x, None, None))(path.latents[:-1])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    ratio = log_ratio(chain, Rollout(path, path.samples[:, 0], ids, keys), found)
    assert np.abs(ratio[:4]).min() > 0
    assert not ratio[4:].any()
