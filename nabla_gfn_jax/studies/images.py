"""A base model with its reward and its prompts, as the studies on images use them."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.base_models.base import BaseModel, predictor
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.parallel import SPLIT, all_devices, require_devices
from nabla_gfn_jax.rewards import REWARDS, Reward, load_reward
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds

Rows = TypeVar("Rows")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Checked):
    """What a study samples. A study may give `num_steps` another default or range."""

    model: str = option("emoji", "a shipped model, a folder, or OWNER/NAME on the hub")
    reward: str = option("valence", "a reward", choices=REWARDS)
    prompts: str = option("a_face", "a prompt set")
    beta: float = option(8.0, "β, the target's exponent", minimum=-1e9, maximum=1e9)
    guidance: float = option(2.0, "classifier-free guidance scale", minimum=0, maximum=100)
    num_steps: int = option(50, "sampling steps", minimum=1, maximum=999)
    seed: int = option(0, "seed of every random number", minimum=0, maximum=LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(ImageOptions):
    """A study of a policy that takes the first steps, or all."""

    until_step: int | None = option(None, "last step with the LoRA; the base model takes the others", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_step > self.num_steps:
            raise UserError(f"--until_step = {self.last_step} is more than --num_steps = {self.num_steps}; lower it")

    @property
    def last_step(self) -> int:
        """The last step with the LoRA, from 1."""
        return self.until_step or self.num_steps


@dataclass(frozen=True, kw_only=True)
class LoraOptions(PolicyOptions):
    """A study of a LoRA."""

    lora: Path = option(meaning="the LoRA: a file, or a folder of one", file="existing")


@dataclass(frozen=True)
class Images:
    """The base model, its reward and its prompts."""

    base: BaseModel
    reward: Reward
    prompts: tuple[str, ...]
    options: ImageOptions

    @classmethod
    def load(cls, options: ImageOptions) -> Self:
        """What the options name, in float32. Raises `UserError` if the prompts, the model or the reward do not load."""
        require_devices()
        prompts = prompt_set(options.prompts).train
        use_compilation_cache()
        return cls(load_model(options.model, jnp.float32), load_reward(options.reward), prompts, options)

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
        return spread((jax.vmap(functools.partial(jax.random.fold_in, key))(numbers), numbers % len(self.prompts)))


def spread(rows: Rows) -> Rows:
    """Arrays with one leading axis, evenly on all devices if its length allows it.

    The devices then share what is computed from them.
    """
    count = len(jax.tree.leaves(rows)[0])
    if count % jax.device_count():
        return rows
    placed: Rows = jax.device_put(rows, NamedSharding(all_devices(), SPLIT))
    return placed


def write_results(folder: Path, name: str, rows: Sequence[NamedTuple], table: str) -> None:
    """Writes a line of JSON for each row to NAME.jsonl and the table to NAME.md in `folder`, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [row._asdict() for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"{name}.md").write_text(table)
    print(table, end="")
