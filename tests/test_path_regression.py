"""Path regression, compared with PyTorch in float64 and with known properties of its weights and its target."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_baselines import assert_gradient, of_update
from test_nabla_db import (
    BATCH,
    CARRIED,
    DEFAULTS,
    LORA,
    MODEL,
    _float64,
    _oracle,
    _reward,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms.base import Rollout
from nabla_gfn_jax.algorithms.path_regression import PathRegression, innovation
from nabla_gfn_jax.algorithms.paths import log_ratio
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.studies import mixture2d
from nabla_gfn_jax.studies.mixture2d import BASES, REWARDS, draw, init_mlp, keys_of, make_model

torch.set_num_threads(1)
BETA = 0.8
WEIGHT = np.asarray([1.5, 0.25, 2.0], np.float32)


def path_in_torch(k):
    trajectory = sampled_trajectory()
    return tuple(_float64(a) for a in (trajectory.latents[k], trajectory.latents[k + 1], trajectory.outputs[k]))


def adjoints(oracle):
    """β∇log R at the path's end, pulled back step by step through the base model's means to each step's y."""
    end = _float64(sampled_trajectory().samples).requires_grad_()
    a = BETA * torch.autograd.grad(_reward(torch, end, oracle.condition).sum(), end)[0]
    found = {}
    for k in range(49, -1, -1):
        found[k] = a
        x = path_in_torch(k)[0].requires_grad_()
        a = torch.autograd.grad(oracle.mean(oracle.eps(x, step(k)[0], None), x, k), x, a)[0]
    return found


@pytest.mark.parametrize("credit", ["innovation", "adjoint"])
@pytest.mark.parametrize("credit_clip", [float("inf"), 0.3])
@pytest.mark.parametrize("model", [MODEL, CARRIED], ids=["subtracted", "carried"])
@pytest.mark.thorough
def test_loss_and_gradient(credit, credit_clip, model):
    algorithm = PathRegression(beta=BETA, credit=credit, steps=10, credit_clip=credit_clip, output_regularisation=3.0)
    data, loss, terms, gradient = of_update(algorithm, jnp.asarray(WEIGHT), model=model)
    oracle = _oracle(DEFAULTS)
    adjoint = adjoints(oracle) if credit == "adjoint" else {}
    total = reg = size = 0.0
    for b in range(BATCH):
        for k in np.asarray(data.index[b]):
            x, y, before = path_in_torch(k)
            now, base = (oracle.eps(x, step(k)[0], lora) for lora in (oracle.lora, None))
            sigma = step(k)[4]
            shift = (oracle.mean(now, x, k) - oracle.mean(base, x, k)) / sigma
            c = sigma * adjoint[k] if adjoint else (y - oracle.mean(base, x, k)) / sigma
            c = c[b] * min(1.0, credit_clip / float((c[b] ** 2).mean()) ** 0.5)
            nats = 50 * float(WEIGHT[b]) / (10 * BATCH) * (shift[b] ** 2 / 2 - shift[b] * c)
            total, size = total + nats.sum(), size + float(nats.detach().abs().sum())
            reg = reg + 3.0 * ((now - before)[b] ** 2).mean() / (10 * BATCH)
    np.testing.assert_allclose(terms["loss_paths"], float(total.detach()), atol=1e-5 * size)  # parts cancel
    np.testing.assert_allclose(terms["loss_reg"], float(reg.detach()), rtol=1e-4)
    np.testing.assert_allclose(loss, terms["loss_paths"] + terms["loss_reg"], rtol=1e-6)
    (total + reg).backward()
    assert_gradient(gradient, oracle)


def test_the_paths_densities():
    """Compares log Π p_#/p_θ† of each path with log densities in float64."""
    oracle, earlier = _oracle(DEFAULTS), _float64(jax.tree.map(lambda a: 0.7 * a, LORA))
    expected = np.zeros(BATCH)
    for k in range(50):
        x, y, _ = path_in_torch(k)
        for lora, sign in ((None, 1), (earlier, -1)):
            error = (y - oracle.mean(oracle.eps(x, step(k)[0], lora), x, k)) / step(k)[4]
            expected -= sign * 0.5 * (error**2).sum((1, 2, 3)).numpy()
    found = jax.jit(lambda r: log_ratio(MODEL.chain, r, innovation(MODEL, LORA, r).base_output)[0])(rollout())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_weights_are_of_a_prompts_own_paths():
    """w = W / (mean of all W of the prompt so far), at most the clip. It does not overflow for large β log R."""
    algorithm, rng = PathRegression(beta=-3.0, weight_clip=1.5), np.random.default_rng(0)
    stats, history = algorithm.first_stats(3), {p: [] for p in range(3)}
    for _ in range(4):
        ids, reward, ratio = rng.integers(0, 2, 8), rng.normal(size=8), rng.normal(size=8)
        for p, r, q in zip(ids, reward, ratio, strict=True):
            history[p].append(np.exp(-3.0 * r + q))
        weight, stats = algorithm.weigh(stats, {"log_reward": reward, "log_ratio": ratio}, ids)
        own = [np.exp(-3.0 * r + q) / np.mean(history[p]) for p, r, q in zip(ids, reward, ratio, strict=True)]
        np.testing.assert_allclose(weight, np.minimum(own, 1.5), rtol=1e-5)
    huge, _ = PathRegression(beta=1e6).weigh(
        algorithm.first_stats(1), {"log_reward": np.asarray([1.0, 1.0]), "log_ratio": np.zeros(2)}, np.zeros(2, int)
    )
    np.testing.assert_allclose(huge, 1.0)


def test_more_steps_than_there_are_is_named():
    with pytest.raises(UserError, match=r"algorithm\.steps = 51 is more than"):
        PathRegression(beta=1.0, steps=51).validate(50)


@pytest.mark.parametrize("reward", REWARDS)
def test_the_mean_weight_of_any_policys_paths_is_z(reward):
    """In the plane, log Z = log E_base[exp(k·x)] has a closed form. The policy is random."""
    k, base, model = REWARDS[reward], BASES["diffusion"], make_model(REWARDS[reward])
    log_z = np.log(base.weights @ np.exp(base.means @ k + base.std**2 * (k @ k) / 2))
    lora = init_mlp(jax.random.key(3), 4)
    lora["layer_3"] = {"kernel": 0.02 * jax.random.normal(jax.random.key(4), (128, 2)), "bias": jnp.asarray([0.2, 0.1])}
    ids, keys = jnp.zeros(20_000, jnp.int32), keys_of(jax.random.key(5), 20_000)

    @jax.jit
    def log_w(lora, keys):
        path = sample(model.predict, lora, model.chain, keys, (2,), ids)
        r = Rollout(path, model.log_reward(path.samples, ids), ids, keys)
        return r.log_reward + log_ratio(model.chain, r, innovation(model, lora, r).base_output)[0]

    w = np.exp(np.asarray(log_w(lora, keys), np.float64) - log_z)
    error = w.std() / np.sqrt(len(w))
    assert np.std(np.log(w)) > 0.5  # the policy is not the target, nor near it
    assert error < 0.02
    assert abs(w.mean() - 1) < 4 * error


@pytest.mark.parametrize("credit", ["adjoint", "innovation"])
@pytest.mark.thorough
def test_a_few_updates_bring_the_policy_close(credit, monkeypatch):
    """The innovation is tested with a reward without a gradient."""
    if credit == "innovation":
        of = mixture2d.make_model
        flat = lambda *a: dataclasses.replace(  # noqa: E731
            of(*a), log_reward=lambda z, ids: jax.lax.stop_gradient(z @ jnp.asarray(REWARDS["doubled"], jnp.float32))
        )
        monkeypatch.setattr(mixture2d, "make_model", flat)
    named = next(r for r in mixture2d.runs(200) if r.name == f"path regression, {credit}, batch 512")
    run = dataclasses.replace(named, batch=256, learning_rate=2e-3)
    result, _ = mixture2d.study(run, "doubled", samples=5000)
    before = partial(mixture2d.distance, target=BASES["diffusion"].tilted(REWARDS["doubled"]))(
        np.asarray(draw(None, make_model(REWARDS["doubled"]), 5000, jax.random.key(0)))
    )
    assert before.forward > 0.9
    assert result.kl_policy_target < 0.3 * before.forward
