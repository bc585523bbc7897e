"""What an update changes, and the optimizer that changes it."""

from collections.abc import Collection

import flax.struct
import optax
from jaxtyping import Array, Int

from nabla_gfn_jax.typing import Params


@flax.struct.dataclass
class TrainState:
    """Parameters {"lora", and each of the algorithm's heads by name}, their optimizer's state, updates made."""

    params: Params
    optimizer: optax.OptState
    step: Int[Array, ""]


def make_optimizer(
    heads: Collection[str], learning_rate: float, *, decay_lora: float, decay_heads: float, clip: float
) -> optax.GradientTransformation:
    """AdamW (.9, .999) for LoRA and each head, each with its own weight decay and its own clip of the global norm."""

    def group(weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(learning_rate, weight_decay=weight_decay))

    groups = {"lora": group(decay_lora)} | {name: group(decay_heads) for name in heads}
    return optax.multi_transform(groups, {name: name for name in groups})
