"""What the regressions on whole paths share: a path's weight, and the loss of a step.

Steps are N(μ, σ²), of the policy θ or θ† (which sampled), or of the base model, #. δ = (μ_θ − μ_#)/σ.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import Metrics, Model, Rollout, output_change
from nabla_gfn_jax.algorithms.credit import Prediction, compare_with
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.typing import Latents, Params, PerSample


@flax.struct.dataclass
class PathWeights:
    """Σ W over all samples of each prompt so far, as its logarithm, and their number; on the host, float64.

    W = R(x_T)^β Π p_#(y|x)/p_θ†(y|x) of a path. Whatever policy samples, its mean is Z, the base model's mean of R^β.
    """

    log_sum: Float[np.ndarray, " prompts"]
    seen: Int[np.ndarray, " prompts"]

    @classmethod
    def none(cls, num_prompts: int) -> "PathWeights":
        """Before the first sample."""
        return cls(np.full(num_prompts, -np.inf), np.zeros(num_prompts, np.int64))

    def add(
        self, beta: float, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], "PathWeights"]:
        """log W of an epoch's paths, from their "log_reward" and "log_ratio", and the sums with them counted."""
        log_w = beta * np.asarray(scalars["log_reward"], np.float64) + np.asarray(scalars["log_ratio"], np.float64)
        log_sum, seen = self.log_sum.copy(), self.seen.copy()
        np.logaddexp.at(log_sum, prompt_id, log_w)
        np.add.at(seen, prompt_id, 1)
        return log_w, PathWeights(log_sum, seen)

    @property
    def log_z(self) -> Float[np.ndarray, " prompts"]:
        """The logarithm of each prompt's mean W; -inf before its first sample."""
        return self.log_sum - np.log(np.maximum(self.seen, 1))


def base_outputs(model: Model, lora: Params, rollout: Rollout) -> Latents:
    """o_# at every state (T, B, …): where differences lose digits, what sampled minus the LoRA's change.

    After the policy's last step, the base model sampled, and what it said is at hand.
    """

    def of_step(_: None, inputs: tuple[Latents, Latents, Chain]) -> tuple[None, Latents]:
        x, output, step = inputs
        where = (x, step.at.each(len(x)), rollout.prompt_id)
        if model.predict_change is None:
            return None, model.predict(None, *where)
        return None, output - model.predict_change(lora, *where)[1]

    path, policy = rollout.trajectory, slice(model.policy_steps)
    found = jax.lax.scan(of_step, None, (path.latents[policy], path.outputs[policy], model.chain[policy]))[1]
    return jnp.concatenate([found, path.outputs[model.policy_steps :]])


def log_ratio(chain: Chain, rollout: Rollout, base_output: Latents) -> Float[Array, "states batch"]:
    """log Π p_#(y|x)/p_θ†(y|x) over the steps after each state: first of the whole path, last 0 at the sample."""

    def of_step(total: PerSample, inputs: Any) -> tuple[PerSample, PerSample]:
        x, y, output, base, step = inputs
        delta = step.mean_o / step.sigma * (output - base)
        noise = (y - step.mean(output, x)) / step.sigma
        total = total - (delta * (0.5 * delta + noise)).reshape(len(x), -1).sum(axis=1)
        return total, total

    path, nothing = rollout.trajectory, jnp.zeros(len(rollout.keys))
    steps = (path.latents[:-1], path.latents[1:], path.outputs, base_output, chain)
    return jnp.concatenate([jax.lax.scan(of_step, nothing, steps, reverse=True)[1], nothing[None]])


def clean_samples(chain: Chain, rollout: Rollout, base_output: Latents) -> Latents:
    """x̂_# at every state (T + 1, B, …), from o_# at all states but the last: the sample is its own x̂."""
    path = rollout.trajectory
    clean = jax.vmap(lambda level, o, x: level.clean(o, x))(chain.at, base_output, path.latents[:-1])
    return jnp.concatenate([clean, path.samples[None]])


def clean_after(model: Model, now: Transition) -> tuple[Latents, Callable[[Latents], Latents]]:
    """x̂_# at the y of transitions (N, …), and the function that pulls a gradient by it back to y.

    A sample is its own x̂.
    """
    to = model.chain[now.index].to
    at_y = Prediction(model, None, now.y, to, now.prompt_id)
    is_sample = expand(now.index == model.chain.num_steps - 1, now.y)

    def to_y(by_clean: Latents) -> Latents:
        return jnp.where(is_sample, by_clean, at_y.to_x(to.clean, by_clean))

    return jnp.where(is_sample, now.y, to.clean(at_y.output, now.y)), to_y


def step_loss(step: Chain, change: Latents, c: Latents) -> PerSample:
    """‖δ‖²/2 − δ·c of each step, in nats, with `change` = o_θ − o_#; least at δ = c."""
    delta = expand(step.mean_o / step.sigma, change) * change
    return (delta * (0.5 * delta - c)).reshape(len(c), -1).sum(axis=1)


def regress_steps(
    model: Model,
    lora: Params,
    now: Transition,
    base_output: Latents,
    c: Latents,
    *,
    loss: str,
    regularisation: float,
    weight: PerSample | float = 1.0,
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
    """((loss, its terms), {"lora": its gradient}) of transitions (N, …) that are told to go by c.

    The terms are the mean of `weight` times a path's `step_loss`, named `loss`, and λ's, λ being `regularisation`.
    """
    step = model.chain[now.index]
    at_x = compare_with(model, lora, now.x, step.at, now.prompt_id, base_output)

    def value(output: Latents, change: Latents) -> tuple[Float[Array, ""], Metrics]:
        pair = (output, now.output) if model.predict_change is None else (change, now.output - base_output)
        terms = {
            loss: model.policy_steps * (weight * step_loss(step, change, c)).mean(),
            "loss_reg": regularisation * output_change(*pair, step.at).mean(),
        }
        return terms[loss] + terms["loss_reg"], terms

    found, cotangents = jax.value_and_grad(value, (0, 1), has_aux=True)(*at_x.outputs)
    return found, {"lora": at_x.to_lora(sum(cotangents))}
