"""Measures how much of what a learned log value tells its steps a policy does, on its own states.

    python -m nabla_gfn_jax.studies.following --lora=runs/exact/lora/00250 --until_step=40 --guess=True \
        --out=runs/following

V is fitted to base paths, as `foresight` does. From a state x of the policy, several next states y are drawn. For each,
c = σ ∇_y V is what `algorithms/kernel_value.py` tells the step, and δ = (μ_θ − μ_#)/σ is what the step does. In nats,
by step:

- *signal* ‖E[c|x]‖²/2 is what a step that follows V spends and gains.
- *noise* E‖c − E[c|x]‖²/2 is the chance in y. No policy can follow it.
- *spent* ‖δ‖²/2 is what the step spends.
- *gain* E[δ·c] − ‖δ‖²/2 is how far it lowers the loss of `kernel_value`, at most the signal.
- *cosine* between δ and E[c|x]: the square root of the part of the signal that a multiple of δ has.
- *scale* is the factor by which δ would have to be multiplied for the largest gain.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nabla_gfn_jax.algorithms.kernel_value import told_by
from nabla_gfn_jax.algorithms.paths import clean_after
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen, ValueMemory
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.foresight import base_paths, fit_value
from nabla_gfn_jax.studies.images import Images, LoraOptions, write_results
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds

_FITTED, _OWN, _AFTER = 0, 1, 2  # streams of random numbers


@dataclass(frozen=True, kw_only=True)
class Options(LoraOptions, FitOptions):
    """The LoRA, the states, how V is fitted, and the folder for the results."""

    out: Path = option(meaning="folder for following.jsonl and following.md")
    steps: tuple[int, ...] = option((), "steps to look at [eight, evenly spaced]", minimum=1, empty=True)
    paths: int = option(1024, "base paths that V is fitted to", minimum=2)
    states: int = option(16, "states of each step", minimum=2)
    noises: int = option(24, "next states of each state", minimum=2)
    together: int = option(128, "base paths sampled together", minimum=1)
    guess: bool = option(False, "let V see log R(x̂) too")

    def __post_init__(self) -> None:
        super().__post_init__()
        late = [step for step in self.steps if step > self.last_step]
        if late:
            raise UserError(f"--steps: the policy takes no step {late[0]}; its last is {self.last_step}")

    @property
    def chosen(self) -> tuple[int, ...]:
        """The steps to look at, from 1."""
        return self.steps or tuple(sorted({round(step) for step in np.linspace(1, self.last_step, 8)}))


class Following(NamedTuple):
    """One step, from 1. `gain_error` is the standard error of the gain over the states."""

    step: int
    signal: float
    noise: float
    spent: float
    gain: float
    gain_error: float
    cosine: float
    scale: float


def judge(
    step: int, c: Float[np.ndarray, "noises states elements"], delta: Float[np.ndarray, "states elements"]
) -> Following:
    """The figures of a step. ‖E[c|x]‖² is the mean over pairs of different noises, which has no bias."""
    c, delta = np.asarray(c, np.float64), np.asarray(delta, np.float64)
    count, squares = len(c), (c**2).sum(axis=2)
    signal = ((c.sum(axis=0) ** 2).sum(axis=1) - squares.sum(axis=0)) / (count * (count - 1))
    told, spent = (delta * c.mean(axis=0)).sum(axis=1), (delta**2).sum(axis=1)
    gain = told - spent / 2
    size = np.sqrt(max(signal.mean(), 0.0) * spent.mean())
    return Following(
        step=step,
        signal=float(signal.mean()) / 2,
        noise=float(squares.mean() - signal.mean()) / 2,
        spent=float(spent.mean()) / 2,
        gain=float(gain.mean()),
        gain_error=float(gain.std(ddof=1) / np.sqrt(len(gain))),
        cosine=float(told.mean() / size) if size > 0 else float("nan"),
        scale=float(told.mean() / spent.mean()) if spent.any() else float("nan"),
    )


def of_state(memory: ValueMemory, state: int) -> ValueMemory:
    """The memory of one state alone."""
    one = slice(state, state + 1)
    arrays = {name: getattr(memory, name)[:, one] for name in ("components", "guess", "log_w", "solution")}
    return memory.replace(**arrays)  # type: ignore[attr-defined,no-any-return]


class Follower:
    """The compiled parts of the study, for states that are looked at together."""

    def __init__(self, images: Images, lora: Params, prompt_id: PromptIds, *, guess: bool):
        self._images, self._lora, self._ids, self._guess = images, lora, prompt_id, guess
        self._step, self._pull = jax.jit(self._one_step), jax.jit(self._pull_back)

    def states(self, keys: PRNGKeys) -> Latents:
        """The states (T + 1, B, …) of the paths of a policy that has the LoRA in every step."""

        def run(frozen: Params, lora: Params) -> Latents:
            model = self._images.model(frozen)
            shape = self._images.base.latent_shape
            return sample(model.predict, lora, model.chain, keys, shape, self._ids).latents

        return jax.jit(run)(self._images.frozen, self._lora)

    def told(
        self, x: Latents, step: int, keys: PRNGKeys, fit: Fit, memory: ValueMemory
    ) -> tuple[Float[np.ndarray, "noises states elements"], Float[np.ndarray, "states elements"]]:
        """c for each noise and state, and δ of each state, at the step with this number, from 0."""
        frozen, ids = self._images.frozen, np.asarray(self._ids)
        delta, y, clean, guess = self._step(frozen, self._lora, x, step, keys)
        parts = []
        for next_, seen, log_reward in zip(y, np.asarray(clean), np.asarray(guess), strict=True):
            states = Seen(seen.reshape(len(ids), 1, -1), log_reward[:, None])
            by_clean, by_guess = fit.gradients(memory, states, ids)
            pulled = self._pull(frozen, next_, step, by_clean[:, 0].reshape(seen.shape), by_guess[:, 0])
            parts.append(np.asarray(pulled).reshape(len(ids), -1))
        return np.stack(parts), np.asarray(delta).reshape(len(ids), -1)

    def _transition(self, y: Latents, step: Array) -> Transition:
        index = jnp.full(len(y), step)
        return Transition(x=y, y=y, output=y, index=index, prompt_id=self._ids, adjoint=None)

    def _one_step(
        self, frozen: Params, lora: Params, x: Latents, step: Array, keys: PRNGKeys
    ) -> tuple[Latents, Latents, Latents, PerSample]:
        """δ (B, …), and for each key a next state, its x̂_# and log R(x̂_#), with leading axes (noises, B)."""
        model = self._images.model(frozen)
        now = model.chain[step]
        base, output = (model.predict(which, x, now.at.each(len(x)), self._ids) for which in (None, lora))

        def after(key: PRNGKeys) -> tuple[Latents, Latents, PerSample]:
            y = now.mean(output, x) + now.sigma * jax.random.normal(key, x.shape)
            clean, _ = clean_after(model, self._transition(y, step))
            return y, clean, model.log_reward(clean, self._ids) if self._guess else jnp.zeros(len(x))

        return now.mean_o / now.sigma * (output - base), *jax.lax.map(after, keys)

    def _pull_back(self, frozen: Params, y: Latents, step: Array, by_clean: Latents, by_guess: PerSample) -> Latents:
        guess = by_guess if self._guess else None
        return told_by(self._images.model(frozen), self._transition(y, step), by_clean, guess)


def as_table(rows: list[Following]) -> str:
    """The rows as a Markdown table."""
    lines = ["| step | signal | noise | spent | gain | cosine | scale |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        figures = f"{r.signal:.4f} | {r.noise:.4f} | {r.spent:.4f} | {r.gain:.4f} ± {r.gain_error:.4f}"
        lines.append(f"| {r.step} | {figures} | {r.cosine:.2f} | {r.scale:.2f} |")
    return "\n".join(lines) + "\n"


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Fits V, samples the policy and judges its steps; writes a line of JSON for each, and the table."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    lora = load_lora(o.lora, images.base.params["unet"])
    fit = Fit.of(o, o.paths)
    memory = fit_value(
        fit, base_paths(images, _FITTED, o.paths, o.together, guess=o.guess), o.beta, len(images.prompts)
    )
    keys, ids = images.keys(_OWN, 0, o.states)
    follower = Follower(images, lora, ids, guess=o.guess)
    states, rows = follower.states(keys), []
    for number in o.chosen:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.key(o.seed), _AFTER), number)
        noises = jax.vmap(partial(jax.random.fold_in, own))(jnp.arange(o.noises))
        rows.append(
            judge(number, *follower.told(states[number - 1], number - 1, noises, fit, of_state(memory, number)))
        )
        print(as_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    write_results(o.out, "following", rows, as_table(rows))


if __name__ == "__main__":
    main(sys.argv)
