"""What a cell leaves behind, as rows of tables: its cost and results after each saved LoRA, and its log."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import append
from nabla_gfn_jax.reports.evaluated import evaluated
from nabla_gfn_jax.runs import evaluations, manifest, metrics_log

CPU = "cpu_seconds.jsonl"

Record = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """What training has cost until the end of an epoch."""

    trajectories: int = 0
    tflop: float = 0.0  # counted, of all devices
    seconds: float = 0.0
    cpu_seconds: float | None = 0.0  # of all cores, with compiling; None if it was not measured


def add_cpu_seconds(workdir: Path, epoch: int, seconds: float) -> None:
    """Notes the CPU time of an epoch. The row of an epoch that a resumed run repeats replaces the earlier one."""
    append(workdir / CPU, (json.dumps({"epoch": epoch, "cpu_seconds": round(seconds, 2)}) + "\n").encode())


def costs(workdir: Path) -> dict[int, Cost]:
    """The cost of training until the end of each epoch in the log, by epoch. The last only samples and costs none."""
    about, rows, cpu = manifest.read(workdir), metrics_log.read(workdir), _cpu_seconds(workdir)
    training = about.config["training"]
    devices, found, cost = about.devices.get("count", 1), {}, Cost()
    for row in rows:
        if row["epoch"] <= training["num_epochs"]:
            seconds = row.get("seconds") or 0.0
            before = cost.cpu_seconds
            cost = Cost(
                trajectories=cost.trajectories + training["trajectories"],
                tflop=cost.tflop + (row.get("flops_per_second") or 0.0) * seconds * devices / 1e12,
                seconds=cost.seconds + seconds,
                cpu_seconds=None if before is None or row["epoch"] not in cpu else before + cpu[row["epoch"]],
            )
        found[row["epoch"]] = cost
    return found


def results(workdir: Path) -> list[Record]:
    """A record of each saved LoRA that was measured: updates, cost, and all figures; `_se`: their standard errors."""
    measured = evaluated(evaluations.read(workdir), starts_from_lora=True)
    each = manifest.read(workdir).config["training"]["updates_per_epoch"]
    spent = costs(workdir)
    found = []
    for updates, row in {} if measured is None else measured.of.items():
        cost = spent.get(updates // each, Cost(cpu_seconds=None))
        found.append({"updates": updates} | _shown(cost) | evaluations.figures(row))
    return found


def curve(workdir: Path) -> Iterator[Record]:
    """A record of each epoch of the log: the reward of the policy after `updates` updates, and the cost until then."""
    spent = costs(workdir)
    samples = manifest.read(workdir).config["training"]["trajectories"]
    for row in metrics_log.read(workdir):
        before = spent.get(row["epoch"] - 1, Cost())
        numbers = {name: row[name] for name in ("reward_mean", "reward_std", "loss", "lost_samples") if name in row}
        yield {"updates": row["step"], "epoch": row["epoch"], "samples": samples} | _shown(before) | numbers


def _shown(cost: Cost) -> Record:
    found: Record = {"trajectories": cost.trajectories, "tflop": cost.tflop, "seconds": cost.seconds}
    return found | ({} if cost.cpu_seconds is None else {"cpu_seconds": cost.cpu_seconds})


def _cpu_seconds(workdir: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    file = workdir / CPU
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            found[int(row["epoch"])] = float(row["cpu_seconds"])
        except (ValueError, KeyError, TypeError):  # a kill has cut the line short
            continue
    return found
