"""Measures models in nats and by diversity: `python -m nabla_gfn_jax.evaluate --workdir=runs/emoji/seed0`.

Samples the same prompts with the same noise from the base model and from every LoRA that the run saved, or from the
given LoRA files, or from the base model as it follows a log value (--value); with --candidates=K, each of their images
is one of K. Prints for each model its mean log R, the nats that this reward needs, the nats that the model spends, its
distance to P_base · R^β (docs/nats.md), the mean log R of its worst samples, and its mean log R by other rewards that
you name. With --metrics it also measures the diversity of the images and their distance from the base model's
(docs/metrics.md). If the drawings of the prompts are known, it also prints how many images show their prompt and the
entropies over vendors and over drawings. Diversity is compared with that of the base model tilted to the same mean log
R. Appends a row for each model to WORKDIR/evaluations.jsonl, and keeps the measurements of all samples in
WORKDIR/base_samples and WORKDIR/lora_samples: the same command, if it was cut off, goes on with the next model.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_gfn_jax.algorithms.value_guide import ValueGuide, load_guide
from nabla_gfn_jax.base_models.names import DTYPES, load_model
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion
from nabla_gfn_jax.checkpoints import csv_file
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.images import levels, save_each
from nabla_gfn_jax.inference.candidates import Candidates
from nabla_gfn_jax.inference.evaluation import (
    BASE_SAMPLES,
    EVERY_CONCEPT,
    LORA_SAMPLES,
    Evaluation,
    Evaluator,
    Split,
    States,
    describe,
    prompts_to_judge,
)
from nabla_gfn_jax.inference.extras import load_extras
from nabla_gfn_jax.inference.recipes import recipes
from nabla_gfn_jax.inference.sampling import CPU_BATCH, ImageSampler, Policy, digest, scaled
from nabla_gfn_jax.inference.subject import Subject, SubjectOptions, find_subject, hashes_of, warn_of_another_base
from nabla_gfn_jax.inference.table import print_evaluations, to_json
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.options import option
from nabla_gfn_jax.parallel import require_devices, use_cpu_cores
from nabla_gfn_jax.rewards import RewardNames, load_reward, scale_of
from nabla_gfn_jax.runs import evaluations


@dataclass(frozen=True, kw_only=True)
class Options(SubjectOptions):
    """What to compare, and how. An option that is not given is the run's, or is read from the LoRA files' headers."""

    lora: tuple[Path, ...] = option(
        (), "a LoRA file, instead of the run's LoRAs", repeated=True, empty=True, file="existing"
    )
    lora_scale: tuple[float, ...] = option((1.0,), "strengths at which to measure each LoRA", minimum=-100, maximum=100)
    value_scale: tuple[float, ...] = option(
        (), "factors of the log value's gradient [the one in its file]", empty=True, minimum=-100, maximum=100
    )
    prompts: str | None = option(None, f"a set of prompts, or {EVERY_CONCEPT} [the run's, or a_face]")
    split: Split = option("held_out", "which prompts of the set: those held out from training, or those of training")
    num_prompts: int = option(0, "number of prompts to use; 0: all", minimum=0)
    num: int = option(512, "images for each prompt", minimum=1)
    base_num: int = option(0, "images of the base model for each prompt, if more than num", minimum=0)
    reward: str | None = option(
        None, "the reward; none: no reward [the run's, or valence]", choices=RewardNames("none")
    )
    cross_rewards: tuple[str, ...] = option(
        (), "other rewards, which show whether the gain is the reward's alone", choices=RewardNames(), empty=True
    )
    metrics: tuple[str, ...] = option(
        (), "more metrics; each needs a network (docs/metrics.md)", choices=METRICS, empty=True
    )
    beta: float | None = option(None, "β of the target P_base · R^β [the run's]", minimum=-1e9, maximum=1e9)
    out: Path | None = option(None, "JSON file for all figures", file="output")
    images: Path | None = option(None, "folder for all images as PNG files, in a folder for each model", file="folder")
    csv: Path | None = option(None, "CSV file, with a line for each model", file="output", endings=(".csv",))


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Samples and measures each model, appends a row as soon as a model is done, and prints the tables at the end."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    use_cpu_cores(CPU_BATCH)
    require_devices()
    subject = find_subject(options, options.lora)
    prompt_set = options.prompts or subject.prompts or "a_face"
    prompts = prompts_to_judge(prompt_set, options.num_prompts, options.seed, options.split)
    reward_name = options.reward or subject.reward or "valence"
    reward = None if reward_name == "none" else load_reward(reward_name)
    extras = load_extras(options.cross_rewards, options.metrics, reward_name)
    model = load_model(subject.model, DTYPES[subject.model_dtype])
    beta = subject.beta if options.beta is None else options.beta
    candidates = Candidates.of(options.candidates, reward_name, reward, beta, prompts)
    contenders = list(contenders_of(options, subject, model, prompts, candidates))

    sampler = ImageSampler(model, prompts, subject.how, options.batch)
    evaluator = Evaluator(sampler, reward, beta, extras.metrics)
    for name, reason in evaluator.not_available.items():
        print(f"not measured: {name} ({reason})")
    hashes = hashes_of(subject.model, {"reward": reward.files if reward else ()} | extras.files)
    what = describe(subject.model, subject.model_dtype, sampler, reward_name, hashes)
    warn_of_another_base(subject, hashes)
    base_num = max(evaluator.base_images(options.num), options.base_num)
    found: dict[str, Evaluation] = {}
    base: States = {}
    for each in contenders:
        num, folder = (base_num, BASE_SAMPLES) if each.is_base else (options.num, LORA_SAMPLES)
        cache = options.workdir / folder if options.workdir else None
        keep = keeper(options.images, each, subject, prompts, num, model.image_shape) if options.images else None
        states = evaluator.kept_states(each.lora, num, cache, what | each.about, each.name, keep, each.candidates)
        if each.is_base:
            base = states
        else:  # the folder may have more
            states = {metric: state.numbers(0, num) for metric, state in states.items()}
        found[each.name] = evaluator.evaluate(states, base, options.num)
        if options.workdir:
            row = {"model": each.name, "beta": beta, "cross_rewards": extras.cross_rewards} | what
            evaluations.append(options.workdir, row | to_json(found[each.name]))
    print_evaluations(found)
    for name in [reward_name] * (reward is not None) + list(options.cross_rewards):
        print(f"log R of {name}: {scale_of(name)}")
    if options.csv:
        rows = [{"model": name, "beta": beta} | evaluations.figures(to_json(its)) for name, its in found.items()]
        csv_file.write(options.csv, rows)
    if options.out:
        write_json(options.out, what | {name: to_json(evaluation) for name, evaluation in found.items()})


@dataclass(frozen=True)
class Contender:
    """A model to measure: the base model, or the LoRA `file` at strength `scale`, or what is followed in its place."""

    name: str
    lora: Policy | None = None
    file: str = ""
    scale: float = 0.0
    candidates: Candidates | None = None

    @property
    def is_base(self) -> bool:
        """Whether it is the base model itself, with which the others are compared."""
        return self.lora is None and self.candidates is None

    @property
    def about(self) -> dict[str, Any]:
        """What its images depend on beside what those of the base model do."""
        policy = {} if self.is_base else {"lora": None if self.lora is None else digest(self.lora)}
        return policy | (self.candidates.about if self.candidates else {})

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of its LoRA by the LoRA's name."""
        return {self.file: self.scale} if isinstance(self.lora, dict) else {}

    @property
    def value(self) -> tuple[str, float] | None:
        """The file of the log value that it follows, and by which factor."""
        return (self.file, self.scale) if isinstance(self.lora, ValueGuide) else None


def contenders_of(
    options: Options, subject: Subject, model: StableDiffusion, prompts: Sequence[str], candidates: Candidates | None
) -> Iterator[Contender]:
    """The base model, and then each LoRA at each strength and the log value by each factor.

    The images of all but the base model are chosen among candidates. Without a LoRA and a log value, these are the base
    model's. Raises `UserError` if a file does not load.
    """
    yield Contender(evaluations.BASE)
    among = f", one of {candidates.number}" if candidates else ""
    for name, file in subject.loras.items():
        lora = load_lora(file, model.params["unet"], model.params["text_encoder"])
        for scale in options.lora_scale:
            times = f" x {scale:g}" * (scale != 1)
            yield Contender(name + times + among, scaled(lora, scale), name, scale, candidates)
    if options.value:
        for factor in options.value_scale or (None,):
            guide = load_guide(options.value, prompts, math.prod(model.latent_shape), factor)
            name, scale = str(options.value), float(guide.scale)
            yield Contender(f"{name} x {scale:g}{among}", guide, name, scale, candidates)
    if candidates and not subject.loras and not options.value:
        yield Contender(evaluations.BASE + among, candidates=candidates)


def keeper(
    folder: Path, model: Contender, subject: Subject, prompts: Sequence[str], num: int, size: Sequence[int]
) -> Callable[[Batch], None]:
    """A function that writes the images of each batch to a folder of the model, as 0000.png and so on."""
    place = folder / re.sub(r"[^\w.-]+", "_", model.name)
    texts = recipes(subject.model, model.strengths, subject.how, prompts, num, size, model.value, model.candidates)
    count = itertools.count()

    def keep(batch: Batch) -> None:
        for image in levels(batch.images):
            save_each(place, image[None], [next(texts)], first=next(count))

    return keep


if __name__ == "__main__":
    main(sys.argv)
