"""log R of latents, a few images at a time: what the VAE and the reward keep of each is much of an update's memory."""

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
    """`function(*rows)`, trees of arrays with one leading axis, computed for at most `size` rows at once (0: all).

    Parts are equal: their size is the largest up to `size` that divides the rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    size = max(n for n in range(1, count + 1) if count % n == 0 and (n <= size or n == 1)) if size else count
    if size == count:
        return function(*rows)
    parts = jax.tree.map(lambda a: a.reshape(count // size, size, *a.shape[1:]), rows)
    results = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), results)


def latent_reward(score: Score, size: int) -> Score:
    """`score` for at most `size` latents at once, differentiable in the latents alone.

    Where a gradient will be asked for, each part's is computed right after its value, by reverse mode, and only that is
    kept: log R of a sample is one number, so its gradient is all that the backward pass can need.
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
