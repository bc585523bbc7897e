"""The state that an update changes, and the optimizer."""

from collections.abc import Collection
from typing import Literal

import flax.struct
import optax
from jaxtyping import Array, Int

from nabla_gfn_jax.typing import Params


@flax.struct.dataclass
class TrainState:
    """The trained parameters, the optimizer's state and the number of updates.

    `params` has "lora" and each head of the algorithm by name. `average` is the running mean of the LoRA over the
    updates, or None if the run keeps none.
    """

    params: Params
    optimizer: optax.OptState
    step: Int[Array, ""]
    average: Params | None = None

    @property
    def policy(self) -> Params:
        """The LoRA that the run saves: the running mean if there is one, otherwise the trained LoRA."""
        return self.params["lora"] if self.average is None else self.average


def learning_rate(
    rate: float, decline: Literal["constant", "cosine", "linear"], updates: int
) -> float | optax.Schedule:
    """The learning rate of a run of `updates` updates: constant, or declining to 0 at the last."""
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
    """AdamW (.9, .999). LoRA and heads have different weight decays; each gradient's norm is clipped separately."""

    def group(weight_decay: float) -> optax.GradientTransformation:
        adam = optax.adamw(rate, eps=epsilon, weight_decay=weight_decay)
        return optax.chain(optax.clip_by_global_norm(clip), adam)

    groups = {"lora": group(decay_lora)} | {name: group(decay_heads) for name in heads}
    return optax.multi_transform(groups, {name: name for name in groups})
