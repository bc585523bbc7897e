"""The loss as the released program computes it: every term for every transition, each gradient a pass of its own."""

import jax

from nabla_gfn_jax.algorithms.nabla_db import score
from nabla_gfn_jax.diffusion.schedule import clean_prediction, expand, step_mean


def naive_value_and_grad(algorithm, params, model, transition):
    """The equations as they are read: every term for every transition, each gradient a pass of its own."""
    x, y, step, condition = transition.x, transition.y, transition.step, transition.condition
    eps_of = lambda lora, x, t: model.predict(lora, x, t, condition)  # noqa: E731

    def s(lora):
        return score(eps_of(lora, x, step.timestep), transition)

    def r(lora):
        def log_p(x):
            mean = step_mean(eps_of(lora, x, step.timestep), x, step)
            return -((y - mean) ** 2 / (2 * expand(step.sigma, y) ** 2)).sum()

        return jax.grad(log_p)(x)

    def guess(lora, x, t, alpha_bar):
        def log_reward(x):
            clean = clean_prediction(eps_of(lora, x, t), x, alpha_bar)
            return (alpha_bar * model.log_reward(clean, condition)).sum()

        return algorithm.beta * jax.grad(log_reward)(x)

    def loss(params):
        fixed = jax.lax.stop_gradient(params["lora"])
        flow_y = model.flow(params["flow"], y, step.next_timestep, condition)
        flow_x = model.flow(params["flow"], x, step.timestep, condition)
        guess_y = guess(fixed, y, step.next_timestep, step.alpha_bar_next)
        forward = s(params["lora"]) - s(None) - guess_y - flow_y
        reverse = r(fixed) - r(None) + guess(fixed, x, step.timestep, step.alpha_bar) + flow_x
        return (forward**2).mean() + (reverse**2).mean() + (flow_y**2).mean()

    return jax.value_and_grad(loss)(params)
