"""Evaluates a run's policy during training, as `evaluate --workdir` does afterwards."""

from collections.abc import Mapping

import jax

from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, Evaluator, describe, prompts_to_judge
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.inference.table import to_json
from nabla_gfn_jax.runs import evaluations
from nabla_gfn_jax.runs.workdir import Workdir
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.trainer import Trainer
from nabla_gfn_jax.typing import Params


class Judge:
    """Samples the held-out prompts from the base model once, and from each LoRA that the run saves.

    The seed of the noise is 0 for every run, so that runs are compared with the same noise.
    """

    def __init__(self, settings: Settings, trainer: Trainer, workdir: Workdir):
        of = settings.sampling
        how = Sampling(sampler=of.sampler, steps=of.num_steps, guidance=of.guidance, lora_until_step=of.lora_until_step)
        sampler = ImageSampler(trainer.base, prompts_to_judge(settings.prompts, 0, 0), how)
        self._beta = getattr(settings.algorithm, "beta", None)
        self._evaluator = Evaluator(sampler, trainer.reward, self._beta)
        self._workdir, self._num = workdir, settings.logging.judged_images
        files: Mapping[str, Mapping[str, str]] = workdir.manifest.inputs
        hashes = {n: given["sha256"] for n, given in files.items() if n.startswith(("model/", "reward/"))}
        self._what = describe(settings.model, settings.model_dtype, sampler, settings.reward, hashes)

    def __call__(self, updates: int, lora: Params) -> None:
        """Appends the row of the LoRA after `updates` updates to evaluations.jsonl. All processes must call it."""
        kept = self._workdir.path / BASE_SAMPLES if jax.process_count() == 1 else None
        base = self._evaluator.base_states(self._num, kept, self._what)
        evaluation = self._evaluator.evaluate(self._evaluator.states(lora, self._num), base)
        if self._workdir.writes:
            row = {"model": f"lora/{updates:05d}", "beta": self._beta} | self._what | to_json(evaluation)
            evaluations.append(self._workdir.path, row)
