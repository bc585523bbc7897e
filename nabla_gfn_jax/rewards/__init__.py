"""Rewards by name: a shipped reward, a user's function, a server, or a weighted sum of them.

A name is one term, or several joined by "+". Each term is `REWARD` or `REWARD:WEIGHT`, where REWARD is a key of
`REWARDS`, `FILE.py:FUNCTION` (`own`), or the URL of a server (`remote`). A new shipped reward is a line in
`REWARDS` and one in `SCALES`.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import aesthetic, clip_score, emoji, hps, image_reward, jpeg, own, remote
from nabla_gfn_jax.rewards.reward import TOTAL, Reward
from nabla_gfn_jax.rewards.sums import weighted_sum

__all__ = ["ABSTRACT", "NAMES", "REWARDS", "TOTAL", "Reward", "RewardNames", "load_reward", "scale_of", "terms"]

REWARDS: dict[str, Callable[[], Reward]] = {
    "valence": emoji.valence,
    "recognisability": emoji.recognisability,
    "aesthetic": aesthetic.aesthetic,
    "hps": hps.hps,
    "hps_v2": hps.hps_v2,
    "image_reward": image_reward.image_reward,
    "pick_score": clip_score.pick_score,
    "clip": clip_score.clip,
    "clip_h": clip_score.clip_h,
    "jpeg": jpeg.jpeg,
}
# The rewards without their weights, to plan a run. Rewards that are not listed have their weights in the package.
ABSTRACT: dict[str, Callable[[], Reward]] = {
    "aesthetic": aesthetic.abstract,
    "hps": hps.abstract,
    "hps_v2": hps.abstract,
    "image_reward": image_reward.abstract,
    "pick_score": lambda: clip_score.abstract(clip_score.VIT_H),
    "clip": lambda: clip_score.abstract(clip_score.VIT_L),
    "clip_h": lambda: clip_score.abstract(clip_score.VIT_H),
}
# The version of each reward and the unit of its log R.
SCALES = {
    "valence": "tanh of the predicted sentiment, -1 to 1",
    "recognisability": "log probability of the prompt's animal",
    "aesthetic": "LAION's aesthetic predictor as in DDPO, about 1 to 10",
    "hps": "HPSv2.1, cosine",
    "hps_v2": "HPSv2.0, cosine",
    "image_reward": "ImageReward v1.0, standardised",
    "pick_score": "PickScore v1, cosine times its scale, about 16 to 26",
    "clip": "OpenAI's CLIP ViT-L/14, cosine",
    "clip_h": "LAION's CLIP ViT-H/14, cosine",
    "jpeg": "minus the kilobytes of a JPEG file of quality 95",
}
_URL = ("http://", "https://")


class Term(NamedTuple):
    """A part of a reward: its name, its label in the log, and its weight."""

    reward: str
    label: str
    weight: float


class RewardNames(Collection[str]):
    """The names that `load_reward` accepts, as the choices of an option. Iteration gives the kinds of names.

    Testing a name raises `UserError` if it names a file that does not exist.
    """

    def __init__(self, *more: str):
        """`more` are other texts that the option allows."""
        self._more = more

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._more or terms(name) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(
            [*REWARDS, "FILE.py:FUNCTION", "http://SERVER/PATH", "a sum such as hps:1+aesthetic:0.5", *self._more]
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


NAMES = RewardNames()


def terms(name: str) -> list[Term] | None:
    """The parts of a reward's name; None if a part is not a reward. Raises `UserError` if a file does not exist."""
    found = _parsed(name)
    for term in found:
        file = own.split(term.reward)
        if file is not None and not file[0].is_file():
            raise UserError(f"reward = {term.reward!r}: there is no file {file[0]}")
    labels = [term.label for term in found]
    return [t._replace(label=t.reward) if labels.count(t.label) > 1 else t for t in found] or None


def scale_of(name: str) -> str:
    """The version and the unit of a reward, or of each part of a sum with its weight; of a user's reward, its name."""
    found = [(term, SCALES.get(term.reward, term.reward)) for term in _parsed(name)]
    if len(found) == 1 and found[0][0].weight == 1.0:
        return found[0][1]
    return " + ".join(f"{term.weight:g} x ({scale})" for term, scale in found)


def _parsed(name: str) -> list[Term]:
    """The parts of a reward's name; none if a part is not a reward."""
    parts = [_term(text.strip()) for text in name.split("+")]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):  # the whole may be a file whose path contains "+"
        whole = _term(name)
        found = [whole] if whole else []
    return found


def _term(text: str) -> Term | None:
    """The term `REWARD` or `REWARD:WEIGHT`; None for other texts."""
    weight = 1.0
    if not _is_reward(text):
        text, _, said = text.rpartition(":")
        try:
            weight = float(said)
        except ValueError:
            return None
    if not _is_reward(text) or not math.isfinite(weight):
        return None
    file = own.split(text)
    return Term(text, file[1] if file else text, weight)


def _is_reward(name: str) -> bool:
    """Whether the text names one reward, without a weight."""
    file = own.split(name)
    if file is not None:
        return file[1].isidentifier()
    server = next((name.removeprefix(start) for start in _URL if name.startswith(start)), None)
    if server is not None:
        return "+" not in name and ":" not in server.partition("/")[2]
    return name in REWARDS


def load_reward(name: str, *, weights: bool = True) -> Reward:
    """The reward called `name`. Without `weights` it has shapes instead and can be compiled but not run.

    Raises `UserError` if there is no such reward or its weights are missing.
    """
    found = terms(name)
    if found is None:
        raise UserError(f"there is no reward {name!r}; choose one of {', '.join(NAMES)}")
    if len({term.label for term in found}) < len(found):
        raise UserError(f"reward = {name!r} names one reward twice; give it once, with the sum of its weights")
    parts = {term.label: (term.weight, _load(term.reward, weights)) for term in found}
    (weight, reward), *others = parts.values()
    return weighted_sum(parts) if others or weight != 1.0 else reward


def _load(name: str, weights: bool) -> Reward:
    if name in REWARDS:
        return (REWARDS if weights else REWARDS | ABSTRACT)[name]()
    file = own.split(name)
    return own.own(*file) if file else remote.remote(name)
