"""A base model with its reward and its prompts, as the studies on images use them."""

import functools
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.base_models.base import BaseModel, predictor
from nabla_gfn_jax.rewards import Reward
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds


class Sampling(Protocol):
    """The options of a study that say how it samples."""

    @property
    def guidance(self) -> float:
        """The classifier-free guidance scale."""

    @property
    def num_steps(self) -> int:
        """The number of steps of a path."""

    @property
    def seed(self) -> int:
        """The seed of every random number."""


@dataclass(frozen=True)
class Images:
    """The base model, its reward and its prompts."""

    base: BaseModel
    reward: Reward
    prompts: tuple[str, ...]
    options: Sampling

    @functools.cached_property
    def frozen(self) -> Params:
        """The parameters, as arguments of compiled functions so that they are not compiled in as constants."""
        table = {
            "base": self.base.encode_prompts(self.prompts),
            "reward": self.reward.encode_prompts(list(self.prompts)),
        }
        return jax.device_put({"base": self.base.frozen_params, "reward": self.reward.params, "table": table})

    def model(self, frozen: Params) -> Model:
        """The base model with the parameters `frozen`, in the form that algorithms use."""

        def log_reward(z: Latents, prompt_id: PromptIds) -> Array:
            features = jax.tree.map(lambda a: a[prompt_id], frozen["table"]["reward"])
            return self.reward.score(frozen["reward"], self.base.decode(frozen["base"], z), features)

        predict = predictor(self.base, frozen["base"], frozen["table"]["base"], self.options.guidance)
        return Model(self.base.chain(self.options.num_steps), predict, log_reward, {})

    def keys(self, stream: int, start: int, count: int) -> tuple[PRNGKeys, PromptIds]:
        """The keys of `count` samples from number `start` on, and their prompt ids, which cycle."""
        numbers = jnp.arange(start, start + count)
        key = jax.random.fold_in(jax.random.key(self.options.seed), stream)
        return jax.vmap(functools.partial(jax.random.fold_in, key))(numbers), numbers % len(self.prompts)
