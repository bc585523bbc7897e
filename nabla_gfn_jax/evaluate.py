"""Reward beside diversity: `python -m nabla_gfn_jax.evaluate --lora=runs/emoji/lora/diffusers.safetensors`.

Draws the same prompts with the same noise from the base model and from every LoRA given, and prints for each the mean
reward, how many samples show their prompt, and the entropies over vendors and over drawings. Under each LoRA stands the
base model tilted: its own samples weighted by exp(b log R), with b (the exponent) such that their mean reward is the
LoRA's. No distribution with that mean reward is closer to the base, so its entropies are what a finetuning that samples
in proportion would keep, and b is the β that it reached.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from nabla_gfn_jax.checkpoints.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.configuration import resolve_model
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.metrics import coverage
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.parallel import use_cpu_cores
from nabla_gfn_jax.rewards import REWARDS, Reward, load_reward
from nabla_gfn_jax.sample import BATCH, draw_images

EVERY_CONCEPT = "every_concept"  # a caption for each emoji of the base model
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What is compared, and how."""

    model: str = option("emoji", "a shipped model, a folder in diffusers' layout, or OWNER/NAME on the hub")
    lora: tuple[Path, ...] = option((), "a LoRA file", repeated=True, empty=True, file="existing")
    prompts: str = option("a_face", f"the held-out prompts of a prompt set, or {EVERY_CONCEPT}")
    num_prompts: int = option(0, "draw so many prompts of the set; 0: all", minimum=0)
    num: int = option(512, "images for each prompt", minimum=1)
    reward: str = option("valence", "the reward; nothing: none", choices=("", *REWARDS), empty=True)
    sampler: Sampler = option("ddpm", "how an image is sampled")
    steps: int = option(50, "sampling steps", minimum=1, maximum=1000)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: none", minimum=0, maximum=100)
    seed: int = option(0, "seed of the noise and of the choice of prompts", minimum=0, maximum=LARGEST_SEED)
    out: Path | None = option(None, "a JSON file for the table", file="output")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images of each model → rewards and nearest drawings → a table, and JSON if --out is given."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(BATCH)
    model = load_folder(resolve_model(options.model))
    loras = [(str(file), load_lora(file, model.params["unet"])) for file in options.lora]
    prompts = [
        p for p in choose_prompts(options.prompts, options.num_prompts, options.seed) for _ in range(options.num)
    ]
    reward = load_reward(options.reward) if options.reward else None

    rows: dict[str, dict[str, float]] = {}
    base_drawings, base_scores = np.zeros(0, int), np.zeros(0)
    for name, lora in [("base", None), *loras]:
        images = draw_images(
            model,
            lora,
            prompts,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            seed=options.seed,
            progress=name,
        )
        drawings = coverage.nearest_drawing(images)
        rows[name] = diversity(drawings, prompts)
        if reward is None:
            continue
        scores = rewards(reward, images, prompts)
        rows[name] = {"reward": float(scores.mean()), "reward_std_error": standard_error(scores)} | rows[name]
        if lora is None:
            base_drawings, base_scores = drawings, scores
        else:
            weights, exponent = tilt(base_scores, float(scores.mean()))
            tilted = {"reward": float(weights @ base_scores), "exponent": exponent}
            rows[f"base tilted to {name}"] = tilted | diversity(base_drawings, prompts, weights)
    print_table(rows)
    if options.out:
        write_json(options.out, rows)


def choose_prompts(name: str, number: int, seed: int) -> list[str]:
    """A prompt set's held-out prompts, or `number` of them drawn without replacement if it is not 0."""
    known = coverage.concept_captions() if name == EVERY_CONCEPT else list(prompt_set(name).held_out)
    if number > len(known):
        raise UserError(f"--num_prompts={number}, but {name} has {len(known)}")
    return known if number == 0 else list(np.random.default_rng(seed).choice(known, number, replace=False))


def rewards(reward: Reward, images: Float[np.ndarray, "n h w 3"], prompts: list[str]) -> Float[np.ndarray, " n"]:
    """log R of each image."""
    features = reward.encode_prompts(prompts)
    score = jax.jit(reward.score)
    batches = [slice(i, i + _BATCH) for i in range(0, len(images), _BATCH)]
    parts = [score(reward.params, images[b], jax.tree.map(lambda a, b=b: a[b], features)) for b in batches]
    return np.concatenate([np.asarray(part) for part in parts])


def diversity(
    drawings: Int[np.ndarray, " n"], prompts: list[str], weights: Float[np.ndarray, " n"] | None = None
) -> dict[str, float]:
    """Concept accuracy and entropies of (weighted) samples; vendors' is the mean of what it is within each prompt."""
    weights = np.full(len(drawings), 1.0 / len(drawings)) if weights is None else weights
    rows_of = {prompt: np.array([p == prompt for p in prompts]) for prompt in dict.fromkeys(prompts)}
    vendors = [coverage.vendor_entropy(drawings[r], weights[r]) for r in rows_of.values()]
    return {
        "concept_accuracy": float(weights @ coverage.shows_prompt(drawings, prompts)),
        "vendor_entropy": float(np.mean(vendors)),
        "drawing_entropy": coverage.drawing_entropy(drawings, weights),
        "effective_samples": float(1.0 / np.square(weights).sum()),
    }


def tilt(log_reward: Float[np.ndarray, " n"], mean: float) -> tuple[Float[np.ndarray, " n"], float]:
    """Weights ∝ exp(b log R) whose mean of log R is `mean`, and b; by bisection over b in ±10⁴ (units of 1/range)."""
    scale = np.ptp(log_reward) + 1e-12
    centred = (log_reward - log_reward.mean()) / scale
    goal = np.clip((mean - log_reward.mean()) / scale, centred.min(), centred.max())

    def weights(b: float) -> Float[np.ndarray, " n"]:
        unnormalised = np.exp(b * centred - (b * centred).max())
        return unnormalised / unnormalised.sum()

    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if weights(middle) @ centred < goal else (low, middle)
    b = (low + high) / 2.0
    return weights(b), float(b / scale)


def standard_error(values: Float[np.ndarray, " n"]) -> float:
    """Of the mean of independent values."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """One line a model, its columns aligned."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("  ".join(name.replace("_", " ").rjust(17) for name in columns))
    for name, row in rows.items():
        print("  ".join((f"{row[c]:.3f}" if c in row else "").rjust(17) for c in columns) + f"  {name}")


if __name__ == "__main__":
    main(sys.argv)
