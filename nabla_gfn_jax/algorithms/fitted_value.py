"""Fitted value: all paths so far tell the log value of a state, and the policy's steps follow it.

V(x) = log E_#[R(x_T)^β | x] is the log value of a state x under the base model. The target P_base · R^β steps from x to

    E_*[y | x] = μ_# + σ² E_*[∇V(y) | x]            (Doob's h-transform, by Stein's identity)

V is a network of the base model's clean sample x̂_#. After every epoch's sampling it is fitted to the ends of all paths
that are remembered, each with its exact weight (`value_memory`). The policy's loss is on its own new paths,

    policy    E_θ†[ Σ_k ( ‖δ_k‖²/2 − δ_k·c_k ) ],   δ = (μ_θ − μ_#)/σ,   c a constant
    reg       λ ‖ε_θ − ε_θ†‖²

in nats of a path. There are two choices of c, both times `scale`, s:

- `gradient`: c = s σ ∇_x V(x̂_#(x)). V's gradient by x̂ comes from the host, and the device pulls it back to x through
  the base model. The gradient at x stands for the mean of that at y. Since ∇V(x) = E_*[(∂μ_#/∂x)ᵀ ∇V(y) | x], they are
  the same as steps become fine.
- `mean_shift`: c = s a m with a = mean_o/(clean_o σ) of the step, m a draw of the mean shift
  E_*[x_T | x] − E_#[x_T | x] from the rest of the path (`algorithms/mean_shift.py`), as far as the policy's steps go.
  As steps become fine, a E[m | x] = σ ∇V(x) for a base model that is the reverse of its noising (Tweedie's identity,
  Robbins 1956). Only V's values are used, and no gradient is taken.

The target is then the fixed point for s = 1. With coarse steps, few paths, or guidance, under which Tweedie's identity
does not hold, some s < 1 is nearer to the target; `studies/foresight.py` measures which for the gradient.

With `guess`, V sees log R(x̂) too, which says more than the components in the later half of a path. If the steps follow
the gradient, the host then gives ∂V/∂ log R(x̂), and the device multiplies it by the reward's gradient. In all other
cases no gradient of the reward is taken: any reward will do.

`value_gradient` learns V from the newest paths alone, on the device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import LAMBDA, Batch, Metrics, Model, PolicyAlone, Rollout, reward_gradient
from nabla_gfn_jax.algorithms.credit import Prediction
from nabla_gfn_jax.algorithms.mean_shift import mean_shifts
from nabla_gfn_jax.algorithms.paths import (
    PathWeights,
    base_outputs,
    clean_samples,
    log_ratio,
    regress_steps,
)
from nabla_gfn_jax.algorithms.transitions import Transition, check_steps, flatten, share_out, take
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@flax.struct.dataclass
class Data:
    """What an update is made of; leaves (B, steps, …)."""

    now: Transition
    base_output: Latents  # o_# at x


@flax.struct.dataclass
class Stats:
    """What is remembered of all epochs."""

    weights: PathWeights
    memory: ValueMemory


@dataclass(frozen=True, kw_only=True)
class FittedValue(FitOptions, PolicyAlone):
    """The policy follows a log value that is fitted to all paths so far."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    follow: Literal["gradient", "mean_shift"] = option("gradient", "what of V the steps follow")
    guess: bool = option(False, "let V see log R(x̂) too; to follow its gradient takes the reward's")
    scale: float = option(1.0, "s, by which what the steps follow is multiplied", above=0, maximum=100)
    steps: int = option(1, "steps of each trajectory in an update; an epoch's updates share out all", minimum=1)
    memory: int = option(16384, "paths that V is fitted to: the newest so many", minimum=2)
    after: int = option(0, "paths to be sampled before the policy begins to learn", minimum=0)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    takes_any_steps: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_steps": "the regression of the policy's steps on V's gradient, in nats per path, up to a constant",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if a trajectory has fewer steps than an update takes."""
        check_steps(self.steps, num_steps)

    @property
    def fit(self) -> Fit:
        """How V is fitted."""
        return Fit(self, self.memory)

    def first_stats(self, num_prompts: int) -> Stats:
        return Stats(PathWeights.none(num_prompts), ValueMemory.empty(num_prompts))

    def weigh(
        self, stats: Stats, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, "all S elements+1"], Stats]:
        """s ∂V/∂x̂ and s ∂V/∂ log R(x̂), or s times the mean shift and 0, at the states of the policy's steps.

        V is fitted to these paths too.
        """
        log_reward = np.asarray(scalars["log_reward"], np.float64)[:, None]
        ratio = np.asarray(scalars["log_ratio_from"], np.float64)
        states = Seen(np.asarray(scalars["clean"]), np.asarray(scalars["guess"]))
        _, weights = stats.weights.add(self.beta, scalars, prompt_id)
        log_w = self.beta * log_reward + ratio
        memory = self.fit.add(stats.memory, states, np.asarray(scalars["sample"]), log_w.astype(np.float32), prompt_id)
        told = np.zeros((len(prompt_id), ratio.shape[1] - 1, states.clean.shape[2] + 1), np.float32)
        memory = self.fit.fitted(memory, weights.log_z)
        if memory.seen <= self.after:
            return told, Stats(weights, memory)
        if self.follow == "mean_shift":
            told[..., :-1] = mean_shifts(self.fit.values(memory, states, prompt_id), ratio, states.clean)
        else:
            by_clean, by_guess = self.fit.gradients(memory, states, prompt_id)
            told[..., :-1], told[..., -1] = by_clean[:, :-1], by_guess[:, :-1]
        return self.scale * told, Stats(weights, memory)

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`steps` steps of each trajectory for every update, and what V is fitted to at each step of the policy."""
        seen = slice(0, model.policy_steps + 1)  # the states of the policy's steps, and the one after
        base = base_outputs(model, params["lora"], rollout)
        ratio = log_ratio(model.chain, rollout, base)
        clean = clean_samples(model.chain, rollout, base)[seen]
        steps = share_out(rollout.keys, model.policy_steps, updates, self.steps)
        rows = jnp.arange(len(rollout.keys))[:, None]
        guess = jnp.zeros(clean.shape[:2])
        if self.guess:
            guess = jax.lax.map(lambda z: model.log_reward(z, rollout.prompt_id), clean)
        return Batch(
            data=jax.vmap(lambda steps: Data(take(steps, rollout), base[steps, rows]))(steps),
            scalars={
                "log_ratio": ratio[0],
                "log_ratio_from": ratio[seen].T,
                "clean": jnp.moveaxis(clean, 0, 1).reshape(len(rollout.keys), model.policy_steps + 1, -1),
                "guess": guess.T,
                "sample": rollout.trajectory.samples.reshape(len(rollout.keys), -1),
            },
        )

    def value_and_grad(
        self, params: Params, model: Model, data: Data, weight: Float[Array, "batch S elements+1"]
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss and the LoRA's gradient, 0 while the policy waits. `weight` is what `weigh` returns."""

        def learn() -> tuple[tuple[Float[Array, ""], Metrics], Params]:
            rows = jnp.arange(len(weight))[:, None]
            now, base_output = flatten(data.now), flatten(data.base_output)
            told = weight[rows, data.now.index].reshape(len(now.y), -1)
            by_clean = told[:, :-1].reshape(now.y.shape)
            if self.follow == "mean_shift":
                step = model.chain[now.index]
                c = expand(step.mean_o / (step.at.clean_o * step.sigma), by_clean) * by_clean
            else:
                c = told_by(model, now.x, now.index, now.prompt_id, by_clean, told[:, -1] if self.guess else None)
            return regress_steps(
                model,
                params["lora"],
                now,
                base_output,
                c,
                loss="loss_steps",
                regularisation=self.output_regularisation,
            )

        # Exact zeros: Adam would make steps of rounding errors.
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(learn))
        return jax.lax.cond(jnp.any(weight != 0), learn, lambda: nothing)


def told_by(
    model: Model,
    x: Latents,
    index: Int[Array, " n"],
    prompt_id: PromptIds,
    by_clean: Latents,
    by_guess: PerSample | None = None,
) -> Latents:
    """c = σ ∇_x V at states x (N, …) of steps `index`, from ∂V/∂x̂ and, if V sees log R(x̂), ∂V/∂ log R(x̂) there."""
    step = model.chain[index]
    at_x = Prediction(model, None, x, step.at, prompt_id)
    if by_guess is not None:
        clean = step.at.clean(at_x.output, x)
        by_clean = by_clean + expand(by_guess, clean) * reward_gradient(model, clean, prompt_id)
    return expand(step.sigma, x) * at_x.to_x(step.at.clean, by_clean)
