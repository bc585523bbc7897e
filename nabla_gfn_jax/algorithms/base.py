"""The interface between algorithms and the trainer.

An algorithm does not know images, guidance or VAEs, so it also runs on problems in the plane. A new algorithm is one
file with one class that follows the `Algorithm` protocol, and a line in `ALGORITHMS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.diffusion.sampler import Predict, PredictChange, Trajectory
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds

Metrics = dict[str, Float[Array, ""]]
Scalars = dict[str, Float[Array, " batch *rest"]]  # one or several numbers for each sample
LAMBDA = "λ, the weight of ‖ε_θ − ε_θ†‖²"  # the meaning of the option output_regularisation
HeadKind = Literal["vector", "scalar"]  # the shape of x, such as g_φ; one number per sample, such as log F


@runtime_checkable
class Head(Protocol):
    """A learned function h_φ(x, level) beside the policy: (B, …) or (B,). It is zero when training starts."""

    def __call__(self, phi: Params, x: Latents, level: Level, prompt_id: PromptIds) -> Latents | PerSample: ...


@runtime_checkable
class LogReward(Protocol):
    """log R(z) of clean latents z (B, …), shape (B,), differentiable in z."""

    def __call__(self, z: Latents, prompt_id: PromptIds) -> PerSample: ...


@dataclass(frozen=True)
class Model:
    """The chain and the pure functions that an algorithm works with. These functions take the index of a prompt.

    Attributes:
        predict_change: None if o_θ − o_# is computed as a difference of two outputs, which is accurate in float32.
        lora_steps: the number of first steps that the policy takes; the base model takes the others. None: all steps.
    """

    chain: Chain
    predict: Predict
    log_reward: LogReward
    heads: Mapping[str, Head]
    predict_change: PredictChange | None = None
    lora_steps: int | None = None

    @property
    def policy_steps(self) -> int:
        """The number of steps that the policy takes."""
        return self.chain.num_steps if self.lora_steps is None else self.lora_steps


@flax.struct.dataclass
class Rollout:
    """The result of sampling on one device: B samples."""

    trajectory: Trajectory
    log_reward: PerSample
    prompt_id: PromptIds
    keys: PRNGKeys  # one per sample


@flax.struct.dataclass
class Batch:
    """The training data that an algorithm takes from a rollout.

    Attributes:
        data: one batch for each update of the epoch, leaves (updates, B, …).
        scalars: numbers per sample (B,), by name, which `weigh` gets beside the log reward.
    """

    data: PyTree[Any]
    scalars: Scalars = flax.struct.field(default_factory=dict)


@runtime_checkable
class Algorithm(Protocol):
    """A training algorithm: `batch` selects training data, `weigh` weights the samples, `value_and_grad` trains.

    `batch` and `value_and_grad` are compiled and run on each device's own samples, without communication. `weigh` runs
    between them, in NumPy on the host, on the samples of all devices.
    """

    @property
    def on_policy(self) -> bool:
        """True if an epoch trains on its own rollout, False if it trains on that of the previous epoch."""

    def heads(self) -> Mapping[str, HeadKind]:
        """The functions learned beside the policy. Their names are keys of `params` and of the gradient."""

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of `num_steps` steps."""

    def first_stats(self, num_prompts: int) -> PyTree[np.ndarray]:
        """The initial `stats`: the memory of `weigh` from epoch to epoch, which is saved with the run."""

    def weigh(
        self, stats: PyTree[np.ndarray], scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all *rest"], PyTree[np.ndarray]]:
        """What `value_and_grad` is told about each sample, which is mostly its weight, and the new stats.

        `scalars` holds "log_reward" and the scalars of `batch`. Both results keep their shapes after the first epoch.
        """

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """The training data for `updates` updates. `params` are the parameters that sampled the rollout."""

    def value_and_grad(
        self, params: Params, model: Model, data: PyTree[Any], weight: Float[Array, " batch *rest"]
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """((loss, its terms), gradient) as means over the samples of `data`, a micro-batch with leaves (B, …).

        If the gradient is 0 everywhere, the trainer leaves parameters and optimizer as they were.
        """


class Unweighted:
    """The parts of the protocol for an algorithm that gives all samples the weight 1."""

    def first_stats(self, num_prompts: int) -> PyTree[np.ndarray]:
        return {}

    def weigh(
        self, stats: PyTree[np.ndarray], scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PyTree[np.ndarray]]:
        return np.ones(len(prompt_id), np.float32), stats


class PolicyAlone:
    """The parts of the protocol for an algorithm without heads that accepts any number of steps."""

    def heads(self) -> Mapping[str, HeadKind]:
        return {}

    def validate(self, num_steps: int) -> None:
        """Accepts any number of steps."""


def reward_gradient(model: Model, z: Latents, prompt_id: PromptIds) -> Latents:
    """∇_z log R(z), (B, …); no gradient flows through it."""
    return jax.grad(lambda z: model.log_reward(z, prompt_id).sum())(jax.lax.stop_gradient(z))


def mean_square(residual: Latents) -> PerSample:
    """‖residual‖² of each sample, (B,), as a mean over latent elements."""
    return (residual**2).reshape(len(residual), -1).mean(axis=1)


def output_change(output: Latents, before: Latents, level: Level) -> PerSample:
    """‖ε_θ − ε_θ†‖² of each state, (B,), the term that λ weights.

    `output` and `before` are the outputs of the policy and of the parameters θ† that sampled.
    """
    return mean_square(expand(level.noise_o, output) * (output - before))
