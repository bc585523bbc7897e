"""Measures what a finished LoRA has taken up of the target, part by part of the path.

    python -m nabla_gfn_jax.studies.uptake --lora=runs/emoji_exact/seed0/lora/00360 --until_step=40 --out=runs/uptake

Base paths weighted by R^β are paths of the target P_base · R^β. On them, a policy with δ = (μ_θ − μ_#)/σ has

    KL(target's paths ‖ policy's paths) = KL(target's ‖ base model's) − Σ_k gain_k
    gain_k = E_*[ δ_k·z_k − ‖δ_k‖²/2 ],     z = (y − μ_#)/σ, the step's noise under the base model

in nats. The certificate (docs/nats.md) judges a policy by its own samples; this study judges it where it should be.
For each part of the path the table has

- *spent* E_*[‖δ‖²/2],
- *gain* with its standard error,
- *scale* E_*[δ·z] / E_*[‖δ‖²], the factor by which δ would have to be multiplied for the largest gain. Above 1, the
  policy does too little there; below 1, too much.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.diffusion.sampler import Trajectory, sample
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.metrics.tilt import Strata, normalise
from nabla_gfn_jax.options import option
from nabla_gfn_jax.studies.images import Images, LoraOptions, write_results
from nabla_gfn_jax.typing import Latents, Params, PerSample, PRNGKeys, PromptIds

_PATHS = 0  # stream of random numbers


@dataclass(frozen=True, kw_only=True)
class Options(LoraOptions):
    """The LoRA, the paths, and the folder for the results."""

    out: Path = option(meaning="folder for uptake.jsonl and uptake.md")
    paths: int = option(2048, "base paths", minimum=2)
    together: int = option(128, "paths sampled together", minimum=1)
    parts: int = option(10, "parts of the path, of equally many steps as far as possible", minimum=1)


class Products(NamedTuple):
    """Of every step of base paths."""

    with_noise: Float[np.ndarray, "steps paths"]  # δ·z
    square: Float[np.ndarray, "steps paths"]  # ‖δ‖²


class Uptake(NamedTuple):
    """What the LoRA has taken up in a part of the path."""

    steps: str
    spent: float
    gain: float
    gain_error: float
    scale: float


def products(model: Model, lora: Params, path: Trajectory, prompt_id: PromptIds) -> tuple[Array, Array]:
    """δ·z and ‖δ‖² of every step (T, B) of the base model's path."""

    def of_step(_: None, inputs: tuple[Latents, Latents, Latents, Chain]) -> tuple[None, tuple[PerSample, PerSample]]:
        x, y, base, step = inputs
        delta = step.mean_o / step.sigma * (model.predict(lora, x, step.at.each(len(x)), prompt_id) - base)
        noise = (y - step.mean(base, x)) / step.sigma
        with_noise, square = ((delta * a).reshape(len(x), -1).sum(axis=1) for a in (noise, delta))
        return None, (with_noise, square)

    steps = (path.latents[:-1], path.latents[1:], path.outputs, model.chain)
    found: tuple[Array, Array] = jax.lax.scan(of_step, None, steps)[1]
    return found


def sampled_products(
    images: Images, lora: Params, count: int, together: int
) -> tuple[Products, Float[np.ndarray, " paths"], Int[np.ndarray, " paths"]]:
    """The products of `count` base paths, their log R and their prompts."""

    @jax.jit
    def part(frozen: Params, lora: Params, keys: PRNGKeys, ids: PromptIds) -> tuple[tuple[Array, Array], PerSample]:
        model = images.model(frozen)
        path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
        return products(model, lora, path, ids), model.log_reward(path.samples, ids)

    parts = []
    for start in range(0, count, together):
        keys, ids = images.keys(_PATHS, start, min(together, count - start))
        found, of_paths = part(images.frozen, lora, keys, ids)
        parts.append((*map(np.asarray, found), np.asarray(of_paths), np.asarray(ids)))
    with_noise, square, reward, prompt_id = (np.concatenate(leaves, axis=-1) for leaves in zip(*parts, strict=True))
    return Products(with_noise, square), reward, prompt_id


def judge(
    found: Products, log_w: Float[np.ndarray, " paths"], prompt_id: Int[np.ndarray, " paths"], parts: int
) -> list[Uptake]:
    """The uptake of each part. `log_w` is β log R of each path."""
    order = np.argsort(prompt_id, kind="stable")
    strata = Strata(prompt_id[order])
    shares = normalise(np.asarray(log_w, np.float64)[order], strata).shares
    rows = []
    for steps in np.array_split(np.arange(len(found.square)), min(parts, len(found.square))):
        with_noise, square = (np.asarray(a, np.float64)[steps].sum(axis=0)[order] for a in found)
        each = with_noise - square / 2
        gain, told, energy = (strata.sums(shares * a) for a in (each, with_noise, square))
        variance = strata.sums(shares**2 * (each - strata.repeat(gain)) ** 2)
        rows.append(
            Uptake(
                steps=f"{steps[0] + 1}-{steps[-1] + 1}",
                spent=float(energy.mean()) / 2,
                gain=float(gain.mean()),
                gain_error=float(np.sqrt(variance.sum()) / len(variance)),
                scale=float(told.mean() / energy.mean()) if energy.any() else float("nan"),
            )
        )
    return rows


def as_table(rows: list[Uptake]) -> str:
    """The rows as a Markdown table, and their sums."""
    lines = ["| steps | spent | gain | scale |", "|---|---|---|---|"]
    lines += [f"| {r.steps} | {r.spent:.4f} | {r.gain:.4f} ± {r.gain_error:.4f} | {r.scale:.2f} |" for r in rows]
    lines.append(f"| all | {sum(r.spent for r in rows):.3f} | {sum(r.gain for r in rows):.3f} | |")
    return "\n".join(lines) + "\n"


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the paths and judges the LoRA; writes a line of JSON for each part, and the table."""
    o = parse(argv, Options, __doc__)
    images = Images.load(o)
    lora = load_lora(o.lora, images.base.params["unet"])
    found, reward, ids = sampled_products(images, lora, o.paths, o.together)
    found = Products(*(a[: o.last_step] for a in found))
    rows = judge(found, o.beta * np.asarray(reward, np.float64), ids, o.parts)
    write_results(o.out, "uptake", rows, as_table(rows))


if __name__ == "__main__":
    main(sys.argv)
