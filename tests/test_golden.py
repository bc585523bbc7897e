"""The same numbers as before the chain of linear coefficients, for ε and v prediction, on a random Stable Diffusion.

`golden/before_chain.npz` was made by `golden/make.py`, which stands in the history, at the commit that added it:
coefficients, losses and gradients in float64. So these tests measure what float32 loses, too.
"""

import functools
import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))
from case import BATCH, GUIDANCE, KEYS, SETTINGS, STEPS, case, flat

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import Transitions, take
from nabla_gfn_jax.base_models.base import predictor
from nabla_gfn_jax.diffusion.sampler import Trajectory, sample

pytestmark = pytest.mark.thorough

GOLDEN = np.load(Path(__file__).parent / "golden/before_chain.npz")
PREDICTIONS = ("epsilon", "v_prediction")
IDS = jnp.arange(BATCH)


def quickly(function, *arguments):
    """The function compiled without optimisations that take longer than they save here."""
    compiled = jax.jit(function).lower(*arguments)
    return compiled.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def relative(ours, golden) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - golden) / np.linalg.norm(golden))


@functools.cache
def single(prediction):
    return case(prediction, jnp.float32)


@pytest.mark.parametrize("sampler", ["ddpm", "sde_dpm_solver"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_coefficients(prediction, sampler):
    chain = single(prediction).model.chain(STEPS, sampler=sampler)
    columns = [chain.mean_x, chain.at.clean_x, chain.to.clean_x, chain.mean_o, chain.at.clean_o, chain.to.clean_o]
    np.testing.assert_allclose(np.stack(columns, 1), GOLDEN[f"{prediction}/{sampler}"], rtol=1.2e-7, atol=1e-12)
    np.testing.assert_allclose(chain.sigma, GOLDEN[f"{sampler}/sigma"], rtol=1.2e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_trajectory_and_images(prediction):
    here = single(prediction)
    model, chain = here.model, here.model.chain(STEPS)

    def run(params, table):
        predict = predictor(model, params, table, GUIDANCE)
        trajectory = sample(predict, here.earlier, chain, KEYS, model.latent_shape, IDS)
        return trajectory, model.decode(params, trajectory.samples)

    trajectory, images = quickly(run, model.frozen_params, here.table)
    assert relative(trajectory.latents, GOLDEN[f"{prediction}/latents"]) < 2e-6
    noise = [chain[k].at.noise(trajectory.outputs[k], trajectory.latents[k]) for k in range(STEPS)]
    assert relative(np.stack(noise), GOLDEN[f"{prediction}/noise_predictions"]) < 2e-6
    assert relative(images, GOLDEN[f"{prediction}/images"]) < 2e-6


def recorded(prediction, chain) -> Rollout:
    """The golden trajectory, with its noise predictions converted to the network's outputs."""
    latents, noise = (jnp.asarray(GOLDEN[f"{prediction}/{name}"]) for name in ("latents", "noise_predictions"))
    outputs = [(noise[k] - chain.at.noise_x[k] * latents[k]) / chain.at.noise_o[k] for k in range(STEPS)]
    return Rollout(Trajectory(latents, jnp.stack(outputs)), jnp.zeros(BATCH), IDS, KEYS)


FAST = (("guess", "epsilon"), ("adjoint", "v_prediction"))  # compiling each takes most of its time
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(("lookahead", "guess", "adjoint"), PREDICTIONS)
]


@pytest.mark.parametrize(("credit", "prediction"), CASES)
def test_losses_and_gradients(credit, prediction):
    """Within float32: as κ = 1.5, all but the adjoint keep s_# = (μ − y)/σ², where μ and y nearly cancel at the end."""
    here = single(prediction)
    chain = here.model.chain(STEPS)
    rollout = recorded(prediction, chain)
    times = GOLDEN[f"{prediction}/times"].reshape(BATCH, -1)
    steps = jnp.asarray(np.searchsorted(-np.asarray(chain.at.time), -times))
    algorithm = ResidualNablaDB(**SETTINGS, credit=credit, transition_fraction=0.2)
    heads = {"correction": here.phi} if credit == "lookahead" else {}

    def loss(params, frozen, table):
        predict = predictor(here.model, frozen, table, GUIDANCE)
        model = Model(chain, predict, here.log_reward, {"correction": here.correction})
        adjoint = adjoint_credit(model, rollout, SETTINGS["beta"]) if credit == "adjoint" else None
        last = jnp.full(BATCH, STEPS - 1)
        chosen = Transitions(ordinary=take(steps, rollout, adjoint), last=take(last, rollout, adjoint))
        return algorithm.value_and_grad(params, model, chosen, jnp.ones(BATCH))

    params = {"lora": here.lora, **heads}
    (_, terms), gradient = quickly(loss, params, here.model.frozen_params, here.table)
    for name, value in terms.items():
        np.testing.assert_allclose(value, GOLDEN[f"{prediction}/{credit}/{name}"], rtol=2e-5, err_msg=name)
    errors = {"lora": relative(flat(gradient["lora"]), GOLDEN[f"{prediction}/{credit}/lora"])}
    if heads:
        errors["phi"] = relative(flat(gradient["correction"]), GOLDEN[f"{prediction}/{credit}/phi"])
    print(credit, prediction, errors)
    assert max(errors.values()) < (5e-6 if credit == "adjoint" else 5e-5)
