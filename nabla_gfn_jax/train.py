"""Finetunes a text-to-image model with a reward: `python -m nabla_gfn_jax.train --config=configs/emoji.py`.

The same command on the same workdir resumes. Docstrings of the config files say what each field means.
"""

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from nabla_gfn_jax.checkpoints.lora_file import save_kohya, save_lora
from nabla_gfn_jax.checkpoints.training_state import Checkpoints
from nabla_gfn_jax.command_line import claim_workdir, parse_flags, workdir_of
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.configuration import build, prompts_of
from nabla_gfn_jax.diffusion.text_to_image import Condition, encode_prompts
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.images import save_grid
from nabla_gfn_jax.parallel import place, use_cpu_cores
from nabla_gfn_jax.training.finetuner import ROLLOUT_SPLIT, Finetuner, TrainState
from nabla_gfn_jax.training.metrics_log import MetricsLog
from nabla_gfn_jax.typing import PRNGKey, PRNGKeys


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Configuration → pieces → restore → for each epoch: sample, update, log, save."""
    config, options = parse_flags(argv, "configs/emoji.py", {"workdir": ""})
    workdir = workdir_of(options)
    claim_workdir(workdir, config)
    use_compilation_cache()
    use_cpu_cores(config.training.trajectories // max(config.training.micro_batches, 1))
    pieces = build(config)
    prompts = Prompts(pieces, prompts_of(config))
    state, pending, first = restore(pieces, Checkpoints(workdir / "checkpoints"), config, prompts)
    run(pieces, config, workdir, prompts, state, pending, first)
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
    pieces: Finetuner, checkpoints: Checkpoints, config: ConfigDict, prompts: Prompts
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
    config: ConfigDict,
    workdir: Path,
    prompts: Prompts,
    state: TrainState,
    pending: Any,
    first: int,
) -> None:
    """The epochs. An epoch trains on the trajectories of the epoch before it; the first only samples."""
    compiled = pieces.compile()
    seed = jax.random.key(config.seed)
    checkpoints = Checkpoints(workdir / "checkpoints")
    # The same prompts and noise in every grid, and none that training draws.
    grid_keys = sample_keys(jax.random.fold_in(seed, 2**31 - 1), 0, config.training.trajectories)
    epochs = config.training.num_epochs
    bar = tqdm(range(first, epochs + 1), initial=first, total=epochs + 1, unit="epoch", dynamic_ncols=True)
    with closing(MetricsLog(workdir, first * pieces.updates_per_epoch, config)) as log:
        for epoch in bar:
            start = time.time()
            last = epoch == epochs
            keys = sample_keys(seed, epoch, config.training.trajectories)
            params = jax.tree.map(jnp.copy, state.params)  # the epoch's own: the update overwrites them
            row: dict[str, Any] = {"step": epoch * pieces.updates_per_epoch, "epoch": epoch}
            if pending is not None:
                state, metrics = compiled.update(pieces.frozen, state, pending)
                row |= metrics
            sampled = compiled.rollout(pieces.frozen, params, keys, prompts.draw(keys))
            grid = None
            if epoch == 1 or (epoch > 0 and epoch % config.logging.samples_every == 0) or last:
                made = epoch if last else epoch - 1  # epochs of updates; the first grid, in epoch 1, is the base's
                drawn = state.params if last else params
                grid = compiled.draw(pieces.frozen, drawn, grid_keys, prompts.cycle(len(grid_keys)))
            if pending is None:  # compiled while the first trajectories are drawn
                compiled.update.lower(pieces.frozen, state, sampled.transitions).compile()
            pending = sampled.transitions
            row |= {"reward_mean": sampled.log_reward.mean(), "reward_std": sampled.log_reward.std()}
            finish(row, start, log, workdir, bar)
            if grid is not None:
                file = workdir / f"samples/update_{made * pieces.updates_per_epoch:05d}.png"
                save_grid(file, np.asarray(grid), columns=8, zoom=2)
            if last or (epoch > 0 and epoch % config.logging.checkpoint_every == 0):
                checkpoints.save(epoch, {"state": state, "pending": pending})
                save_lora(workdir / "lora/diffusers.safetensors", state.params["lora"])
                save_kohya(workdir / "lora/kohya.safetensors", state.params["lora"])


def finish(row: dict[str, Any], start: float, log: MetricsLog, workdir: Path, bar: tqdm) -> None:
    """Waits for the epoch's numbers, writes and shows them, and stops the run if one is no number."""
    numbers = {name: float(value) for name, value in row.items()}
    numbers |= {"step": row["step"], "epoch": row["epoch"], "seconds": time.time() - start}
    log.write(numbers)
    stop_if_not_finite(numbers, workdir)
    bar.set_postfix(reward=f"{numbers['reward_mean']:.3f}", loss=f"{numbers.get('loss', float('nan')):.3g}")


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
