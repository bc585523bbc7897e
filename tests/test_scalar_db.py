"""Residual DB and DAG-DB, compared with detailed balance in PyTorch, in float64, by complete log densities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_baselines import EARLIER, without_gradient
from test_nabla_db import (
    BATCH,
    DEFAULTS,
    FLOW,
    LORA,
    MODEL,
    SHAPE,
    _correction,
    _float64,
    _oracle,
    _reward,
    first_update,
    rollout,
    sampled_trajectory,
    step,
)
from test_parallel import without_images
from test_training import rows

from nabla_gfn_jax.algorithms.dag_db import DagDB
from nabla_gfn_jax.algorithms.residual_db import ResidualDB
from nabla_gfn_jax.runs.metrics_log import COLUMNS

pytestmark = pytest.mark.thorough

torch.set_num_threads(1)
BETA, ELEMENTS = 0.8, int(np.prod(SHAPE))


def flow(phi, x, level, prompt_id):
    return _correction(phi, x, level, prompt_id).reshape(len(x), -1).mean(axis=1)


SCALAR = dataclasses.replace(MODEL, heads={"flow": flow})
PARAMS = {"lora": LORA, "flow": FLOW}
GAMMAS = {"alpha_bar": lambda a: a, "sqrt_alpha_bar": lambda a: a**0.5, "one": lambda a: 1.0}


def log_normal(x, mean, sigma):
    density = torch.distributions.Normal(mean, torch.full_like(mean, sigma))
    return density.log_prob(x).sum((1, 2, 3))


def imbalance(algorithm, oracle, k):
    """D times Δ of the transitions of step k, and λ's term."""
    trajectory = sampled_trajectory()
    x, y = (_float64(a) for a in (trajectory.latents[k], trajectory.latents[k + 1]))
    t, t_next, a, b, sigma = step(k)
    now = oracle.eps(x, t, oracle.lora)

    def log_flow(x, t, a, eps):
        learned = ELEMENTS * oracle.flow(x, t).mean((1, 2, 3))
        guess = _reward(torch, oracle.clean(eps.detach(), x, a), oracle.condition)
        return learned + BETA * GAMMAS[algorithm.gamma](a) * guess

    after = BETA * _reward(torch, y, oracle.condition)
    if k < 49:
        after = log_flow(y, t_next, b, oracle.eps(y, t_next, oracle.lora))
    if isinstance(algorithm, ResidualDB):
        reference = log_normal(y, oracle.mean(oracle.eps(x, t, None), x, k), sigma)
    else:
        reference = log_normal(x, (a / b) ** 0.5 * y, (1 - a / b) ** 0.5)
    delta = log_flow(x, t, a, now) + log_normal(y, oracle.mean(now, x, k), sigma) - reference - after
    drift = now - _float64(trajectory.outputs[k])
    return delta, (drift**2).mean((1, 2, 3))


@pytest.mark.parametrize("algorithm", [ResidualDB, DagDB])
@pytest.mark.parametrize("gamma", ["one", "alpha_bar"])
def test_loss_and_gradient(algorithm, gamma):
    algorithm = algorithm(beta=BETA, gamma=gamma, output_regularisation=3.0)
    data = first_update(algorithm.batch({"lora": EARLIER, "flow": FLOW}, SCALAR, rollout(), 1))
    value = jax.jit(lambda params, data: algorithm.value_and_grad(params, SCALAR, data, jnp.ones(BATCH)))
    (loss, terms), gradient = value(PARAMS, data)
    oracle, squares, drifts = _oracle(DEFAULTS), [], []
    for b in range(BATCH):
        steps = [*np.asarray(data.transitions.ordinary.index[b]), 49]
        assert len(steps) == 6
        for k in steps:
            delta, drift = imbalance(algorithm, oracle, k)
            squares.append((delta[b] / ELEMENTS) ** 2)
            drifts.append(drift[b])
    balance, held = torch.stack(squares).mean(), 3.0 * torch.stack(drifts).mean()
    np.testing.assert_allclose(terms["loss_balance"], float(balance.detach()), rtol=1e-4)
    np.testing.assert_allclose(terms["loss_reg"], float(held.detach()), rtol=1e-4)
    np.testing.assert_allclose(loss, float((balance + held).detach()), rtol=1e-4)
    (balance + held).backward()
    for group, leaves in (("lora", oracle.lora), ("flow", oracle.phi)):
        for name, leaf in leaves.items():
            expected = leaf.grad.numpy()
            assert np.linalg.norm(gradient[group][name] - expected) < 1e-4 * np.linalg.norm(expected), (group, name)


def test_a_run_trains_the_flow(command, monkeypatch, tmp_path):
    """In a complete run of the tiny model, the scalar head and the LoRA both learn."""
    without_images(monkeypatch)
    command(tmp_path, "--config=residual_db:emoji", "--config.training.num_epochs=1")
    log = rows(tmp_path)
    assert [(row["epoch"], row["updates"]) for row in log] == [(0, 0), (1, 2), (2, 2)]
    assert log[1]["grad_norm_flow"] > 0
    assert log[1]["grad_norm_lora"] > 0
    assert set(log[1]) <= {column.name for column in COLUMNS}


@pytest.mark.parametrize("algorithm", [ResidualDB, DagDB])
def test_no_gradient_of_the_reward_is_taken(algorithm):
    algorithm, model = algorithm(beta=BETA), without_gradient(SCALAR)
    data = first_update(algorithm.batch(PARAMS, model, rollout(), 1))
    jax.eval_shape(lambda p: algorithm.value_and_grad(p, model, data, jnp.ones(BATCH)), PARAMS)


def test_the_base_model_is_balanced_where_there_is_no_reward():
    """With β = 0, F = 1 and the base model as the policy, every Δ of residual DB is 0."""
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    algorithm = ResidualDB(beta=0.0)
    data = first_update(algorithm.batch(zero, SCALAR, rollout(), 1))
    (loss, _), _ = algorithm.value_and_grad(zero, SCALAR, data, jnp.ones(BATCH))
    assert float(loss) < 1e-12
