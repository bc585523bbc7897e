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
from jaxtyping import PyTree

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.sampling import image_keys
from nabla_gfn_jax.parallel import SPLIT, gather, place, placed
from nabla_gfn_jax.processes import meet
from nabla_gfn_jax.rewards import TOTAL
from nabla_gfn_jax.runs import pictures
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

    def begins(self, epoch: int) -> None:
        """Is called before an epoch."""

    def ends(self, epoch: int) -> None:
        """Is called after an epoch."""


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


def sample_keys(key: PRNGKey, epoch: int, count: int) -> PRNGKeys:
    """One key per sample, (count,), which depends only on the run's key, the epoch and the index of the sample."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), jnp.arange(count))


class Programs:
    """The two programs of a run, rollout and update, each traced once. They are compiled simultaneously."""

    def __init__(self, trainer: Trainer, plan: Plan, state: TrainState):
        self.trainer, self.meter = trainer, Meter()
        self._key, self._count = jax.random.key(plan.seed), plan.samples
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
        """The keys and prompt ids of an epoch's samples on the devices, and the prompt ids on the host."""
        keys = sample_keys(self._key, epoch, self._count)
        ids = self._prompts.chosen(keys)
        return (*place((keys, ids), self.trainer.mesh, SPLIT), ids)

    def rollout(self, params: Params, keys: Any, ids: Any) -> Any:
        """Samples with `params`: a `Sampled`."""
        self.meter.call("rollout")
        return self.compiled["rollout"](self.trainer.frozen, params, keys, ids)

    def update(self, state: TrainState, data: Any, weight: Any) -> Any:
        """Makes the updates of an epoch: the new state and the metrics. The old state is donated."""
        self.meter.call("update")
        return self.compiled["update"](self.trainer.frozen, state, data, weight)

    def images(self, policy: Params) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Samples of the LoRA `policy` for the grid and the report, and their scores.

        Prompts and noise are the same each time and in all runs; training never uses this noise.
        """
        prompt, number = pictures.arranged(self._prompts.number, self._count)
        keys = image_keys(pictures.SEED, prompt, number)
        placed = place((keys, prompt), self.trainer.mesh, SPLIT)
        images, scores = self.trainer.images(self.trainer.frozen, {"lora": policy}, *placed)
        mesh = self.trainer.mesh
        return gather(images, mesh), {name: gather(score, mesh) for name, score in scores.items()}


def first_progress(trainer: Trainer, state: TrainState) -> Progress:
    """The progress of a new run."""
    return Progress(state, trainer.algorithm.first_stats(trainer.num_prompts))


def restored(programs: Programs, progress: Progress, checkpoints: Any) -> tuple[Progress, int]:
    """The progress in the newest checkpoint and the next epoch; without a checkpoint, `progress` and epoch 0 or 1."""
    trainer = programs.trainer
    if checkpoints.latest is None:
        return progress, 1 if trainer.algorithm.on_policy else 0
    progress = replace(progress, stats=programs.stats)
    if not trainer.algorithm.on_policy:
        zeros = lambda shapes, spec: place(  # noqa: E731
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes), trainer.mesh, spec
        )
        progress = replace(progress, data=zeros(programs.data, BY_UPDATE), weight=zeros(programs.weight, SPLIT))
    saved = Progress(**checkpoints.restore(progress.tree()))
    return replace(saved, stats=jax.tree.map(np.asarray, saved.stats)), checkpoints.latest + 1


def run(programs: Programs, plan: Plan, progress: Progress, first: int, outputs: Outputs) -> None:
    """Runs the epochs from `first` to the end. Raises `UserError` if a number of the log is not finite."""
    per_epoch = programs.trainer.updates_per_epoch
    for epoch in range(first, plan.epochs + 2):
        outputs.begins(epoch)
        last, before = epoch == plan.epochs + 1, per_epoch * max(epoch - 1, 0)
        programs.meter.start()
        params = jax.tree.map(jnp.copy, progress.state.params)  # a copy, because the update overwrites them
        shown = last or (epoch > 0 and (epoch - 1) % plan.images_every == 0)
        policy = jax.tree.map(jnp.copy, progress.state.policy) if shown else None  # the LoRA that would be saved
        if last:
            params |= {"lora": progress.state.policy}
        progress, numbers = one(programs, epoch, params, progress, update=not last)
        if policy is not None:
            outputs.images(before, *programs.images(policy))
        row: Row = {"epoch": epoch, "step": before, "updates": per_epoch * min(epoch, plan.epochs)}
        row |= numbers | programs.meter.numbers(plan.samples)
        outputs.row(row)
        stop_if_not_finite(row)
        if not last and epoch > 0 and (epoch == plan.epochs or epoch % plan.save_every == 0):
            outputs.save(epoch, per_epoch * epoch, progress)
        outputs.ends(epoch)


def one(programs: Programs, epoch: int, params: Params, progress: Progress, *, update: bool) -> tuple[Progress, Row]:
    """Runs one epoch: samples with `params` and, if `update`, trains. Returns the new progress and the log row."""
    trainer, state = programs.trainer, progress.state
    metrics: dict[str, Any] = {}
    keys, ids, prompt_id = programs.given(epoch)
    sampled: Sampled = programs.rollout(params, keys, ids)
    if not trainer.algorithm.on_policy and update and progress.data is not None:
        state, metrics = programs.update(state, progress.data, progress.weight)  # starts while sampling runs
    meet(f"epoch {epoch}")
    scalars = {name: gather(value, trainer.mesh) for name, value in sampled.scalars.items()}
    numbers = {"reward_mean": scalars[TOTAL].mean(), "reward_std": scalars[TOTAL].std()}
    parts = {name: value for name, value in scalars.items() if name.startswith(f"{TOTAL}_")}
    numbers |= {f"reward_mean{name.removeprefix(TOTAL)}": value.mean() for name, value in parts.items()}
    host_weight, stats = trainer.algorithm.weigh(progress.stats, scalars, prompt_id)
    weight = place(host_weight, trainer.mesh, SPLIT)
    if not trainer.algorithm.on_policy:
        progress = Progress(state, stats, sampled.data, weight)
    elif update:
        state, metrics = programs.update(state, sampled.data, weight)
        progress = Progress(state, stats)
    return progress, {name: float(value) for name, value in (metrics | numbers).items()}  # waits for the devices


def stop_if_not_finite(row: Row) -> None:
    """Raises `UserError` if a reward, loss or gradient is not finite, before the epoch is saved as a checkpoint."""
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} in epoch {row['epoch']} is not finite; the last checkpoint and LoRA are from before it: "
            "lower training.learning_rate or algorithm.beta in a new workdir"
        )
