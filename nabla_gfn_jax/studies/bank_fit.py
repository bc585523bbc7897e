"""Measures how much of an exact teacher a LoRA learns, by fits on a fixed bank of base paths and held-out nats.

    python -m nabla_gfn_jax.studies.bank_fit --out=runs/bank_fit

Base paths are sampled once, with the adjoint of every step. Resampled with probability ∝ R^β, they are paths of the
target P_base · R^β. The mean of the adjoint is then the exact teacher for any policy (algorithms/path_regression.py).
Only the clip, the fit and the expressiveness of the LoRA remain between this teacher and the target. Two results are
reported:

- the *gain* on held-out paths, KL(target ‖ base) − KL(target ‖ policy) in nats, which is at most the needed nats. It is
  computed for each tenth of the path, with the credit clipped as in training and with the unclipped credit, which is
  exact but has heavy tails at early steps.
- the certificate of the policy's own samples (docs/nats.md).

The default takes some minutes on a GPU. On a CPU, use fewer paths and updates.
"""

import functools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Rollout
from nabla_gfn_jax.algorithms.credit import adjoint_credit
from nabla_gfn_jax.algorithms.path_regression import clipped
from nabla_gfn_jax.algorithms.paths import step_loss
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics import certificate
from nabla_gfn_jax.models.lora import Layers, is_adapted
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.images import ImageOptions, Images
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds

TENTHS = 10
AVERAGE = 0.99  # decay of the running mean of the LoRA, which is evaluated
REPORT = 50  # updates between two reported losses


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """The teacher, the fits, and the folder for their results."""

    out: Path = option(meaning="folder for results.jsonl")
    num_steps: int = option(50, "sampling steps; results are reported by tenths of them", minimum=10, maximum=999)
    paths: int = option(8192, "base paths in the bank", minimum=2)
    held_out: int = option(2048, "held-out base paths, and samples of each policy", minimum=2)
    together: int = option(512, "paths sampled together", minimum=1)
    clip_quantile: float = option(
        0.8, "the credit is clipped to this quantile of its size at each step", above=0, maximum=1
    )
    layers: tuple[Layers, ...] = option(("attention", "all"), "layers with a LoRA; one fit for each")
    rank: int = option(8, "rank of the LoRA", minimum=1)
    rates: tuple[float, ...] = option((3e-4, 1e-3), "learning rates, with cosine decay to 0; one fit for each", above=0)
    updates: int = option(400, "updates per fit", minimum=1)
    batch: int = option(768, "transitions per update", minimum=1)


class Bank(NamedTuple):
    """Base paths with their credit for β = 1; leaves (T, N, …) unless stated otherwise."""

    x: Latents
    base_output: Latents
    credit: Latents  # c = σ a, the adjoint at the step's end
    prompt_id: PromptIds  # (N,)
    log_reward: Float[Array, " paths"]


@dataclass(frozen=True)
class Bench(Images):
    """The base model, its reward and its prompts."""

    options: Options

    def bank(self, stream: int, count: int) -> Bank:
        """Samples `count` base paths with their credit, some at a time."""

        @jax.jit
        def part(frozen: Params, keys: PRNGKeys, ids: PromptIds) -> Bank:
            model = self.model(frozen)
            path = sample(model.predict, None, model.chain, keys, self.base.latent_shape, ids)
            reward = model.log_reward(path.samples, ids)
            credit = adjoint_credit(model, Rollout(path, reward, ids, keys), 1.0).gradient
            c = model.chain.sigma.reshape((-1,) + (1,) * (credit.ndim - 1)) * credit
            return Bank(path.latents[:-1], path.outputs, c, ids, reward)

        parts = [part(self.frozen, *self.keys(stream, *span)) for span in spans(count, self.options.together)]
        return Bank(
            *(jnp.concatenate(leaves, axis=0 if leaves[0].ndim == 1 else 1) for leaves in zip(*parts, strict=True))
        )

    def policy_paths(self, pairs: Params, count: int) -> certificate.Paths:
        """Samples `count` paths of the policy, for the certificate."""

        @jax.jit
        def part(frozen: Params, pairs: Params, keys: PRNGKeys, ids: PromptIds) -> Any:
            base = self.model(frozen)
            adapted = self.model(frozen | {"base": adapt(frozen["base"], pairs)})
            predict = lambda lora, *where: (base if lora is None else adapted).predict(None, *where)  # noqa: E731
            found = sample_paths(predict, pairs, base.chain, keys, self.base.latent_shape, ids)
            return base.log_reward(found.latents, ids), found.spent, found.log_ratio, ids

        parts = [part(self.frozen, pairs, *self.keys(1, *span)) for span in spans(count, self.options.together)]
        return certificate.Paths(*(np.concatenate([np.asarray(p[i]) for p in parts]) for i in range(4)))


def spans(count: int, size: int) -> list[tuple[int, int]]:
    """The (start, length) of consecutive parts of at most `size`."""
    return [(start, min(size, count - start)) for start in range(0, count, size)]


def init_pairs(params: Params, layers: Layers, rank: int, key: Array) -> Params:
    """Low-rank pairs by the UNet's layer: down ~ N(0, 1/rank²), up = 0. A convolution's kernel counts as a matrix."""
    pairs = {}
    for number, (path, kernel) in enumerate(sorted(flatten_dict(params["unet"]).items())):
        if path[-1] == "kernel" and is_adapted(path[:-1], layers):
            inputs, outputs = int(np.prod(kernel.shape[:-1])), kernel.shape[-1]
            down = jax.random.normal(jax.random.fold_in(key, number), (inputs, rank)) / rank
            pairs["/".join(path)] = {"down": down, "up": jnp.zeros((rank, outputs))}
    return pairs


def adapt(params: Params, pairs: Params) -> Params:
    """The parameters with the pairs' products added, in float32."""
    flat = {"/".join(path): leaf for path, leaf in flatten_dict(params["unet"]).items()}
    for name, pair in pairs.items():
        flat[name] = flat[name] + (pair["down"] @ pair["up"]).reshape(flat[name].shape)
    return params | {"unet": unflatten_dict({tuple(name.split("/")): leaf for name, leaf in flat.items()})}


def clip_of(bank: Bank, beta: float, quantile: float) -> Float[Array, " steps"]:
    """For each step, the quantile over paths of the root mean square of β c."""
    size = jnp.sqrt(jnp.square(bank.credit).reshape(*bank.credit.shape[:2], -1).mean(axis=-1))
    return jnp.quantile(abs(beta) * size, quantile, axis=1)


def nats(bench: Bench, frozen: Params, pairs: Params, bank: Bank, c: Latents, steps: Array, picked: Array) -> Array:
    """δ·c − ‖δ‖²/2 of each transition (step, path): its gain over the base model."""
    model = bench.model(frozen | {"base": adapt(frozen["base"], pairs)})
    x, base_output, step = bank.x[steps, picked], bank.base_output[steps, picked], bench.model(frozen).chain[steps]
    output = model.predict(None, x, step.at, bank.prompt_id[picked])
    return -step_loss(step, output - base_output, c)


def fit(bench: Bench, bank: Bank, clip: Array, layers: Layers, rate: float) -> tuple[Params, list[float]]:
    """Fits a LoRA with Adam on transitions of target paths. Returns the running mean of the pairs, and the losses."""
    o = bench.options
    pairs = init_pairs(bench.base.params, layers, o.rank, jax.random.key(o.seed))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, o.updates))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, frozen: Params, bank: Bank, key: Array) -> tuple[Any, Array]:
        pairs, average, moments = state
        picked = jax.random.categorical(jax.random.fold_in(key, 0), o.beta * bank.log_reward, shape=(o.batch,))
        steps = jax.random.randint(jax.random.fold_in(key, 1), (o.batch,), 0, o.num_steps)
        c = o.beta * bank.credit[steps, picked]
        c = clipped(c, clip[steps])

        def loss(pairs: Params) -> Array:
            return -o.num_steps * nats(bench, frozen, pairs, bank, c, steps, picked).mean()

        value, gradient = jax.value_and_grad(loss)(pairs)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes weak and strong types
            change, moments = optimizer.update(gradient, moments, pairs)
        pairs = optax.apply_updates(pairs, change)
        return (pairs, optax.incremental_update(pairs, average, 1 - AVERAGE), moments), value

    state, losses = (pairs, jax.tree.map(jnp.copy, pairs), optimizer.init(pairs)), list[Array]()
    for number in range(o.updates):
        state, value = update(state, bench.frozen, bank, jax.random.fold_in(jax.random.key(o.seed + 1), number))
        losses.append(value)
    return state[1], [float(jnp.stack(losses[i : i + REPORT]).mean()) for i in range(0, o.updates, REPORT)]


def gains(bench: Bench, pairs: Params, held_out: Bank, clip: Array) -> dict[str, list[float]]:
    """The gain in nats for each tenth of held-out target paths, with clipped and with unclipped credit."""
    o, count = bench.options, len(held_out.log_reward)
    picked = jax.random.categorical(jax.random.key(o.seed + 2), o.beta * held_out.log_reward, shape=(count,))

    @jax.jit
    def at(frozen: Params, pairs: Params, bank: Bank, k: Array, rows: Array) -> tuple[Array, Array]:
        steps, c = jnp.broadcast_to(k, rows.shape), o.beta * bank.credit[k, rows]
        of = functools.partial(nats, bench, frozen, pairs, bank, steps=steps, picked=rows)
        return of(c=clipped(c, clip[k])).mean(), of(c=c).mean()

    size = min(o.together, count)
    rows = picked[: count // size * size].reshape(-1, size)
    found = np.array(
        [
            np.mean([at(bench.frozen, pairs, held_out, jnp.int32(k), r) for r in rows], axis=0)
            for k in range(o.num_steps)
        ]
    )
    tenths = [part.sum(axis=0) for part in np.array_split(found, TENTHS)]
    return {name: [float(t[i]) for t in tenths] for i, name in enumerate(("clipped", "as_it_is"))}


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the bank, and fits and evaluates each kind of layers and rate; writes one line of JSON for each fit."""
    options = parse(argv, Options, __doc__)
    bench = Bench.load(options)
    bank, held_out = bench.bank(2, options.paths), bench.bank(3, options.held_out)
    clip = clip_of(bank, options.beta, options.clip_quantile)
    base = certificate.Paths.of_base(np.asarray(bank.log_reward), np.asarray(bank.prompt_id))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("w") as file:
        for layers in options.layers:
            for rate in options.rates:
                start = time.time()
                pairs, losses = fit(bench, bank, clip, layers, rate)
                seconds, gain = time.time() - start, gains(bench, pairs, held_out, clip)
                judged = certificate.certify(bench.policy_paths(pairs, options.held_out), base, options.beta)
                row = {"layers": layers, "rate": rate, "seconds": seconds, "losses": losses, "gain": gain}
                print(line(layers, rate, gain, judged), flush=True)
                row["certificate"] = json.loads(json.dumps(asdict(judged), default=np.ndarray.tolist))
                file.write(json.dumps(row) + "\n")
                file.flush()


def line(layers: str, rate: float, gain: dict[str, list[float]], found: certificate.Certificate) -> str:
    """One line of text about the result of a fit."""
    gap = found.at_beta.gap.value if found.at_beta else float("nan")
    gained = f"held-out gain {sum(gain['clipped']):.3f} clipped, {sum(gain['as_it_is']):.3f} unclipped"
    reached = f"exponent {found.exponent.value:.2f}, needed {found.needed.value:.3f}, spent {found.spent.value:.3f}"
    return f"{layers:9} rate {rate:g}: {gained}; {reached}, gap {gap:.3f}"


if __name__ == "__main__":
    main(sys.argv)
