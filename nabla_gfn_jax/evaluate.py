"""Reward beside diversity: `python -m nabla_gfn_jax.evaluate --lora=runs/emoji/lora/diffusers.safetensors`.

Draws the same prompts with the same noise from the base model and from every LoRA given, and prints for each the mean
reward, how many samples show their prompt, and the entropies over vendors and over drawings. Under each LoRA stands the
base model tilted: its own samples weighted by exp(b log R), with b (the exponent) such that their mean reward is the
LoRA's. No distribution with that mean reward is closer to the base, so its entropies are what a finetuning that samples
in proportion would keep, and b is the β that it reached.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jaxtyping import Float, Int

from nabla_gfn_jax.checkpoints.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import read_flags
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.configuration import resolve_model
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.metrics import coverage
from nabla_gfn_jax.parallel import use_cpu_cores
from nabla_gfn_jax.rewards import Reward, load_reward
from nabla_gfn_jax.sample import BATCH, draw_images

EVERY_CONCEPT = "every_concept"  # a caption for each emoji of the base model
_BATCH = 64


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images of each model → rewards and nearest drawings → a table, and JSON if --out is given."""
    options = _parse(argv)
    if options.num < 1:
        raise UserError(f"--num={options.num}; ask for at least one image of each prompt")
    use_compilation_cache()
    use_cpu_cores(BATCH)
    model = load_folder(resolve_model(options.model))
    loras = [(file, load_lora(Path(file), model.params["unet"])) for file in options.lora]
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
        Path(options.out).write_text(json.dumps(rows, indent=2) + "\n")


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


def _parse(argv: list[str]) -> Any:
    values = flags.FlagValues()
    flags.DEFINE_string("model", "emoji", "a shipped model, a folder, or OWNER/NAME on the hub", flag_values=values)
    flags.DEFINE_multi_string("lora", [], "a LoRA file; give it again to compare several", flag_values=values)
    flags.DEFINE_string("prompts", "a_face", f"a prompt set's held out, or {EVERY_CONCEPT}", flag_values=values)
    flags.DEFINE_integer(
        "num_prompts", 0, "draw this many prompts of the set; 0: all", flag_values=values, lower_bound=0
    )
    flags.DEFINE_integer("num", 512, "images for each prompt", flag_values=values)
    flags.DEFINE_string("reward", "valence", "the reward, or nothing", flag_values=values)
    flags.DEFINE_string("sampler", "ddpm", "ddpm or sde_dpm_solver", flag_values=values)
    flags.DEFINE_integer("steps", 50, "sampling steps", flag_values=values)
    flags.DEFINE_float("guidance", 5.0, "classifier-free guidance", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the noise and the choice of prompts", flag_values=values)
    flags.DEFINE_string("out", None, "a JSON file for the table", flag_values=values)
    return read_flags(values, argv)


if __name__ == "__main__":
    main(sys.argv)
