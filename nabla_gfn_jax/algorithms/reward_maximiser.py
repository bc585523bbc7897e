"""Direct reward maximisation: the baseline that collapses.

The reward of the final sample, backpropagated through the last K sampling steps: DRaFT-K (Clark et al. 2024,
arXiv 2309.17400); ReFL (Xu et al. 2023, arXiv 2304.05977) with K = 1.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from nabla_gfn_jax.algorithms.base import Metrics, Model
from nabla_gfn_jax.diffusion.sampler import Trajectory
from nabla_gfn_jax.diffusion.schedule import Schedule, step_mean
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys


@flax.struct.dataclass
class Tail:
    """The last K steps of trajectories, leaves with leading axis B."""

    start: Latents  # the state K steps before the end
    shocks: Float[Array, "batch tail *shape"]  # σ·noise that each step drew
    condition: PyTree[Any]
    steps: Schedule  # leaves (B, K)


@dataclass(frozen=True, kw_only=True)
class RewardMaximiser(Checked):
    """Minimises −mean log R of the final sample."""

    tail: int = option(1, "K, the number of last steps that are differentiated", minimum=1)

    @property
    def uses_flow(self) -> bool:
        return False

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if a trajectory has fewer steps than are differentiated."""
        if self.tail > num_steps:
            raise UserError(f"algorithm.tail = {self.tail} is more than sampling.num_steps = {num_steps}")

    def transitions(
        self,
        params: Params,
        model: Model,
        keys: PRNGKeys,
        trajectory: Trajectory,
        schedule: Schedule,
        condition: PyTree[Any],
        draws: int,
    ) -> Tail:
        """The state K steps before the end and the noise drawn since, the same in every draw."""
        num_steps, batch = schedule.num_steps, len(keys)
        last = slice(num_steps - self.tail, num_steps)
        means = jax.vmap(step_mean)(trajectory.noise_predictions[last], trajectory.latents[last], schedule[last])
        shocks = trajectory.latents[1:][last] - means
        tail = Tail(
            start=trajectory.latents[last.start],
            shocks=jnp.swapaxes(shocks, 0, 1),
            condition=condition,
            steps=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (batch, self.tail)), schedule[last]),
        )
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (draws, *leaf.shape)), tail)

    def value_and_grad(
        self, params: Params, model: Model, transitions: Tail
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """−mean log R of the sample that the policy reaches from the same state with the same noise."""

        @jax.checkpoint
        def step(x: Latents, inputs: tuple[Latents, Schedule], lora: Params) -> Latents:
            shock, coefficients = inputs
            eps = model.predict(lora, x, coefficients.timestep, transitions.condition)
            return step_mean(eps, x, coefficients) + shock

        def loss(lora: Params) -> Float[Array, ""]:
            tail = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (transitions.shocks, transitions.steps))
            final, _ = jax.lax.scan(lambda x, inputs: (step(x, inputs, lora), None), transitions.start, tail)
            return -model.log_reward(final, transitions.condition).mean()

        value, lora = jax.value_and_grad(loss)(params["lora"])
        flow = jax.tree.map(jnp.zeros_like, params["flow"])
        return (value, {"loss_reward": value}), {"lora": lora, "flow": flow}
