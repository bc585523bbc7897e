"""The policy that follows a learned log value exactly: no LoRA stands between them.

    python -m nabla_gfn_jax.studies.value_guidance --out=runs/value_guidance

Base paths are sampled once, and the log value V of their states is fitted (`studies/bank.py`). The policy shifts its
step by δ = s σ ∇_x V(x̂_#(x)) (the `gradient` of `algorithms/fitted_value.py`), which is what a perfect pupil would do.
Its certificate therefore says what the teacher is worth, and the difference to a LoRA's (`studies/value_fit.py`) says
what the pupil is worth. A step costs about three evaluations of the base model, because V's gradient is pulled back
through it. No gradient of the reward is taken.

The policy's steps need not be those of the bank: between the times of two states, V is interpolated. A step can only
move its mean, so shorter steps follow V better. The policy is judged against base samples of its own steps, and
samples.png shows the base model's samples above the policy's, from the same noise.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nabla_gfn_jax.algorithms import value_network
from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.algorithms.credit import Prediction
from nabla_gfn_jax.algorithms.value_memory import Fit, ValueMemory
from nabla_gfn_jax.algorithms.value_network import Points
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Level
from nabla_gfn_jax.diffusion.sampler import PredictChange
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics import certificate
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.bank import (
    BANK,
    BankOptions,
    Memories,
    certify,
    clean_of,
    fit_halves,
    held_out_paths,
    sample_bank,
)
from nabla_gfn_jax.studies.images import Images
from nabla_gfn_jax.typing import Latents, Params, PRNGKeys, PromptIds


@dataclass(frozen=True, kw_only=True)
class Options(BankOptions):
    """The paths, how V is fitted to them, how it is followed, and the folder for the results."""

    out: Path = option(meaning="folder for the certificate and two rows of samples")
    scale: float = option(1.1, "s, by which V's gradient is multiplied", above=0, maximum=100)
    steps: int | None = option(None, "the policy's sampling steps [num_steps, as V's]", minimum=1, maximum=999)
    sampler: Sampler = option("ddpm", "which times these steps visit")


def slope(memory: ValueMemory, clean: Latents, position: Float[Array, ""], prompt_id: PromptIds) -> Latents:
    """∂V/∂x̂ (B, …) at clean samples x̂: `Fit.gradients`, but on the device and between two states too.

    `position` is 0 at the first state and S − 1 at the last. Between two, V is interpolated linearly. V must not see
    log R(x̂).
    """
    centre, basis, middle, unit = (jnp.asarray(a) for a in (memory.centre, memory.basis, memory.middle, memory.unit))
    last = len(unit) - 1
    before = jnp.minimum(position.astype(int), max(last - 1, 0))

    def total(clean: Latents) -> Array:
        components = (clean.reshape(len(clean), -1) - centre[None]) @ basis
        values = []
        for state in (before, jnp.minimum(before + 1, last)):
            seen = (components - middle[state][None]) / unit[state]
            features = jnp.concatenate([seen, jnp.zeros((len(clean), 1), seen.dtype)], axis=1)
            time = jnp.full(len(clean), state / max(last, 1), seen.dtype)
            points = Points(features, time, prompt_id)  # type: ignore[arg-type]
            values.append(value_network.log_value(memory.network.average, points).sum())
        weight = position - before.astype(position.dtype)
        return (1 - weight) * values[0] + weight * values[1]

    return jax.grad(total)(clean)


def following(model: Model, scale: float, times: Float[np.ndarray, " steps"]) -> PredictChange:
    """The base model, and the policy that follows V's gradient times `scale`.

    Args:
        model: its chain has the policy's steps.
        scale: s.
        times: of V's states, decreasing: those of the steps of its bank in which V is followed. Before the first of
            them V is taken to be that of the first state. After the last, the change is 0.

    Returns:
        A function that takes in a LoRA's place memories of V, whose mean is followed.
    """
    visited = jnp.asarray(model.chain.at.time)
    known = jnp.asarray(times[::-1], jnp.float32)

    def predict_change(
        lora: Sequence[ValueMemory], x: Latents, level: Level, condition: PromptIds
    ) -> tuple[Latents, Latents]:
        now = level.time[0].astype(jnp.float32)
        step = model.chain[jnp.argmin(jnp.abs(visited - level.time[0]))]
        position = jnp.interp(now, known, jnp.arange(len(times) - 1.0, -1.0, -1.0))

        def follow(x: Latents) -> tuple[Latents, Latents]:
            at_x = Prediction(model, None, x, level, condition)
            clean = level.clean(at_x.output, x)
            slopes = [slope(memory, clean, position, condition) for memory in lora]
            by_x = at_x.to_x(level.clean, sum(slopes[1:], slopes[0]) / len(slopes))
            return at_x.output, scale * step.sigma**2 / step.mean_o * by_x

        def rest(x: Latents) -> tuple[Latents, Latents]:
            return model.predict(None, x, level, condition), jnp.zeros_like(x)

        output, change = jax.lax.cond(now >= known[0], follow, rest, x)
        return output, change

    return predict_change


def own_paths(
    images: Images, o: Options, memories: Memories | None
) -> tuple[certificate.Paths, UInt8[np.ndarray, "_n height width 3"]]:
    """Samples of the policy that follows V, or of the base model, with the policy's steps, and pictures of the first.

    They begin at the noise of the held-out base paths.
    """
    chain = images.base.chain(o.steps or o.num_steps, sampler=o.sampler)
    times = np.asarray(images.base.chain(o.num_steps).at.time, np.float32)[: o.last_step]

    @jax.jit
    def part(frozen: Params, memories: Memories | None, keys: PRNGKeys, ids: PromptIds) -> Any:
        model = replace(images.model(frozen), chain=chain)
        policy: Any = memories  # in a LoRA's place
        follow = following(model, o.scale, times)
        shape = images.base.latent_shape
        found = sample_paths(model.predict, policy, chain, keys, shape, ids, predict_change=follow)
        pictures = images.base.decode(frozen["base"], found.latents)
        return pictures, model.log_reward(found.latents, ids), found.spent, found.log_ratio, ids

    return held_out_paths(images, o, functools.partial(part, images.frozen, memories))


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the bank, fits V, samples the policy that follows it, and judges it."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    o.check_paths(len(images.prompts))
    images.base.chain(o.steps or o.num_steps, sampler=o.sampler)  # refused before the bank is sampled
    o.out.mkdir(parents=True, exist_ok=True)
    bank = sample_bank(images, BANK, o.paths, o.together, o.bank)
    clean = clean_of(images.base.chain(o.num_steps), bank)
    memories = fit_halves(Fit(o, o.paths), clean, bank, o.beta, len(images.prompts))
    del bank, clean  # some GB
    base, before = own_paths(images, o, None)
    own, after = own_paths(images, o, memories)
    certify(o.beta, "the policy that follows V", own, base, o.out / "certificate.json")
    zoom = max(1, 128 // before.shape[1])
    save_grid(o.out / "samples.png", np.concatenate([before, after]), columns=len(before), zoom=zoom)


if __name__ == "__main__":
    main(sys.argv)
