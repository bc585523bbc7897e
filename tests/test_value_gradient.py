"""The value gradient against PyTorch in float64, and against what is known of values in the plane."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_nabla_db import (
    BATCH,
    CARRIED,
    DEFAULTS,
    FLOW,
    LORA,
    MODEL,
    _correction,
    _float64,
    _flow_network,
    _oracle,
    _patches_torch,
    _reward,
    first_update,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms.value_gradient import ValueGradient
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.studies import mixture2d
from nabla_gfn_jax.studies.mixture2d import REWARDS, mlp

torch.set_num_threads(1)
BETA, LAMBDA, CLIP = 0.8, 3.0, 1.4
LOG_Z = np.asarray([0.3, -0.4, 0.1], np.float32)


def with_head(model):
    return dataclasses.replace(
        model, heads={"flow": lambda phi, *where, prompt_id: _correction(phi, *where, prompt_id).mean((1, 2, 3))}
    )


def value_in_torch(oracle, phi, clean, k, guess, log_z):
    """V − log Z at a state's x̂; k = 50 is the sample."""
    time, signal = (step(k)[0], step(k)[2]) if k < 50 else (step(49)[1], step(49)[3])
    t = torch.full((BATCH,), float(time), dtype=torch.float64)
    head = _flow_network(torch, _patches_torch, clean, t, oracle.condition, phi).mean((1, 2, 3))
    return guess * signal * (BETA * _reward(torch, clean, oracle.condition) - log_z) + head


def clean_in_torch(oracle, x, k):
    """x̂_# of state k, the sample itself at the end."""
    return x if k == 50 else oracle.clean(oracle.eps(x, step(k)[0], None), x, step(k)[2])


@pytest.mark.parametrize("guess", [True, False])
@pytest.mark.parametrize("model", [MODEL, CARRIED], ids=["subtracted", "carried"])
@pytest.mark.thorough
def test_losses_and_gradients(guess, model):
    algorithm = ValueGradient(
        beta=BETA, guess=guess, steps=20, states=12, weight_clip=CLIP, output_regularisation=LAMBDA
    )
    model, sampled_by = with_head(model), {"lora": jax.tree.map(lambda a: 0.7 * a, LORA)}
    data = first_update(jax.jit(lambda r: algorithm.batch(sampled_by, model, r, 2))(rollout()))
    params = {"lora": LORA, "flow": FLOW}
    (loss, terms), gradient = jax.jit(lambda *a: algorithm.value_and_grad(a[0], model, *a[1:]))(params, data, LOG_Z)

    oracle, path, log_z = _oracle(DEFAULTS), sampled_trajectory(), _float64(LOG_Z)
    phi = jax.tree.map(lambda a: _float64(a).requires_grad_(), FLOW)
    earlier = _float64(jax.tree.map(lambda a: 0.7 * a, LORA))
    x = [_float64(latents) for latents in path.latents]
    ratio = [torch.zeros(BATCH, dtype=torch.float64)]
    for k in range(49, -1, -1):
        means = (oracle.mean(oracle.eps(x[k], step(k)[0], lora), x[k], k) for lora in (None, earlier))
        base, policy = (-((x[k + 1] - mean) ** 2).sum((1, 2, 3)) / (2 * step(k)[4] ** 2) for mean in means)
        ratio.insert(0, ratio[0] + base - policy)

    nats = reg = value = 0.0
    size = 0.0
    for b in range(BATCH):
        for k in np.asarray(data.now.index[b]):
            y = x[k + 1].clone().requires_grad_()
            v = value_in_torch(oracle, phi, clean_in_torch(oracle, y, k + 1), k + 1, guess, log_z)
            sigma = step(k)[4]
            c = sigma * torch.autograd.grad(v.sum(), y)[0]
            now, base = (oracle.eps(x[k], step(k)[0], lora) for lora in (oracle.lora, None))
            shift = (oracle.mean(now, x[k], k) - oracle.mean(base, x[k], k)) / sigma
            each = 50 * (shift[b] ** 2 / 2 - shift[b] * c[b]) / (20 * BATCH)
            nats, size = nats + each.sum(), size + float(each.detach().abs().sum())
            reg = reg + LAMBDA * ((now - _float64(path.outputs[k]))[b] ** 2).mean() / (20 * BATCH)
        for k in np.asarray(data.states.index[b]):
            v = value_in_torch(oracle, phi, clean_in_torch(oracle, x[k], k), k, guess, log_z)[b]
            w = torch.exp(BETA * _reward(torch, x[50], oracle.condition)[b] + ratio[k][b] - log_z[b])
            at = np.log(CLIP)
            grown = torch.exp(v) if v < at else CLIP * (1 + v - at)
            value = value + (grown - torch.clamp(w, max=CLIP) * v) / (12 * BATCH)
    assert 50 in np.asarray(data.states.index)
    assert 49 in np.asarray(data.now.index)
    np.testing.assert_allclose(terms["loss_steps"], float(nats.detach()), atol=1e-5 * size)  # parts cancel
    np.testing.assert_allclose(terms["loss_reg"], float(reg.detach()), rtol=1e-4)
    np.testing.assert_allclose(terms["loss_value"], float(value.detach()), rtol=1e-4)
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-6)
    (nats + reg + value).backward()
    for found, tree in ((gradient["lora"], oracle.lora), (gradient["flow"], phi)):
        for name, weights in tree.items():
            expected = weights.grad.numpy()
            assert np.linalg.norm(found[name] - expected) < 1e-4 * np.linalg.norm(expected), name


def test_log_z_is_that_of_whole_paths():
    """`weigh` tells each sample its prompt's log mean W so far."""
    algorithm, rng = ValueGradient(beta=-3.0), np.random.default_rng(0)
    stats, seen = algorithm.first_stats(3), {p: [] for p in range(3)}
    for _ in range(3):
        ids, reward, ratio = rng.integers(0, 2, 8), rng.normal(size=8), rng.normal(size=8)
        for p, r, q in zip(ids, reward, ratio, strict=True):
            seen[p].append(np.exp(-3.0 * r + q))
        log_z, stats = algorithm.weigh(stats, {"log_reward": reward, "log_ratio": ratio}, ids)
        np.testing.assert_allclose(log_z, [np.log(np.mean(seen[p])) for p in ids], rtol=1e-5)


@pytest.mark.parametrize(("field", "most"), [("steps", 50), ("states", 51)])
def test_more_than_a_trajectory_has_is_named(field, most):
    ValueGradient(beta=1.0, **{field: most}).validate(50)
    with pytest.raises(UserError, match=rf"algorithm\.{field} = {most + 1} is more than"):
        ValueGradient(beta=1.0, **{field: most + 1}).validate(50)


def flat(z):
    return jax.lax.stop_gradient(z @ jnp.asarray(REWARDS["doubled"], jnp.float32))


@pytest.mark.parametrize("guess", [True, False])
@pytest.mark.thorough
def test_a_few_updates_bring_the_policy_close(guess, monkeypatch):
    """Without the guess the reward has no gradient at all."""
    of = mixture2d.make_model
    value = {"flow": lambda phi, x, level, prompt_id: mlp(phi, x, level.time).sum(axis=1)}

    def make(*args):
        return dataclasses.replace(of(*args), heads=value, **({} if guess else {"log_reward": lambda z, ids: flat(z)}))

    monkeypatch.setattr(mixture2d, "make_model", make)
    algorithm = ValueGradient(beta=1.0, guess=guess, steps=6, states=10)
    run = mixture2d.Run(name="value gradient", algorithm=algorithm, batch=256, updates=200, learning_rate=2e-3)
    result, _ = mixture2d.study(run, "doubled", samples=5000)
    assert result.kl_policy_target < 0.25  # .94 before
