"""Measures a run's policy during training, as `evaluate --workdir` does afterwards; keeps the best LoRA."""

from collections.abc import Mapping
from typing import Any

import jax

from nabla_gfn_jax.checkpoints.files import plain
from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, Evaluation, Evaluator, describe, prompts_to_judge
from nabla_gfn_jax.inference.extras import load_extras
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.inference.subject import file_hashes
from nabla_gfn_jax.inference.table import to_json
from nabla_gfn_jax.processes import greatest, tell
from nabla_gfn_jax.runs import alarms, best, evaluations
from nabla_gfn_jax.runs.workdir import Workdir
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.trainer import Trainer
from nabla_gfn_jax.typing import Params

Row = dict[str, Any]


class Judge:
    """Samples the held-out prompts from the base model once, and from the policy at each measurement.

    The seed of the noise is 0 for every run, so that runs are compared with the same noise.
    """

    def __init__(self, settings: Settings, trainer: Trainer, workdir: Workdir):
        """Raises `UserError` if a reward or a network for the measurements is missing."""
        of, self._settings, self._workdir = settings.sampling, settings.evaluation, workdir
        self._updates = settings.training.num_epochs * settings.training.updates_per_epoch
        how = Sampling(sampler=of.sampler, steps=of.num_steps, guidance=of.guidance, lora_until_step=of.lora_until_step)
        sampler = ImageSampler(trainer.base, prompts_to_judge(settings.prompts, 0, 0), how)
        self._beta = getattr(settings.algorithm, "beta", None)
        extras = load_extras(self._settings.cross_rewards, self._settings.metrics, settings.reward)
        self._evaluator = Evaluator(sampler, trainer.reward, self._beta, extras.metrics)
        files: Mapping[str, Mapping[str, str]] = workdir.manifest.inputs
        hashes = {n: given["sha256"] for n, given in files.items() if n.startswith(("model/", "reward/"))}
        hashes |= file_hashes(extras.files)
        self._sampled = describe(settings.model, settings.model_dtype, sampler, settings.reward, hashes)
        self._what = plain({"beta": self._beta, "cross_rewards": extras.cross_rewards} | self._sampled)

    def is_due(self, updates: int) -> bool:
        """Whether the policy after `updates` updates is to be measured."""
        every = self._settings.every_updates
        return updates > 0 and (every == 0 or updates % every == 0 or updates == self._updates)

    def lacks(self, updates: int) -> bool:
        """Whether the policy after `updates` updates is not measured yet; the same in every process."""
        return not greatest(int(self._workdir.writes and updates in self._rows()))

    def __call__(self, updates: int, lora: Params) -> bool:
        """Measures the LoRA after `updates` updates. All processes must call it. Returns whether it raises an alarm.

        Appends its row to evaluations.jsonl, before the first that of the base model. A row that is there already,
        because a resumed run repeats it, and a full disk change nothing.
        """
        kept = self._workdir.path / BASE_SAMPLES if jax.process_count() == 1 else None
        base = self._evaluator.base_states(self._evaluator.base_images(self._settings.images), kept, self._sampled)
        states = self._evaluator.states(lora, self._settings.images)
        alarmed = False
        if self._workdir.writes:
            if 0 not in self._rows():
                self._write(evaluations.BASE, self._evaluator.evaluate(base, base, self._settings.images))
            self._write(evaluations.name_of(updates), self._evaluator.evaluate(states, base, self._settings.images))
            alarmed = self.conclude(updates)
        return bool(greatest(int(alarmed)))

    def conclude(self, updates: int) -> bool:
        """Copies the best LoRA and writes alarms, up to `updates` updates, that are not there yet. Process 0 calls it.

        Returns whether there is a new alarm.
        """
        rows = {n: row for n, row in self._rows().items() if n <= updates}
        criterion: best.Criterion = self._settings.best or ("log_reward" if self._beta is None else "gap")
        found = best.best_of(rows, criterion)
        try:
            if found is not None:
                best.keep(self._workdir.path, found, criterion)
            return bool(alarms.add(self._workdir.path, alarms.of_evaluations(rows), tell))
        except OSError as error:
            tell(f"the best LoRA or an alarm cannot be written ({error}); the run goes on")
            return False

    def _write(self, name: str, evaluation: Evaluation) -> None:
        row = plain({"model": name} | self._what | to_json(evaluation))
        if row not in evaluations.read(self._workdir.path):
            try:
                evaluations.append(self._workdir.path, row)
            except OSError as error:
                tell(f"{self._workdir.path / evaluations.NAME} lacks {name} ({error})")

    def _rows(self) -> dict[int, Row]:
        """The newest row of each number of updates that was measured like the others; at 0 the base model's."""
        rows = [row for row in evaluations.read(self._workdir.path) if row | self._what == row]
        return {updates: row for row in rows if (updates := evaluations.updates_of(row)) is not None}
