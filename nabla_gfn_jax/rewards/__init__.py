"""Rewards by name. A new one is a file with a loader and a line in `REWARDS`."""

from collections.abc import Callable

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import aesthetic, emoji, hps, image_reward
from nabla_gfn_jax.rewards.reward import Reward

REWARDS: dict[str, Callable[[], Reward]] = {
    "valence": emoji.valence,
    "recognisability": emoji.recognisability,
    "aesthetic": aesthetic.aesthetic,
    "hps": hps.hps,
    "image_reward": image_reward.image_reward,
}
# Without their weights, to plan a run; those not named here come with the package.
ABSTRACT: dict[str, Callable[[], Reward]] = {
    "aesthetic": aesthetic.abstract,
    "hps": hps.abstract,
    "image_reward": image_reward.abstract,
}


def load_reward(name: str, *, weights: bool = True) -> Reward:
    """The reward called `name`, or, without weights, one of shapes to compile and not to run.

    Raises `UserError` if there is none, or its weights are not installed.
    """
    if name not in REWARDS:
        raise UserError(f"there is no reward {name!r}; choose one of {', '.join(REWARDS)}")
    return (REWARDS if weights else REWARDS | ABSTRACT)[name]()
