"""The sampler: one scan from noise to a sample, which records the trajectory for the losses."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.diffusion.chain import Chain, Level
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys


@runtime_checkable
class Predict(Protocol):
    """o(x, level): the network's output with guidance, in its own prediction type; for `lora` None the base model's.

    `level` has leaves (B,); `condition` is any tree of arrays with leading axis B. The output is float32.
    """

    def __call__(self, lora: Params | None, x: Latents, level: Level, condition: PyTree[Any]) -> Latents: ...


@runtime_checkable
class PredictChange(Protocol):
    """(o_#, o_θ − o_#): the base model's output and its change by the LoRA.

    The rounding error of this change is relative to the change. If two outputs are subtracted in half precision, the
    error is relative to the outputs, which are much larger.
    """

    def __call__(self, lora: Params, x: Latents, level: Level, condition: PyTree[Any]) -> tuple[Latents, Latents]: ...


@flax.struct.dataclass
class Trajectory:
    """States and network outputs of T steps, in sampling order."""

    latents: Float[Array, "states batch *shape"]  # T+1 states: noise first, the sample last
    outputs: Float[Array, "steps batch *shape"]  # o at latents[k], from the parameters that sampled

    @property
    def samples(self) -> Latents:
        """The last states, (B, *shape)."""
        return self.latents[-1]


def draw_noise(keys: PRNGKeys, draw: int | Array, shape: tuple[int, ...]) -> Latents:
    """Standard normal noise (B, *shape), each sample from its own key. The start is draw 0, and step k is draw k + 1.

    A sample therefore depends on its key only, not on its batch or its device.
    """
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def policy_or_base(
    predict: Predict, lora: Params | None, x: Latents, level: Level, condition: PyTree[Any], on: Array | None
) -> Latents:
    """The policy's output if `on` is true or None, otherwise the base model's. Only one of them is evaluated."""
    if on is None or lora is None:
        return predict(lora, x, level, condition)
    policy, base = (partial(predict, parameters, x, level, condition) for parameters in (lora, None))
    output: Latents = jax.lax.cond(on, policy, base)
    return output


def sample(
    predict: Predict,
    lora: Params | None,
    chain: Chain,
    keys: PRNGKeys,
    shape: tuple[int, ...],
    condition: PyTree[Any],
    lora_steps: int | None = None,
) -> Trajectory:
    """Draws x ~ N(0, 1), then y ~ N(μ(x), σ²) step by step.

    Args:
        predict: the network, which is called with `lora`.
        lora: the policy's LoRA; None for the base model.
        chain: T steps.
        keys: (B,), one per sample; all random numbers of a sample come from its key.
        shape: the shape of one latent.
        condition: the argument of `predict`, leaves with leading axis B.
        lora_steps: the number of first steps that the policy takes; the base model takes the others. None: all steps.
    """
    until = chain.num_steps if lora_steps is None else lora_steps

    def step(x: Latents, inputs: tuple[Array, Chain]) -> tuple[Latents, tuple[Latents, Latents]]:
        index, now = inputs
        on = index < until if until < chain.num_steps else None
        output = policy_or_base(predict, lora, x, now.at.each(len(keys)), condition, on)
        y = now.mean(output, x) + now.sigma * draw_noise(keys, index + 1, shape)
        return y, (y, output)

    start = draw_noise(keys, 0, shape)
    _, (latents, outputs) = jax.lax.scan(step, start, (jnp.arange(chain.num_steps), chain))
    return Trajectory(latents=jnp.concatenate([start[None], latents]), outputs=outputs)
