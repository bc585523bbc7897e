"""Samples images: `python -m nabla_gfn_jax.sample --prompt="a cat" --num=16`, or `--workdir=runs/emoji/seed0`."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nabla_gfn_jax.algorithms.value_guide import ValueGuide, load_guide
from nabla_gfn_jax.base_models.names import DTYPES, load_model
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.images import PICTURES, save_each, save_grid
from nabla_gfn_jax.inference.candidates import Candidates, draw_images
from nabla_gfn_jax.inference.recipes import recipes
from nabla_gfn_jax.inference.sampling import CPU_BATCH, ImageSampler, Policy, all_images, combined, scaled
from nabla_gfn_jax.inference.subject import Subject, SubjectOptions, find_subject, hashes_of, warn_of_another_base
from nabla_gfn_jax.options import option
from nabla_gfn_jax.parallel import require_devices, use_cpu_cores
from nabla_gfn_jax.rewards import RewardNames, load_reward

ROWS = 4  # number of prompts from the run's set, if no prompt is given


@dataclass(frozen=True, kw_only=True)
class Options(SubjectOptions):
    """What to sample, and how.

    An option that is not given is the run's, or is read from the header of the LoRA file.
    """

    lora: tuple[Path, ...] = option(
        (),
        "a LoRA file or folder, instead of the run's last LoRA; several LoRAs are added",
        repeated=True,
        empty=True,
        file="existing",
    )
    lora_scale: tuple[float, ...] = option(
        (1.0,), "strength of all LoRAs, or one strength for each; 0: no LoRA", minimum=-100, maximum=100
    )
    value_scale: float | None = option(
        None, "factor of the log value's gradient [the one in its file]", minimum=-100, maximum=100
    )
    lora_from_step: int = option(1, "first step with the LoRA; earlier steps use the base model", minimum=1)
    lora_until_step: int | None = option(None, "last step with the LoRA [the run's]", minimum=1)
    prompt: tuple[str, ...] = option(
        (), "a prompt; each prompt gives a row of images [the run's, or a face]", repeated=True, empty=True
    )
    negative: str = option("", "negative prompt of the guidance", empty=True)
    height: int | None = option(None, "height of an image [the model's]", unit="pixels", minimum=8, maximum=4096)
    width: int | None = option(None, "width of an image [the model's]", unit="pixels", minimum=8, maximum=4096)
    num: int = option(16, "images for each prompt", minimum=1)
    reward: str | None = option(None, "the reward by which candidates are chosen [the run's]", choices=RewardNames())
    beta: float | None = option(None, "β of their choice [the run's]", minimum=-1e9, maximum=1e9)
    eta: float = option(1.0, "scale of the noise of each step; 1: DDPM, 0: DDIM", minimum=0, maximum=1)
    out: Path = option(Path("samples.png"), "image file to write", file="output", endings=PICTURES)
    each: Path | None = option(
        None, "folder for one PNG per image; each PNG stores its prompt, seed and settings", file="folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value and self.lora:
            raise UserError("--value and --lora are two policies; give one of them")
        if self.value and (self.lora_from_step > 1 or self.lora_until_step):
            raise UserError("--value follows its own steps; leave --lora_from_step and --lora_until_step out")
        if self.value and self.eta == 0:
            raise UserError("--value moves the noise of a step, and --eta = 0 has none; give an --eta above 0")
        if self.candidates == 1 and (self.reward is not None or self.beta is not None):
            raise UserError("--reward and --beta choose among candidates; give --candidates above 1")

    def strengths(self, loras: int) -> tuple[float, ...]:
        """The strength of each of `loras` LoRAs.

        Raises `UserError` if `lora_scale` has neither 1 nor `loras` values.
        """
        if len(self.lora_scale) == 1:
            return self.lora_scale * loras
        if len(self.lora_scale) != loras:
            given = ", ".join(f"{scale:g}" for scale in self.lora_scale)
            raise UserError(f"--lora_scale = {given} is not allowed; give one value, or one for each of {loras} LoRAs")
        return self.lora_scale


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples the prompts and writes one image file, with a row of images for each prompt."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(CPU_BATCH)
    require_devices()
    subject = find_subject(options, options.lora, options.eta)
    files = {} if options.value else dict(list(subject.loras.items())[0 if options.lora else -1 :])  # a run's last
    strengths = options.strengths(len(files))
    how = replace(
        subject.how,
        negative=options.negative,
        lora_from_step=options.lora_from_step,
        lora_until_step=options.lora_until_step or subject.how.lora_until_step,
    )
    prompts = options.prompt or ("a face",)
    if subject.prompts and not options.prompt:
        known = prompt_set(subject.prompts)
        prompts = (known.train if options.value else known.held_out)[:ROWS]
    candidates = chooser(options, subject, prompts)
    model = load_model(subject.model, DTYPES[subject.model_dtype])
    if options.height or options.width:
        height, width, _ = model.image_shape
        model = model.sized(options.height or height, options.width or width)
    warn_of_another_base(subject, hashes_of(subject.model) if subject.model_files else {})
    policy = policy_of(options, files, strengths, prompts, model)

    images = all_images(draw_images(ImageSampler(model, prompts, how, options.batch), policy, options.num, candidates))
    columns = math.ceil(math.sqrt(options.num)) if len(prompts) == 1 else options.num
    save_grid(options.out, images, columns=columns, zoom=max(1, 128 // images.shape[1]))
    print(f"{len(images)} images of {' and '.join(files) or options.value or 'the base model'} in {options.out}")
    if options.each:
        drawn, size = dict(zip(files, strengths, strict=True)), images.shape[1:3]
        value = (str(options.value), float(policy.scale)) if isinstance(policy, ValueGuide) else None
        texts = recipes(subject.model, drawn, how, prompts, options.num, size, value, candidates)
        save_each(options.each, images, texts)


def policy_of(
    options: Options,
    files: Mapping[str, Path],
    strengths: Sequence[float],
    prompts: Sequence[str],
    model: StableDiffusion,
) -> Policy | None:
    """The sum of the LoRAs, or what is followed in their place; None for the base model.

    Raises `UserError` if a file does not load.
    """
    if options.value:
        return load_guide(options.value, prompts, math.prod(model.latent_shape), options.value_scale)
    unet, text_encoder = model.params["unet"], model.params["text_encoder"]
    loras = [
        scaled(load_lora(file, unet, text_encoder), strength)
        for file, strength in zip(files.values(), strengths, strict=True)
    ]
    return combined(loras) if loras else None


def chooser(options: Options, subject: Subject, prompts: Sequence[str]) -> Candidates | None:
    """How images are chosen; None without candidates. Raises `UserError` as `Candidates.of`."""
    if options.candidates == 1:
        return None
    reward, beta = options.reward or subject.reward, subject.beta if options.beta is None else options.beta
    return Candidates.of(options.candidates, reward or "", load_reward(reward) if reward else None, beta, prompts)


if __name__ == "__main__":
    main(sys.argv)
