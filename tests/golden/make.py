"""Made `before_chain.npz` at the commit before the chain of linear coefficients, in float64; it does not run later.

A random tiny Stable Diffusion, ε and v prediction: coefficients, a sampled trajectory with its images (in float32, as
the noise is), and for another LoRA the loss terms and gradients of the three credits on that trajectory's transitions.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from case import CREDITS, GUIDANCE, KEYS, SETTINGS, STEPS, case, flat

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.transitions import flatten, select
from nabla_gfn_jax.diffusion import sampler, schedule, text_to_image
from nabla_gfn_jax.diffusion.sampler import Trajectory, sample

DOUBLE = SimpleNamespace(**vars(jnp) | {"float32": jnp.float64})


def steps_of(name, scheduler):
    return schedule.make_schedule(scheduler, STEPS, sampler=name)


def coefficients(name, prediction, scheduler):
    """(T, 6): μ and x̂ at x, and x̂ at y, of (x, output), by evaluating the functions of the time at unit vectors."""
    steps, bars = steps_of(name, scheduler), schedule.alphas_cumprod(scheduler)
    one, zero = np.ones((STEPS, 1)), np.zeros((STEPS, 1))

    def eps(output, x, times):
        a = bars[times][:, None]
        return output if prediction == "epsilon" else jnp.sqrt(a) * output + jnp.sqrt(1 - a) * x

    columns = []
    for output, x in ((zero, one), (one, zero)):
        columns.append(schedule.step_mean(eps(output, x, steps.timestep), x, steps))
        columns.append(schedule.clean_prediction(eps(output, x, steps.timestep), x, steps.alpha_bar))
        columns.append(schedule.clean_prediction(eps(output, x, steps.next_timestep), x, steps.alpha_bar_next))
    return np.concatenate(columns, 1)


def main():
    found = {}
    for prediction in ("epsilon", "v_prediction"):
        single = case(prediction, jnp.float32)
        steps = steps_of("ddpm", single.model.scheduler)
        predict = text_to_image.guided_predictor(single.model, single.model.params["unet"], GUIDANCE)
        condition = single.condition
        trajectory = jax.jit(
            lambda c: sample(lambda x, t, c: predict(single.earlier, x, t, c), steps, KEYS, (4, 4, 4), c)
        )(condition)
        found[f"{prediction}/latents"] = np.asarray(trajectory.latents)
        images = text_to_image.decode(single.model, single.model.params["vae"], trajectory.samples)
        found[f"{prediction}/images"] = np.asarray(images)
        found[f"{prediction}/noise_predictions"] = np.asarray(trajectory.noise_predictions)

    jax.config.update("jax_enable_x64", True)
    schedule.jnp = text_to_image.jnp = sampler.jnp = DOUBLE
    for prediction in ("epsilon", "v_prediction"):
        double = case(prediction, jnp.float64)
        for name in ("ddpm", "sde_dpm_solver"):
            found[f"{prediction}/{name}"] = coefficients(name, prediction, double.model.scheduler)
            found[f"{name}/sigma"] = np.asarray(steps_of(name, double.model.scheduler).sigma)
        steps = steps_of("ddpm", double.model.scheduler)
        assert steps.sigma.dtype == jnp.float64
        predict = text_to_image.guided_predictor(double.model, double.model.params["unet"], GUIDANCE)
        trajectory = Trajectory(
            *(np.asarray(found[f"{prediction}/{n}"], np.float64) for n in ("latents", "noise_predictions"))
        )
        model = Model(predict, double.correction, double.log_reward)
        params = {"lora": double.lora, "flow": double.phi}
        credit = jax.jit(functools.partial(adjoint_credit, model, beta=SETTINGS["beta"]))(
            trajectory, steps, double.condition
        )
        for name in CREDITS:
            algorithm = ResidualNablaDB(**SETTINGS, credit=name, transition_fraction=0.2)
            adjoint = credit if name == "adjoint" else None
            chosen = select(KEYS, trajectory, steps, double.condition, 2, adjoint)
            (loss, terms), gradient = jax.jit(
                lambda p, c, algorithm=algorithm, model=model: algorithm.value_and_grad(p, model, c)
            )(params, chosen)
            key = f"{prediction}/{name}"
            found |= {f"{key}/{term}": np.asarray(value) for term, value in terms.items()}
            found[f"{key}/lora"] = flat(gradient["lora"])
            if name == "lookahead":
                found[f"{key}/phi"] = flat(gradient["flow"])
                found[f"{prediction}/times"] = np.asarray(flatten(chosen.ordinary).step.timestep)
            print(key, float(loss), {k: float(v) for k, v in terms.items()}, np.linalg.norm(found[f"{key}/lora"]))
    np.savez_compressed(Path(__file__).with_name("before_chain.npz"), **found)


if __name__ == "__main__":
    main()
