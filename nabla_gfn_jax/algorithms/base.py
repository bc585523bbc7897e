"""What an algorithm sees. It knows nothing of images, guidance or VAEs: it runs in the plane too.

A new algorithm is one file with one class that keeps the `Algorithm` protocol.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.diffusion.sampler import Trajectory
from nabla_gfn_jax.diffusion.schedule import Schedule
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, Scores, Timesteps

Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Predict(Protocol):
    """ε_θ(x, t): the policy's noise prediction with `lora`, the base model's (ε_#) with None."""

    def __call__(self, lora: Params | None, x: Latents, t: Timesteps, condition: PyTree[Any]) -> Latents: ...


@runtime_checkable
class Flow(Protocol):
    """g_φ(x, t): the learned correction of the one-step guess, shaped like x, zero when training starts."""

    def __call__(self, phi: Params, x: Latents, t: Timesteps, condition: PyTree[Any]) -> Latents: ...


@runtime_checkable
class LogReward(Protocol):
    """log R(z) of a clean latent z, sample by sample, differentiable in z."""

    def __call__(self, z: Latents, condition: PyTree[Any]) -> Scores: ...


class Model(NamedTuple):
    """The pure functions an algorithm works with. `condition` is any tree of arrays with leading axis B."""

    predict: Predict
    flow: Flow
    log_reward: LogReward


@runtime_checkable
class Algorithm(Protocol):
    """An epoch samples trajectories, takes `transitions` of each batch, and updates by `value_and_grad`."""

    @property
    def uses_flow(self) -> bool:
        """Whether there is a φ to train; if not, params["flow"] is {}."""

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if the options do not fit a trajectory of so many steps."""

    def transitions(
        self,
        params: Params,
        model: Model,
        keys: PRNGKeys,
        trajectory: Trajectory,
        schedule: Schedule,
        condition: PyTree[Any],
        draws: int,
    ) -> PyTree[Any]:
        """What the loss needs of each trajectory, `draws` times, for as many updates: leaves (draws, B, …).

        `params` are those that sampled; `keys` are the samples' own.
        """

    def value_and_grad(
        self, params: Params, model: Model, transitions: PyTree[Any]
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """((loss, its terms), gradient) with params = {"lora": …, "flow": …}; a mean over the batch."""


def reward_gradient(model: Model, z: Latents, condition: PyTree[Any]) -> Latents:
    """∇_z log R(z), a constant to every parameter."""
    return jax.grad(lambda z: model.log_reward(z, condition).sum())(jax.lax.stop_gradient(z))
