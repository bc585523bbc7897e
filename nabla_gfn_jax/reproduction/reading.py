"""Reads results for notebooks: of a grid, or of one run's workdir."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.reproduction import records, tables, thumbnails
from nabla_gfn_jax.reproduction.records import Record
from nabla_gfn_jax.runs import evaluations, manifest, pictures
from nabla_gfn_jax.runs.pictures import Pictures

Key = tuple[str, str]  # base and method


@dataclass(frozen=True)
class Results:
    """The tables of a grid. A run alone has one base and one method, named by its reward and algorithm."""

    rows: list[Record]  # one for each measured LoRA, base model and failed run
    curves: list[Record]  # one for each epoch of each run
    frontier: list[Record]  # of the tilted base model
    about: Record  # the manifest of the grid
    folders: dict[Key, Path] = field(default_factory=dict)  # of the pictures

    @property
    def bases(self) -> list[str]:
        """The names of the base configs."""
        return list(dict.fromkeys(row["base"] for row in self.rows))

    def methods(self, base: str) -> list[str]:
        """The names of the methods with results for a base, without the base model and without methods that failed."""
        ended = {row["method"]: row.get("status") for row in self.rows if row["base"] == base}
        named = dict.fromkeys(row["method"] for row in (*self.rows, *self.curves) if row["base"] == base)
        return [n for n in named if n != tables.BASE_MODEL and ended.get(n) != tables.FAILED]

    def label(self, base: str, method: str = "") -> str:
        """The name of a base, or of a method, in figures."""
        rows = [r for r in (*self.rows, *self.curves) if r["base"] == base and method in ("", r["method"])]
        return str(rows[0]["label" if method else "base_label"]) if rows else method or base

    def chosen(self, table: Iterable[Record], base: str, method: str) -> list[Record]:
        """The rows of a method at its chosen learning rate."""
        return [r for r in table if (r["base"], r["method"]) == (base, method) and r.get("chosen", True)]

    def over(self, x: str, y: str, base: str, method: str) -> list[tuple[float, Estimate, int]]:
        """(x, mean of y over the seeds with its spread, number of seeds) of a method, in ascending order of updates.

        The spread is the standard deviation over seeds or, of a single seed, the standard error of y. Numbers of the
        log's columns are read from the curves, all others from the measured LoRAs. Only updates that all seeds have are
        taken.
        """
        table = self.curves if any(y in row for row in self.curves) else self.rows
        mine = [r for r in self.chosen(table, base, method) if known(r.get(y)) and known(r.get(x))]
        runs: dict[Any, dict[float, list[Record]]] = {row["seed"]: {} for row in mine}
        for row in mine:
            runs[row["seed"]].setdefault(row["updates"], []).append(row)
        common = sorted(set.intersection(*(set(run) for run in runs.values()))) if runs else []
        found = []
        for updates in common:
            each = [run[updates] for run in runs.values()]
            values = [float(np.mean([row[y] for row in rows])) for rows in each]
            at = float(np.mean([row[x] for rows in each for row in rows]))
            found.append((at, spread(values, each[0][-1].get(f"{y}_se", math.nan)), len(values)))
        return found

    def last(self, base: str, method: str) -> list[Record]:
        """The row of the LoRA with the most updates, of each seed at the chosen learning rate."""
        rows = [r for r in self.chosen(self.rows, base, method) if r.get("status") != tables.FAILED and "updates" in r]
        seeds = dict.fromkeys(r.get("seed") for r in rows)
        return [max((r for r in rows if r.get("seed") == seed), key=lambda r: r["updates"]) for seed in seeds]

    def figure(self, y: str, rows: Sequence[Record]) -> Estimate | None:
        """The mean of y over rows of different seeds, with the spread of `over`; None if a row does not have it."""
        values = [row.get(y) for row in rows]
        if not values or not all(map(known, values)):
            return None
        return spread([float(v) for v in values if v is not None], rows[0].get(f"{y}_se", math.nan))

    def pictures(self, base: str, method: str) -> dict[int, Pictures]:
        """The pictures of a method by the number of updates, those that can be read."""
        folder = self.folders.get((base, method))
        files = {} if folder is None else {int(f.stem): f for f in sorted(folder.glob("*.png")) if f.stem.isdecimal()}
        found = {updates: pictures.read(file) for updates, file in files.items()}
        return {updates: those for updates, those in found.items() if those is not None}


def load(folder: Path | str) -> Results:
    """The results in a folder: `results/` of a grid, the folder of a grid, or the workdir of a run.

    Raises `UserError` if the folder is none of them.
    """
    path = Path(folder).expanduser()
    for place in (path, path / tables.FOLDER):
        if (place / tables.RESULTS).is_file():
            return _of_grid(place)
    if (path / "metrics.jsonl").is_file() and (path / manifest.NAME).is_file():
        return _of_run(path)
    raise UserError(f"{path} holds no results; name the folder of a grid, its results, or the workdir of a run")


def known(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def spread(values: Sequence[float], error: float) -> Estimate:
    """The mean and the standard deviation of the values; of a single value, `error`."""
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else error)


def _of_grid(folder: Path) -> Results:
    files = (tables.RESULTS, tables.CURVES, tables.FRONTIER)
    rows, curves, frontier = (_read(folder / name) for name in files)
    about = json.loads((folder / tables.MANIFEST).read_text(encoding="utf-8"))
    shown = (folder / thumbnails.FOLDER).glob("*/*")
    return Results(rows, curves, frontier, about, {(f.parent.name, f.name): f for f in sorted(shown) if f.is_dir()})


def _of_run(workdir: Path) -> Results:
    about = manifest.read(workdir)
    base, method = about.reward or "reward", about.algorithm or "run"
    rate = about.config["training"]["learning_rate"]
    named = {"base": base, "base_label": base, "method": method, "label": method, "learning_rate": rate}
    named |= {"seed": about.config["seed"], "chosen": True}
    of_base = [row for row in evaluations.read(workdir) if row.get("model") == "base"][-1:]
    rows = [
        {"base": base, "base_label": base, "method": tables.BASE_MODEL, "label": "base model", "updates": 0}
        | evaluations.figures(row)
        for row in of_base
    ]
    rows += [named | row for row in records.results(workdir)]
    curves = [named | row for row in records.curve(workdir)]
    return Results(rows, curves, [], {"starts": list(about.starts)}, {(base, method): workdir / pictures.FOLDER})


def _read(file: Path) -> list[Record]:
    """The rows of a CSV file, without empty cells; numbers and truth values in their types."""
    with file.open(encoding="utf-8", newline="") as opened:
        return [{name: _typed(text) for name, text in row.items() if text} for row in csv.DictReader(opened)]


def _typed(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    kinds: tuple[Callable[[str], Any], ...] = (int, float)
    for kind in kinds:
        try:
            return kind(text)
        except ValueError:
            continue
    return text
