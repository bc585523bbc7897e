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
- the LoRA's uptake on new base paths (`studies/uptake.py`), and the certificate of its own samples (docs/nats.md);
- with `guided`, the certificate of the policy that follows V's gradient without a LoRA (`studies/value_guidance.py`).
  What it reaches is up to the teacher, and the difference to the LoRA is up to the pupil.
"""

import functools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.fitted_value import told_by
from nabla_gfn_jax.algorithms.mean_shift import mean_shifts
from nabla_gfn_jax.algorithms.paths import step_loss
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics import certificate
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.models.lora import Layers
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.foresight import ONCE, Ends, fit_value
from nabla_gfn_jax.studies.images import Images, PolicyOptions, spread, write_results
from nabla_gfn_jax.studies.uptake import Products, as_table, judge, sampled_products
from nabla_gfn_jax.studies.value_guidance import following
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds

_HELD_OUT, _BANK = 0, 4  # streams of random numbers; `uptake` samples the first
AVERAGE = 0.97  # decay of the running mean of the LoRA, which is judged and saved
REPORT = 50  # updates between two printed losses


@dataclass(frozen=True, kw_only=True)
class Options(PolicyOptions, FitOptions):
    """The paths, how V is fitted to them, the LoRA, and the folder for the results."""

    out: Path = option(meaning="folder for value_fit.jsonl, value_fit.md, certificate.json and lora.safetensors")
    paths: int = option(4096, "base paths in the bank", minimum=4)
    held_out: int = option(1024, "new base paths that judge the LoRA, and its own samples", minimum=2)
    guided: bool = option(False, "also judge the policy that follows V's gradient itself")
    together: int = option(128, "paths sampled together", minimum=1)
    fit_updates: int = option(ONCE, "updates of V's network, for each half of the paths", minimum=1)
    follow: Literal["gradient", "mean_shift"] = option("gradient", "what of V the steps follow")
    scale: float = option(0.9, "by which what the steps follow is multiplied", above=0, maximum=100)
    layers: Layers = option("all", "layers with a LoRA")
    rank: int = option(16, "rank of the LoRA", minimum=1)
    rate: float = option(7e-4, "learning rate, with cosine decay to 0", above=0)
    updates: int = option(400, "updates of the LoRA", minimum=1)
    batch: int = option(128, "transitions per update", minimum=2)


class Bank(NamedTuple):
    """Base paths, in the host's memory."""

    x: Float[np.ndarray, "paths states *shape"]
    base_output: Float[np.ndarray, "paths steps *shape"]
    log_reward: Float[np.ndarray, " paths"]
    prompt_id: Int[np.ndarray, " paths"]


class Values(NamedTuple):
    """What the two halves of a bank say of its states, each of the other's."""

    value: Float[np.ndarray, "paths states"]  # V − log Z; at the sample, β log R − log Z
    by_clean: Float[np.ndarray, "paths steps elements"]  # ∂V/∂x̂ at every state but the sample
    memories: tuple[ValueMemory, ValueMemory]


class Teacher(NamedTuple):
    """What the steps of a bank are told, and Σ e^V of the states that they begin at, over the paths so far.

    Told are ∂V/∂x̂ for the gradient, and c for the mean shift; both are to be multiplied by the scale.
    """

    told: Float[np.ndarray, "paths steps elements"]
    sums: Float[np.ndarray, "steps paths"]


def sample_bank(images: Images, stream: int, count: int, together: int) -> Bank:
    """Samples `count` base paths, some at a time."""

    @jax.jit
    def part(frozen: Params, keys: PRNGKeys, ids: PromptIds) -> Bank:
        model = images.model(frozen)
        path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
        by_path = functools.partial(jnp.moveaxis, source=0, destination=1)
        return Bank(by_path(path.latents), by_path(path.outputs), model.log_reward(path.samples, ids), ids)  # type: ignore[arg-type]

    parts = []
    for start in range(0, count, together):
        keys, ids = images.keys(stream, start, min(together, count - start))
        parts.append(jax.tree.map(np.asarray, part(images.frozen, keys, ids)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)  # type: ignore[no-any-return]


def clean_of(chain: Chain, bank: Bank) -> Float[np.ndarray, "paths states elements"]:
    """x̂_# at every state; the sample is its own."""
    flat = bank.x.reshape(*bank.x.shape[:2], -1)
    found = flat.copy()
    on_x, on_output = (np.asarray(a)[:, None] for a in (chain.at.clean_x, chain.at.clean_o))
    found[:, :-1] = on_x * flat[:, :-1] + on_output * bank.base_output.reshape(len(flat), len(on_x), -1)
    return found


def fit_values(
    fit: Fit, clean: Float[np.ndarray, "paths states elements"], bank: Bank, beta: float, num_prompts: int
) -> Values:
    """Fits V to each half of the bank, and asks it about the other half."""
    seen = Seen(clean, np.zeros(clean.shape[:2], np.float32))
    found, by_clean = np.zeros(clean.shape[:2]), np.zeros((len(clean), clean.shape[1] - 1, clean.shape[2]), np.float32)
    halves = np.arange(len(clean)) // num_prompts % 2  # every prompt has both halves
    memories = []
    for half in (0, 1):
        mine, others = halves == half, halves != half
        ends = Ends(Seen(*(a[others] for a in seen)), bank.log_reward[others], bank.prompt_id[others])
        memory, asked = fit_value(fit, ends, beta, num_prompts), (Seen(*(a[mine] for a in seen)), bank.prompt_id[mine])
        found[mine] = fit.values(memory, *asked)
        by_clean[mine] = fit.gradients(memory, *asked)[0][:, :-1]
        memories.append(memory)
    log_w = beta * np.asarray(bank.log_reward, np.float64)
    for prompt in np.unique(bank.prompt_id):
        own = bank.prompt_id == prompt
        found[own, -1] = log_w[own] - np.logaddexp.reduce(log_w[own]) + np.log(own.sum())
    return Values(found, by_clean, (memories[0], memories[1]))


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


def own_paths(images: Images, o: Options, policy: Any, *, guided: bool) -> certificate.Paths:
    """Samples of a policy, a LoRA or the memories of V that it follows, from the noise of the held-out base paths."""

    @jax.jit
    def part(frozen: Params, policy: Any, keys: PRNGKeys, ids: PromptIds) -> Any:
        model, active = images.model(frozen), np.arange(o.num_steps) < o.last_step
        found = sample_paths(
            model.predict,
            policy,
            model.chain,
            keys,
            images.base.latent_shape,
            ids,
            active=active,
            predict_change=following(model, o.scale, o.last_step) if guided else None,
        )
        return model.log_reward(found.latents, ids), found.spent, found.log_ratio, ids

    parts = []
    for start in range(0, o.held_out, o.together):
        keys, ids = images.keys(_HELD_OUT, start, min(o.together, o.held_out - start))
        parts.append(jax.tree.map(np.asarray, part(images.frozen, policy, keys, ids)))
    return certificate.Paths(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))


def certify(o: Options, whose: str, paths: certificate.Paths, base: certificate.Paths, file: Path) -> None:
    """Writes the certificate to `file`, and prints the main figures in a line."""
    judged = certificate.certify(paths, base, o.beta)
    file.write_text(json.dumps(asdict(judged), default=np.ndarray.tolist) + "\n")
    gap = judged.at_beta.gap if judged.at_beta else None
    print(
        f"{whose}: log R {judged.log_reward.value:.3f}, exponent {_with_error(judged.exponent)}, "
        f"needed {judged.needed.value:.3f}, spent {judged.spent.value:.3f}, "
        f"efficiency {_with_error(judged.efficiency)}, gap {_with_error(gap)}",
        flush=True,
    )


def _with_error(found: Estimate | None) -> str:
    return "unknown" if found is None else f"{found.value:.2f} ± {found.error:.2f}"


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the bank, fits V and the LoRA, and judges it; writes the results and the LoRA."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    if o.paths < (fewest := 2 * len(images.prompts)):
        raise UserError(f"--paths = {o.paths} is less than two of each prompt; use {fewest} or more")
    chain = images.base.chain(o.num_steps)
    bank = sample_bank(images, _BANK, o.paths, o.together)
    clean = clean_of(chain, bank)
    value, told, memories = fit_values(Fit(o, o.paths), clean, bank, o.beta, len(images.prompts))
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
    certify(o, "own samples", own_paths(images, o, lora, guided=False), base, o.out / "certificate.json")
    if o.guided:
        certify(o, "V's gradient itself", own_paths(images, o, memories, guided=True), base, o.out / "guided.json")


if __name__ == "__main__":
    main(sys.argv)
