"""Regression of the policy's steps on sampled paths with importance weights, with or without the reward's gradient.

The target's paths have the density p_#(path) R(x_T)^β / Z. Consider all policies with the base model's σ. The one with
the least KL(target ‖ policy) has the mean E_target[y | x], and a regression on the target's paths finds it. Paths of
any policy θ† can replace the target's paths if each is weighted by w:

    w = W / Z,   W = R(x_T)^β Π p_#(y|x) / p_θ†(y|x),   Z = E_θ†[W] for every θ†
    loss = E_θ†[ w Σ_k ( ‖δ_k‖²/2 − δ_k·c_k ) ],   δ = (μ_θ − μ_#)/σ

The loss is KL(target ‖ policy) − KL(target ‖ base), in nats: 0 for the base model, and minus the needed nats for the
target. By Stein's identity, two credits c have the same mean given x:

    innovation   c = (y − μ_#)/σ               needs no gradient, so it works with any reward
    adjoint      c = σ a, ∇log R^β at the path's end pulled back to y; has much less noise at late steps

This is the cross-entropy method for path integral control (Zhang et al. 2014, SIAM J. Sci. Comput. 36) with the
innovation, and stochastic optimal control matching (Domingo-Enrich et al. 2023, arXiv 2312.02027) with the adjoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    Metrics,
    Model,
    PolicyAlone,
    Rollout,
)
from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.paths import PathWeights, base_outputs, log_ratio, regress_steps
from nabla_gfn_jax.algorithms.transitions import AdjointCredit, Transition, check_steps, flatten, share_out, take
from nabla_gfn_jax.diffusion.chain import Chain, expand
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.typing import Latents, Params, PerSample


@dataclass(frozen=True, kw_only=True)
class PathRegression(Checked, PolicyAlone):
    """Weighted regression on the policy's own paths. log Z of a prompt is estimated from all its samples so far."""

    beta: float = option(meaning="β, the reward's exponent; below 0 the reward falls", minimum=-1e9, maximum=1e9)
    credit: Literal["innovation", "adjoint"] = option(
        "adjoint", "the credit c of a step; see algorithms/path_regression.py"
    )
    steps: int = option(
        6, "steps of each trajectory per update; the updates of an epoch take different steps", minimum=1
    )
    weight_clip: float = option(float("inf"), "largest weight w of a path", above=0, infinite=True)
    credit_clip: float = option(
        float("inf"), "largest root mean square of c, over latent elements", above=0, infinite=True
    )
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    takes_any_steps: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_paths": "the weighted regression of the policy's steps, in nats per path, up to a constant",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def validate(self, num_steps: int) -> None:
        """Raises `UserError` if an update takes more steps than a trajectory has."""
        check_steps(self.steps, num_steps)

    def first_stats(self, num_prompts: int) -> PathWeights:
        return PathWeights.none(num_prompts)

    def weigh(
        self, stats: PathWeights, scalars: Mapping[str, np.ndarray], prompt_id: Int[np.ndarray, " all"]
    ) -> tuple[Float[np.ndarray, " all"], PathWeights]:
        """w = W/Z, (all,), at most `weight_clip`; the epoch's own W are included in Z."""
        log_w, stats = stats.add(self.beta, scalars, prompt_id)
        return np.minimum(np.exp(log_w - stats.log_z[prompt_id]), self.weight_clip).astype(np.float32), stats

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`steps` steps of each trajectory for every update with their credit; scalars: log Π p_#/p_θ† of each path."""
        lora = params["lora"]
        if self.credit == "adjoint":
            credit = adjoint_credit(model, rollout, self.beta)
            if model.predict_change is not None:
                credit = AdjointCredit(credit.gradient, base_outputs(model, lora, rollout))
        else:
            credit = innovation(model, lora, rollout)
        assert credit.base_output is not None
        steps = share_out(rollout.keys, model.policy_steps, updates, self.steps)
        data = jax.vmap(lambda steps: take(steps, rollout, credit))(steps)
        return Batch(data=data, scalars={"log_ratio": log_ratio(model.chain, rollout, credit.base_output)[0]})

    def value_and_grad(
        self, params: Params, model: Model, data: Transition, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss in nats of a whole path plus λ's term, both terms, and the LoRA's gradient."""
        each, now = data.index.shape[1], flatten(data)
        weight, step = jnp.repeat(weight, each), model.chain[now.index]
        assert now.adjoint is not None
        assert now.adjoint.base_output is not None
        c = clipped(expand(step.sigma, now.x) * now.adjoint.gradient, self.credit_clip)
        return regress_steps(
            model,
            params["lora"],
            now,
            now.adjoint.base_output,  # with `predict_change`: o_θ† minus its change by the LoRA
            c,
            loss="loss_paths",
            regularisation=self.output_regularisation,
            weight=weight,
        )


def innovation(model: Model, lora: Params, rollout: Rollout) -> AdjointCredit:
    """(y − μ_#)/σ² of every step, (T, B, …), as the credit; no gradient is taken."""
    latents, base_output = rollout.trajectory.latents, base_outputs(model, lora, rollout)

    def of_step(x: Latents, y: Latents, output: Latents, step: Chain) -> Latents:
        return (y - step.mean(output, x)) / step.sigma**2

    return AdjointCredit(jax.vmap(of_step)(latents[:-1], latents[1:], base_output, model.chain), base_output)


def clipped(c: Latents, largest: float | PerSample) -> Latents:
    """`c` (B, …), with each sample scaled down to a root mean square of at most `largest`."""
    size = jnp.sqrt(jnp.square(c).reshape(len(c), -1).mean(axis=1))
    return expand(jnp.where(size > largest, largest / size, 1.0), c) * c
