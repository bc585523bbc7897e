"""Samples images: `python -m nabla_gfn_jax.sample --prompt="a cat" --num=16`, or `--workdir=runs/emoji/seed0`."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.base_models.names import DTYPES, load_model, resolve_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import PICTURES, save_grid
from nabla_gfn_jax.inference.sampling import CPU_BATCH, ImageSampler, all_images, scaled
from nabla_gfn_jax.inference.subject import SubjectOptions, find_subject, hashes_of, warn_of_another_base
from nabla_gfn_jax.options import option
from nabla_gfn_jax.parallel import use_cpu_cores

ROWS = 4  # prompts of a run's set, if none is given


@dataclass(frozen=True, kw_only=True)
class Options(SubjectOptions):
    """What is sampled, and how. What is not given is the run's, or in the LoRA file's header."""

    lora: Path | None = option(None, "a LoRA file, in place of the run's last", file="existing")
    lora_scale: float = option(1.0, "strength of the LoRA; 0: none", minimum=-100, maximum=100)
    prompt: tuple[str, ...] = option(
        (), "what to sample, a row of images each [the run's, or a face]", repeated=True, empty=True
    )
    num: int = option(16, "images for each prompt", minimum=1)
    eta: float = option(1.0, "noise of each step; 1: DDPM, 0: DDIM", minimum=0, maximum=1)
    out: Path = option(Path("samples.png"), "the picture to write", file="output", endings=PICTURES)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images → one PNG, a row for each prompt."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(CPU_BATCH)
    subject = find_subject(options, [options.lora] if options.lora else [], options.eta)
    prompts = options.prompt or (prompt_set(subject.prompts).held_out[:ROWS] if subject.prompts else ("a face",))
    model = load_model(subject.model, DTYPES[subject.model_dtype])
    warn_of_another_base(subject, hashes_of(resolve_model(subject.model)) if subject.model_files else {})
    *_, (name, file) = [("the base model", None), *subject.loras.items()]
    lora = None if file is None else scaled(load_lora(file, model.params["unet"]), options.lora_scale)

    images = all_images(ImageSampler(model, prompts, subject.how, options.batch).images(lora, options.num))
    columns = math.ceil(math.sqrt(options.num)) if len(prompts) == 1 else options.num
    save_grid(options.out, images, columns=columns, zoom=max(1, 128 // images.shape[1]))
    print(f"{len(images)} images of {name} in {options.out}")


if __name__ == "__main__":
    main(sys.argv)
