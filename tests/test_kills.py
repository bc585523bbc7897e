"""A run that is killed with SIGKILL again and again ends with the same files as one that was left alone."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_training import rows, without_time
from tiny_run import fitting, flags

from nabla_gfn_jax.runs import loras
from nabla_gfn_jax.runs.checkpoints import Checkpoints

HERE = Path(__file__).parent
MORE = ("--config.training.num_epochs=8", "--config.logging.checkpoint_every=2")
# What algorithms remember: pending transitions, rewards of prompts, weights, paths, a network beside the LoRA.
REMEMBERS = {
    "transitions": ("--config.algorithm.credit=adjoint",),
    "rewards": ("--config=ddpo:emoji", "--config.algorithm.min_count=2"),
    "weights": ("--config=path_regression",),
    "paths": ("--config=emoji_exact", "--config.algorithm.after=0", "--config.sampling.lora_until_step=8"),
    "network": ("--config=emoji_exact:network", "--config.algorithm.states=4", "--config.sampling.lora_until_step=8"),
}


def run(model: Path, workdir: Path, what: str, kill_at: str) -> tuple[int, str]:
    """Exit code and stderr of a start of the run whose algorithm remembers `what`."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "KILL_AT": kill_at,
    }
    chosen = fitting([*flags(model, workdir), *MORE, *REMEMBERS[what]])
    command = [sys.executable, str(HERE / "killed_process.py"), str(workdir), *chosen]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    return ended.returncode, ended.stderr


def last_state(workdir: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint: LoRA, optimizer, the samples of the last epoch."""
    with Checkpoints(workdir / "checkpoints") as saves:
        read = saves._manager.restore(saves.latest, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(read)]


@pytest.mark.slow
@pytest.mark.parametrize("what", REMEMBERS)
def test_a_run_killed_at_random_instants_ends_with_the_same_bits(tiny_model, tmp_path, what):
    """Half of the kills come just before a file is changed, half at a random time of the start.

    `KILLS` is their number, and `SEED` chooses the instants.
    """
    kills, chance = int(os.environ.get("KILLS", "20")), random.Random(int(os.environ.get("SEED", "0")))
    whole, begun, killed = tmp_path / "whole", 0.0, []
    for folder in (tmp_path / "compiles", whole):  # the time of a kill is chosen within a run that compiles nothing
        begun = time.monotonic()
        assert run(tiny_model, folder, what, "never")[0] == 0
    duration, workdirs = time.monotonic() - begun, (tmp_path / f"run{i}" for i in itertools.count())
    workdir = next(workdirs)
    while len(killed) < kills:
        when = f"file:{chance.randint(1, 60)}" if len(killed) % 2 else f"time:{chance.uniform(0.2, 1) * duration:.2f}"
        code, error = run(tiny_model, workdir, what, when)
        if code == 0:  # the run has ended before: another one, from the beginning
            compare(workdir, whole)
            workdir = next(workdirs)
            continue
        assert code == -signal.SIGKILL, error
        assert "is damaged" not in error
        log = rows(workdir) if (workdir / "metrics.jsonl").exists() else []
        killed.append((when, len(log)))
        print("killed", *killed[-1], flush=True)
    assert run(tiny_model, workdir, what, "never")[0] == 0
    compare(workdir, whole)
    print(f"{kills} kills:", killed)


def compare(workdir: Path, whole: Path) -> None:
    assert list(map(without_time, rows(workdir))) == list(map(without_time, rows(whole)))
    epochs = [row["epoch"] for row in rows(workdir)]
    assert epochs in (list(range(10)), list(range(1, 10)))  # off policy, the first epoch only samples
    assert loras.saved(workdir).keys() == loras.saved(whole).keys()
    for folder in loras.saved(whole).values():
        for file in folder.iterdir():
            assert (workdir / "lora" / folder.name / file.name).read_bytes() == file.read_bytes()
    for name in (file.name for file in (whole / "samples").iterdir()):
        assert (workdir / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()
    for ours, theirs in zip(last_state(workdir), last_state(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not list(workdir.rglob("*.unfinished"))
