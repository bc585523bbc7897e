"""Finetunes a text-to-image model with a reward: `python -m nabla_gfn_jax.train --config=emoji`.

The same command on the same workdir resumes. Several processes, a machine each: the same command on each with
`--distributed` where the cluster says who they are, or `--coordinator=HOST:PORT --num_processes=N --process_id=I`, and
one workdir that all of them see.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nabla_gfn_jax.checkpoints.lora_file import save_kohya, save_lora
from nabla_gfn_jax.checkpoints.training_state import Checkpoints
from nabla_gfn_jax.command_line import default_workdir, parse_run
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.configuration import build, check, prompts_of
from nabla_gfn_jax.diffusion.text_to_image import Condition, encode_prompts
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.options import option
from nabla_gfn_jax.parallel import SPLIT, gather, place, placed, use_cpu_cores
from nabla_gfn_jax.processes import ProcessOptions, ending_together, is_first, join, meet
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.finetuner import ROLLOUT_SPLIT, Finetuner, Rollout, TrainState
from nabla_gfn_jax.training.metrics_log import MetricsLog
from nabla_gfn_jax.training.profiling import Meter, Trace
from nabla_gfn_jax.typing import Params, PRNGKey, PRNGKeys
from nabla_gfn_jax.workdir import claim_workdir


@dataclass(frozen=True, kw_only=True)
class Options(ProcessOptions):
    """What a run is told beside its settings."""

    config: str = option("emoji", "a shipped config's name or a Python file, and :VARIANT where it has any")
    workdir: Path | None = option(None, "folder of the run [runs/CONFIG-VARIANT/seedN]")
    profile: bool = option(False, "trace two epochs, for TensorBoard or XProf, into WORKDIR/profile")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Configuration → pieces → restore → for each epoch: sample, update, log, save."""
    options, config = parse_run(argv, Options, Settings, __doc__)
    workdir = options.workdir or default_workdir(options.config, config.seed)
    use_cpu_cores(config.training.trajectories // config.training.micro_batches)
    join(options)
    with ending_together():
        check(config)
        claim_workdir(workdir, config, write=is_first())
        use_compilation_cache()
        pieces = build(config)
        prompts = Prompts(pieces, prompts_of(config))
        state, pending, first = restore(pieces, Checkpoints(workdir / "checkpoints"), config, prompts)
        run(pieces, config, workdir, prompts, state, pending, first, profile=options.profile)
        if is_first():
            print(
                f"done. metrics: {workdir / 'metrics.jsonl'}   samples: {workdir / 'samples'}   "
                f"LoRA: {workdir / 'lora' / 'diffusers.safetensors'}   checkpoints: {workdir / 'checkpoints'}"
            )


class Prompts:
    """A prompt set with its text features, encoded once and kept in the host's memory, and draws from it by key."""

    def __init__(self, pieces: Finetuner, prompts: tuple[str, ...]):
        self.texts = prompts
        features = encode_prompts(pieces.base, prompts)
        features["reward"] = pieces.reward.encode_prompts(list(prompts))
        self.features: Condition = jax.tree.map(np.asarray, features)

    def draw(self, keys: PRNGKeys) -> Condition:
        """One prompt for each key."""
        chosen = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.texts)))(keys))
        return jax.tree.map(lambda a: a[chosen], self.features)

    def cycle(self, count: int) -> Condition:
        """The prompts in order, over and over."""
        return jax.tree.map(lambda a: a[np.arange(count) % len(self.texts)], self.features)


def sample_keys(key: PRNGKey, epoch: int, count: int) -> PRNGKeys:
    """One key a sample from (seed, epoch, sample index) alone: the same on any number of devices."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), jnp.arange(count))


def restore(
    pieces: Finetuner, checkpoints: Checkpoints, config: Settings, prompts: Prompts
) -> tuple[TrainState, Any, int]:
    """State, the transitions that wait to be trained on, and the next epoch: the last save's, or the beginning's."""
    state = pieces.init(config.seed, config.lora.rank)
    if checkpoints.latest is None:
        return state, None, 0
    keys = sample_keys(jax.random.key(config.seed), 0, config.training.trajectories)
    rollout = pieces.compile().rollout
    pending = jax.eval_shape(rollout, pieces.frozen, state.params, keys, prompts.draw(keys)).transitions
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), pending)
    like = {"state": state, "pending": place(zeros, pieces.mesh, ROLLOUT_SPLIT.transitions)}
    saved = checkpoints.restore(like)
    return saved["state"], saved["pending"], checkpoints.latest + 1


def run(
    pieces: Finetuner,
    config: Settings,
    workdir: Path,
    prompts: Prompts,
    state: TrainState,
    pending: Any,
    first: int,
    *,
    profile: bool = False,
) -> None:
    """The epochs. An epoch trains on the trajectories of the epoch before it; the first only samples."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    epochs = config.training.num_epochs
    trace = Trace(workdir, first, epochs, wanted=profile)
    steps = Epochs(pieces, config, prompts)
    quiet = not is_first()
    bar = tqdm(
        range(first, epochs + 1), initial=first, total=epochs + 1, unit="epoch", dynamic_ncols=True, disable=quiet
    )
    with closing(MetricsLog(workdir, first * pieces.updates_per_epoch, config, write=is_first())) as log:
        for epoch in bar:
            trace.before(epoch)
            state, pending, row, grid = steps.one(epoch, state, pending)
            log.write(row)
            stop_if_not_finite(row, workdir)
            bar.set_postfix(reward=f"{row['reward_mean']:.3f}", loss=f"{row.get('loss', float('nan')):.3g}")
            for made, images in grid.items():
                if is_first():
                    save_grid(workdir / f"samples/update_{made:05d}.png", images, columns=8, zoom=2)
            if epoch == epochs or (epoch > 0 and epoch % config.logging.checkpoint_every == 0):
                save(workdir, checkpoints, epoch, state, pending)
            trace.after(epoch)


class Epochs:
    """What an epoch does with the devices."""

    def __init__(self, pieces: Finetuner, config: Settings, prompts: Prompts):
        self._pieces, self._prompts, self._compiled = pieces, prompts, pieces.compile()
        self._seed, self._count = jax.random.key(config.seed), config.training.trajectories
        self._last, self._samples_every = config.training.num_epochs, config.logging.samples_every
        self._meter, self._both_compiled = Meter(), False

    def one(
        self, epoch: int, state: TrainState, pending: Any
    ) -> tuple[TrainState, Any, dict[str, float], dict[int, np.ndarray]]:
        """Updates on the transitions that wait and sampling with the parameters before; the new ones of both, the
        epoch's numbers, and, where one is due, a grid by how many updates its parameters had seen."""
        pieces, compiled = self._pieces, self._compiled
        self._meter.start()
        params = jax.tree.map(jnp.copy, state.params)  # the epoch's own: the update overwrites them
        row: dict[str, Any] = {"step": epoch * pieces.updates_per_epoch, "epoch": epoch}
        keys = sample_keys(self._seed, epoch, self._count)
        drawn = place((keys, self._prompts.draw(keys)), pieces.mesh, SPLIT)
        sampled = self._sample(state, pieces.frozen, params, *drawn)
        if pending is not None:
            state, metrics = self._meter.call("update", compiled.update, pieces.frozen, state, pending)
            row |= metrics
        grid = self._grid(epoch, params, state.params)
        meet(f"epoch {epoch}")
        row |= {"reward_mean": sampled.log_reward.mean(), "reward_std": sampled.log_reward.std()}
        numbers = {name: float(value) for name, value in row.items()}  # waits for all of it
        numbers |= {"step": row["step"], "epoch": row["epoch"]} | self._meter.numbers(self._count)
        return state, sampled.transitions, numbers, {n: gather(images, pieces.mesh) for n, images in grid.items()}

    def _sample(self, state: TrainState, *arguments: Any) -> Rollout:
        """The rollout. The first time it is compiled, and begins, while the update is compiled."""
        rollout, update = self._compiled.rollout, self._compiled.update
        if self._both_compiled:
            return self._meter.call("rollout", rollout, *arguments)
        self._both_compiled = True
        traced = rollout.trace(*arguments)
        self._meter.count("rollout", traced)
        with ThreadPoolExecutor(1) as pool:
            sampling = pool.submit(lambda lowered: lowered.compile()(*arguments), traced.lower())
            transitions = placed(traced.out_info.transitions, self._pieces.mesh, ROLLOUT_SPLIT.transitions)
            update.lower(self._pieces.frozen, state, transitions).compile()
            sampled = sampling.result()
        meet("compiled")
        return sampled

    def _grid(self, epoch: int, before: Params, after: Params) -> dict[int, Any]:
        """The same prompts and noise in every grid, none that training draws; the first, in epoch 1, is the base's."""
        last = epoch == self._last
        if not (epoch == 1 or (epoch > 0 and epoch % self._samples_every == 0) or last):
            return {}
        keys = sample_keys(jax.random.fold_in(self._seed, 2**31 - 1), 0, self._count)
        params, epochs = (after, epoch) if last else (before, epoch - 1)
        drawn = place((keys, self._prompts.cycle(self._count)), self._pieces.mesh, SPLIT)
        images = self._compiled.draw(self._pieces.frozen, params, *drawn)
        return {epochs * self._pieces.updates_per_epoch: images}


def save(workdir: Path, checkpoints: Checkpoints, epoch: int, state: TrainState, pending: Any) -> None:
    """What a resume needs, by all processes, and the LoRA in both layouts."""
    checkpoints.save(epoch, {"state": state, "pending": pending})
    if is_first():
        save_lora(workdir / "lora/diffusers.safetensors", state.params["lora"])
        save_kohya(workdir / "lora/kohya.safetensors", state.params["lora"])


def stop_if_not_finite(row: dict[str, Any], workdir: Path) -> None:
    """A loss or gradient that is no number ends the run before anything of it is saved as a checkpoint."""
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} at step {row['step']} is not finite; its numbers are in {workdir / 'metrics.jsonl'}, "
            "the checkpoint before it is intact: lower training.learning_rate or algorithm.beta in a new workdir"
        )


if __name__ == "__main__":
    main(sys.argv)
