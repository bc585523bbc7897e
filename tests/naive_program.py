"""The loss as in the released program: every term for every transition, and a separate pass for each gradient."""

import jax

from nabla_gfn_jax.algorithms.nabla_db import score
from nabla_gfn_jax.diffusion.chain import expand


def naive_value_and_grad(algorithm, params, model, transition):
    """The equations written literally: every term for every transition, and a separate pass for each gradient."""
    x, y, step, prompt_id = transition.x, transition.y, model.chain[transition.index], transition.prompt_id
    output_of = lambda lora, x, level: model.predict(lora, x, level, prompt_id)  # noqa: E731

    def s(lora):
        return score(output_of(lora, x, step.at), transition, step)

    def r(lora):
        def log_p(x):
            mean = step.mean(output_of(lora, x, step.at), x)
            return -((y - mean) ** 2 / (2 * expand(step.sigma, y) ** 2)).sum()

        return jax.grad(log_p)(x)

    def guess(lora, x, level):
        def log_reward(x):
            clean = level.clean(output_of(lora, x, level), x)
            return (level.signal * model.log_reward(clean, prompt_id)).sum()

        return algorithm.beta * jax.grad(log_reward)(x)

    def loss(params):
        fixed = jax.lax.stop_gradient(params["lora"])
        correct = model.heads["correction"]
        correction_y = correct(params["correction"], y, step.to, prompt_id)
        correction_x = correct(params["correction"], x, step.at, prompt_id)
        forward = s(params["lora"]) - s(None) - guess(fixed, y, step.to) - correction_y
        reverse = r(fixed) - r(None) + guess(fixed, x, step.at) + correction_x
        return (forward**2).mean() + (reverse**2).mean() + (correction_y**2).mean()

    return jax.value_and_grad(loss)(params)
