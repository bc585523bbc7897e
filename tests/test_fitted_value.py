"""The fitted value: its network and its losses against PyTorch, and its target in the plane."""

import jax
import numpy as np
import pytest
import torch
from test_nabla_db import (
    BATCH,
    CARRIED,
    DEFAULTS,
    LORA,
    MODEL,
    _float64,
    _oracle,
    _reward,
    first_update,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms import value_network
from nabla_gfn_jax.algorithms.fitted_value import FittedValue
from nabla_gfn_jax.algorithms.mean_shift import mean_shifts
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.studies import mixture2d
from nabla_gfn_jax.studies.mixture import sampled

torch.set_num_threads(1)
LAMBDA, POLICY_STEPS = 3.0, 50
SMALL = {"components": 3, "width": 16, "fit_updates": 20, "fit_batch": 64, "weight_clip": 6.0}
FIT = Fit(FitOptions(**SMALL), 64)


def paths(count, states=2, elements=5, seed=0):
    """What V sees of states, samples, log weights and prompts of paths."""
    random = np.random.default_rng(seed)
    samples = (random.normal(size=(count, elements)) * [3, 2, 1, 0.3, 0.1] + 1).astype(np.float32)
    known = np.linspace(0.3, 0.9, states)[:, None]  # of the sample, in a state
    clean = (known * samples[:, None] + 0.1 * random.normal(size=(count, states, elements))).astype(np.float32)
    log_w = random.normal(size=(count, states)).astype(np.float32)
    guess = (0.4 * random.normal(size=(count, states)) + 0.3 * log_w - 2).astype(np.float32)
    return Seen(clean, guess), samples, log_w, random.integers(0, 2, count)


def network_in_torch(weights, features, time, prompt):
    """V − log Z in float64, from what the network sees of states."""
    waves = time[:, None] * np.pi * 2.0 ** torch.arange(6)
    h = torch.cat([features, time[:, None], torch.sin(waves), torch.cos(waves)], dim=1)
    for number, (matrix, bias) in enumerate(weights["layers"]):
        z = h @ matrix + bias + (weights["prompts"][prompt] if number == 0 else 0)
        h = (0 if number == 0 else h) + z * torch.sigmoid(z)
    return h @ weights["out"][0] + weights["out"][1]


def value_in_torch(weights, x, guess, memory, prompt, state):
    """V − log Z of states in float64, from x̂ and log R(x̂), stated anew."""
    known, states = memory.prompt_id >= 0, memory.components.shape[1]
    old, ends = memory.components[known].astype(np.float64), memory.ends[known].astype(np.float64)
    spread = np.sqrt(((ends - old[:, state]) ** 2).mean(0)).max()
    unit = max(spread, ends.std(0).max() / 4)
    a = (x - _float64(memory.centre)) @ _float64(memory.basis) - torch.as_tensor(old[:, state].mean(0))
    seen = memory.guess[known, state].astype(np.float64)
    g = (guess - float(seen.mean())) / float(seen.std())
    t = torch.full((len(x),), state / (states - 1), dtype=torch.float64)
    return network_in_torch(weights, torch.cat([a / unit, g[:, None]], dim=1), t, prompt)


def _log_reward(clean, oracle):
    return _reward(torch, clean, oracle.condition)


@pytest.fixture(scope="module")
def fitted():
    states, samples, log_w, prompt_id = paths(40)
    memory = FIT.add(ValueMemory.empty(2), states, samples, log_w, prompt_id)
    return FIT.fitted(memory, np.asarray([0.4, -0.2]))


@pytest.mark.parametrize("prompt", [0, 1])
@pytest.mark.parametrize("state", [0, 1])
def test_the_value_and_its_gradient(prompt, state, fitted):
    """V is what the network says with the running mean of its weights; what is told a state is V's gradient there."""
    states, _, _, prompt_id = paths(40)
    gradients, value = FIT.gradients(fitted, states, prompt_id), FIT.values(fitted, states, prompt_id)
    own = prompt_id == prompt
    x, guess = (_float64(seen[own, state]).requires_grad_() for seen in states)
    v = value_in_torch(_float64(fitted.network.average), x, guess, fitted, prompt, state)
    assert v.std() > 0.01
    np.testing.assert_allclose(value[own, state], v.detach(), rtol=1e-4, atol=1e-5)
    for found, expected in zip(gradients, torch.autograd.grad(v.sum(), (x, guess)), strict=True):
        scale = float(expected.abs().max())
        assert scale > 1e-3
        np.testing.assert_allclose(found[own, state], expected, rtol=1e-4, atol=1e-4 * scale)


def test_an_update_is_a_step_of_adam(fitted):
    """Without noise: Adam on the mean of V + W/Z e^−V."""
    random, network = np.random.default_rng(3), fitted.network
    size = len(network.weights["layers"][0][0]) - 13
    points = value_network.Points(
        features=random.normal(size=(30, size)).astype(np.float32),
        time=random.uniform(0.1, 0.9, 30).astype(np.float32),
        prompt_id=random.integers(0, 2, 30).astype(np.int32),
    )
    ratio = random.exponential(size=30).astype(np.float32)
    after = value_network.updated(network, points, ratio, np.zeros(size, np.float32), jax.random.key(0), rate=1e-3)

    weights = jax.tree.map(lambda a: _float64(a).requires_grad_(), network.weights)
    v = network_in_torch(weights, _float64(points.features), _float64(points.time), points.prompt_id)
    (v + _float64(ratio) * torch.exp(-v)).mean().backward()
    count = int(network.moments[0].count) + 1
    for old, leaf, mu, nu, new in zip(
        *map(jax.tree.leaves, (network.weights, weights, network.moments[0].mu, network.moments[0].nu, after.weights)),
        strict=True,
    ):
        slope = leaf.grad.numpy()
        mean, square = (0.9 * mu + 0.1 * slope) / (1 - 0.9**count), (0.99 * nu + 0.01 * slope**2) / (1 - 0.99**count)
        np.testing.assert_allclose(new, old - 1e-3 * mean / (np.sqrt(square) + 1e-8), rtol=1e-3, atol=1e-6)
    kept = min(0.99, int(network.updates) / (int(network.updates) + 10))
    expected = jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, network.average, after.weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.average, expected)


def test_the_loss_goes_on_as_its_tangent_below_minus_five():
    v, ratio = np.linspace(-9, 3, 25), np.random.default_rng(0).exponential(size=25)
    value, slope = -5 + ratio * np.exp(5.0), 1 - ratio * np.exp(5.0)
    expected = np.where(v > -5, v + ratio * np.exp(-v), value + slope * (v + 5)).mean()
    found = value_network.gamma_loss(v.astype(np.float32), ratio.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_fit_goes_on_where_it_stopped(fitted):
    """The draws and the noise are those of the number of paths seen, so that a resumed run is the same to the bit."""
    again = FIT.fitted(jax.tree.map(np.copy, fitted), np.asarray([0.4, -0.2]))
    other = FIT.fitted(fitted, np.asarray([0.4, -0.2]))
    jax.tree.map(np.testing.assert_array_equal, again.network, other.network)
    assert int(again.network.updates) == 2 * SMALL["fit_updates"]


def test_a_linear_log_value_is_found():
    """log W = 1.2 times the first element, and noise of known mean: the slope comes near with many paths."""
    random = np.random.default_rng(1)
    clean = random.normal(size=(4000, 1, 4)).astype(np.float32) * np.asarray([1, 0.8, 0.5, 0.1], np.float32)
    log_w = (0.6 * clean[..., 0] + 0.5 * random.normal(size=(4000, 1)) - 0.125).astype(np.float32)
    samples = clean[:, 0] + random.normal(size=(4000, 4)).astype(np.float32)
    fit = Fit(FitOptions(components=3, width=32, fit_updates=400, fit_batch=512, weight_clip=50.0), 4000)
    states, ids = Seen(clean, np.zeros((4000, 1), np.float32)), np.zeros(4000, int)
    memory = fit.add(ValueMemory.empty(1), states, samples, log_w, ids)
    memory = fit.fitted(memory, np.log(np.exp(log_w).mean(0)))
    gradient, by_guess = fit.gradients(memory, states, ids)
    np.testing.assert_allclose(gradient[:, 0].mean(0), [0.6, 0, 0, 0], atol=0.05)
    assert not by_guess.any()


def test_what_the_components_do_not_show_is_found_by_the_guess():
    """log W = 1.2 times the guess, of which the components know nothing."""
    random = np.random.default_rng(2)
    clean, guess = random.normal(size=(4000, 1, 2)), 0.5 * random.normal(size=(4000, 1)) - 3
    log_w = (1.2 * guess + 0.5 * random.normal(size=(4000, 1)) - 0.125).astype(np.float32)
    samples = (clean[:, 0] + random.normal(size=(4000, 2))).astype(np.float32)
    fit = Fit(FitOptions(components=2, width=32, fit_updates=400, fit_batch=512, noise=0.0, weight_clip=50.0), 4000)
    states, ids = Seen(clean.astype(np.float32), guess.astype(np.float32)), np.zeros(4000, int)
    memory = fit.add(ValueMemory.empty(1), states, samples, log_w, ids)
    memory = fit.fitted(memory, np.log(np.exp(log_w).mean(0)))
    gradient, by_guess = fit.gradients(memory, states, ids)
    np.testing.assert_allclose(by_guess.mean(), 1.2, atol=0.05)
    np.testing.assert_allclose(gradient[:, 0].mean(0), [0, 0], atol=0.05)


def test_the_value_does_not_fall_where_there_is_no_reward():
    """W is 0 in one half of the states. V comes to the floor's logarithm there; without a floor it falls and falls."""
    random = np.random.default_rng(5)
    clean = random.normal(size=(2000, 1, 1)).astype(np.float32)
    log_w = np.where(clean[..., 0] > 0, np.log(2.0), -60.0).astype(np.float32)
    rich, poor = {}, {}
    for floor in (0.0, 0.1):
        options = FitOptions(components=1, width=32, fit_updates=800, fit_batch=512, noise=0.0, weight_floor=floor)
        fit, states, ids = Fit(options, 2000), Seen(clean, np.zeros((2000, 1), np.float32)), np.zeros(2000, int)
        memory = fit.add(ValueMemory.empty(1), states, clean[:, 0], log_w, ids)
        memory = fit.fitted(memory, np.zeros(1))
        found = fit.values(memory, states, ids)[:, 0]
        rich[floor], poor[floor] = found[clean[:, 0, 0] > 0.5].mean(), found[clean[:, 0, 0] < -0.5].mean()
    assert (rich[0.1], poor[0.1]) == pytest.approx((np.log(2.0), np.log(0.1)), abs=0.1)
    assert poor[0.0] < -10


def test_noise_makes_the_value_smoother():
    """log W is a steep step: with noise in the features, V's largest slope is much smaller."""
    random = np.random.default_rng(4)
    clean = random.normal(size=(2000, 1, 1)).astype(np.float32)
    log_w = np.where(clean[..., 0] > 0, 1.0, -1.0).astype(np.float32)
    steepest = {}
    for noise in (0.0, 0.5):
        options = FitOptions(components=1, width=32, fit_updates=400, fit_batch=512, fit_rate=5e-3, noise=noise)
        fit, states, ids = Fit(options, 2000), Seen(clean, np.zeros((2000, 1), np.float32)), np.zeros(2000, int)
        memory = fit.add(ValueMemory.empty(1), states, clean[:, 0], log_w, ids)
        memory = fit.fitted(memory, np.log(np.exp(log_w).mean(0)))
        steepest[noise] = float(np.abs(fit.gradients(memory, states, ids)[0]).max() * memory.unit[0])
    assert steepest[0.5] < 0.6 * steepest[0.0]


def test_the_oldest_paths_make_room():
    """A ring of 64: of 100 paths in three epochs the last 64 are kept, each with what belongs to it."""
    states, samples, log_w, prompt_id = paths(100)
    memory = ValueMemory.empty(2)
    for some in (slice(0, 40), slice(40, 70), slice(70, 100)):
        memory = FIT.add(memory, Seen(*(seen[some] for seen in states)), samples[some], log_w[some], prompt_id[some])
    assert memory.seen == 100
    order = np.argsort(memory.log_w[:, 0])
    kept = 36 + np.argsort(log_w[36:, 0])
    np.testing.assert_array_equal(memory.log_w[order], log_w[kept])
    np.testing.assert_array_equal(memory.prompt_id[order], prompt_id[kept])
    np.testing.assert_array_equal(memory.guess[order], states.guess[kept])
    for found, given in ((memory.components, states.clean), (memory.ends, samples)):
        np.testing.assert_allclose(found[order], FIT.project(memory, given[kept]), rtol=1e-5, atol=1e-5)


def test_the_basis_is_that_of_the_first_paths_samples():
    states, samples, log_w, prompt_id = paths(50)
    memory = FIT.add(ValueMemory.empty(2), states, samples, log_w, prompt_id)
    variance, vectors = np.linalg.eigh(np.cov(samples.astype(np.float64).T))
    found = np.abs(memory.basis.T @ vectors[:, np.argsort(-variance)[:3]])
    np.testing.assert_allclose(found, np.eye(3), atol=1e-4)


def test_the_policy_waits_for_paths():
    """Until `after` paths have been seen every sample is told nothing, and their number alone decides."""
    algorithm = FittedValue(beta=1.0, after=40, memory=64, **SMALL)
    stats, told = algorithm.first_stats(2), []
    for epoch in range(3):
        states, samples, _, prompt_id = paths(20, seed=epoch)
        scalars = {
            "log_reward": states.clean[:, -1, 0],
            "log_ratio": np.zeros(20),
            "log_ratio_from": np.zeros((20, 2)),  # of two states: one step
            "clean": states.clean,
            "guess": states.guess,
            "sample": samples,
        }
        weight, stats = algorithm.weigh(stats, scalars, prompt_id)
        told.append(np.abs(weight).max())
    assert told[0] == told[1] == 0
    assert told[2] > 0


@pytest.mark.parametrize(
    ("model", "guess", "follow"),
    [(MODEL, False, "gradient"), (CARRIED, True, "gradient"), (CARRIED, True, "mean_shift")],
    ids=["subtracted", "carried, with the guess", "the mean shift"],
)
def test_loss_and_gradient(model, guess, follow):
    """Each step goes by V's gradient by x̂ at its state, pulled back to the state, or by the mean shift."""
    algorithm = FittedValue(beta=0.8, steps=20, output_regularisation=LAMBDA, guess=guess, follow=follow)
    sampled_by = {"lora": jax.tree.map(lambda a: 0.7 * a, LORA)}
    batch = jax.jit(lambda r: algorithm.batch(sampled_by, model, r, 2))(rollout())
    data, path = first_update(batch), sampled_trajectory()
    told = np.random.default_rng(0).normal(size=(BATCH, POLICY_STEPS, path.samples[0].size + 1)).astype(np.float32)
    run = jax.jit(lambda *a: algorithm.value_and_grad(a[0], model, *a[1:]))
    (loss, terms), gradient = run({"lora": LORA}, data, told)
    _, waiting = run({"lora": LORA}, data, 0 * told)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(waiting))
    oracle, x = _oracle(DEFAULTS), [_float64(latents) for latents in path.latents]

    def clean(x, k):
        return oracle.clean(oracle.eps(x, step(k)[0], None), x, step(k)[2])

    for k in (0, 20, 49):
        expected = clean(x[k], k).detach().numpy().reshape(BATCH, -1)
        np.testing.assert_allclose(batch.scalars["clean"][:, k], expected, rtol=1e-4, atol=1e-4)
    nats = reg = size = 0.0
    for b in range(BATCH):
        for k in np.asarray(data.now.index[b]):
            at_x = x[k].clone().requires_grad_()
            by_clean, by_guess = _float64(told[:, k, :-1].reshape(path.samples.shape)), _float64(told[:, k, -1])
            sigma, at = step(k)[4], clean(at_x, k)
            value = (at * by_clean).sum()
            if guess:
                value = value + (by_guess * _log_reward(at, oracle)).sum()
            c = sigma * torch.autograd.grad(value, at_x)[0]
            if follow == "mean_shift":
                moved = oracle.mean(torch.ones_like(x[k]), x[k], k) - oracle.mean(torch.zeros_like(x[k]), x[k], k)
                signal = step(k)[2]
                c = -moved / ((1 - signal) / signal) ** 0.5 / sigma * by_clean
            now, base = (oracle.eps(x[k], step(k)[0], lora) for lora in (oracle.lora, None))
            shift = (oracle.mean(now, x[k], k) - oracle.mean(base, x[k], k)) / sigma
            each = 50 * (shift[b] ** 2 / 2 - shift[b] * c[b]) / (20 * BATCH)
            nats, size = nats + each.sum(), size + float(each.detach().abs().sum())
            reg = reg + LAMBDA * ((now - _float64(path.outputs[k]))[b] ** 2).mean() / (20 * BATCH)
    assert 49 in np.asarray(data.now.index)
    np.testing.assert_allclose(terms["loss_steps"], float(nats.detach()), atol=1e-5 * size)  # parts cancel
    np.testing.assert_allclose(terms["loss_reg"], float(reg.detach()), rtol=1e-4)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-6)
    (nats + reg).backward()
    for name, weights in oracle.lora.items():
        expected = weights.grad.numpy()
        assert np.linalg.norm(gradient["lora"][name] - expected) < 1e-4 * np.linalg.norm(expected), name


def test_the_guess_is_log_r_of_the_clean_sample():
    """V is fitted to log R(x̂_#). ∂V/∂ log R(x̂) comes after ∂V/∂x̂ in what the device is told, both times the scale."""
    algorithm = FittedValue(beta=0.8, guess=True, scale=0.5, **SMALL)
    scalars = jax.jit(lambda r: algorithm.batch({"lora": LORA}, MODEL, r, 1))(rollout()).scalars
    oracle, shape = _oracle(DEFAULTS), sampled_trajectory().samples.shape
    for k in (0, 20, 49):
        guess = _log_reward(_float64(scalars["clean"][:, k]).reshape(shape), oracle)
        np.testing.assert_allclose(scalars["guess"][:, k], guess, rtol=1e-4)
    ids = np.zeros(BATCH, int)
    told, stats = algorithm.weigh(algorithm.first_stats(1), {"log_reward": scalars["guess"][:, -1]} | scalars, ids)
    seen = Seen(*(np.asarray(scalars[name]) for name in ("clean", "guess")))
    by_clean, by_guess = algorithm.fit.gradients(stats.memory, seen, ids)
    assert np.abs(by_guess).min() > 0
    np.testing.assert_array_equal(told[..., :-1], by_clean[:, :-1] / 2)  # no step begins at the sample
    np.testing.assert_array_equal(told[..., -1], by_guess[:, :-1] / 2)


def test_the_mean_shift_is_that_of_the_values_of_v():
    """What the device is told is s times `mean_shifts` of V, x̂ and the ratios of the policy's own paths."""
    algorithm = FittedValue(beta=0.8, follow="mean_shift", guess=True, scale=0.5, **SMALL)
    scalars = jax.jit(lambda r: algorithm.batch({"lora": LORA}, MODEL, r, 1))(rollout()).scalars
    ids = np.zeros(BATCH, int)
    told, stats = algorithm.weigh(algorithm.first_stats(1), {"log_reward": scalars["guess"][:, -1]} | scalars, ids)
    seen = Seen(*(np.asarray(scalars[name]) for name in ("clean", "guess")))
    value = algorithm.fit.values(stats.memory, seen, ids)
    expected = mean_shifts(value, np.asarray(scalars["log_ratio_from"], np.float64), seen.clean)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(told[..., :-1], expected / 2, rtol=1e-5)
    assert not told[..., -1].any()


def test_the_weights_are_those_of_the_steps_from_the_state_on():
    """`log_ratio_from` of the state of step k is log Π p_#/p_θ† over the steps k to T; `log_ratio` is of all."""
    algorithm, earlier = FittedValue(beta=0.8), jax.tree.map(lambda a: 0.7 * a, LORA)
    found = jax.jit(lambda r: algorithm.batch({"lora": earlier}, MODEL, r, 1))(rollout()).scalars
    oracle, path = _oracle(DEFAULTS), sampled_trajectory()
    x, lora = [_float64(latents) for latents in path.latents], _float64(earlier)
    ratio = [torch.zeros(BATCH, dtype=torch.float64)]
    for k in range(49, -1, -1):
        means = (oracle.mean(oracle.eps(x[k], step(k)[0], who), x[k], k) for who in (None, lora))
        base, policy = (-((x[k + 1] - mean) ** 2).sum((1, 2, 3)) / (2 * step(k)[4] ** 2) for mean in means)
        ratio.insert(0, ratio[0] + base - policy)
    np.testing.assert_allclose(found["log_ratio"], ratio[0].detach(), rtol=1e-4)
    expected = torch.stack(ratio, 1).detach().numpy()
    largest = np.abs(expected).max()  # the last step's noise is a small difference of latents, divided by a small σ
    np.testing.assert_allclose(found["log_ratio_from"], expected, rtol=1e-4, atol=1e-4 * largest)


def test_more_than_a_trajectory_has_is_named():
    FittedValue(beta=1.0, steps=50).validate(50)
    with pytest.raises(UserError, match=r"algorithm\.steps = 51 is more than"):
        FittedValue(beta=1.0, steps=51).validate(50)


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["gradient", "mean_shift"])
def test_updates_bring_the_policy_close(follow, monkeypatch):
    """In the plane with ten steps, whose base and target are exact too. No gradient of the reward is taken there."""
    chain = stable_diffusion_chain(STABLE_DIFFUSION, 10)
    monkeypatch.setitem(mixture2d.CHAINS, "diffusion", chain)
    monkeypatch.setitem(mixture2d.BASES, "diffusion", sampled(mixture2d.DATA, chain))
    monkeypatch.setattr(mixture2d, "AVERAGE", 0.95)
    algorithm = FittedValue(beta=1.0, steps=6, memory=2048, components=2, width=64, fit_batch=512, follow=follow)
    run = mixture2d.Run(name="fitted value", algorithm=algorithm, batch=256, updates=80, learning_rate=3e-3)
    result, _ = mixture2d.study(run, "doubled", samples=5000)
    assert result.kl_policy_target < 0.45  # .94 before
