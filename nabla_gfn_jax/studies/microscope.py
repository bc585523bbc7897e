"""Measures what single steps are told: the bias and the noise of each credit, against the exact answer.

    python -m nabla_gfn_jax.studies.microscope --out=runs/microscope

A step x → y of the target P_base · R^β is μ_# + σ² u*, where u* is the gradient of the log value, to first order in the
step. It is estimated at one state x_k of a base path: the path is continued many times under the base model, and

    u* = Σ_i w_i a_i / Σ_i w_i,   w_i = R(x_T,i)^β,   a_i = the adjoint at the continuation's y

Every credit c is computed on the same continuations, without the weights, as training would see it. In nats of one
step:

- *signal* σ²‖E c‖²/2, and *true signal* σ²‖u*‖²/2.
- *noise* σ² E‖c − E c‖²/2.
- *largest*: the share of Σ‖c‖² in the four largest of all continuations.
- *cosine* between E c and u*, and *size*, the factor of E c that is nearest to u*.
- *gain* σ²(E c · u* − ‖E c‖²/2): what a step gains that goes by E c. At u* it is the true signal. Below 0 the step is
  worse than the base model's.

Squares and products of means leave out the products of a continuation with itself, so that noise does not count as
signal. They may then be below 0, where cosine and size are not defined.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.base import Model, Rollout, reward_gradient
from nabla_gfn_jax.algorithms.credit import Prediction, adjoint_credit, guess_cotangent, terminal_credit
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import Trajectory, draw_noise, sample
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.images import ImageOptions, Images
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds

LARGEST = 4  # continuations that `largest` counts
_BASE_PATHS, _CONTINUATIONS = 0, 1  # streams of random numbers
_OF_A_CREDIT = ("signal", "noise", "largest", "cosine", "size", "gain")  # columns of the table


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """What to look at, and the folder for the results."""

    out: Path = option(meaning="folder for microscope.jsonl and microscope.md")
    steps: tuple[int, ...] = option((10, 25, 40, 47), "the steps to look at, from 0", minimum=0)
    states: int = option(3, "states for each step, on different base paths", minimum=1)
    continuations: int = option(64, "continuations of each state", minimum=8)


class Credits(NamedTuple):
    """Each credit times σ at the y of M continuations of one state; leaves (M, elements)."""

    adjoint: Float[Array, "paths elements"]
    guess: Float[Array, "paths elements"]
    terminal: Float[Array, "paths elements"]


class Products(NamedTuple):
    """What is known about one credit at one state, in nats of the step but for `largest`."""

    signal: float  # ‖E c‖²/2
    noise: float  # E‖c − E c‖²/2
    largest: float
    with_true: float  # E c · u*
    true_signal: float  # ‖u*‖²/2


def product_of_means(
    a: Float[np.ndarray, "paths elements"],
    w: Float[np.ndarray, " paths"],
    b: Float[np.ndarray, "paths elements"],
    v: Float[np.ndarray, " paths"],
) -> float:
    """E_w[a] · E_v[b], unbiased for fixed weights w and v: without the products of a path with itself."""
    w, v = w / w.sum(), v / v.sum()
    same = float((w * v * (a * b).sum(axis=1)).sum())
    return float(((w @ a) @ (v @ b) - same) / (1 - w @ v))


def look(credits: Credits, log_w: Float[np.ndarray, " paths"]) -> dict[str, Products]:
    """The products of every credit at one state, whose continuations have the log weights β log R."""
    w, even = np.exp(log_w - log_w.max()), np.ones(len(log_w))
    true = np.asarray(credits.adjoint, np.float64)
    true_signal = product_of_means(true, w, true, w) / 2
    found = {}
    for name, value in credits._asdict().items():
        c = np.asarray(value, np.float64)
        square, signal = (c**2).sum(axis=1), product_of_means(c, even, c, even) / 2
        found[name] = Products(
            signal=signal,
            noise=float(square.mean() / 2 - signal),
            largest=float(np.sort(square)[-LARGEST:].sum() / square.sum()) if square.any() else float("nan"),
            with_true=product_of_means(c, even, true, w),
            true_signal=true_signal,
        )
    return found


def continue_paths(model: Model, x: Latents, keys: PRNGKeys, prompt_id: PromptIds) -> Rollout:
    """The rest of the base model's paths from states x (M, …), which the chain of `model` starts from."""

    def step(x: Latents, inputs: tuple[Array, Chain]) -> tuple[Latents, tuple[Latents, Latents]]:
        index, now = inputs
        output = model.predict(None, x, now.at.each(len(keys)), prompt_id)
        y = now.mean(output, x) + now.sigma * draw_noise(keys, index, x.shape[1:])
        return y, (y, output)

    _, (latents, outputs) = jax.lax.scan(step, x, (jnp.arange(model.chain.num_steps), model.chain))
    path = Trajectory(jnp.concatenate([x[None], latents]), outputs)
    return Rollout(path, model.log_reward(path.samples, prompt_id), prompt_id, keys)


def credits_of(model: Model, rollout: Rollout, beta: float) -> Credits:
    """σ times each credit after the first step of the rollout, (M, elements)."""
    y, ids, first = rollout.trajectory.latents[1], rollout.prompt_id, model.chain[0]
    level = first.to.each(len(y))
    if model.chain.num_steps == 1:
        guess = beta * reward_gradient(model, y, ids)
    else:
        at_y = Prediction(model, None, y, level, ids)
        scale = jnp.full(len(y), beta, jnp.float32)
        guess = at_y.to_x(level.clean, guess_cotangent(model, at_y.output, y, level, scale, ids))
    credits = (
        adjoint_credit(model, rollout, beta).gradient[0],
        guess,
        terminal_credit(model, rollout, beta).gradient[0],
    )
    return Credits(*(first.sigma * c.reshape(len(y), -1) for c in credits))


def look_at_step(images: Images, options: Options, k: int) -> list[dict[str, Products]]:
    """The products at `states` states of step k."""

    @jax.jit
    def states(frozen: Params, keys: PRNGKeys, ids: PromptIds) -> Latents:
        model = images.model(frozen)
        path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
        return path.latents[k]

    @jax.jit
    def of_state(frozen: Params, x: Latents, keys: PRNGKeys, ids: PromptIds) -> tuple[Credits, PerSample]:
        model = images.model(frozen)
        model = dataclasses.replace(model, chain=model.chain[k:])
        rollout = continue_paths(model, jnp.broadcast_to(x, (len(keys), *x.shape)), keys, ids)
        return credits_of(model, rollout, options.beta), rollout.log_reward

    found, count = [], options.continuations
    keys, ids = images.keys(_BASE_PATHS, 0, options.states)
    for number, x in enumerate(states(images.frozen, keys, ids)):
        onward, _ = images.keys(_CONTINUATIONS, number * count, count)
        credits, log_reward = of_state(images.frozen, x, onward, jnp.broadcast_to(ids[number], count))
        found.append(look(credits, options.beta * np.asarray(log_reward, np.float64)))
    return found


def summary(products: list[Products]) -> dict[str, float]:
    """The means over states. Cosine and size are of all states together: quotients of sums."""
    mean = Products(*(float(a) for a in np.mean(np.asarray(products), axis=0)))
    whole = 4 * mean.signal * mean.true_signal
    error = np.std([p.true_signal for p in products], ddof=1) / len(products) ** 0.5 if len(products) > 1 else np.nan
    return {
        "true_signal": mean.true_signal,
        "true_signal_error": float(error),
        "signal": mean.signal,
        "noise": mean.noise,
        "largest": mean.largest,
        "cosine": mean.with_true / whole**0.5 if mean.signal > 0 and mean.true_signal > 0 else float("nan"),
        "size": mean.with_true / (2 * mean.signal) if mean.signal > 0 else float("nan"),
        "gain": mean.with_true - mean.signal,
    }


def as_table(rows: list[dict[str, float | str]]) -> str:
    """The rows as a Markdown table."""
    columns = ("step", "true_signal", "true_signal_error", "credit", *_OF_A_CREDIT)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in map(row.get, columns))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Looks at every step of `--steps`; writes a line of JSON for each credit, and the table."""
    options = parse(argv, Options, __doc__)
    for k in options.steps:
        if k >= options.num_steps:
            raise UserError(f"--steps has {k}, but the steps are 0 to num_steps - 1 = {options.num_steps - 1}")
    images = Images.load(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, float | str]] = []
    with (options.out / "microscope.jsonl").open("w") as file:
        for k in options.steps:
            states = look_at_step(images, options, k)
            for credit in Credits._fields:
                rows.append({"step": str(k), "credit": credit, **summary([state[credit] for state in states])})
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
    (options.out / "microscope.md").write_text(as_table(rows))
    print(as_table(rows), end="")


if __name__ == "__main__":
    main(sys.argv)
