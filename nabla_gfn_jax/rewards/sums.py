"""A weighted sum of rewards: log R = Σ wᵢ log Rᵢ, so that R^β = Π Rᵢ^(β wᵢ), a product of experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import PyTree

from nabla_gfn_jax.rewards.reward import TOTAL, Reward
from nabla_gfn_jax.typing import Images, Params, PerSample


@dataclass(frozen=True)
class SumOfRewards(Reward):
    """A sum whose `scores` also has each part as `log_reward_NAME`, without its weight."""

    parts: tuple[tuple[str, float, Reward], ...] = ()

    def scores(self, params: Params, images: Images, features: PyTree[Any]) -> dict[str, PerSample]:
        found = {name: part.score(params[name], images, features[name]) for name, _, part in self.parts}
        total = sum(weight * found[name] for name, weight, _ in self.parts)
        return {TOTAL: total, **{f"{TOTAL}_{name}": score for name, score in found.items()}}  # type: ignore[dict-item]


def weighted_sum(parts: Mapping[str, tuple[float, Reward]]) -> SumOfRewards:
    """The sum of the named parts, each times its weight. It accepts the prompts that all parts accept."""

    def encode(prompts: list[str]) -> dict[str, Any]:
        return {name: part.encode_prompts(prompts) for name, (_, part) in parts.items()}

    def check(prompts: list[str]) -> None:
        for _, part in parts.values():
            part.check_prompts(prompts)

    def score(params: Params, images: Images, features: PyTree[Any]) -> PerSample:
        return whole.scores(params, images, features)[TOTAL]

    files = dict.fromkeys(file for _, part in parts.values() for file in part.files)
    whole = SumOfRewards(
        params={name: part.params for name, (_, part) in parts.items()},
        encode_prompts=encode,
        score=score,
        files=tuple(files),
        check_prompts=check,
        parts=tuple((name, weight, part) for name, (weight, part) in parts.items()),
    )
    return whole
