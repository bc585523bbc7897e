"""Evaluates a run's policy during training, as `evaluate --workdir` does afterwards."""

import sys
from collections.abc import Mapping

import jax

from nabla_gfn_jax.checkpoints.files import plain
from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, Evaluator, describe, prompts_to_judge
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.inference.table import to_json
from nabla_gfn_jax.processes import greatest
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
        """Appends the row of the LoRA after `updates` updates to evaluations.jsonl. All processes must call it.

        A row that is there already, because a resumed run repeats it, and a full disk change nothing.
        """
        kept = self._workdir.path / BASE_SAMPLES if jax.process_count() == 1 else None
        base = self._evaluator.base_states(self._num, kept, self._what)
        evaluation = self._evaluator.evaluate(self._evaluator.states(lora, self._num), base)
        row = plain({"model": _name(updates), "beta": self._beta} | self._what | to_json(evaluation))
        if self._workdir.writes and row not in evaluations.read(self._workdir.path):
            try:
                evaluations.append(self._workdir.path, row)
            except OSError as error:
                print(f"{self._workdir.path / evaluations.NAME} lacks {_name(updates)} ({error})", file=sys.stderr)

    def lacks(self, updates: int) -> bool:
        """Whether there is no row of the LoRA after `updates` updates; the same in every process."""
        about = plain({"model": _name(updates), "beta": self._beta} | self._what)
        rows = evaluations.read(self._workdir.path) if self._workdir.writes else []
        return not greatest(int(any(row | about == row for row in rows)))


def _name(updates: int) -> str:
    return f"lora/{updates:05d}"
