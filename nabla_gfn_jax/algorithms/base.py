"""What an algorithm sees. It knows nothing of images, guidance or VAEs: it runs in the plane too.

A new algorithm is one file with one class that keeps the `Algorithm` protocol, and a line in `ALGORITHMS`.
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
Scalars = dict[str, PerSample]
LAMBDA = "λ, how strongly ε_θ is held at ε_θ†"  # the meaning of the option output_regularisation
HeadKind = Literal["vector", "scalar"]  # shaped like x, such as g_φ; one number a sample, such as log F


@runtime_checkable
class Head(Protocol):
    """A learned function h_φ(x, level) beside the policy, zero when training starts."""

    def __call__(self, phi: Params, x: Latents, level: Level, prompt_id: PromptIds) -> Latents | PerSample: ...


@runtime_checkable
class LogReward(Protocol):
    """log R(z) of a clean latent z, sample by sample, differentiable in z."""

    def __call__(self, z: Latents, prompt_id: PromptIds) -> PerSample: ...


@dataclass(frozen=True)
class Model:
    """The chain, and the pure functions an algorithm works with; what they need of a prompt, its id tells them.

    `predict_change` is None where o_θ − o_# may be computed as a difference of two outputs: in float32.
    `lora_steps`: the first so many steps are the policy's, the others the base model's own; None: all are the policy's.
    """

    chain: Chain
    predict: Predict
    log_reward: LogReward
    heads: Mapping[str, Head]
    predict_change: PredictChange | None = None
    lora_steps: int | None = None

    @property
    def policy_steps(self) -> int:
        """How many steps are the policy's."""
        return self.chain.num_steps if self.lora_steps is None else self.lora_steps


@flax.struct.dataclass
class Rollout:
    """What sampling leaves, of a device's B samples."""

    trajectory: Trajectory
    log_reward: PerSample
    prompt_id: PromptIds
    keys: PRNGKeys  # the samples' own


@flax.struct.dataclass
class Batch:
    """What is trained on of a rollout.

    Attributes:
        data: one batch for each update of the epoch, leaves (updates, B, …).
        scalars: numbers of each sample, by name, that `weigh` sees beside its log reward.
    """

    data: PyTree[Any]
    scalars: Scalars = flax.struct.field(default_factory=dict)


@runtime_checkable
class Algorithm(Protocol):
    """Samples are taken by `batch`, weighed on the host by `weigh`, and trained on by `value_and_grad`.

    `batch` and `value_and_grad` are compiled and run on each device's own samples, without communication; `weigh` runs
    between them, in NumPy, on the samples of all devices.
    """

    @property
    def on_policy(self) -> bool:
        """Whether an epoch trains on its own rollout, or, if not, on that of the epoch before."""

    def heads(self) -> Mapping[str, HeadKind]:
        """The functions to be learned beside the policy, which `params` and the gradient then have by name."""

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of so many steps."""

    def first_stats(self, num_prompts: int) -> PyTree[np.ndarray]:
        """What `weigh` remembers from epoch to epoch, as a run starts; saved with the run."""

    def weigh(
        self, stats: PyTree[np.ndarray], scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PyTree[np.ndarray]]:
        """A number for each sample, as a rule a weight, from its "log_reward" and the scalars; and the new stats."""

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """What the updates need of a rollout. `params` are those that sampled."""

    def value_and_grad(
        self, params: Params, model: Model, data: PyTree[Any], weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """((loss, its terms), gradient): means over the samples of `data`, leaves (B, …), some of an update's."""


class Unweighted:
    """The parts of the protocol of an algorithm that weighs all samples alike."""

    def first_stats(self, num_prompts: int) -> PyTree[np.ndarray]:
        return {}

    def weigh(
        self, stats: PyTree[np.ndarray], scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PyTree[np.ndarray]]:
        return np.ones(len(prompt_id), np.float32), stats


class PolicyAlone:
    """The parts of the protocol of an algorithm that learns nothing beside the policy, from any number of steps."""

    def heads(self) -> Mapping[str, HeadKind]:
        return {}

    def validate(self, num_steps: int) -> None:
        """Nothing to refuse."""


def reward_gradient(model: Model, z: Latents, prompt_id: PromptIds) -> Latents:
    """∇_z log R(z), a constant to every parameter."""
    return jax.grad(lambda z: model.log_reward(z, prompt_id).sum())(jax.lax.stop_gradient(z))


def mean_square(residual: Latents) -> PerSample:
    """‖·‖², a mean over latent elements."""
    return (residual**2).reshape(len(residual), -1).mean(axis=1)


def output_change(output: Latents, before: Latents, level: Level) -> PerSample:
    """‖ε_θ − ε_θ†‖² at a state, from the outputs of the policy and of the parameters θ† that sampled: what λ weighs."""
    return mean_square(expand(level.noise_o, output) * (output - before))
