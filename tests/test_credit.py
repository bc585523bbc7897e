"""Residual ∇-DB with credits that are known at the end of a path, compared with PyTorch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_nabla_db import (
    BATCH,
    CARRIED,
    CONDITION,
    DEFAULTS,
    MODEL,
    PARAMS,
    PENULTIMATE,
    _assert_equal,
    _float64,
    _oracle,
    _oracle_terms,
    _reward,
    first_update,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import take

torch.set_num_threads(1)


def test_the_adjoint_is_the_gradient_through_the_whole_chain():
    oracle, latents = _oracle(DEFAULTS), _float64(sampled_trajectory().latents)
    shocks = [latents[k + 1] - oracle.mean(oracle.eps(latents[k], step(k)[0], None), latents[k], k) for k in range(50)]
    credit = adjoint_credit(MODEL, rollout(), DEFAULTS["beta"])
    for start in (1, 24, 49, 50):
        t = step(start - 1)[0]
        base_eps = oracle.eps(latents[start - 1], t, None).numpy()
        np.testing.assert_allclose(credit.base_output[start - 1], base_eps, rtol=1e-3, atol=1e-5)
        leaf = latents[start].clone().requires_grad_()
        x = leaf
        for k in range(start, 50):
            x = oracle.mean(oracle.eps(x, step(k)[0], None), x, k) + shocks[k]
        log_reward = DEFAULTS["beta"] * _reward(torch, x, oracle.condition).sum()
        expected = torch.autograd.grad(log_reward, leaf)[0].numpy()
        assert np.linalg.norm(credit.gradient[start - 1] - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("model", [MODEL, CARRIED], ids=["subtracted", "carried"])
@pytest.mark.parametrize("kappa", [1.0, 1.5])
def test_adjoint_loss_and_gradient(kappa, model):
    settings = DEFAULTS | {"credit": "adjoint", "prior_strength": kappa}
    algorithm = ResidualNablaDB(**settings)
    credit = adjoint_credit(model, rollout(), DEFAULTS["beta"])
    loss = jax.jit(lambda params, transition: algorithm.with_path_credit(params, model, transition))
    for k in (0, 23, PENULTIMATE, 49):
        transition = take(jnp.full(BATCH, k), rollout(), credit)
        expected = _oracle_terms(settings, k, _float64(credit.gradient[k]))
        _assert_equal(*loss(PARAMS, transition), *expected, 1e-4 if kappa == 1 else 3e-4)


@pytest.mark.parametrize("gamma", ["alpha_bar", "one"])
def test_terminal_loss_and_gradient(gamma):
    """The credit is γ of the next time times the gradient at the path's end; checks each step of `batch`."""
    settings = DEFAULTS | {"credit": "terminal", "gamma": gamma}
    algorithm, end = ResidualNablaDB(**settings), _float64(sampled_trajectory().samples).requires_grad_()
    gradient = torch.autograd.grad(_reward(torch, end, _float64(CONDITION)).sum(), end)[0]
    chosen = first_update(jax.jit(lambda r: algorithm.batch(PARAMS, MODEL, r, 1))(rollout()))
    loss = jax.jit(lambda params, transition: algorithm.with_path_credit(params, MODEL, transition))
    for b in range(BATCH):
        k = int(chosen.ordinary.index[b, 2])
        one = jax.tree.map(lambda a, b=b: jnp.repeat(a[b : b + 1, 2], BATCH, axis=0), chosen.ordinary)
        credit = DEFAULTS["beta"] * {"alpha_bar": step(k)[3], "one": 1.0}[gamma] * gradient
        terms, _ = loss(PARAMS, one)
        oracle, trajectory = _oracle(settings), sampled_trajectory()
        x, y, eps = (_float64(a) for a in (trajectory.latents[k], trajectory.latents[k + 1], trajectory.outputs[k]))
        oracle.condition = oracle.condition[b : b + 1].expand(BATCH, -1)
        same = [a[b : b + 1].expand(BATCH, -1, -1, -1) for a in (x, y, eps, credit)]
        expected = oracle.terms(*same[:3], k, same[3])
        for name, value in expected.items():
            np.testing.assert_allclose(terms[name], float(value.detach()), rtol=1e-4, err_msg=name)
    gamma_at_end = {"alpha_bar": step(49)[3], "one": 1.0}[gamma]
    expected = _oracle_terms(settings, 49, DEFAULTS["beta"] * gamma_at_end * gradient)
    _assert_equal(*loss(PARAMS, chosen.last), *expected)


def test_credit_clip():
    credit = adjoint_credit(MODEL, rollout(), DEFAULTS["beta"])
    transition = take(jnp.full(BATCH, 23), rollout(), credit)
    sizes = step(23)[4] * np.sqrt((credit.gradient[23] ** 2).mean((1, 2, 3)))
    limit = float(np.sort(sizes)[1])  # the middle one of three stays as it is, the largest shrinks to it
    clipped = ResidualNablaDB(**DEFAULTS | {"credit": "adjoint"}, credit_clip=limit * (1 + 1e-5))
    shrunk = credit.gradient[23] * np.minimum(1, limit / sizes)[:, None, None, None]
    expected = _oracle_terms(DEFAULTS | {"credit": "adjoint"}, 23, _float64(shrunk))
    _assert_equal(*clipped.with_path_credit(PARAMS, MODEL, transition), *expected)
