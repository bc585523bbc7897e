"""Plain ∇-DB, compared with its equations in PyTorch, in float64 by autograd of the two log densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_nabla_db import (
    BATCH,
    DEFAULTS,
    MODEL,
    PARAMS,
    _assert_equal,
    _float64,
    _oracle,
    first_update,
    rollout,
    sampled_trajectory,
    step,
)

from nabla_gfn_jax.algorithms.plain_nabla_db import PlainNablaDB
from nabla_gfn_jax.algorithms.transitions import flatten, take

pytestmark = pytest.mark.thorough

torch.set_num_threads(1)


def backward_scores(x, y, k):
    """∇_y and ∇_x of log q(x|y)."""
    _, _, a, b, _ = step(k)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    log_q = -((x - (a / b) ** 0.5 * y) ** 2).sum() / (2 * (1 - a / b))
    return torch.autograd.grad(log_q, (y, x))


def oracle_terms(settings, k):
    """The terms, each summed over the batch, and the gradient of their sum."""
    oracle, trajectory = _oracle(DEFAULTS | settings), sampled_trajectory()
    x, y, before = (_float64(a) for a in (trajectory.latents[k], trajectory.latents[k + 1], trajectory.outputs[k]))
    (t, t_next, a, b, sigma), (kernel_y, kernel_x) = step(k), backward_scores(x, y, k)
    credit = oracle.guess(y, t_next, b) + (oracle.flow(y, t_next) if k < 49 else 0.0)
    weight = sigma**2 if settings["variance_weighted"] else 1.0
    forward = oracle.s(x, y, k, oracle.lora) - (kernel_y + credit)
    terms = {"loss_forward": weight * (forward**2).mean((1, 2, 3)).sum()}
    if k < 49:
        reverse = oracle.r(x, y, k, oracle.lora) - (kernel_x - oracle.guess(x, t, a) - oracle.flow(x, t))
        terms["loss_reverse"] = (reverse**2).mean((1, 2, 3)).sum()
    else:
        terms["loss_terminal"] = (oracle.flow(y, 0) ** 2).mean((1, 2, 3)).sum()
    drift = oracle.eps(x, t, oracle.lora) - before
    terms["loss_reg"] = settings["output_regularisation"] * (drift**2).mean((1, 2, 3)).sum()
    leaves = [*oracle.lora.values(), *oracle.phi.values()]
    gradient = torch.autograd.grad(sum(terms.values()), leaves)
    names = [("lora", n) for n in oracle.lora] + [("correction", n) for n in oracle.phi]
    return {n: float(v.detach()) for n, v in terms.items()}, dict(zip(names, gradient, strict=True))


@pytest.mark.parametrize(("gamma", "variance_weighted"), [("alpha_bar", False), ("one", True)])
def test_every_term_and_gradient(gamma, variance_weighted):
    settings = {"beta": 0.8, "output_regularisation": 3.0, "gamma": gamma, "variance_weighted": variance_weighted}
    algorithm = PlainNablaDB(**settings)
    ordinary = jax.jit(lambda params, transition: algorithm.ordinary(params, MODEL, transition))
    last = jax.jit(lambda params, transition: algorithm.last(params, MODEL, transition))
    for k, of in ((0, ordinary), (23, ordinary), (48, ordinary), (49, last)):
        # s_θ = (μ − y)/σ² stays, of float32's μ at small σ
        _assert_equal(*of(PARAMS, take(jnp.full(BATCH, k), rollout())), *oracle_terms(settings, k), 3e-4)


def test_the_loss_is_the_mean_over_all_transitions():
    algorithm = PlainNablaDB(beta=0.8)
    chosen = first_update(algorithm.batch(PARAMS, MODEL, rollout(), 1))
    (loss, metrics), _ = jax.jit(lambda p, c: algorithm.value_and_grad(p, MODEL, c, jnp.ones(BATCH)))(PARAMS, chosen)
    np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
    ordinary, _ = algorithm.ordinary(PARAMS, MODEL, flatten(chosen.ordinary))
    last, _ = algorithm.last(PARAMS, MODEL, chosen.last)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, (ordinary[name] + last[name]) / (6 * BATCH), rtol=1e-4, err_msg=name)
