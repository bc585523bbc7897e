"""What an update changes, and the optimizer that changes it."""

from collections.abc import Collection
from typing import Literal

import flax.struct
import optax
from jaxtyping import Array, Int

from nabla_gfn_jax.typing import Params


@flax.struct.dataclass
class TrainState:
    """Parameters {"lora", and each of the algorithm's heads by name}, their optimizer's state, updates made.

    `average` is the running mean of the LoRA over the updates, if the run keeps one.
    """

    params: Params
    optimizer: optax.OptState
    step: Int[Array, ""]
    average: Params | None = None

    @property
    def policy(self) -> Params:
        """The LoRA that the run leaves: the running mean, if there is one."""
        return self.params["lora"] if self.average is None else self.average


def learning_rate(
    rate: float, decline: Literal["constant", "cosine", "linear"], updates: int
) -> float | optax.Schedule:
    """The learning rate of a run of so many updates: constant, or falling to 0 at the last."""
    if decline == "cosine":
        return optax.cosine_decay_schedule(rate, max(updates, 1))
    return rate if decline == "constant" else optax.linear_schedule(rate, 0.0, max(updates, 1))


def make_optimizer(
    heads: Collection[str],
    rate: float | optax.Schedule,
    *,
    decay_lora: float,
    decay_heads: float,
    clip: float,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW (.9, .999) for LoRA and each head, each with its own weight decay and its own clip of the global norm."""

    def group(weight_decay: float) -> optax.GradientTransformation:
        adam = optax.adamw(rate, eps=epsilon, weight_decay=weight_decay)
        return optax.chain(optax.clip_by_global_norm(clip), adam)

    groups = {"lora": group(decay_lora)} | {name: group(decay_heads) for name in heads}
    return optax.multi_transform(groups, {name: name for name in groups})
