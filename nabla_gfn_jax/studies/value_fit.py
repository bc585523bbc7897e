"""Fits a LoRA to the log value of a bank of base paths, and judges it by held-out paths and by its own samples.

    python -m nabla_gfn_jax.studies.value_fit --out=runs/value_fit

Base paths are sampled once. The log value V of their states is fitted in two halves (`algorithms/value_memory.py`), so
that no path is told by a V that has seen it; at the sample, V is β log R. A state x of a path is then told, times
`scale`, one of the two that `algorithms/fitted_value.py` has:

- `gradient`: c = σ ∇_x V(x̂(x)), which has no noise;
- `mean_shift`: c = r a m with a = mean_o/(clean_o σ) of the step and m a draw of the mean shift
  (`algorithms/mean_shift.py`). r is measured step by step: the part of the step's noise z that follows a (x_T − x̂). It
  is 1 for a base model that is the exact reverse of its noising, and less than 1 under guidance.

A LoRA is fitted to Σ_k ‖δ_k‖²/2 − δ_k·c_k, δ = (μ_θ − μ_#)/σ. No gradient of the reward is taken. An update's states
are drawn evenly for one half, and with probability ∝ e^V of the state for the other half, because the policy is to be
right where the target goes too. Printed are

- the loss beside ‖c‖²/2, the teacher's nats of a path, which a perfect pupil of a teacher without noise would reach as
  a negative loss;
- the LoRA's uptake on new base paths (`studies/uptake.py`), and the certificate of its own samples (docs/nats.md).

`studies/value_guidance.py` follows V's gradient without a LoRA. What it reaches is up to the teacher, and the
difference to the LoRA is up to the pupil.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.fitted_value import told_by
from nabla_gfn_jax.algorithms.mean_shift import mean_shifts
from nabla_gfn_jax.algorithms.paths import step_loss
from nabla_gfn_jax.algorithms.value_memory import Fit
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.metrics import certificate
from nabla_gfn_jax.models.lora import Layers
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.bank import (
    BANK,
    SHOWN,
    Bank,
    BankOptions,
    certify,
    clean_of,
    fit_halves,
    held_out_paths,
    sample_bank,
    values_of,
)
from nabla_gfn_jax.studies.images import Images, spread, write_results
from nabla_gfn_jax.studies.uptake import Products, as_table, judge, sampled_products
from nabla_gfn_jax.typing import Latents, Params

AVERAGE = 0.97  # decay of the running mean of the LoRA, which is judged and saved
REPORT = 50  # updates between two printed losses


@dataclass(frozen=True, kw_only=True)
class Options(BankOptions):
    """The paths, how V is fitted to them, the LoRA, and the folder for the results."""

    out: Path = option(meaning="folder for the tables, the certificate, the LoRA and a row of its samples")
    follow: Literal["gradient", "mean_shift"] = option("gradient", "what of V the steps follow")
    scale: float = option(0.9, "by which what the steps follow is multiplied", above=0, maximum=100)
    layers: Layers = option("all", "layers with a LoRA")
    rank: int = option(16, "rank of the LoRA", minimum=1)
    rate: float = option(7e-4, "learning rate, with cosine decay to 0", above=0)
    updates: int = option(400, "updates of the LoRA", minimum=1)
    batch: int = option(128, "transitions per update", minimum=2)


class Teacher(NamedTuple):
    """What the steps of a bank are told, and Σ e^V of the states that they begin at, over the paths so far.

    Told are ∂V/∂x̂ for the gradient, and c for the mean shift; both are to be multiplied by the scale.
    """

    told: Float[np.ndarray, "paths steps elements"]
    sums: Float[np.ndarray, "steps paths"]


def shifts(
    chain: Chain,
    bank: Bank,
    clean: Float[np.ndarray, "paths states elements"],
    value: Float[np.ndarray, "paths states"],
) -> tuple[Float[np.ndarray, "paths steps elements"], Float[np.ndarray, " steps"]]:
    """r a m of every step, and r."""
    mean_x, mean_o, sigma = (np.asarray(a) for a in (chain.mean_x, chain.mean_o, chain.sigma))
    scale = mean_o / (np.asarray(chain.at.clean_o) * sigma)
    c, follows = mean_shifts(value, np.zeros_like(value), clean), np.zeros(len(sigma))
    for k, a in enumerate(scale):
        x, y, output = (z.reshape(len(z), -1) for z in (bank.x[:, k], bank.x[:, k + 1], bank.base_output[:, k]))
        noise, rest = (y - mean_x[k] * x - mean_o[k] * output) / sigma[k], a * (clean[:, -1] - clean[:, k])
        follows[k] = np.vdot(noise, rest) / np.vdot(rest, rest)
        c[:, k] *= follows[k] * a
    return c, follows


def drawn(teacher: Teacher, steps: int, batch: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paths and steps of an update: half of them even, half with probability ∝ e^V of the state."""
    step, paths = rng.integers(steps, size=batch), rng.integers(len(teacher.told), size=batch)
    for i in range(batch // 2):
        sums = teacher.sums[step[i]]
        paths[i] = min(np.searchsorted(sums, rng.random() * sums[-1]), len(sums) - 1)
    return paths, step


def fit_lora(images: Images, o: Options, bank: Bank, teacher: Teacher) -> Params:
    """Fits a LoRA with Adam, and returns its running mean."""
    lora = images.base.init_lora(jax.random.key(o.seed), o.rank, o.layers)
    optimizer = optax.adam(optax.cosine_decay_schedule(o.rate, o.updates))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, frozen: Params, x: Latents, base: Latents, told: Latents, k: Array, ids: Array) -> Any:
        lora, average, moments = state
        model = images.model(frozen)
        step = model.chain[k]
        c = o.scale * (told_by(model, x, k, ids, told) if o.follow == "gradient" else told)

        def loss(lora: Params) -> Array:
            return o.last_step * step_loss(step, model.predict(lora, x, step.at, ids) - base, c).mean()

        value, gradient = jax.value_and_grad(loss)(lora)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
            change, moments = optimizer.update(gradient, moments, lora)
        lora = optax.apply_updates(lora, change)
        nats = o.last_step * jnp.square(c).sum() / (2 * len(c))
        return (lora, optax.incremental_update(lora, average, 1 - AVERAGE), moments), jnp.stack([value, nats])

    rng, losses = np.random.default_rng(o.seed), list[Any]()
    state = (lora, jax.tree.map(jnp.copy, lora), optimizer.init(lora))
    for number in range(o.updates):
        paths, k = drawn(teacher, o.last_step, o.batch, rng)
        x, base = bank.x[paths, k], bank.base_output[paths, k]
        told, ids = teacher.told[paths, k].reshape(x.shape), bank.prompt_id[paths]
        state, value = update(state, images.frozen, *spread((x, base, told, k.astype(np.int32), ids)))
        losses.append(np.asarray(value))
        if len(losses) % REPORT == 0:
            loss, nats = np.mean(losses[-REPORT:], axis=0)
            print(f"update {number + 1} of {o.updates}: loss {loss:.3f}, teacher {nats:.3f} nats", flush=True)
    average: Params = state[1]
    return average


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the bank, fits V and the LoRA, and judges it; writes the results and the LoRA."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    o.check_paths(len(images.prompts))
    chain = images.base.chain(o.num_steps)
    bank = sample_bank(images, BANK, o.paths, o.together, o.bank)
    clean, fit = clean_of(chain, bank), Fit(o, o.paths)
    memories = fit_halves(fit, clean, bank, o.beta, len(images.prompts))
    value, told = values_of(fit, memories, clean, bank, o.beta, len(images.prompts))
    if o.follow == "mean_shift":
        told, follows = shifts(chain, bank, clean, value)
        print(f"r is {follows.min():.2f} to {follows.max():.2f}", flush=True)
    o.out.mkdir(parents=True, exist_ok=True)
    lora = fit_lora(images, o, bank, Teacher(told, np.cumsum(np.exp(value[:, :-1]), axis=0).T))
    save_lora(o.out / "lora.safetensors", lora)

    found, reward, ids = sampled_products(images, lora, o.held_out, o.together)
    found = Products(*(a[: o.last_step] for a in found))
    rows = judge(found, o.beta * np.asarray(reward, np.float64), ids, 10)
    write_results(o.out, "value_fit", rows, as_table(rows))
    base = certificate.Paths.of_base(np.r_[reward, bank.log_reward], np.r_[ids, bank.prompt_id])
    own, pictures = held_out_paths(images, o, lora, chain, np.arange(o.num_steps) < o.last_step)
    certify(o.beta, "own samples", own, base, o.out / "certificate.json")
    save_grid(o.out / "samples.png", pictures, columns=SHOWN, zoom=max(1, 128 // pictures.shape[1]))


if __name__ == "__main__":
    main(sys.argv)
