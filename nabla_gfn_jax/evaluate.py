"""Judges models in nats and by diversity: `python -m nabla_gfn_jax.evaluate --lora=FILE`.

Samples the same prompts with the same noise from the base model and from every LoRA given. For each: the mean log R;
the nats that it needs and that were spent (docs/nats.md); and, where the drawings are known, how many images show their
prompt and the entropies over vendors and over drawings, beside those of the base model tilted to the same mean log R.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.inference.evaluation import Evaluator, prompts_of_set
from nabla_gfn_jax.inference.sampling import CPU_BATCH, ImageSampler, Sampling
from nabla_gfn_jax.inference.table import print_figures, print_nats, to_json
from nabla_gfn_jax.metrics import coverage
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.parallel import use_cpu_cores
from nabla_gfn_jax.rewards import REWARDS, load_reward

EVERY_CONCEPT = "every_concept"  # a caption for each emoji of the base model


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """What is compared, and how."""

    model: str = option("emoji", "a shipped model, a folder in diffusers' layout, or OWNER/NAME on the hub")
    lora: tuple[Path, ...] = option((), "a LoRA file", repeated=True, empty=True, file="existing")
    prompts: str = option("a_face", f"the held-out prompts of a prompt set, or {EVERY_CONCEPT}")
    num_prompts: int = option(0, "how many prompts of the set; 0: all", minimum=0)
    num: int = option(512, "images for each prompt", minimum=1)
    reward: str = option("valence", "the reward; nothing: none", choices=REWARDS, empty=True)
    beta: float | None = option(
        None, "the exponent of the reward that the LoRAs were trained for", minimum=-1e9, maximum=1e9
    )
    sampler: Sampler = option("ddpm", "how an image is sampled")
    steps: int = option(50, "sampling steps", minimum=1, maximum=999)
    guidance: float = option(5.0, "classifier-free guidance scale; 1: none", minimum=0, maximum=100)
    seed: int = option(0, "seed of the noise and of the choice of prompts", minimum=0, maximum=LARGEST_SEED)
    out: Path | None = option(None, "a JSON file for all figures", file="output")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Prompts → images of each model → metrics → tables, and JSON if --out is given."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(CPU_BATCH)
    model = load_model(options.model)
    loras = {str(file): load_lora(file, model.params["unet"]) for file in options.lora}
    how = Sampling(sampler=options.sampler, steps=options.steps, guidance=options.guidance, seed=options.seed)
    sampler = ImageSampler(model, choose_prompts(options.prompts, options.num_prompts, options.seed), how)
    evaluator = Evaluator(sampler, load_reward(options.reward) if options.reward else None, options.beta)
    for name, reason in evaluator.not_available.items():
        print(f"not measured: {name} ({reason})")
    base = evaluator.states(None, options.num, progress="base")
    found = {"base": evaluator.evaluate(base, base)}
    for name, lora in loras.items():
        found[name] = evaluator.evaluate(evaluator.states(lora, options.num, progress=name), base)
    certificates = {name: e.certificate for name, e in found.items() if e.certificate is not None}
    if certificates:
        print_nats(certificates)
        print()
    print_figures(found)
    if options.out:
        write_json(options.out, {name: to_json(evaluation) for name, evaluation in found.items()})


def choose_prompts(name: str, number: int, seed: int) -> list[str]:
    """A prompt set's held-out prompts, or `number` of them drawn without replacement if it is not 0."""
    known = coverage.concept_captions() if name == EVERY_CONCEPT else list(prompt_set(name).held_out)
    if number > len(known):
        raise UserError(f"--num_prompts={number}, but {name} has {len(known)}")
    return prompts_of_set(known, number, seed)


if __name__ == "__main__":
    main(sys.argv)
