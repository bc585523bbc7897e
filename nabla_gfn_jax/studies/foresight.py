"""Measures how early a path is decided: what its states say about R^β, and what is lost if a policy begins late.

    python -m nabla_gfn_jax.studies.foresight --out=runs/foresight

The log value V(x_k) = log E_#[R(x_T)^β | x_k] is fitted to base paths at every state (`algorithms/value_memory.py`),
and judged on held-out base paths. In nats, state by state, where state 0 is the noise that a path starts from:

- *known* E_*[V] − log E_#[e^V], at most the KL of the target's states from the base model's (Donsker & Varadhan 1975).
  It is what an ideal policy must have spent by then, as far as this V can tell.
- *spent* E_V[V] − log E_#[e^V], the KL of the states that V chooses: base paths weighted by e^V.
- *exponent*, *needed* and *efficiency* (docs/nats.md) of those paths. They are the certificate of a policy that chooses
  exactly as V does up to this state and is the base model afterwards.
- *lost* log E_#[e^V] − E_#[V], the KL of the base model's states from those that V chooses. A policy that was the base
  model until this state has lost it for good. At state 0 every policy loses it, because all start from the same noise.

A policy follows V's gradient and not its values. With d = σ ∇V·z at a state, along the noise z of the next step:

- *followed* E_#[d²]/2, what the step spends if it goes by σ ∇V.
- *gain* E_*[d] − E_#[d²]/2, how far the step then lowers the KL of the policy's paths from the target's. For the true V
  and fine steps it is what is followed. A V that has learned the chance in its paths gains less, or loses.
- *scale* E_*[d] / E_#[d²], by which σ ∇V would have to be multiplied for the largest gain, scale² · followed: the
  `scale` of `fitted_value`.

The last line of the table is for the whole path.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import Model, Rollout
from nabla_gfn_jax.algorithms.paths import clean_samples
from nabla_gfn_jax.algorithms.transitions import Transition, take
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.metrics.tilt import Strata, normalise, tilt_to
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.images import ImageOptions, Images, write_results
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds

_FITTED, _HELD_OUT = 0, 1  # streams of random numbers
ONCE = 800  # updates of V's network, where it is fitted once
REPLICATES = 100  # of the bootstrap over held-out paths


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions, FitOptions):
    """The paths, how V is fitted to them, and the folder for the results."""

    out: Path = option(meaning="folder for foresight.jsonl and foresight.md")
    num_steps: int = option(20, "sampling steps", minimum=1, maximum=999)
    paths: int = option(4096, "base paths that V is fitted to", minimum=2)
    held_out: int = option(1024, "base paths that judge it", minimum=2)
    together: int = option(128, "paths sampled together", minimum=1)
    guess: bool = option(False, "let V see log R(x̂) too")
    fit_updates: int = option(ONCE, "updates of V's network", minimum=1)


class Ends(NamedTuple):
    """Base paths as V sees them."""

    states: Seen
    log_reward: Float[np.ndarray, " paths"]
    prompt_id: Int[np.ndarray, " paths"]
    beside: tuple[Seen, Seen] | None = None  # all states but the last, moved by ± half of the next step's noise


class Foresight(NamedTuple):
    """What V says at one state."""

    state: int
    known: float
    known_error: float
    spent: float
    log_reward: float
    exponent: float
    needed: float
    efficiency: float
    lost: float
    followed: float  # 0 at the sample, which no step follows
    gain: float
    gain_error: float
    scale: float


def base_paths(images: Images, stream: int, count: int, together: int, *, guess: bool, beside: bool = False) -> Ends:
    """Samples `count` base paths, some at a time; `beside` also gives what V sees on both sides of the states."""

    @jax.jit
    def part(frozen: Params, keys: PRNGKeys, ids: PromptIds) -> tuple[PerSample, tuple[Array, Array], Any]:
        model = images.model(frozen)
        path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
        reward = model.log_reward(path.samples, ids)
        rollout = Rollout(path, reward, ids, keys)

        def seen(clean: Latents) -> tuple[Array, Array]:
            log_r = jax.lax.map(lambda z: model.log_reward(z, ids), clean) if guess else jnp.zeros(clean.shape[:2])
            return jnp.moveaxis(clean, 0, 1).reshape(len(ids), len(clean), -1), log_r.T

        steps = jnp.broadcast_to(jnp.arange(model.chain.num_steps)[:, None], (model.chain.num_steps, len(ids)))

        def moved(share: float) -> tuple[Array, Array]:
            return seen(jax.lax.map(lambda step: clean_beside(model, take(step, rollout), share), steps))

        states = seen(clean_samples(model.chain, rollout, path.outputs))
        return reward, states, (moved(0.5), moved(-0.5)) if beside else None

    parts = []
    for start in range(0, count, together):
        keys, ids = images.keys(stream, start, min(together, count - start))
        reward, states, sides = jax.tree.map(np.asarray, part(images.frozen, keys, ids))
        pair = None if sides is None else (Seen(*sides[0]), Seen(*sides[1]))
        parts.append(Ends(Seen(*states), reward, np.asarray(ids), pair))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)  # type: ignore[no-any-return]


def clean_beside(model: Model, now: Transition, share: float) -> Latents:
    """x̂_# of transitions (N, …) at x + `share` · σ z, where σ z = y − μ is the step's noise."""
    step = model.chain[now.index]
    x = now.x + share * (now.y - step.mean(now.output, now.x))
    return step.at.clean(model.predict(None, x, step.at, now.prompt_id), x)


def fit_value(fit: Fit, paths: Ends, beta: float, num_prompts: int) -> ValueMemory:
    """V, fitted to these paths."""
    log_w = beta * np.asarray(paths.log_reward, np.float64)
    order = np.argsort(paths.prompt_id, kind="stable")
    strata = Strata(paths.prompt_id[order])
    log_z = np.zeros(num_prompts)
    log_z[strata.prompts] = normalise(log_w[order], strata).log_mean
    each = np.repeat(log_w[:, None], paths.states.guess.shape[1], axis=1).astype(np.float32)
    samples = paths.states.clean[:, -1]
    memory = fit.add(ValueMemory.empty(num_prompts), paths.states, samples, each, paths.prompt_id)
    return fit.fitted(memory, log_z)


def known_nats(
    value: Float[np.ndarray, " n"], log_w: Float[np.ndarray, " n"], strata: Strata, counts: Float[np.ndarray, " n"]
) -> float:
    """E_*[V] − log E_#[e^V], the mean over prompts."""
    target, chosen = normalise(log_w, strata, counts), normalise(value, strata, counts)
    return float((strata.sums(target.shares * value) - chosen.log_mean).mean())


def followed(
    along: Float[np.ndarray, " n"], log_w: Float[np.ndarray, " n"], strata: Strata, counts: Float[np.ndarray, " n"]
) -> tuple[float, float]:
    """E_#[d²]/2 and E_*[d] − E_#[d²]/2 of d = `along`, means over prompts."""
    target, base = normalise(log_w, strata, counts), normalise(np.zeros(len(along)), strata, counts)
    spent = float(strata.sums(base.shares * along**2).mean()) / 2
    return spent, float(strata.sums(target.shares * along).mean()) - spent


def judge(
    value: Float[np.ndarray, "paths states"],
    along: Float[np.ndarray, "paths states-1"],
    held: Ends,
    beta: float,
    seed: int,
) -> list[Foresight]:
    """What V, given at every state of held-out paths, says about their ends.

    `along` is V's difference across each state but the last, from one side to the other.
    """
    order = np.argsort(held.prompt_id, kind="stable")
    prompt, reward = held.prompt_id[order], np.asarray(held.log_reward, np.float64)[order]
    strata, found = Strata(prompt), []
    rng, even = np.random.default_rng(seed), np.ones(len(reward))
    draws = [rng.poisson(1.0, len(reward)).astype(float) + 1e-9 for _ in range(REPLICATES)]
    slopes = np.pad(np.asarray(along, np.float64)[order], ((0, 0), (0, 1))).T
    for state, v in enumerate(np.asarray(value, np.float64)[order].T):
        chosen = normalise(v, strata)
        spent = float((strata.sums(chosen.shares * v) - chosen.log_mean).mean())
        mean = float(strata.sums(chosen.shares * reward).mean())
        exponent, needed = tilt_to(mean, reward, prompt)
        known = [known_nats(v, beta * reward, strata, counts) for counts in (even, *draws)]
        (step, gain), *others = (followed(slopes[state], beta * reward, strata, counts) for counts in (even, *draws))
        found.append(
            Foresight(
                state=state,
                known=known[0],
                known_error=float(np.std(known[1:], ddof=1)),
                spent=spent,
                log_reward=mean,
                exponent=exponent,
                needed=needed,
                efficiency=needed / spent if spent > 0 else float("nan"),
                lost=float((chosen.log_mean - strata.means(v)).mean()),
                followed=step,
                gain=gain,
                gain_error=float(np.std([other for _, other in others], ddof=1)),
                scale=(gain + step) / (2 * step) if step > 0 else float("nan"),
            )
        )
    return found


def as_table(rows: list[Foresight]) -> str:
    """The rows as a Markdown table, and the sums of what is followed and gained."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in Foresight._fields) + " |"]
    lines.append("|---" * len(Foresight._fields) + "|")
    lines += ["| " + " | ".join(f"{value:.3g}" for value in row) + " |" for row in rows]
    step, gain = sum(row.followed for row in rows), sum(row.gain for row in rows)
    scale = (gain + step) / (2 * step) if step > 0 else float("nan")
    last = {"state": "all", "followed": f"{step:.3g}", "gain": f"{gain:.3g}", "scale": f"{scale:.3g}"}
    return "\n".join([*lines, "| " + " | ".join(last.get(name, "") for name in Foresight._fields) + " |"]) + "\n"


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the paths, fits V and judges it; writes a line of JSON for each state, and the table."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    fitted = base_paths(images, _FITTED, o.paths, o.together, guess=o.guess)
    held = base_paths(images, _HELD_OUT, o.held_out, o.together, guess=o.guess, beside=True)
    fit = Fit(o, o.paths)
    memory = fit_value(fit, fitted, o.beta, len(images.prompts))
    assert held.beside is not None
    value, up, down = (fit.values(memory, states, held.prompt_id) for states in (held.states, *held.beside))
    rows = judge(value, up - down, held, o.beta, o.seed)
    write_results(o.out, "foresight", rows, as_table(rows))


if __name__ == "__main__":
    main(sys.argv)
