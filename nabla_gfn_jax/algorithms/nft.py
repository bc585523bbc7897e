"""DiffusionNFT, negative-aware finetuning (Zheng et al., ICLR 2026, arXiv 2509.16117).

A sample z of the policy counts as good with probability r and as bad with probability 1 − r. It is noised to x. Two
implicit policies lie on both sides of the parameters θ† that sampled; x̂ are their clean predictions:

    good   o⁺ = (1 − b) o_θ† + b o_θ          bad   o⁻ = (1 + b) o_θ† − b o_θ
    loss = mean of (C/b) [ r ‖x̂⁺ − z‖²/w⁺ + (1 − r) ‖x̂⁻ − z‖²/w⁻ ] + β₀ ‖o_θ − o_#‖² + λ ‖ε_θ − ε_θ†‖²
    r = (1 + A/C)/2,   w = mean of |x̂ − z| over latent elements, at least 10⁻⁵, a constant

A is the advantage (advantages.py), clipped at C = 5. A lower loss moves the policy towards good samples and away from
bad ones. The reward's gradient is not used.

b is `mixing`. The authors' program calls it β, with the values 1 and .1 in its configs, and has β₀ = .0001. There the
sampling parameters are a running mean of θ, whose decay grows to .5; here they are θ at the start of the epoch.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.advantages import Advantages
from nabla_gfn_jax.algorithms.base import (
    LAMBDA,
    Batch,
    Metrics,
    Model,
    PolicyAlone,
    Rollout,
    mean_square,
    output_change,
)
from nabla_gfn_jax.algorithms.noising import Noised, noise_samples
from nabla_gfn_jax.algorithms.transitions import flatten
from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import option
from nabla_gfn_jax.typing import Latents, Params, PerSample

_LEAST_SIZE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Nft(Advantages, PolicyAlone):
    """DiffusionNFT: contrasts two implicit policies on good and bad samples."""

    mixing: float = option(
        1.0, "b, the distance of the implicit policies from the one that sampled", above=0, maximum=1e6
    )
    noisings: int = option(10, "number of noised copies of each sample in an update", minimum=1)
    base_regularisation: float = option(1e-4, "β₀, the weight of ‖o_θ − o_#‖²", minimum=0)
    output_regularisation: float = option(0.0, LAMBDA, minimum=0)

    on_policy: ClassVar[bool] = True
    columns: ClassVar[dict[str, str]] = {
        "loss_contrast": "the weighted errors of the implicit good and bad policies",
        "loss_base": "β₀ ‖o_θ − o_#‖²",
        "loss_reg": "λ ‖ε_θ − ε_θ†‖²",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advantage_clip == float("inf"):
            raise UserError("algorithm.advantage_clip = inf gives every sample the same probability; give a number")

    def batch(self, params: Params, model: Model, rollout: Rollout, updates: int) -> Batch:
        """`noisings` noised copies of each sample for every update."""
        return Batch(data=noise_samples(params, model, rollout, updates, self.noisings))

    def value_and_grad(
        self, params: Params, model: Model, data: Noised, weight: PerSample
    ) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
        """The loss, its terms and the gradient, as means over samples and noised copies."""
        good = 0.5 + 0.5 * jnp.repeat(weight, self.noisings) / self.advantage_clip
        now = flatten(data)
        assert now.output is not None
        level = model.chain[now.index].at
        base = model.predict(None, now.x, level, now.prompt_id)

        def error(output: Latents) -> PerSample:
            residual = level.clean(output, now.x) - now.sample
            size = jax.lax.stop_gradient(jnp.abs(residual).reshape(len(residual), -1).mean(axis=1))
            return mean_square(residual / expand(jnp.sqrt(jnp.maximum(size, _LEAST_SIZE)), residual))

        def loss(lora: Params) -> tuple[Float[Array, ""], Metrics]:
            output = model.predict(lora, now.x, level, now.prompt_id)
            step = self.mixing * (output - now.output)
            contrast = good * error(now.output + step) + (1 - good) * error(now.output - step)
            terms = {
                "loss_contrast": self.advantage_clip / self.mixing * contrast.mean(),
                "loss_base": self.base_regularisation * mean_square(output - base).mean(),
                "loss_reg": self.output_regularisation * output_change(output, now.output, level).mean(),
            }
            return jnp.asarray(sum(terms.values())), terms

        value, lora = jax.value_and_grad(loss, has_aux=True)(params["lora"])
        return value, {"lora": lora}
