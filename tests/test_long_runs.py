"""A long run: memory, open files, threads and workdir do not grow, whatever a logger does."""

import os
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_parallel import without_images
from test_training import rows
from tiny_run import brightness, flags, last_of_each

from nabla_gfn_jax import train
from nabla_gfn_jax.command_line import parse_run
from nabla_gfn_jax.options import flatten
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs import metrics_log
from nabla_gfn_jax.runs.workdir import claim
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import about, free_fields

EPOCHS, SETTLED = 250, 25  # of two updates each
FIELDS = {
    "training.num_epochs": EPOCHS,
    "logging.samples_every": 1000,
    "logging.checkpoint_every": 5,
    "logging.keep_loras": 2,
    "logging.wandb": True,
    "algorithm.credit": "adjoint",
}


def measured(workdir: Path) -> dict[str, int]:
    """What this process and the run hold now."""
    files = [file for file in workdir.rglob("*") if file.is_file()]
    return {
        "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(files),
        "log": (workdir / "metrics.jsonl").stat().st_size,
        "other bytes": sum(file.stat().st_size for file in files if file.name != "metrics.jsonl"),
    }


@pytest.mark.slow
def test_500_updates_with_a_logger_that_hangs(tiny_model, tmp_path, monkeypatch, capsys):
    """After the first 50 updates. The checkpoints of five epochs are compared with those of other five."""
    without_images(monkeypatch)
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))
    never = threading.Event()
    monkeypatch.setattr("nabla_gfn_jax.runs.sinks.wandb", lambda *_: (lambda row: never.wait(), lambda: None))
    monkeypatch.setattr(metrics_log.MetricsLog.close, "__defaults__", (0.5,))
    argv = ["train", *last_of_each([*flags(tiny_model, tmp_path), *(f"--config.{n}={v}" for n, v in FIELDS.items())])]
    _, settings = parse_run(argv, train.Options, Settings, "")
    held, times = [], []

    def look(row):
        times.append(time.monotonic())
        if row["epoch"] % 5 == 4:
            held.append({"epoch": row["epoch"]} | measured(tmp_path))

    with claim(tmp_path, flatten(settings), free_fields(settings), about(settings)) as workdir:
        train.finetune(settings, workdir, on_epoch=look)
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(EPOCHS + 2))
    settled = [one for one in held if SETTLED <= one["epoch"] < EPOCHS]
    first, last = settled[: len(settled) // 3], settled[-len(settled) // 3 :]
    for name in held[0]:
        of = [statistics.median(one[name] for one in part) for part in (first, last)]
        print(f"{name}: {of[0]:g} to {of[1]:g}")
    change = {name: np.median([o[name] for o in last]) - np.median([o[name] for o in first]) for name in held[0]}
    assert change["memory"] < 16 * 2**20
    assert change["open files"] <= 0
    assert change["threads"] <= 0
    assert change["files"] <= 0
    assert abs(change["other bytes"]) < 2**14
    assert change["log"] < 1024 * change["epoch"]
    each = np.diff(times)
    print(f"epochs: {np.median(each[SETTLED:100]):.3f} s, then {np.median(each[-75:]):.3f} s")
    assert np.median(each[-75:]) < 1.5 * np.median(each[SETTLED:100])
    assert "Weights & Biases has not taken all rows in 0.5 s" in capsys.readouterr().err
