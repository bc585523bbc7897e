"""Measures a base model and its LoRAs: chooses the metrics and keeps the base model's states for later use."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nabla_gfn_jax.checkpoints.files import WriteError, write_whole
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.candidates import Candidates, draw_images
from nabla_gfn_jax.inference.sampling import ImageSampler, Policy
from nabla_gfn_jax.metrics.base import Batch, Comparison, Metric, NotAvailable, Samples, Weighting
from nabla_gfn_jax.metrics.certificate import Certificate
from nabla_gfn_jax.metrics.coverage import SHAPE as DRAWN_SHAPE
from nabla_gfn_jax.metrics.coverage import Coverage, concept_captions
from nabla_gfn_jax.metrics.nats import Nats
from nabla_gfn_jax.metrics.reward import LogReward
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.rewards import Reward

BASE_SAMPLES = "base_samples"  # the folder of a workdir in which the base model's states are kept
LORA_SAMPLES = "lora_samples"  # and those of LoRAs, so that an evaluation that was cut off goes on
EVERY_CONCEPT = "every_concept"  # the name of a prompt set: one caption for each concept of the emoji model
DESCRIBED = ("base_model", "model_dtype", "sampling", "prompts", "reward", "inputs")
AnyMetric = Metric | Comparison
Split = Literal["held_out", "train"]
States = dict[str, Samples]  # by the metric's name
Figures = dict[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model."""

    figures: Figures
    certificate: Certificate | None = None
    tilted: Figures | None = None  # figures of the base samples, weighted by R^b to this model's mean log R
    as_few: Figures | None = None  # this model's figures at the effective sample size of `tilted`


class Evaluator:
    """Samples one prompt set from several models with the same noise and measures them."""

    def __init__(
        self, sampler: ImageSampler, reward: Reward | None, beta: float | None = None, more: Sequence[AnyMetric] = ()
    ):
        """`beta` is the exponent that the LoRAs were trained for, `more` are metrics beside the usual ones.

        Raises `UserError` if a reward rejects a prompt or no metric applies.
        """
        self._sampler = sampler
        self.metrics, self.not_available = choose_metrics(sampler, reward, beta, more)

    def base_images(self, num: int) -> int:
        """The images of each prompt from the base model that `num` images of another model are compared with.

        For a `Comparison`, other images than those with the same noise are needed.
        """
        return 2 * num if any(isinstance(metric, Comparison) for metric in self.metrics) else num

    def states(
        self,
        lora: Policy | None,
        num: int,
        *,
        first: int = 0,
        progress: str | None = None,
        keep: Callable[[Batch], None] | None = None,
        candidates: Candidates | None = None,
    ) -> States:
        """The metrics' states for the images number `first` to `num` − 1 of each prompt. `keep` gets each batch."""
        states: States = {}
        wants_nats = any(isinstance(metric, Nats) for metric in self.metrics)
        images = draw_images(self._sampler, lora, num, candidates, first=first, nats=wants_nats, progress=progress)
        for batch in images:
            if keep is not None:
                keep(batch)
            for metric in self.metrics:
                state = metric.update(batch)
                states[metric.name] = states[metric.name].merge(state) if metric.name in states else state
        return states

    def base_states(self, num: int, cache: Path | None, key: Mapping[str, Any], progress: str | None = None) -> States:
        """The states for at least `num` images of each prompt from the base model, as `kept_states`."""
        return self.kept_states(None, num, cache, key, progress)

    def kept_states(
        self,
        lora: Policy | None,
        num: int,
        cache: Path | None,
        key: Mapping[str, Any],
        progress: str | None = None,
        keep: Callable[[Batch], None] | None = None,
        candidates: Candidates | None = None,
    ) -> States:
        """The states for at least `num` images of each prompt.

        States in the folder `cache` are used again, unless `keep` wants the images. `key` has everything that the
        images and their rewards depend on.
        """
        file = None if cache is None else cache / kept_name(key, [metric.name for metric in self.metrics])
        states = _read_states(file) if file is not None and file.is_file() and keep is None else {}
        have = min((int(np.bincount(s.prompt).min()) for s in states.values()), default=0)
        if have < num:
            more = self.states(lora, num, first=have, progress=progress, keep=keep, candidates=candidates)
            states = {name: states[name].merge(more[name]) for name in states} or more
            if file is not None:
                with suppress(WriteError):  # on a full disk they are sampled again
                    _write_states(file, states)
        return states

    def evaluate(self, states: States, base: States | None = None, num: int | None = None) -> Evaluation:
        """The figures of every metric.

        With the base model's states, also the certificate, the tilted base's figures, and how the images differ from
        the base model's: the first `num` images of each prompt, from the base model's images number `num` to 2 num − 1.
        Without `num`, it is half the number of the base model's images of each prompt.
        """
        measures = [metric for metric in self.metrics if isinstance(metric, Metric)]
        figures = {k: v for m in measures for k, v in m.compute(states[m.name]).items()}
        for metric in self.metrics:
            if isinstance(metric, Comparison) and base is not None:
                end = num or int(np.bincount(base[metric.name].prompt).min()) // 2
                mine, theirs = states[metric.name].numbers(0, end), base[metric.name].numbers(end, 2 * end)
                figures |= metric.compare(mine, theirs)
        nats = next((m for m in measures if isinstance(m, Nats)), None)
        reward = LogReward.NAME if nats is None else nats.name
        if base is None or reward not in states:
            return Evaluation(figures)
        certificate = nats.certify(states[nats.name], base[nats.name]) if nats else None
        if states is base or all(isinstance(m, LogReward) for m in measures):
            return Evaluation(figures, certificate)
        tilted = Weighting.tilted(base[reward].by_prompt(), states[reward].by_prompt())
        worth = {"effective_samples": Estimate(tilted.effective)}
        of_tilted = {k: v for m in measures for k, v in m.compute(base[m.name], tilted).items()}
        coverage = next((m for m in measures if isinstance(m, Coverage)), None)
        as_few = None if coverage is None else coverage.compute_as(states[coverage.name], tilted) | worth
        return Evaluation(figures, certificate, of_tilted | worth, as_few)


def kept_base_states(cache: Path, key: Mapping[str, Any]) -> States:
    """The states that `Evaluator.base_states` kept in the folder for this key; {} if there are none."""
    for file in sorted(cache.glob("base-*.npz")):
        states = _read_states(file)
        if states and file.name == kept_name(key, list(states)):
            return states
    return {}


def choose_metrics(
    sampler: ImageSampler, reward: Reward | None, beta: float | None, more: Sequence[AnyMetric] = ()
) -> tuple[list[AnyMetric], dict[str, str]]:
    """The metrics that apply, prepared for the prompts, and the reasons why others do not apply, by name.

    Raises `UserError` if none applies.
    """
    reasons: dict[str, str] = {}
    candidates: list[AnyMetric] = list(more)
    if reward is None:
        reasons |= {"reward": "no reward was named", "nats": "no reward was named"}
    elif sampler.has_nats:
        candidates.insert(0, Nats(reward, sampler.chain.num_steps, beta))
    else:
        reasons["nats"] = "steps without noise (eta 0) have no density"
        candidates.insert(0, LogReward(reward))
    if sampler.image_shape == DRAWN_SHAPE:
        candidates.append(Coverage())
    else:
        sizes = [f"{height} x {width}" for height, width, _ in (DRAWN_SHAPE, sampler.image_shape)]
        reasons["coverage"] = f"only drawings of {sizes[0]} are known, and the images are {sizes[1]}"
    chosen: list[AnyMetric] = []
    for metric in candidates:
        try:
            metric.prepare(sampler.prompts)
            chosen.append(metric)
        except NotAvailable as reason:
            reasons[metric.name] = str(reason)
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"there is nothing to measure ({why}); name a reward or a metric")
    return chosen, reasons


def describe(
    model: str, model_dtype: str, sampler: ImageSampler, reward: str, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that figures depend on except the LoRA and the number of images, under the names `DESCRIBED`.

    `inputs` has the SHA-256 of the files that were read.
    """
    values = (model, model_dtype, asdict(sampler.how), list(sampler.prompts), reward, dict(inputs))
    return dict(zip(DESCRIBED, values, strict=True))


def kept_name(key: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The name of the file with the states of the metrics."""
    digest = hashlib.sha256((json.dumps(key, sort_keys=True) + json.dumps(metrics)).encode()).hexdigest()
    return f"{'lora' if 'lora' in key else 'base'}-{digest[:16]}.npz"


def _write_states(file: Path, states: States) -> None:
    arrays = {f"{name}/prompt": state.prompt for name, state in states.items()}
    arrays |= {f"{name}/{key}": array for name, state in states.items() for key, array in state.values.items()}
    contents = io.BytesIO()
    np.savez(contents, **arrays)  # type: ignore[arg-type]
    write_whole(file, contents.getvalue())


def _read_states(file: Path) -> States:
    """The states that `_write_states` wrote; {} if the file is damaged, so that they are sampled again."""
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for full in arrays.files:
                name, _, key = full.partition("/")
                found.setdefault(name, {})[key] = arrays[full]
        return {name: Samples(values.pop("prompt"), values) for name, values in found.items()}
    except (OSError, ValueError, KeyError):
        return {}


def prompts_to_judge(name: str, number: int, seed: int, split: Split = "held_out") -> list[str]:
    """The prompts of a set's split or, if `number` is not 0, `number` of them drawn without replacement.

    Raises `UserError` if there is no such set or it has fewer prompts.
    """
    if name == EVERY_CONCEPT:
        known = concept_captions()
    else:
        known = list(prompt_set(name).held_out if split == "held_out" else prompt_set(name).train)
    if number > len(known):
        raise UserError(f"--num_prompts={number}, but {name} has {len(known)}")
    return known if number == 0 else list(np.random.default_rng(seed).choice(known, number, replace=False))
