"""Rewards that Python computes on the host from NumPy images, for algorithms that need no gradient."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards.reward import Reward
from nabla_gfn_jax.typing import Images, Params, PerSample

# Images in [0, 1] (B, height, width, 3), float32, and their prompts → log R of each image.
Judge = Callable[[Float[np.ndarray, "batch height width 3"], Sequence[str]], Any]


def host_reward(judge: Judge, name: str, files: tuple[Path, ...] = ()) -> Reward:
    """The reward whose scores `judge` computes, batch by batch. `name` is its name in errors.

    A `UserError` is raised if its gradient is needed, or if `judge` does not return a finite number for each image.
    """
    texts: list[str] = []

    def encode(prompts: list[str]) -> Int[np.ndarray, " prompts"]:
        first = len(texts)
        texts.extend(prompts)
        return np.arange(first, len(texts), dtype=np.int32)

    def ask(images: Any, prompt: Any) -> Float[np.ndarray, " batch"]:
        images = np.asarray(images, np.float32)
        found = judge(images, [texts[i] for i in np.asarray(prompt)])
        try:
            scores = np.asarray(found, np.float32)
        except (TypeError, ValueError):
            scores = np.zeros(0, np.float32)
        if scores.shape != (len(images),) or not np.isfinite(scores).all():
            raise UserError(
                f"{name} must give a finite number for each of {len(images)} images; it gave {found!r:.100}"
            )
        return scores

    @jax.custom_jvp
    def scores_of(images: Array, prompt: Array) -> Array:
        shape = jax.ShapeDtypeStruct((len(images),), jnp.float32)
        found: Array = jax.pure_callback(ask, shape, images, prompt)
        return found

    @scores_of.defjvp
    def has_no_gradient(primals: Any, tangents: Any) -> Any:
        raise UserError(
            f"{name} is computed outside of JAX and has no gradient; use an algorithm that needs none, such as ddpo"
        )

    def score(params: Params, images: Images, prompt: Array) -> PerSample:
        return scores_of(images.astype(jnp.float32), prompt)

    return Reward({}, encode, score, files)
