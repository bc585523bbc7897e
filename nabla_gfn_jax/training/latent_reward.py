"""log R of latents, a few images at a time, because the activations of VAE and reward take much memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds

Score = Callable[[Params, Latents, PromptIds], PerSample]  # (frozen parameters, z, prompt_id) → log R


def in_parts(function: Callable[..., Any], size: int, *rows: PyTree[Any]) -> Any:
    """`function(*rows)`, computed for at most `size` rows at a time (0: all). All arrays have the same leading axis.

    The parts are equal: their size is the largest divisor of the number of rows that is at most `size`.
    """
    count = len(jax.tree.leaves(rows)[0])
    size = max(n for n in range(1, count + 1) if count % n == 0 and (n <= size or n == 1)) if size else count
    if size == count:
        return function(*rows)
    parts = jax.tree.map(lambda a: a.reshape(count // size, size, *a.shape[1:]), rows)
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), results)


def latent_reward(score: Score, size: int) -> Score:
    """`score` for at most `size` latents at a time (0: all), differentiable in the latents only.

    When it is differentiated, the gradient of each part is computed together with its value, and only the gradient is
    kept. The backward pass needs nothing else, because log R of a sample is one number.
    """

    @jax.custom_vjp
    def log_reward(frozen: Params, z: Latents, prompt_id: PromptIds) -> PerSample:
        return in_parts(partial(score, frozen), size, z, prompt_id)

    def forward(frozen: Params, z: Latents, prompt_id: PromptIds) -> tuple[PerSample, Latents]:
        def value_and_gradient(z: Latents, prompt_id: PromptIds) -> tuple[PerSample, Latents]:
            value, pull = jax.vjp(lambda z: score(frozen, z, prompt_id), z)
            return value, pull(jnp.ones_like(value))[0]

        return in_parts(value_and_gradient, size, z, prompt_id)

    def backward(gradient: Latents, cotangent: Array) -> tuple[None, Latents, None]:
        return None, expand(cotangent, gradient) * gradient, None

    log_reward.defvjp(forward, backward)
    return log_reward
