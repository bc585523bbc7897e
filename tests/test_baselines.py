"""DDPO, ReFL and DRaFT against independent statements of their losses in PyTorch, in float64 by autograd."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_nabla_db import (
    BATCH,
    DEFAULTS,
    LORA,
    MODEL,
    PARAMS,
    SHAPE,
    _float64,
    _oracle,
    _reward,
    first_update,
    rollout,
    sample_keys,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.algorithms.base import Algorithm
from nabla_gfn_jax.algorithms.ddpo import Ddpo
from nabla_gfn_jax.algorithms.draft import Draft
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.refl import Refl
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import leaves

torch.set_num_threads(1)
ONES = jnp.ones(BATCH)


EARLIER = jax.tree.map(lambda a: 0.7 * a, LORA)  # θ†, which sampled


def of_update(algorithm, weight=ONES, updates=1, model=MODEL):
    """The first update's data, loss, terms and LoRA gradient, at parameters that differ from those that sampled."""
    data = first_update(jax.jit(lambda r: algorithm.batch({"lora": EARLIER}, model, r, updates))(rollout()))
    value = jax.jit(lambda p, d, w: algorithm.value_and_grad({"lora": p}, model, d, w))
    (loss, terms), gradient = value(LORA, data, weight)
    assert gradient.keys() == {"lora"}
    return data, loss, terms, gradient["lora"]


def assert_gradient(gradient, oracle):
    for name, weights in oracle.lora.items():
        expected = weights.grad.numpy()
        assert np.linalg.norm(gradient[name] - expected) < 1e-4 * np.linalg.norm(expected), name


def without_gradient(model):
    """The model with a reward that raises an error when its gradient is taken."""

    @jax.custom_vjp
    def log_reward(z, prompt_id):
        return model.log_reward(z, prompt_id)

    def backward(*_):
        raise AssertionError("a gradient of the reward was asked for")

    log_reward.defvjp(lambda z, prompt_id: (log_reward(z, prompt_id), None), backward)
    return dataclasses.replace(model, log_reward=log_reward)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_the_protocol(name):
    needed = {"beta": 1.0} if "beta" in leaves(ALGORITHMS[name]) else {}
    algorithm = ALGORITHMS[name](**needed)
    assert isinstance(algorithm, Algorithm)
    assert "output_regularisation" in leaves(ALGORITHMS[name])
    vector = MODEL.heads["correction"]
    heads = {"vector": vector, "scalar": lambda *a, **b: vector(*a, **b).mean(axis=(1, 2, 3))}
    model = dataclasses.replace(MODEL, heads={head: heads[kind] for head, kind in algorithm.heads().items()})
    params = {"lora": LORA} | dict.fromkeys(algorithm.heads(), PARAMS["correction"])

    def batch(sampled):
        return algorithm.batch(params, model, sampled, 1)

    def metrics(sampled, told):
        (_, terms), gradient = algorithm.value_and_grad(params, model, first_update(batch(sampled)), told)
        assert gradient.keys() == params.keys()
        return terms

    sampled = rollout()  # called here: what it samples is kept for the other tests
    shapes = jax.eval_shape(lambda r: batch(r).scalars, sampled) | {"log_reward": sampled.log_reward}
    scalars = {name: np.zeros(a.shape, a.dtype) for name, a in shapes.items()}
    ids = np.asarray(sampled.prompt_id)
    told, stats = algorithm.weigh(algorithm.first_stats(1 + int(ids.max())), scalars, ids)
    # The log's table is made of the columns.
    assert jax.eval_shape(metrics, sampled, told).keys() == algorithm.columns.keys()
    again = algorithm.weigh(stats, scalars, ids)  # shapes stay: a checkpoint is restored by them, an update compiled
    assert jax.tree.map(np.shape, again) == jax.tree.map(np.shape, (told, stats))


def drift(oracle, x, k):
    """‖ε_θ − ε_θ†‖² at states x of step k, the term that λ weights."""
    t = step(k)[0]
    return ((oracle.eps(x, t, oracle.lora) - oracle.eps(x, t, _float64(EARLIER)).detach()) ** 2).mean((1, 2, 3))


# ---------------------------------------------------------------- DRaFT


@pytest.mark.parametrize("last_steps", [1, 3])
def test_draft_k(last_steps):
    _, loss, terms, gradient = of_update(Draft(last_steps=last_steps, output_regularisation=3.0))
    oracle, trajectory = _oracle(DEFAULTS), sampled_trajectory()
    x = _float64(trajectory.latents[50 - last_steps])
    held = 3.0 * drift(oracle, x, 50 - last_steps).mean()
    for k in range(50 - last_steps, 50):
        sampled = oracle.mean(_float64(trajectory.outputs[k]), _float64(trajectory.latents[k]), k)
        shock = _float64(trajectory.latents[k + 1]) - sampled
        x = oracle.mean(oracle.eps(x, step(k)[0], oracle.lora), x, k) + shock
    expected = -_reward(torch, x, oracle.condition).mean() + held
    np.testing.assert_allclose(terms["loss_reg"], float(held.detach()), rtol=1e-4)
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-4)
    expected.backward()
    assert_gradient(gradient, oracle)


@pytest.mark.parametrize("held", [0.0, 3.0])
@pytest.mark.thorough
def test_draft_lv(held):
    """Checks the loss at the noised samples, and that these have the distribution q(x | x_T)."""
    data, loss, _, gradient = of_update(Draft(lv_samples=2, output_regularisation=held))
    oracle = _oracle(DEFAULTS)
    t, _, a, b, _ = step(49)
    rewards, drifts = [], []
    for i in range(2):
        x = _float64(data.start[:, i])
        rewards.append(_reward(torch, oracle.clean(oracle.eps(x, t, oracle.lora), x, a), oracle.condition))
        drifts.append(drift(oracle, x, 49))
    expected = -torch.cat(rewards).mean() + held * torch.cat(drifts).mean()
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-4)
    expected.backward()
    assert_gradient(gradient, oracle)

    many = Draft(lv_samples=400).batch(PARAMS, MODEL, rollout(), 2).data.start
    noise = (many - np.sqrt(a / b) * sampled_trajectory().samples[None, :, None]) / np.sqrt(1 - a / b)
    assert abs(float(noise.mean())) < 4 / np.sqrt(noise.size)
    assert abs(float(noise.std()) - 1) < 4 / np.sqrt(2 * noise.size)
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.02  # each update has its own


def test_draft_names_what_cannot_be():
    with pytest.raises(UserError, match="last_steps = 51 is more than"):
        Draft(last_steps=51).validate(50)
    with pytest.raises(UserError, match="lv_samples = 2 needs"):
        Draft(lv_samples=2, last_steps=3)


# ---------------------------------------------------------------- ReFL


def test_refl():
    """Checks ReLU(margin − log R(x̂)) at a late state; the margin lies between the rewards, so it excludes some
    samples.
    """
    algorithm = Refl(late_steps=10)
    data = first_update(algorithm.batch(PARAMS, MODEL, rollout(), 1))
    steps = np.asarray(data.index)
    assert ((steps >= 40) & (steps < 50)).all()
    oracle, rewards, drifts = _oracle(DEFAULTS), [], []
    for b, k in enumerate(steps):
        x = _float64(sampled_trajectory().latents[k])
        clean = oracle.clean(oracle.eps(x, step(k)[0], oracle.lora), x, step(k)[2])
        rewards.append(_reward(torch, clean, oracle.condition)[b])
        drifts.append(drift(oracle, x, k)[b])
    rewards = torch.stack(rewards)
    margin = float(rewards.detach().median())
    expected = torch.relu(margin - rewards).mean() + 3.0 * torch.stack(drifts).mean()
    _, loss, _, gradient = of_update(Refl(late_steps=10, margin=margin, output_regularisation=3.0))
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-4)
    expected.backward()
    assert_gradient(gradient, oracle)


def test_refl_chooses_every_late_step_alike():
    from nabla_gfn_jax.algorithms.refl import late_offsets

    offsets = np.asarray(late_offsets(sample_keys(4000), 10, 0))
    np.testing.assert_allclose(np.bincount(offsets, minlength=10), 400, atol=4 * np.sqrt(400))
    with pytest.raises(UserError, match="late_steps = 10 is more than"):
        Refl(late_steps=10).validate(8)


# ---------------------------------------------------------------- DDPO


def log_p(oracle, x, y, k, output):
    """log N(y; μ, σ²) as a mean over elements, with its constant."""
    sigma = step(k)[4]
    error = (y - oracle.mean(output, x, k)) / sigma
    return (-0.5 * error**2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)).mean((1, 2, 3))


@pytest.mark.parametrize("ratio_clip", [1e-4, 0.03, float("inf")])
def test_ddpo(ratio_clip):
    """Checks all 50 steps. If every ratio is clipped and all advantages have one sign, the gradient is zero."""
    weight = np.asarray([1.5, -0.5, 0.25], np.float32)
    algorithm = Ddpo(ratio_clip=ratio_clip, output_regularisation=0.3)
    _, loss, terms, gradient = of_update(algorithm, jnp.asarray(weight))
    oracle, trajectory = _oracle(DEFAULTS), sampled_trajectory()
    losses, outside = [], []
    for k in range(50):
        x, y, before = (_float64(a) for a in (trajectory.latents[k], trajectory.latents[k + 1], trajectory.outputs[k]))
        now = oracle.eps(x, step(k)[0], oracle.lora)
        ratio = torch.exp(log_p(oracle, x, y, k, now) - log_p(oracle, x, y, k, before))
        advantage = _float64(weight)
        kept = torch.clamp(ratio, 1 - ratio_clip, 1 + ratio_clip)
        losses.append(-torch.minimum(advantage * ratio, advantage * kept) + 0.3 * drift(oracle, x, k))
        outside.append(((ratio - 1).abs() > ratio_clip).double())
    expected = torch.stack(losses).mean()
    np.testing.assert_allclose(loss, float(expected.detach()), rtol=1e-5)
    np.testing.assert_allclose(terms["ratios_clipped"], float(torch.stack(outside).mean()), atol=1e-6)
    expected.backward()
    assert_gradient(gradient, oracle)


def test_ddpos_updates_share_out_the_steps():
    data = Ddpo().batch(PARAMS, MODEL, rollout(), 5).data
    assert data.x.shape == (5, BATCH, 10, *SHAPE)
    steps = np.asarray(data.index)
    for b in range(BATCH):
        assert sorted(steps[:, b].ravel()) == list(range(50))
        assert list(steps[:, b].ravel()) != list(range(50))
    assert not np.array_equal(steps[:, 0], steps[:, 1])


def test_advantages_are_of_a_prompts_own_rewards():
    """Compares with mean and std of each prompt's latest rewards in a list; a rare prompt uses those of the epoch."""
    algorithm = Ddpo(buffer_size=8, min_count=3, advantage_clip=1.2)
    rng, stats = np.random.default_rng(0), algorithm.first_stats(4)
    history = {prompt: [] for prompt in range(4)}
    for epoch in range(6):
        ids = rng.integers(0, 3, 10)
        ids[0] = 3 if epoch in (1, 4) else ids[0]
        rewards = rng.normal(ids * 5.0, 1 + ids).astype(np.float32)
        for prompt, reward in zip(ids, rewards, strict=True):
            history[prompt].append(float(reward))
        expected = []
        for prompt, reward in zip(ids, rewards, strict=True):
            own = history[prompt][-8:]
            among = own if len(own) >= 3 else rewards.astype(np.float64)
            expected.append(np.clip((reward - np.mean(among)) / (np.std(among) + 1e-6), -1.2, 1.2))
        weights, stats = algorithm.weigh(stats, {"log_reward": rewards}, ids)
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


def test_others_weigh_all_samples_alike():
    for algorithm in (ResidualNablaDB(beta=1.0), Draft(), Refl()):
        weights, stats = algorithm.weigh(algorithm.first_stats(3), {"log_reward": np.arange(4.0)}, np.arange(4))
        np.testing.assert_array_equal(weights, np.ones(4))
        assert stats == {}
