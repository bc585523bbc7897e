"""A policy without a LoRA: the base model, whose steps follow the gradient of a learned log value V.

    δ = s σ ∇_x V(x̂_#(x)),     δ = (μ_θ − μ_#)/σ

as `algorithms/fitted_value.py` tells its LoRA. V is the mean of some learned log values (`value_memory.py`), which see
x̂ in a few principal components. They are known at the states of the paths that they were fitted to. Between two states
V is interpolated in time, so the policy may take other steps.

A step costs about three evaluations of the base model, because V's gradient is pulled back through it. Where V is not
known it can be steep, and a steep step leads to where it is known less. So a δ that would spend more than some nats,
‖δ‖²/2, is shortened to them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms import value_network
from nabla_gfn_jax.algorithms.value_memory import ValueMemory
from nabla_gfn_jax.algorithms.value_network import Points
from nabla_gfn_jax.checkpoints.files import TensorFiles, write_safetensors
from nabla_gfn_jax.checkpoints.lora_file import header, read_about
from nabla_gfn_jax.diffusion.chain import Chain, Level
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Latents, Params, PromptIds

_SHOWN = 5  # prompts in a message
_LEAST = 1e-30  # nats; a divisor above 0
_KIND = "value"  # what tells the file from a LoRA


class Known(NamedTuple):
    """A learned log value: S states of a path, d components of an x̂ of some elements."""

    centre: Float[np.ndarray, " elements"]
    basis: Float[np.ndarray, "elements d"]
    middle: Float[np.ndarray, "S d"]
    unit: Float[np.ndarray, " S"]
    weights: Params

    @classmethod
    def of(cls, memory: ValueMemory) -> "Known":
        """What a memory has learned. It must not see log R(x̂)."""
        return cls(memory.centre, memory.basis, memory.middle, memory.unit, memory.network.average)

    def value(self, clean: Latents, position: Float[Array, ""], prompt_id: PromptIds) -> Float[Array, " batch"]:
        """V at clean samples x̂. `position` is 0 at the first state and S − 1 at the last."""
        middle, unit, weights = jax.tree.map(jnp.asarray, (self.middle, self.unit, self.weights))
        last = len(unit) - 1
        before = jnp.minimum(position.astype(int), max(last - 1, 0))
        components = (clean.reshape(len(clean), -1) - jnp.asarray(self.centre)[None]) @ jnp.asarray(self.basis)

        def at(state: Array) -> Float[Array, " batch"]:
            seen = (components - middle[state][None]) / unit[state]
            features = jnp.concatenate([seen, jnp.zeros((len(clean), 1), seen.dtype)], axis=1)  # no guess
            time = jnp.full(len(clean), state / max(last, 1), seen.dtype)
            return value_network.log_value(weights, Points(features, time, prompt_id))  # type: ignore[arg-type]

        weight = position - before.astype(position.dtype)
        return (1 - weight) * at(before) + weight * at(jnp.minimum(before + 1, last))


@flax.struct.dataclass
class ValueGuide:
    """What the policy follows, in a LoRA's place."""

    known: tuple[Known, ...]  # V is their mean
    times: Float[np.ndarray, " states"]  # of the first states, decreasing; after the last the base model goes on
    scale: Float[np.ndarray, ""]  # s
    most: Float[np.ndarray, ""]  # nats that a step of a sample may spend

    @classmethod
    def of(
        cls,
        memories: Sequence[ValueMemory],
        times: Float[np.ndarray, " states"],
        scale: float,
        most: float = np.inf,
    ) -> "ValueGuide":
        """The guide of V that these memories have learned.

        Args:
            memories: what V is the mean of.
            times: those of the network at the first states of a path.
            scale: s, by which V's gradient is multiplied.
            most: nats that a step of a sample may spend, ‖δ‖²/2.
        """
        known = tuple(Known.of(memory) for memory in memories)
        return cls(known, *(np.asarray(a, np.float32) for a in (times, scale, most)))

    def slope(self, clean: Latents, time: Float[Array, ""], prompt_id: PromptIds) -> Latents:
        """∂V/∂x̂ (B, …) at clean samples x̂ of a time."""
        states = jnp.arange(len(self.times) - 1.0, -1.0, -1.0)
        position = jnp.interp(time, jnp.asarray(self.times)[::-1], states)

        def total(clean: Latents) -> Array:
            values = [known.value(clean, position, prompt_id) for known in self.known]
            return jnp.stack(values).sum() / len(values)

        return jax.grad(total)(clean)


def following(predict: Predict, chain: Chain) -> PredictChange:
    """The base model's output, and its change in the policy that follows the `ValueGuide` in the LoRA's place.

    `chain` has the steps of the policy. The states of a batch are at one level, and σ must be above 0 there.
    """

    def predict_change(lora: Any, x: Latents, level: Level, condition: PromptIds) -> tuple[Latents, Latents]:
        guide: ValueGuide = lora
        step = chain[jnp.argmin(jnp.abs(jnp.asarray(chain.at.time) - level.time[0]))]
        now = level.time[0].astype(jnp.float32)

        def follow(x: Latents) -> tuple[Latents, Latents]:
            output, through = jax.vjp(lambda x: predict(None, x, level, condition), x)
            clean, to = jax.vjp(level.clean, output, x)
            by_output, direct = to(guide.slope(clean, now, condition))
            change = guide.scale * step.sigma**2 / step.mean_o * (through(by_output)[0] + direct)
            spent = jnp.square(step.mean_o / step.sigma * change).sum(axis=tuple(range(1, x.ndim)), keepdims=True) / 2
            return output, change * jnp.sqrt(jnp.minimum(1, guide.most / jnp.maximum(spent, _LEAST)))

        def rest(x: Latents) -> tuple[Latents, Latents]:
            return predict(None, x, level, condition), jnp.zeros_like(x)

        output, change = jax.lax.cond(now >= guide.times[-1], follow, rest, x)
        return output, change

    return predict_change


def save_guide(file: Path, guide: ValueGuide, prompts: Sequence[str], about: Mapping[str, Any]) -> None:
    """Writes a safetensors file. `prompts` are V's in the order of their ids; `about` describes the guide."""
    tensors = {name: np.asarray(a) for name, a in flatten_dict(to_state_dict(guide), sep=".").items()}
    write_safetensors(file, tensors, header({"kind": _KIND, "known_prompts": list(prompts), **about}))


def load_guide(file: Path, prompts: Sequence[str], elements: int, scale: float | None = None) -> ValueGuide:
    """The guide in a file for a list of prompts, whose places in the list are then their ids.

    Args:
        file: written by `save_guide`.
        prompts: those to sample.
        elements: of the model's latents.
        scale: s in place of the file's.

    Raises:
        UserError: the file is missing or damaged, is no such file, knows nothing of a prompt, or is of another model.
    """
    tensors = TensorFiles(file)
    about = read_about(file)
    known = about.get("known_prompts")
    if about.get("kind") != _KIND or not isinstance(known, list):
        raise UserError(f"{file} has no log value; name the value.safetensors that studies.value_guidance wrote")
    for prompt in prompts:
        if prompt not in known:
            few = ", ".join(map(repr, known[:_SHOWN])) + f" and {len(known) - _SHOWN} more" * (len(known) > _SHOWN)
            raise UserError(f"{file} knows no value for the prompt {prompt!r}; choose among {few}")
    rows = np.array([known.index(prompt) for prompt in prompts])
    try:
        tree = unflatten_dict({name: np.asarray(tensors[name]) for name in tensors}, sep=".")
        found = ValueGuide(
            known=tuple(_known(tree["known"][str(i)], rows) for i in range(len(tree["known"]))),
            times=tree["times"],
            scale=_number(tree["scale"]) if scale is None else np.asarray(scale, np.float32),
            most=_number(tree.get("most", np.asarray(np.inf, np.float32))),  # older files have no limit
        )
        size = len(found.known[0].centre)
        some = jax.ShapeDtypeStruct((1, size), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
        jax.eval_shape(found.slope, *some, jax.ShapeDtypeStruct((1,), jnp.int32))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}); run studies.value_guidance again") from None
    if size != elements:
        raise UserError(f"{file} is for latents of {size} numbers, and this model's have {elements}; give its --model")
    return found


def _known(tree: dict[str, Any], rows: np.ndarray) -> Known:
    weights, layers = tree["weights"], tree["weights"]["layers"]
    pairs = [(layers[str(i)]["0"], layers[str(i)]["1"]) for i in range(len(layers))]
    out = (weights["out"]["0"], _number(weights["out"]["1"]))
    network = {"layers": pairs, "prompts": weights["prompts"][rows], "out": out}
    return Known(tree["centre"], tree["basis"], tree["middle"], tree["unit"], network)


def _number(tensor: np.ndarray) -> np.ndarray:
    """A number, which safetensors files of ours keep as a list of one."""
    return tensor.reshape(())
