"""The time that training waits for a checkpoint, and the time until it is on the disk."""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.parallel import SPLIT, place
from nabla_gfn_jax.runs.checkpoints import Checkpoints
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import build
from nabla_gfn_jax.training.loop import sample_keys
from nabla_gfn_jax.training.prompts import PromptIds

_SAVES = 5


def run() -> Iterator[tuple[str, str, str, str]]:
    """Times saves of a tree with the shapes of a run's state and random numbers, after a first save."""
    for name in ("emoji", "emoji_exact"):
        tree = state_of(name)
        leaves = jax.tree.leaves(tree)
        size = sum(leaf.nbytes for leaf in leaves) / 1e6
        times = []
        with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder) / "checkpoints") as saves:
            for step in range(_SAVES + 1):
                start = time.perf_counter()
                saves.save(step, tree, {"seconds": 0.0})
                copied = time.perf_counter() - start
                saves.wait()
                times.append((copied, time.perf_counter() - start))
        copied, written = (statistics.median(column) for column in zip(*times[1:], strict=True))
        what = f"(f) save of a checkpoint, configs/{name}.py, {size:.0f} MB in {len(leaves)} arrays"
        yield what, "", f"training waits {copied:.3f} s; on the disk after {written:.2f} s", ""


def state_of(config: str) -> dict[str, Any]:
    """What `Progress.tree` has after an epoch of the config, with random numbers. Nothing is compiled."""
    settings = load_settings(Settings, config)
    trainer, count = build(settings), settings.training.trajectories
    state = trainer.first_state(settings.seed, settings.lora.rank, settings.lora.layers)
    keys = sample_keys(jax.random.key(0), 0, count)
    ids = PromptIds(trainer.num_prompts).chosen(keys)
    sampled = trainer.rollout.trace(trainer.frozen, state.params, *place((keys, ids), trainer.mesh, SPLIT)).out_info
    weight, stats = trainer.told(sampled.scalars, count)
    rng = np.random.default_rng(0)
    kept = {} if trainer.algorithm.on_policy else {"data": sampled.data, "weight": weight}
    made = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), {"stats": stats} | kept)
    return {"state": jax.tree.map(np.asarray, state), "data": None, "weight": None} | made
