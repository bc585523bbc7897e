"""Draws images: `python -m nabla_gfn_jax.sample --model=emoji --prompt="a cat" --num=16 --out=cats.png`."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import PICTURES, save_grid
from nabla_gfn_jax.inference.sampling import CPU_BATCH, ImageSampler, Sampling, all_images
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.parallel import use_cpu_cores


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What is drawn, and how."""

    model: str = option("emoji", "a shipped model, a folder in diffusers' layout, or OWNER/NAME on the hub")
    lora: Path | None = option(None, "a LoRA file in diffusers', PEFT's or kohya's layout", file="existing")
    prompt: tuple[str, ...] = option(("a face",), "what to draw, a row of images each", repeated=True, empty=True)
    num: int = option(16, "images for each prompt", minimum=1)
    sampler: Sampler = option("ddpm", "how an image is sampled")
    steps: int = option(50, "sampling steps", minimum=1, maximum=999)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: none", minimum=0, maximum=100)
    eta: float = option(1.0, "noise of each step; 1: DDPM, 0: DDIM", minimum=0, maximum=1)
    seed: int = option(0, "seed of the noise", minimum=0, maximum=LARGEST_SEED)
    out: Path = option(Path("samples.png"), "the picture to write", file="output", endings=PICTURES)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images → one PNG, a row for each prompt."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(CPU_BATCH)
    model = load_model(options.model)
    lora = load_lora(options.lora, model.params["unet"]) if options.lora else None
    how = Sampling(
        sampler=options.sampler, steps=options.steps, guidance=options.guidance, eta=options.eta, seed=options.seed
    )
    images = all_images(ImageSampler(model, options.prompt, how).images(lora, options.num))
    one_prompt = len(options.prompt) == 1
    columns = math.ceil(math.sqrt(options.num)) if one_prompt else options.num
    save_grid(options.out, images, columns=columns, zoom=max(1, 128 // images.shape[1]))
    print(f"{len(images)} images in {options.out}")


if __name__ == "__main__":
    main(sys.argv)
