"""The loop over the epochs of a run.

Epoch e ≥ 1 samples with the current policy and then makes `updates_per_epoch` updates. An on-policy algorithm trains on
the samples of the same epoch. Other algorithms train on the samples of the previous epoch; for them, epoch 0 only
samples. One more epoch after the last only samples; its row has the reward of the final policy.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.sampling import image_keys
from nabla_gfn_jax.parallel import SPLIT, gather, place, placed
from nabla_gfn_jax.processes import meet, tell
from nabla_gfn_jax.rewards import TOTAL
from nabla_gfn_jax.runs import pictures
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.training.faults import (
    describe_lost,
    describe_skipped,
    in_a_row,
    lost_by,
    mean,
    mean_applied,
    stand_ins,
)
from nabla_gfn_jax.training.profiling import Meter
from nabla_gfn_jax.training.prompts import PromptIds
from nabla_gfn_jax.training.state import TrainState
from nabla_gfn_jax.training.trainer import BY_UPDATE, Sampled, Trainer
from nabla_gfn_jax.typing import Params, PRNGKey, PRNGKeys

Row = dict[str, float]


@dataclass(frozen=True)
class Progress:
    """The state of a run between two epochs; a resume starts from it."""

    state: TrainState
    stats: PyTree[np.ndarray]  # the algorithm's memory
    data: PyTree[Any] = None  # training data for the next epoch; None for an on-policy algorithm and at the start
    weight: Any = None  # the weights of the samples in `data`
    skipped: int = 0  # updates since the last one that was applied
    fault: str = ""  # what was not finite in the last update that was not applied

    def tree(self) -> dict[str, Any]:
        """The tree that a checkpoint saves."""
        return {"state": self.state, "stats": self.stats, "data": self.data, "weight": self.weight}


class Outputs(Protocol):
    """The destinations of a run's results."""

    def row(self, row: Row) -> None:
        """Writes the log row of an epoch."""

    def images(self, updates: int, images: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        """Writes samples of the policy after `updates` updates, (B, height, width, 3) in [0, 1], and their scores."""

    def save(self, epoch: int, updates: int, progress: Progress) -> None:
        """Saves the policy, and the state from which a resume continues after this epoch."""

    def measure(self, updates: int, progress: Progress) -> None:
        """Measures the policy, if this is due, after an epoch that is not saved."""

    def begins(self, epoch: int) -> None:
        """Is called before an epoch."""

    def ends(self, epoch: int, updates: int, progress: Progress | None) -> None:
        """Is called after an epoch, when all its results are written. A resume may continue after it.

        `progress` is None after the epoch that only samples the final policy.
        """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The length of a run and the intervals of its outputs, in epochs."""

    seed: int
    samples: int  # per epoch
    epochs: int
    images_every: int
    save_every: int
    updates: int  # in the whole run
    keep_loras: int = 0  # number of newest LoRAs to keep; 0: all
    skipped_updates: int = 3  # most updates in a row that are not applied


def sample_keys(key: PRNGKey, epoch: int, count: int) -> PRNGKeys:
    """One key per sample, (count,), which depends only on the run's key, the epoch and the index of the sample."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), jnp.arange(count))


class Programs:
    """The two programs of a run, rollout and update, each traced once. They are compiled simultaneously."""

    def __init__(self, trainer: Trainer, plan: Plan, state: TrainState):
        self.trainer, self.meter = trainer, Meter()
        self._key, self._count = jax.random.key(plan.seed), plan.samples
        self._seen: dict[int, tuple[Params, Int[np.ndarray, " all"]]] = {}  # of the last two epochs
        self._prompts = PromptIds(trainer.num_prompts, trainer.prompt_weights)
        traced = trainer.rollout.trace(trainer.frozen, state.params, *self.given(0)[:2])
        self.data = placed(traced.out_info.data, trainer.mesh, BY_UPDATE)
        weight, self.stats = trainer.told(traced.out_info.scalars, plan.samples)
        self.weight = placed(weight, trainer.mesh, SPLIT)
        update = trainer.update.trace(trainer.frozen, state, self.data, self.weight)
        self.meter.know("rollout", traced)
        self.meter.know("update", update)
        with ThreadPoolExecutor(1) as pool:
            rollout = pool.submit(lambda lowered: lowered.compile(), traced.lower())
            self.compiled = {"update": update.lower().compile(), "rollout": rollout.result()}
        meet("compiled")

    def given(self, epoch: int) -> tuple[Any, Any, np.ndarray]:
        """The keys and table rows of an epoch's samples on the devices, and their prompt ids on the host."""
        keys = sample_keys(self._key, epoch, self._count)
        _, rows = self.seeing(epoch)
        return (*place((keys, rows), self.trainer.mesh, SPLIT), self._ids(epoch))

    def seeing(self, epoch: int) -> tuple[Params, Int[np.ndarray, " all"]]:
        """The frozen parameters, with a table that has the epoch's prompts, and the row of each sample's prompt."""
        if epoch not in self._seen:
            self._seen = {other: seen for other, seen in self._seen.items() if abs(other - epoch) == 1}
            self._seen[epoch] = self.trainer.seeing(self._ids(epoch))
        return self._seen[epoch]

    def _ids(self, epoch: int) -> Int[np.ndarray, " all"]:
        return self._prompts.chosen(sample_keys(self._key, epoch, self._count))

    def rollout(self, epoch: int, params: Params) -> tuple[Any, Int[np.ndarray, " all"]]:
        """Samples the epoch with `params`: a `Sampled`, and the prompt ids."""
        keys, rows, ids = self.given(epoch)
        self.meter.call("rollout")
        return self.compiled["rollout"](self.seeing(epoch)[0], params, keys, rows), ids

    def update(self, epoch: int, state: TrainState, data: Any, weight: Any) -> Any:
        """Makes the updates on the data that the epoch sampled: the new state and a `Steps`."""
        self.meter.call("update")
        return self.compiled["update"](self.seeing(epoch)[0], state, data, weight)

    def images(self, policy: Params) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples of the LoRA `policy` for the grid and the report, and their scores.

        Prompts and noise are the same each time and in all runs; training never uses this noise.
        """
        prompt, number = pictures.arranged(self._prompts.number, self._count)
        keys = image_keys(pictures.SEED, prompt, number)
        frozen, rows = self.trainer.seeing(prompt)
        placed = place((keys, rows), self.trainer.mesh, SPLIT)
        images, scores = self.trainer.images(frozen, {"lora": policy}, *placed)
        mesh = self.trainer.mesh
        return gather(images, mesh), {name: gather(score, mesh) for name, score in scores.items()}


def first_progress(trainer: Trainer, state: TrainState) -> Progress:
    """The progress of a new run."""
    return Progress(state, trainer.algorithm.first_stats(trainer.num_prompts))


def restored(programs: Programs, progress: Progress, checkpoints: Checkpoints) -> tuple[Progress, int, dict[str, Any]]:
    """The progress in the newest whole checkpoint, the next epoch, and what the checkpoint says about the run.

    Without a checkpoint: `progress`, epoch 0 or 1, and {}.
    """
    trainer = programs.trainer
    if checkpoints.latest is None:
        return progress, 1 if trainer.algorithm.on_policy else 0, {}
    progress = replace(progress, stats=programs.stats)
    if not trainer.algorithm.on_policy:
        zeros = lambda shapes, spec: place(  # noqa: E731
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), trainer.mesh, spec
        )
        progress = replace(progress, data=zeros(programs.data, BY_UPDATE), weight=zeros(programs.weight, SPLIT))
    found = checkpoints.restore(progress.tree())
    saved = Progress(**found.tree)
    skipped, fault = int(found.about.get("skipped", 0)), str(found.about.get("fault", ""))
    saved = replace(saved, stats=jax.tree.map(np.asarray, saved.stats), skipped=skipped, fault=fault)
    return saved, found.step + 1, found.about


def run(programs: Programs, plan: Plan, progress: Progress, first: int, outputs: Outputs) -> None:
    """Runs the epochs from `first` to the end. Raises `UserError` if too many updates in a row are not finite."""
    per_epoch = programs.trainer.updates_per_epoch
    for epoch in range(first, plan.epochs + 2):
        outputs.begins(epoch)
        last, before = epoch == plan.epochs + 1, per_epoch * max(epoch - 1, 0)
        programs.meter.start()
        params = progress.state.params
        shown = last or (epoch > 0 and (epoch - 1) % plan.images_every == 0)
        policy = progress.state.policy if shown else None  # the LoRA that would be saved
        if last:
            params = params | {"lora": progress.state.policy}
        progress, numbers = one(programs, epoch, params, progress, update=not last)
        if policy is not None:
            outputs.images(before, *programs.images(policy))
        row: Row = {"epoch": epoch, "step": before, "updates": per_epoch * min(epoch, plan.epochs)}
        row |= numbers | programs.meter.numbers(plan.samples)
        outputs.row(row)
        stop_if_not_finite(epoch, progress, plan, row["lost_samples"])
        if not last and epoch > 0 and (epoch == plan.epochs or epoch % plan.save_every == 0):
            outputs.save(epoch, per_epoch * epoch, progress)
        elif not last:
            outputs.measure(per_epoch * epoch, progress)
        outputs.ends(epoch, per_epoch * min(epoch, plan.epochs), None if last else progress)


def one(programs: Programs, epoch: int, params: Params, progress: Progress, *, update: bool) -> tuple[Progress, Row]:
    """Runs one epoch: samples with `params` and, if `update`, trains. Returns the new progress and the log row."""
    trainer, state, steps = programs.trainer, progress.state, None
    sampled: Sampled
    sampled, prompt_id = programs.rollout(epoch, params)
    if not trainer.algorithm.on_policy and update and progress.data is not None:
        state, steps = programs.update(epoch - 1, state, progress.data, progress.weight)  # starts while sampling runs
    meet(f"epoch {epoch}")
    data, host_weight, stats, numbers = weighed(programs, epoch, sampled, prompt_id, progress.stats)
    weight = place(host_weight, trainer.mesh, SPLIT)
    if trainer.algorithm.on_policy and update:
        state, steps = programs.update(epoch, state, data, weight)
    skipped, fault = progress.skipped, progress.fault
    if steps is not None:  # waits for the devices
        applied = np.asarray(steps.applied)
        skipped = in_a_row(skipped, applied)
        numbers = mean_applied(steps.metrics, applied) | numbers | {"skipped_updates": float((~applied).sum())}
        if not applied.all():
            fault = describe_skipped(steps.metrics, applied, gather(steps.finite, trainer.mesh), len(prompt_id))
            of = epoch if trainer.algorithm.on_policy else epoch - 1
            tell(f"epoch {epoch} skips {(~applied).sum()} of {len(applied)} updates: {fault} of epoch {of}")
    kept = {} if trainer.algorithm.on_policy else {"data": data, "weight": weight}
    return Progress(state, stats, skipped=skipped, fault=fault, **kept), numbers


def weighed(
    programs: Programs, epoch: int, sampled: Sampled, prompt_id: Int[np.ndarray, " all"], stats: PyTree[np.ndarray]
) -> tuple[Any, np.ndarray, PyTree[np.ndarray], Row]:
    """Training data, weights, the algorithm's new memory, and the row's numbers of an epoch's samples.

    A sample that is not finite is left out of the numbers, and another takes its place in the rest. If none is finite,
    the memory stays, and the weights are NaN, so that no update is applied.
    """
    trainer, mesh = programs.trainer, programs.trainer.mesh
    scalars = {name: gather(value, mesh) for name, value in sampled.scalars.items()}
    lost = lost_by(scalars, {name: gather(value, mesh) for name, value in sampled.finite.items()})
    whole = ~np.any([np.zeros(len(prompt_id), bool), *lost.values()], axis=0)
    numbers: Row = {"lost_samples": float((~whole).sum())}
    for name in (name for name in scalars if name == TOTAL or name.startswith(f"{TOTAL}_")):
        numbers[f"reward_mean{name.removeprefix(TOTAL)}"] = mean(scalars[name][whole])
    numbers["reward_std"] = float(scalars[TOTAL][whole].std()) if whole.any() else np.nan
    numbers |= spread_of_prompts(scalars[TOTAL][whole], prompt_id[whole])
    if lost:
        tell(f"epoch {epoch} loses {(~whole).sum()} of {len(whole)} samples; not finite: {describe_lost(lost)}")
    if not whole.any():
        return sampled.data, np.full(programs.weight.shape, np.nan, programs.weight.dtype), stats, numbers
    data = sampled.data
    if lost:
        chosen = stand_ins(whole, prompt_id)
        data, prompt_id = trainer.take(data, chosen), prompt_id[chosen]
        scalars = {name: value[chosen] for name, value in scalars.items()}
    weight, stats = trainer.algorithm.weigh(stats, scalars, prompt_id)
    return data, weight, stats, numbers


def spread_of_prompts(reward: Float[np.ndarray, " n"], prompt_id: Int[np.ndarray, " n"]) -> Row:
    """The log row's `reward_std_prompt`: √ of the mean variance within a prompt; {} if no prompt has two samples."""
    values = [reward[prompt_id == prompt] for prompt in np.unique(prompt_id)]
    variances = [its.var(ddof=1) for its in values if len(its) > 1]
    return {"reward_std_prompt": float(np.sqrt(np.mean(variances)))} if variances else {}


def stop_if_not_finite(epoch: int, progress: Progress, plan: Plan, lost_samples: float) -> None:
    """Raises `UserError` if too many updates in a row were not applied, or if the final policy has no finite sample."""
    advice = (
        "the last checkpoint and LoRA are from before it, or equal to those from before it: lower "
        "training.learning_rate or algorithm.beta in a new workdir, or mend the reward"
    )
    if progress.skipped > plan.skipped_updates:
        raise UserError(
            f"{progress.skipped} updates in a row, up to epoch {epoch}, are not finite ({progress.fault}) and not "
            f"applied; {advice}"
        )
    if epoch == plan.epochs + 1 and lost_samples == plan.samples:
        raise UserError(f"no sample of the final policy has finite latents and a finite reward_mean; {advice}")
