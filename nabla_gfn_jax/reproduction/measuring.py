"""Measures the saved LoRAs of a grid's runs, and the base model, with the same prompts and noise."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nabla_gfn_jax.base_models.names import DTYPES, load_model
from nabla_gfn_jax.checkpoints.files import plain, write_json
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, Evaluator, States, describe, prompts_to_judge
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.inference.subject import hashes_of
from nabla_gfn_jax.inference.table import to_json
from nabla_gfn_jax.metrics.base import Metric, Weighting
from nabla_gfn_jax.metrics.registry import METRICS
from nabla_gfn_jax.metrics.tilt import FEW, Strata, normalise
from nabla_gfn_jax.reproduction.cells import Cell
from nabla_gfn_jax.reproduction.grid import Evaluation
from nabla_gfn_jax.rewards import TOTAL, load_reward
from nabla_gfn_jax.runs import evaluations, loras
from nabla_gfn_jax.settings import Settings

BASE = "base"  # the name of the base model's row
FRONTIER = "frontier.json"
_EXPONENTS = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45, 64)  # times 1/(4 · standard deviation of log R)


def how(settings: Settings) -> Sampling:
    """How the images of a run are sampled. The seed of the noise is 0 for every run."""
    of = settings.sampling
    return Sampling(sampler=of.sampler, steps=of.num_steps, guidance=of.guidance, lora_until_step=of.lora_until_step)


class Measuring:
    """Measures runs of one model, reward, prompt set and sampler. The base model is measured once, in `folder`."""

    def __init__(self, cell: Cell, evaluation: Evaluation, folder: Path, progress: str | None = None):
        s = cell.settings
        self._model, reward = load_model(s.model, DTYPES[s.model_dtype]), load_reward(s.reward)
        released = [METRICS[name]() for name in dict.fromkeys(evaluation.metrics)]
        sampler = ImageSampler(self._model, prompts_to_judge(s.prompts, 0, 0), how(s))
        self._evaluator = Evaluator(sampler, reward, cell.beta, [metric for metric, _ in released])
        files = {"reward": reward.files} | {metric.name: read for metric, read in released}
        described = describe(s.model, s.model_dtype, sampler, s.reward, hashes_of(s.model, files))
        self._what, self._num = {"beta": cell.beta, "num": evaluation.num} | described, evaluation.num
        folder.mkdir(parents=True, exist_ok=True)
        most = max(self._evaluator.base_images(evaluation.num), evaluation.base_num)
        self.base = self._evaluator.base_states(most, folder / BASE_SAMPLES, described, progress)
        if not self._has(folder, BASE) or not (folder / FRONTIER).is_file():
            write_json(folder / FRONTIER, {"points": frontier(self._evaluator.metrics, self.base)})
        self._append(folder, BASE, lambda: to_json(self._evaluator.evaluate(self.base, self.base, self._num)))

    def __call__(self, workdir: Path, progress: str | None = None) -> None:
        """Appends a row for each saved LoRA to the workdir's evaluations, except for those that it has."""
        for updates, path in loras.saved(workdir).items():
            self._append(workdir, row_name(updates), lambda path=path: self._measured(path, progress))  # type: ignore[misc]

    def lacks(self, workdir: Path) -> bool:
        """Whether a saved LoRA of the workdir has no row."""
        return any(not self._has(workdir, row_name(updates)) for updates in loras.saved(workdir))

    def _measured(self, path: Path, progress: str | None) -> dict[str, Any]:
        lora = load_lora(path / loras.DIFFUSERS, self._model.params["unet"], self._model.params["text_encoder"])
        states = self._evaluator.states(lora, self._num, progress=progress)
        return to_json(self._evaluator.evaluate(states, self.base, self._num))

    def _has(self, workdir: Path, name: str) -> bool:
        about = plain({"model": name} | self._what)
        return any(row | about == row for row in evaluations.read(workdir))

    def _append(self, workdir: Path, name: str, measure: Any) -> None:
        if not self._has(workdir, name):
            evaluations.append(workdir, {"model": name} | self._what | measure())


def row_name(updates: int) -> str:
    """The name of the row of the LoRA after `updates` updates."""
    return f"lora/{updates:05d}"


def frontier(metrics: Iterable[object], base: States) -> list[dict[str, float]]:
    """The base model weighted by R^b, for several b: mean log R, needed nats, and the figures of the metrics.

    The last point is the one at which fewer than 20 effective samples of a prompt carry the weight.
    """
    reward = next((name for name, state in base.items() if TOTAL in getattr(state, "values", {})), None)
    if reward is None:
        return []
    samples = base[reward].by_prompt()
    strata, log_reward = Strata(samples.prompt), samples.values[TOTAL].astype(np.float64)
    centred = log_reward - strata.mean(log_reward)
    scale = max(strata.mean(centred**2) ** 0.5, 1e-12)
    measures = [metric for metric in metrics if isinstance(metric, Metric)]
    points = []
    for b in np.array(_EXPONENTS) / (4 * scale):
        weights = normalise(b * centred, strata)
        shares = weights.shares / len(strata.sizes)
        weighting = Weighting(strata, shares, np.stack([shares, shares]))
        figures = {n: e.value for m in measures for n, e in m.compute(base[m.name], weighting).items()}
        mean = float(strata.sums(weights.shares * log_reward).mean())
        needed = b * float(strata.sums(weights.shares * centred).mean()) - float(weights.log_mean.mean())
        effective = float(1.0 / np.mean(1.0 / weights.effective))
        own = {"exponent": float(b), "needed": max(needed, 0.0), "effective_samples": effective}
        points.append(figures | own | {"log_reward": mean})
        if b > 0 and effective < FEW:
            break
    return points
