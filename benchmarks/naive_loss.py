"""The paper's loss in PyTorch as in the released program: a forward and a backward pass for every term."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.base_models.stable_diffusion import TextFeatures
from nabla_gfn_jax.diffusion.chain import Chain

Tensor = torch.Tensor
# x, y, noise (B, channels, height, width); t, t_next, a, a_next, sigma (B,); context, negative (B, tokens, width)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Networks:
    """The networks of the loss. `base` selects the model without LoRA."""

    predict: Callable[[Tensor, Tensor, Batch, bool], Tensor]  # (x, t, batch, base) → ε, guided
    log_reward: Callable[[Tensor, Batch], Tensor]  # (z, batch) → (B,)
    correction: Callable[[Tensor, Tensor, Batch], Tensor]  # (x, t, batch) → g_φ


def loss_terms(networks: Networks, algorithm: Any, c: Batch) -> dict[str, Tensor]:
    """The terms (B,) of each transition, by our metrics' names, for `ResidualNablaDB` with the lookahead credit."""
    x, y = (c[name].detach().requires_grad_() for name in ("x", "y"))
    last = c["t_next"] == 0
    sigma, a, a_next = (c[name][:, None, None, None] for name in ("sigma", "a", "a_next"))

    def mean(eps: Tensor) -> Tensor:
        return a_next.sqrt() * clean(eps, x, a) + (1 - a_next - sigma**2).sqrt() * eps

    def clean(eps: Tensor, x: Tensor, a: Tensor) -> Tensor:
        return (x - (1 - a).sqrt() * eps) / a.sqrt()

    def pull(value: Tensor, at: Tensor, keep: bool) -> Tensor:
        return torch.autograd.grad(value.sum(), at, retain_graph=keep)[0].detach()

    def log_p(eps: Tensor) -> Tensor:
        return -((y.detach() - mean(eps)) ** 2 / (2 * sigma**2))

    eps = networks.predict(x, c["t"], c, False)
    reverse = pull(log_p(eps), x, keep=True)
    guess_x = algorithm.beta * pull(c["a"] * networks.log_reward(clean(eps, x, a), c), x, keep=True)
    base = networks.predict(x, c["t"], c, True)
    base_reverse = pull(log_p(base), x, keep=False)
    base = base.detach()
    eps_y = networks.predict(y, c["t_next"], c, False)
    clean_y = torch.where(last[:, None, None, None], y, clean(eps_y, y, a_next))
    guess_y = algorithm.beta * pull(c["a_next"] * networks.log_reward(clean_y, c), y, keep=False)

    at_x, at_y = (networks.correction(z.detach(), t, c) for z, t in ((x, c["t"]), (y, c["t_next"])))
    # x is a constant here, because only LoRA and φ are trained
    change = (mean(eps) - mean(base)).detach() + (mean(eps) - mean(eps).detach())
    weight = c["sigma"] ** 2 if algorithm.variance_weighted else 1.0
    credit = guess_y + torch.where(last[:, None, None, None], 0.0, at_y)
    return {
        "loss_forward": weight * _mean_square(change / sigma**2 - credit),
        "loss_reverse": torch.where(last, 0.0, _mean_square(reverse - base_reverse + guess_x + at_x)),
        "loss_terminal": torch.where(last, _mean_square(at_y), 0.0),
        "loss_reg": algorithm.output_regularisation * _mean_square(eps - c["noise"]),
    }


def _mean_square(a: Tensor) -> Tensor:
    return (a**2).flatten(1).mean(1)


def batch_of(transition: Transition, chain: Chain, table: TextFeatures) -> Batch:
    """Transitions with one leading axis, with the text features of their prompts."""
    step = chain[jnp.asarray(transition.index)]
    x, output = jnp.asarray(transition.x), jnp.asarray(transition.output, jnp.float32)
    images = {"x": x, "y": transition.y, "noise": step.at.noise(output, x)}
    found = {name: np.moveaxis(np.asarray(image, np.float32), -1, -3) for name, image in images.items()}
    found |= {"t": np.asarray(step.at.time, np.int64), "t_next": np.asarray(step.to.time, np.int64)}
    found |= {"a": step.at.signal, "a_next": step.to.signal, "sigma": step.sigma}
    context = np.asarray(table.context, np.float32)[np.asarray(transition.prompt_id)]
    found |= {"context": context, "negative": np.broadcast_to(np.asarray(table.negative, np.float32), context.shape)}
    return {name: torch.from_numpy(np.array(a)) for name, a in found.items()}
