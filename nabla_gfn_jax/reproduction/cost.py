"""The cost of a grid, estimated before it runs: FLOPs counted from shapes, and the time on named devices."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.flops import FULL, count_flops
from nabla_gfn_jax.parallel import data_mesh
from nabla_gfn_jax.planning.chips import Chip, chip_of
from nabla_gfn_jax.planning.phases import Plan
from nabla_gfn_jax.planning.table import ASSUMED_SHARE
from nabla_gfn_jax.reproduction import tables
from nabla_gfn_jax.reproduction.cells import Cell, planned
from nabla_gfn_jax.reproduction.grid import Grid
from nabla_gfn_jax.reproduction.progress import duration
from nabla_gfn_jax.settings import Settings

Flops = Counter[str]  # by the operands' type


@dataclass(frozen=True)
class Cost:
    """The FLOPs of a run. `evaluation` is None if the held-out prompts are not known without a download."""

    training: Flops
    evaluation: Flops | None

    @property
    def total(self) -> Flops:
        return self.training + (self.evaluation or Counter())


def show(grid: Grid, folder: Path, topology: str) -> str:
    """The text of a plan: a line for each base and method, and the sum. Traces the programs of each; runs nothing.

    Raises `UserError` for an unknown topology.
    """
    chip, devices = (chip_of(topology), _devices(topology)) if topology else (None, 1)
    cells = planned(grid)
    done = [cell for cell in cells if tables.status(folder, cell) == tables.DONE]
    lines = [
        f"{grid.name}: {len(cells)} runs = {len(grid.bases)} configs × {len(grid.methods)} methods × (learning rates + "
        f"{len(grid.shared.seeds) - 1} more seeds); {len(done)} are done",
        f"each saved LoRA is measured on {grid.shared.evaluation.num} images of each held-out prompt",
        "",
        "| config | method | runs | updates | trajectories | PFLOP of a run | with evaluation | all runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total, unknown = Counter[str](), []
    for base in grid.bases:
        for method in grid.methods:
            mine = [cell for cell in cells if (cell.base, cell.method) == (base, method)]
            try:
                one = of_run(mine[0], grid.shared.evaluation.num)
            except UserError as error:
                lines.append(f"| {base} | {method} | {len(mine)} | not known: {error} | | | | |")
                unknown.append(method)
                continue
            of_all = Counter({kind: len(mine) * flops for kind, flops in one.total.items()})
            total += of_all
            lines.append(_line(mine, one, _time(of_all, chip, devices)))
    lines += ["", f"all {len(cells)} runs: {total.total() / 1e15:.4g} PFLOP{_ending(total, chip, devices, topology)}"]
    if unknown:
        lines.append(f"without {len(unknown)} lines that are not known")
    return "\n".join(lines)


def of_run(cell: Cell, num: int) -> Cost:
    """The FLOPs of a run and of its evaluation on `num` images of each held-out prompt, from the shapes of the weights.

    An evaluation samples with the policy, and evaluates the base model at each state; its metrics are not counted.
    """
    s = cell.settings
    mesh = data_mesh(s.training.trajectories, s.training.micro_batches, np.asarray(jax.devices()[:1]))
    plan = Plan(s, chip_of("v5e"), mesh, full_effort=False)
    rollout, update = (count_flops(f, *a) for f, a in (plan.phase(n, plan.trainer) for n in ("rollout", "update")))
    _, (frozen, params, keys, ids) = plan.phase("rollout", plan.trainer)
    images = count_flops(plan.trainer.images, frozen, {"lora": params["lora"]}, keys, ids)
    training = _times(rollout, cell.epochs) + _times(update, s.training.num_epochs)
    prompts, saved = _held_out(s), -(-s.training.num_epochs // s.logging.checkpoint_every)
    if prompts is None:
        return Cost(training, None)
    return Cost(training, _times(images, 2.0 * saved * num * prompts / s.training.trajectories))


def _held_out(settings: Settings) -> int | None:
    try:
        return len(prompt_set(settings.prompts).held_out)
    except UserError:  # the set must be downloaded first
        return None


def _times(flops: Mapping[str, float], factor: float) -> Flops:
    return Counter({kind: factor * count for kind, count in flops.items()})


def _line(cells: list[Cell], one: Cost, time: str) -> str:
    c, first = cells[0].settings.training, cells[0]
    updates = c.num_epochs * c.updates_per_epoch
    trajectories = c.trajectories * (first.epochs - 1)
    whole = f"{one.total.total() / 1e15:.4g}" if one.evaluation is not None else "not known"
    numbers = (len(cells), updates, trajectories, f"{one.training.total() / 1e15:.4g}", whole, time)
    return f"| {first.base} | {first.method} | {' | '.join(map(str, numbers))} |"


def _time(flops: Flops, chip: Chip | None, devices: int) -> str:
    if chip is None:
        return f"{flops.total() / 1e15:.4g} PFLOP"
    return duration(_seconds(flops, chip, devices))


def _seconds(flops: Flops, chip: Chip, devices: int) -> float:
    rounded = flops.total() - flops[FULL]
    return (rounded / chip.flops + flops[FULL] / chip.float32_flops) / (devices * ASSUMED_SHARE)


def _ending(flops: Flops, chip: Chip | None, devices: int, topology: str) -> str:
    if chip is None:
        return "; --topology=v5e:2x4 estimates the time"
    time = duration(_seconds(flops, chip, devices))
    return f", {time} on {topology}, assuming {ASSUMED_SHARE:.0%} of the peak rate; estimated, not measured"


def _devices(topology: str) -> int:
    """The number of devices of a topology such as v5e:2x4 or a100:8."""
    sides = topology.partition(":")[2].split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"topology {topology!r} is not understood; write it like v5e:2x4 or a100:8")
    return int(np.prod([int(side) for side in sides]))
