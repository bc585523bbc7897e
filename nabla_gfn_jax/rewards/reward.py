"""The interface of rewards."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from nabla_gfn_jax.typing import Images, Params, PerSample

TOTAL = "log_reward"  # the name of the whole reward among its scores


@dataclass(frozen=True)
class Reward:
    """log R(x) of images, given prompts.

    Attributes:
        params: the parameters of `score`.
        encode_prompts: prompts → arrays with one row per prompt. It is called once with all prompts of a run, or, if
            they are very many, with the prompts of each epoch. It raises `UserError` for a prompt that the reward
            cannot judge.
        score: (params, images in [0, 1], features of their prompts) → log R of each image, (B,), float32, without β. It
            is pure and, unless the reward says otherwise, differentiable in the images.
        files: the files from which the reward was read.
        check_prompts: raises the `UserError` of `encode_prompts` without computing features.
    """

    params: Params
    encode_prompts: Callable[[list[str]], PyTree[Any]]
    score: Callable[[Params, Images, PyTree[Any]], PerSample]
    files: tuple[Path, ...] = ()
    check_prompts: Callable[[list[str]], object] = lambda prompts: None

    def scores(self, params: Params, images: Images, features: PyTree[Any]) -> dict[str, PerSample]:
        """The result of `score` under the name `TOTAL`, and the parts of a sum under their own names, for the log."""
        return {TOTAL: self.score(params, images, features)}


def abstract_reward(shapes: PyTree[Any], features: PyTree[Any], score: Callable[..., PerSample]) -> Reward:
    """A reward with shapes instead of arrays, which can be compiled but not run.

    `shapes` are those of the parameters, `features` those of one prompt's features.
    """

    def encode(prompts: list[str]) -> PyTree[Any]:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((len(prompts), *a.shape), a.dtype), features)

    return Reward(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes), encode, score)
