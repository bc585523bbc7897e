"""The prompts of a run: the table of their features, and the choice of a prompt for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from nabla_gfn_jax.base_models.base import FEW_PROMPTS, BaseModel
from nabla_gfn_jax.rewards import Reward
from nabla_gfn_jax.streams import stream
from nabla_gfn_jax.typing import PRNGKeys


def make_table(base: BaseModel, reward: Reward, prompts: Sequence[str]) -> dict[str, Any]:
    """The features of each prompt for base model and reward, on the host. A prompt's id is its row."""
    features = jax.tree.map(np.asarray, reward.encode_prompts(list(prompts)))
    return {"base": base.encode_prompts(prompts), "reward": features}


def table_rows(num_prompts: int, samples: int) -> int:
    """The rows of a run's table: all prompts, or, if they are very many, as many as an epoch has samples."""
    return num_prompts if num_prompts <= FEW_PROMPTS else samples


def abstract_table(base: BaseModel, reward: Reward, num_prompts: int, example: str = "") -> dict[str, Any]:
    """The shapes of the table. `example` is a prompt that the reward accepts."""
    one = reward.encode_prompts([example])
    features = jax.tree.map(lambda a: jax.ShapeDtypeStruct((num_prompts, *a.shape[1:]), a.dtype), one)
    return {"base": base.abstract_table(num_prompts), "reward": features}


@dataclass(frozen=True)
class PromptIds:
    """Chooses one of `number` prompts for each sample."""

    number: int
    weights: tuple[float, ...] | None = None  # relative frequency of each prompt; None: all the same

    def chosen(self, keys: PRNGKeys) -> Int[np.ndarray, " batch"]:
        """A random prompt id for each key, with probabilities proportional to the weights."""
        if self.weights is None:
            choose = lambda key: jax.random.randint(stream(key, "prompt"), (), 0, self.number)  # noqa: E731
            return np.asarray(jax.vmap(choose)(keys))
        place = np.asarray(jax.vmap(lambda key: jax.random.uniform(stream(key, "prompt")))(keys), np.float64)
        ends = np.cumsum(np.asarray(self.weights, np.float64))
        found = np.searchsorted(ends, place * ends[-1], side="right")
        return np.minimum(found, np.flatnonzero(self.weights)[-1]).astype(np.int32)
