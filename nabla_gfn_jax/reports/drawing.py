"""Draws the pictures of a run's saved LoRAs that have none yet. The workdir keeps them.

It also computes how much more or less probable each LoRA has made the base model's pictures: the ratio of the densities
of the path that led to the picture. Its mean over the base model's paths is 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nabla_gfn_jax.base_models.names import DTYPES, load_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.inference.sampling import ImageSampler
from nabla_gfn_jax.inference.subject import Subject, SubjectOptions, find_subject, hashes_of, warn_of_another_base
from nabla_gfn_jax.metrics.base import Batch, Samples
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.reports.source import starts_from_lora
from nabla_gfn_jax.rewards import load_reward
from nabla_gfn_jax.runs import loras, manifest, pictures
from nabla_gfn_jax.runs.pictures import Picture, Pictures
from nabla_gfn_jax.typing import Params


def missing(workdir: Path) -> list[int | str]:
    """The policies without pictures: numbers of updates of saved LoRAs, and 0 or `pictures.BASE` for the base model."""
    base: int | str = pictures.BASE if starts_from_lora(manifest.read(workdir)) else 0
    wanted = [base, *loras.saved(workdir)]
    return [updates for updates in wanted if pictures.read(pictures.place(workdir, updates)) is None]


def without_chance(workdir: Path) -> list[int]:
    """The numbers of updates of saved LoRAs for which the base model's pictures have no chance yet."""
    found = {updates: pictures.read(pictures.place(workdir, updates)) for updates in loras.saved(workdir)}
    return [updates for updates, of in found.items() if of is None or pictures.CHANCE not in of.scores]


def draw(workdir: Path, batch: int = 0) -> int:
    """Draws and scores the missing pictures as training would, and returns how many policies were drawn.

    It adds the chances of the base model's pictures where they are missing and exist: a step without noise has no
    density. `batch`: images sampled together; 0: as many as are likely to fit. Raises `UserError` if the run's model,
    prompts or reward is not found, or the prompts are no longer those of the run.
    """
    wanted, bare = missing(workdir), without_chance(workdir)
    if not wanted and not bare:
        return 0
    subject = find_subject(SubjectOptions(workdir=workdir, seed=pictures.SEED))
    of = _pictures(workdir, subject)
    model = load_model(subject.model, DTYPES[subject.model_dtype])
    warn_of_another_base(subject, hashes_of(subject.model))
    prompts = list(dict.fromkeys(picture.prompt for picture in of))
    sampler = ImageSampler(model, prompts, subject.how, batch)
    reward = LogReward(load_reward(str(subject.reward)))
    reward.prepare(prompts)

    def lora_of(updates: int | str) -> Params | None:
        if not isinstance(updates, int) or updates == 0:
            return None
        file = loras.folder(workdir, updates) / loras.DIFFUSERS
        return load_lora(file, model.params["unet"], model.params["text_encoder"])

    for updates in wanted:
        drawn = _drawn(sampler, reward, lora_of(updates), of, f"{workdir.name}/{updates}")
        pictures.save(pictures.place(workdir, updates), drawn)
    for updates in bare if sampler.has_nats else ():
        found, lora = pictures.read(pictures.place(workdir, updates)), lora_of(updates)
        if found is not None and lora is not None:
            chance = _chances(sampler, lora, found.of, f"{workdir.name}/{updates}, chances")
            scores = found.scores | {pictures.CHANCE: chance}
            pictures.save(pictures.place(workdir, updates), replace(found, scores=scores))
    return len(wanted)


def _pictures(workdir: Path, subject: Subject) -> tuple[Picture, ...]:
    """The pictures that training keeps, with the run's prompts."""
    run = manifest.read(workdir)
    prompts = prompt_set(str(subject.prompts)).train
    before = {name: run.inputs[name] for name in ("prompts",) if name in run.inputs}
    if before and manifest.compare_inputs(before, manifest.describe_inputs({"prompts": prompts})):
        raise UserError(f"the prompts of {workdir}, {subject.prompts}, have changed since the run; restore them")
    return pictures.kept(prompts, int(run.config["training"]["trajectories"]))


def _drawn(
    sampler: ImageSampler, reward: LogReward, lora: Params | None, of: tuple[Picture, ...], name: str
) -> Pictures:
    each = 1 + max(picture.number for picture in of)
    parts = list(_scored(sampler.images(lora, each, progress=name), reward))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    drawn = tuple(Picture(place, prompt, n) for place, prompt in enumerate(sampler.prompts) for n in range(each))
    scores = {score: tuple(values.tolist()) for score, values in whole.values.items() if score != "images"}
    return Pictures(drawn, whole.values["images"], scores).only(of)


def _chances(sampler: ImageSampler, lora: Params, of: Sequence[Picture], name: str) -> tuple[float, ...]:
    """log p_θ(path)/p_#(path) of the base model's path of each picture."""
    each = 1 + max(picture.number for picture in of)
    parts = [batch.paths for batch in sampler.images(lora, each, along_base=True, progress=name)]
    ratio = np.concatenate([paths.log_ratio for paths in parts if paths is not None]).reshape(-1, each)
    place = {prompt: row for row, prompt in enumerate(sampler.prompts)}
    return tuple(-float(ratio[place[picture.prompt], picture.number]) for picture in of)


def _scored(batches: Iterator[Batch], reward: LogReward) -> Iterator[Samples]:
    for batch in batches:
        state = reward.update(batch)
        yield Samples(state.prompt, state.values | {"images": levels(batch.images)})
