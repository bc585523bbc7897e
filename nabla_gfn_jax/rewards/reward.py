"""What a reward is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from nabla_gfn_jax.typing import Images, Params, PerSample

TOTAL = "log_reward"  # the name of the reward itself among its scores


@dataclass(frozen=True)
class Reward:
    """log R(x) of images, given prompts.

    `encode_prompts` turns prompts into arrays with a leading axis of their number, once, and raises `UserError`
    for a prompt the reward cannot judge. `score(params, images, prompt_features)` is pure and differentiable: log
    R(x) of each image in [0, 1], float32, not yet multiplied by β. `files` are those it was read from.
    """

    params: Params
    encode_prompts: Callable[[list[str]], PyTree[Any]]
    score: Callable[[Params, Images, PyTree[Any]], PerSample]
    files: tuple[Path, ...] = ()

    def scores(self, params: Params, images: Images, features: PyTree[Any]) -> dict[str, PerSample]:
        """`score` under the name `TOTAL`, and whatever a reward tells apart beside it, for the log."""
        return {TOTAL: self.score(params, images, features)}


def abstract_reward(shapes: PyTree[Any], features: PyTree[Any], score: Callable[..., PerSample]) -> Reward:
    """A reward to compile and not to run: `shapes` of its parameters and of one prompt's features, for arrays."""

    def encode(prompts: list[str]) -> PyTree[Any]:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(prompts), *a.shape), a.dtype), features)

    return Reward(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes), encode, score)
