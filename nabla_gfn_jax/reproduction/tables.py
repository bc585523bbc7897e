"""The results of a grid: `results.csv`, `curves.csv`, `frontier.csv`, `thumbnails/` and `manifest.json`."""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints import csv_file
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.reproduction import measuring, records, thumbnails
from nabla_gfn_jax.reproduction.cells import Cell, best_rate, in_order
from nabla_gfn_jax.reproduction.grid import Grid
from nabla_gfn_jax.reproduction.records import Record
from nabla_gfn_jax.runs import evaluations, manifest

FOLDER = "results"  # in the folder of a grid
RESULTS, CURVES, FRONTIER, MANIFEST = "results.csv", "curves.csv", "frontier.csv", "manifest.json"
STATE = "cell.json"  # in a cell's workdir
DONE, FAILED, MISSING = "done", "failed", "missing"
LEADING = (
    *("base", "base_label", "method", "label", "config", "learning_rate", "seed", "stage", "chosen", "status", "error"),
    *("updates", "epoch", "trajectories", "tflop", "seconds", "cpu_seconds", "log_reward", "log_reward_se"),
)
BASE_MODEL = "base"  # the method's name in the rows of the base model


def state(workdir: Path) -> dict[str, Any]:
    """What is noted about a cell that has ended: `seconds`, and `measured` or, if it has failed, `error`."""
    try:
        found = json.loads((workdir / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note(workdir: Path, **about: Any) -> None:
    """Replaces what is noted about a cell."""
    write_json(workdir / STATE, about)


def status(folder: Path, cell: Cell) -> str:
    """`DONE`, `FAILED` or `MISSING`."""
    about = state(folder / cell.folder)
    return FAILED if "error" in about else DONE if "measured" in about else MISSING


def score(folder: Path, grid: Grid, cell: Cell) -> float:
    """The figure that chooses the learning rate, of the cell's LoRA with the most updates; NaN if there is none."""
    if status(folder, cell) != DONE:
        return math.nan
    rows = records.results(folder / cell.folder)
    figure = grid.shared.tuning.figure
    if rows and figure not in rows[-1]:
        known = ", ".join(name for name, value in rows[-1].items() if isinstance(value, float) and name[-3:] != "_se")
        raise UserError(f"tuning.figure = {figure!r} is not among the results; it must be one of {known}")
    return float(rows[-1][figure]) if rows else math.nan


@dataclass(frozen=True)
class Start:
    """A start of the command. `cpu_seconds` is the CPU time of the process when it began."""

    command: str
    begun: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    cpu_seconds: float = field(default_factory=time.process_time)


def write(folder: Path, grid: Grid, start: Start) -> None:
    """Writes all results so far of the grid whose runs are in `folder`."""
    out = folder / FOLDER
    cells = list(in_order(grid, lambda cell: score(folder, grid, cell)))
    logged = [cell for cell in cells if _logged(folder / cell.folder)]
    best = _best(folder, grid)
    about = {cell: _about(grid, cell) | {"chosen": cell.rate == best[cell.base, cell.method]} for cell in cells}
    rows = [*_of_bases(folder, grid), *(about[cell] | row for cell in cells for row in _of_cell(folder, cell))]
    csv_file.write(out / RESULTS, rows, LEADING)
    logs = [about[cell] | row for cell in logged for row in records.curve(folder / cell.folder)]
    csv_file.write(out / CURVES, logs, LEADING)
    csv_file.write(out / FRONTIER, list(_frontiers(folder, grid)), LEADING)
    done = [cell for cell in logged if status(folder, cell) == DONE]
    shown = [cell for cell in done if cell.seed == grid.shared.seeds[0] and about[cell]["chosen"]]
    thumbnails.write({(cell.base, cell.method): folder / cell.folder for cell in shown}, out / thumbnails.FOLDER)
    _write_manifest(folder, grid, cells, start)


def _best(folder: Path, grid: Grid) -> dict[tuple[str, str], float]:
    """The best learning rate of each base and method among the runs so far."""
    pairs = [(base, method) for base in grid.bases for method in grid.methods]
    return {pair: best_rate(grid, *pair, lambda cell: score(folder, grid, cell)) for pair in pairs}


def _of_bases(folder: Path, grid: Grid) -> Iterator[Record]:
    for base, about in grid.bases.items():
        rows = [row for row in evaluations.read(folder / "bases" / base) if row.get("model") == measuring.BASE]
        if rows:
            named = {"base": base, "base_label": about.label or base, "method": BASE_MODEL, "label": "base model"}
            yield named | {"status": DONE, "updates": 0, "trajectories": 0} | evaluations.figures(rows[-1])


def _of_cell(folder: Path, cell: Cell) -> Iterator[Record]:
    about, workdir = {"status": status(folder, cell)}, folder / cell.folder
    if about["status"] == FAILED:
        yield about | {"error": state(workdir)["error"]}
    for row in records.results(workdir) if _logged(workdir) else ():
        yield about | row


def _about(grid: Grid, cell: Cell) -> Record:
    return {
        "stage": cell.stage,
        "base": cell.base,
        "base_label": grid.bases[cell.base].label or cell.base,
        "method": cell.method,
        "label": grid.methods[cell.method].label or cell.method,
        "config": cell.config,
        "learning_rate": cell.rate,
        "seed": cell.seed,
    }


def _logged(workdir: Path) -> bool:
    return (workdir / "metrics.jsonl").is_file() and (workdir / manifest.NAME).is_file()


def _frontiers(folder: Path, grid: Grid) -> Iterator[Record]:
    for base, about in grid.bases.items():
        file = folder / "bases" / base / measuring.FRONTIER
        for point in json.loads(file.read_text())["points"] if file.is_file() else ():
            yield {"base": base, "base_label": about.label or base} | point


def _write_manifest(folder: Path, grid: Grid, cells: Sequence[Cell], start: Start) -> None:
    of = {kind: [cell.name for cell in cells if status(folder, cell) == kind] for kind in (DONE, FAILED, MISSING)}
    write_manifest(folder / FOLDER / MANIFEST, {"grid": grid.name, "contents": grid.contents, "cells": of}, start)


def write_manifest(file: Path, about: Mapping[str, Any], start: Start) -> None:
    """Writes what the results are of, with this start of the command and all earlier ones."""
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    earlier = [one for one in starts if one["begun"] != start.begun]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cpu = round(time.process_time() - start.cpu_seconds, 1)
    here = {"begun": start.begun, "written": now, "cpu_seconds": cpu, "command": start.command}
    here |= {"versions": manifest.versions(), "devices": manifest.devices()}
    total = round(sum(one["cpu_seconds"] for one in earlier) + cpu, 1)
    write_json(file, {**about, "cpu_seconds": total, "starts": [*earlier, here]})
