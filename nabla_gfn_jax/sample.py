"""Draws images: `python -m nabla_gfn_jax.sample --model=emoji --prompt="a cat" --num=16 --out=cats.png`."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from nabla_gfn_jax.checkpoints.diffusers_folder import StableDiffusion, load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.configuration import resolve_model
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.diffusion.schedule import Sampler, make_schedule
from nabla_gfn_jax.diffusion.text_to_image import Condition, decode, encode_prompts, guided_predictor
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import PICTURES, save_grid
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, place, split, use_cpu_cores
from nabla_gfn_jax.typing import Images, Latents, Params, PRNGKeys, Timesteps

BATCH = 32  # images drawn together


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What is drawn, and how."""

    model: str = option("emoji", "a shipped model, a folder in diffusers' layout, or OWNER/NAME on the hub")
    lora: Path | None = option(None, "a LoRA file in diffusers', PEFT's or kohya's layout", file="existing")
    prompt: tuple[str, ...] = option(("a face",), "what to draw, a row of images each", repeated=True, empty=True)
    num: int = option(16, "images for each prompt", minimum=1)
    sampler: Sampler = option("ddpm", "how an image is sampled")
    steps: int = option(50, "sampling steps", minimum=1, maximum=1000)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: none", minimum=0, maximum=100)
    eta: float = option(1.0, "noise of each step; 1: DDPM, 0: DDIM", minimum=0, maximum=1)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=LARGEST_SEED)
    out: Path = option(Path("samples.png"), "the picture to write", file="output", endings=PICTURES)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images → one PNG, a row for each prompt."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(BATCH)
    model = load_folder(resolve_model(options.model))
    lora = load_lora(options.lora, model.params["unet"]) if options.lora else None
    prompts = [prompt for prompt in options.prompt for _ in range(options.num)]
    images = draw_images(
        model,
        lora,
        prompts,
        steps=options.steps,
        guidance=options.guidance,
        eta=options.eta,
        sampler=options.sampler,
        seed=options.seed,
    )
    one_prompt = len(options.prompt) == 1
    columns = math.ceil(math.sqrt(options.num)) if one_prompt else options.num
    save_grid(options.out, images, columns=columns, zoom=max(1, 128 // images.shape[1]))
    print(f"{len(images)} images in {options.out}")


def draw_images(
    model: StableDiffusion,
    lora: Params | None,
    prompts: list[str],
    *,
    steps: int = 50,
    guidance: float = 5.0,
    eta: float = 1.0,
    sampler: Sampler = "ddpm",
    seed: int = 0,
    progress: str | None = None,
) -> np.ndarray:
    """One image in [0, 1] for each prompt, (N, H, W, 3); image i depends on the seed, i and its prompt alone.

    `progress`: what to call the work on a progress bar, if there is to be one.
    """
    schedule = make_schedule(model.scheduler, steps, eta, sampler)

    def run(params: Params, lora: Params | None, keys: PRNGKeys, condition: Condition) -> Images:
        predictor = guided_predictor(model, params["unet"], guidance)

        def predict(x: Latents, t: Timesteps, condition: Condition) -> Latents:
            return predictor(lora, x, t, condition)

        latents = sample(predict, schedule, keys, model.latent_shape, condition).samples
        return decode(model, params["vae"], latents)

    mesh = all_devices()
    drawing = split(run, mesh, (EVERYWHERE, EVERYWHERE, SPLIT, SPLIT), SPLIT)
    params, lora = place((model.params, lora), mesh)
    count = len(prompts)
    batch = -(-min(BATCH, count) // mesh.size) * mesh.size
    padded = prompts + prompts[-1:] * (-count % batch)
    condition = encode_prompts(model, padded)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(padded)))
    parts = []
    for start in tqdm(range(0, len(padded), batch), desc=progress, disable=progress is None):
        rows = slice(start, start + batch)
        parts.append(np.asarray(drawing(params, lora, keys[rows], {k: v[rows] for k, v in condition.items()})))
    return np.concatenate(parts)[:count]


if __name__ == "__main__":
    main(sys.argv)
