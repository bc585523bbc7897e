"""Value gradient: a learned scalar V tells the policy's steps where reward is to be had; no path is pulled back.

V(x) = log E_#[R(x_T)^β | x] is the log value of a state x under the base model. The target P_base · R^β steps from x to

    E_*[y | x] = μ_# + σ² E_*[∇V(y) | x]            (Doob's h-transform, by Stein's identity)

V is learned from the values of whole paths, the policy from V's gradient. Both losses are on the policy's own paths:

    value     E_θ†[ e^V(x) − W V(x) ],     W = R(x_T)^β Π p_#/p_θ†, over the steps after x:  E_θ†[W | x] = e^V(x)
    policy    E_θ†[ Σ_k ( ‖δ_k‖²/2 − δ_k·c_k ) ],   δ = (μ_θ − μ_#)/σ,   c = σ ∇V(y), a constant
    reg       λ ‖ε_θ − ε_θ†‖²

The policy's loss is in nats of a path, and the target is its fixed point. There W is a constant given x: the value's
noise vanishes as the policy gets nearer, where an adjoint's does not. V is written as

    V(x) = γ_t β log R(x̂_#) + h_φ(x̂_#, t),     h_φ a scalar head, "flow",  γ_t = ᾱ_t, or 0 without `guess`

so it sees a state by the base model's clean sample alone: what pure noise a state has on top, which a network could
learn by heart, is not shown to it. Without the guess no gradient of the reward is taken: any reward will do.

All is relative to log Z of the prompt, the running mean of W over whole paths. A value's gradient in the place of the
reward's is Liu et al. 2025 (VGG-Flow, arXiv 2512.05116) for flows; the exact path weights are this program's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import LAMBDA, Batch, HeadKind, Metrics, Model, Rollout
from nabla_gfn_jax.algorithms.paths import (
    PathWeights,
    base_outputs,
    clean_after,
    clean_samples,
    log_ratio,
    regress_steps,
)
from nabla_gfn_jax.algorithms.transitions import Transition, flatten, share_out, take
from nabla_gfn_jax.diffusion.chain import Chain, Level, expand
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PerSample, PromptIds


@flax.struct.dataclass
class States:
    """Where V is learned: states of paths, the samples among them; leaves (B, states, …)."""

    clean: Latents  # x̂_#; of a sample, itself
    index: Int[Array, "*states"]  # 0 to T: T is the sample
    log_reward: Float[Array, "*states"]  # of `clean`; 0 without the guess
    log_ratio: Float[Array, "*states"]  # log Π p_#/p_θ† over the steps after
    prompt_id: Int[Array, "*states"]


@flax.struct.dataclass
class Data:
    """What an update is made of; leaves (B, …)."""

    now: Transition
    base_output: Latents  # o_# at each transition's x
    states: States
    log_reward: PerSample  # of the path's sample


@dataclass(frozen=True, kw_only=True)
class ValueGradient(Checked):
    """The policy follows the gradient of a learned log value."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    guess: bool = option(True, "start V from γ_t β log R(x̂), which takes the reward's gradient")
    steps: int = option(4, "steps of each trajectory in an update of the policy", minimum=1)
    states: int = option(10, "states of each trajectory in an update of V", minimum=1)
    weight_clip: float = option(20.0, "largest weight W/Z", above=0, infinite=True)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    takes_any_steps: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_steps": "the regression of the policy's steps on V's gradient, in nats per path, up to a constant",
        "loss_value": "how far V is from the log values of paths, the mean of e^V − W V; 1 where all V are 0",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def heads(self) -> Mapping[str, HeadKind]:
        return {"flow": "scalar"}

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if a trajectory has fewer steps than an update takes."""
        for name, most in (("steps", num_steps), ("states", num_steps + 1)):
            if getattr(self, name) > most:
                raise UserError(
                    f"algorithm.{name} = {getattr(self, name)} is more than a trajectory of sampling.num_steps = "
                    f"{num_steps} has; lower it"
                )

    def first_stats(self, num_prompts: int) -> PathWeights:
        return PathWeights.none(num_prompts)

    def weigh(
        self, stats: PathWeights, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PathWeights]:
        """log Z of each sample's prompt, after this epoch's paths have been counted."""
        _, stats = stats.add(self.beta, scalars, prompt_id)
        return stats.log_z[prompt_id].astype(np.float32), stats

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """For every update `steps` steps and `states` states of each trajectory."""
        num_steps = model.chain.num_steps
        base = base_outputs(model, params["lora"], rollout)
        steps = share_out(rollout.keys, model.policy_steps, updates, self.steps)
        ratio = log_ratio(model.chain, rollout, base)

        clean = clean_samples(model.chain, rollout, base)
        log_reward = jnp.zeros(clean.shape[:2])
        if self.guess:
            before = jax.lax.map(lambda z: model.log_reward(z, rollout.prompt_id), clean[:-1])
            log_reward = jnp.concatenate([before, rollout.log_reward[None]])
        chosen = share_out(rollout.keys, num_steps + 1, updates, self.states)

        def of_update(steps: Int[Array, "batch steps"], states: Int[Array, "batch states"]) -> Data:
            rows = jnp.arange(len(rollout.keys))[:, None]
            now = take(steps, rollout)
            at = States(
                clean=clean[states, rows],
                index=states,
                log_reward=log_reward[states, rows],
                log_ratio=ratio[states, rows],
                prompt_id=jnp.broadcast_to(rollout.prompt_id[:, None], states.shape),
            )
            return Data(now, base[steps, rows], at, rollout.log_reward)

        return Batch(data=jax.vmap(of_update)(steps, chosen), scalars={"log_ratio": ratio[0]})

    def value_and_grad(
        self, params: Params, model: Model, data: Data, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The losses, and the gradients of the LoRA and of V. `weight` is log Z of each sample's prompt."""
        policy, lora = self._policy(params, model, data, weight)
        value, phi = jax.value_and_grad(lambda phi: self._value(phi, model, data, weight))(params["flow"])
        terms = policy | {"loss_value": value}
        return (jnp.asarray(sum(terms.values())), terms), {"lora": lora, "flow": phi}

    def _policy(self, params: Params, model: Model, data: Data, log_z: PerSample) -> tuple[Metrics, Params]:
        """The terms that train the policy, and its gradient."""
        each, now, base_output = data.now.index.shape[1], flatten(data.now), flatten(data.base_output)
        step = model.chain[now.index]
        credit = self._gradient(params["flow"], model, now, step, jnp.repeat(log_z, each))
        c = expand(step.sigma, now.x) * credit
        (_, terms), gradient = regress_steps(
            model,
            params["lora"],
            now,
            base_output,
            c,
            loss="loss_steps",
            regularisation=self.output_regularisation,
        )
        return terms, gradient["lora"]

    def _gradient(self, phi: Params, model: Model, now: Transition, step: Chain, log_z: PerSample) -> Latents:
        """∇V(y), pulled back to y through the base model's clean sample; a sample is its own."""
        clean, to_y = clean_after(model, now)

        def total(clean: Latents) -> Float[Array, ""]:
            log_reward = model.log_reward(clean, now.prompt_id) if self.guess else jnp.zeros(len(clean))
            return self._log_value(phi, model, clean, log_reward, step.to, now.prompt_id, log_z).sum()

        return to_y(jax.grad(total)(clean))

    def _value(self, phi: Params, model: Model, data: Data, log_z: PerSample) -> Float[Array, ""]:
        """The mean of e^V − W V over states; W is at most `weight_clip`, above which e^V goes on as a straight line."""
        each, at = data.states.index.shape[1], flatten(data.states)
        log_z, of_path = jnp.repeat(log_z, each), jnp.repeat(self.beta * data.log_reward, each)
        w = jnp.minimum(jnp.exp(of_path + at.log_ratio - log_z), self.weight_clip)
        levels = jax.tree.map(lambda a, b: jnp.concatenate([a, b[-1:]]), model.chain.at, model.chain.to)
        v = self._log_value(phi, model, at.clean, at.log_reward, levels[at.index], at.prompt_id, log_z)
        return (growing(v, self.weight_clip) - w * v).mean()

    def _log_value(
        self,
        phi: Params,
        model: Model,
        clean: Latents,
        log_reward: PerSample,
        level: Level,
        prompt_id: PromptIds,
        log_z: PerSample,
    ) -> PerSample:
        """V − log Z."""
        head: PerSample = model.heads["flow"](phi, clean, level, prompt_id=prompt_id)
        return level.signal * (self.beta * log_reward - log_z) + head if self.guess else head


def growing(v: PerSample, largest: float) -> PerSample:
    """e^v where it is at most `largest`, and its tangent there above: V's gradient is bounded as W is."""
    at = float(np.log(largest))
    below = jnp.exp(jnp.minimum(v, at))
    return below if np.isinf(largest) else below + largest * jnp.maximum(v - at, 0.0)
