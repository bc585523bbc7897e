"""The measurements beside the usual ones that a user asks for by name: other rewards, and metrics with a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.evaluation import AnyMetric
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.rewards import Reward, load_reward, terms


@dataclass(frozen=True)
class Extras:
    """The metrics, and the files that were read for them by the metric's name."""

    metrics: list[AnyMetric]
    files: dict[str, tuple[Path, ...]]
    cross_rewards: tuple[str, ...]  # the labels of the other rewards; their figures are log_reward_LABEL


def load_extras(cross_rewards: Sequence[str], metrics: Sequence[str], reward: str) -> Extras:
    """Loads rewards and networks. Raises `UserError` for a missing file, or as `load_cross_rewards`."""
    others = load_cross_rewards(cross_rewards, reward)
    released = [METRICS[name]() for name in dict.fromkeys(metrics)]
    files = {f"reward_{label}": other.files for label, other in others.items()}
    files |= {metric.name: read for metric, read in released}
    found: list[AnyMetric] = [*(LogReward(other, label) for label, other in others.items())]
    return Extras([*found, *(metric for metric, _ in released)], files, tuple(others))


def load_cross_rewards(names: Sequence[str], reward: str) -> dict[str, Reward]:
    """The rewards by their labels in the table. Raises `UserError` if one has a weight or has the label of another."""
    labels = [term.label for term in terms(reward) or ()]
    found: dict[str, Reward] = {}
    for name in names:
        parts = terms(name) or []
        term = parts[0]
        if len(parts) > 1 or term.weight != 1.0:
            raise UserError(f"cross_rewards = {name} is a sum; give its parts without weights and with commas between")
        if term.label in (*labels, *found):
            raise UserError(f"cross_rewards = {name} is measured already; leave it out")
        found[term.label] = load_reward(name)
    return found
