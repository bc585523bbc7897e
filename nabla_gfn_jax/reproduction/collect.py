"""Makes results as those of a grid from runs that exist already, given by their workdirs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nabla_gfn_jax.checkpoints import csv_file
from nabla_gfn_jax.inference.evaluation import BASE_SAMPLES, States, kept_base_states
from nabla_gfn_jax.metrics.base import NotAvailable
from nabla_gfn_jax.metrics.coverage import Coverage
from nabla_gfn_jax.metrics.tilt import Strata
from nabla_gfn_jax.reports import source
from nabla_gfn_jax.reports.evaluated import evaluated
from nabla_gfn_jax.reproduction import measuring, reading, tables, thumbnails
from nabla_gfn_jax.reproduction.records import Record
from nabla_gfn_jax.rewards import TOTAL


@dataclass(frozen=True)
class Named:
    """A run, and the names of its base and method in the tables."""

    path: Path
    base: str
    method: str


def collect(workdirs: Sequence[Path], out: Path, start: tables.Start) -> None:
    """Writes the tables and the pictures of the runs to `out`.

    Runs that differ only by the seed are one method. The base model's row comes from an evaluation of it, or from the
    samples that an evaluation has kept. Raises `UserError` if a workdir holds no run.
    """
    runs = named(workdirs)
    rows: list[Record] = []
    curves: list[Record] = []
    frontier: list[Record] = []
    for run in runs:
        found, names = reading.load(run.path), {"base": run.base, "base_label": run.base}
        theirs = [row for row in found.rows if row["method"] == tables.BASE_MODEL]
        if not any(row["base"] == run.base and row["method"] == tables.BASE_MODEL for row in rows):
            kept = _base_samples(run.path)
            points = measuring.frontier(_metrics(kept, run.path), kept)
            frontier += [names | point for point in points]
            rows += [row | names for row in theirs] or [names | row for row in _of_base(kept, points)]
        own = names | {"method": run.method, "label": run.method}
        rows += [row | own for row in found.rows if row["method"] != tables.BASE_MODEL]
        curves += [row | own for row in found.curves]
    for file, table in ((tables.RESULTS, rows), (tables.CURVES, curves), (tables.FRONTIER, frontier)):
        csv_file.write(out / file, table, tables.LEADING)
    firsts = {(run.base, run.method): run.path for run in reversed(runs)}
    thumbnails.write(firsts, out / thumbnails.FOLDER)
    done = [f"{run.method} on {run.base}, seed {_seed(run.path)}" for run in runs]
    about = {"grid": "", "contents": {}, "cells": {tables.DONE: done, tables.FAILED: [], tables.MISSING: []}}
    tables.write_manifest(out / tables.MANIFEST, about, start)


def named(workdirs: Sequence[Path]) -> list[Named]:
    """The runs with names: the reward, and the algorithm, with a number if runs of it differ in more than the seed."""
    runs = source.read(workdirs)
    groups = source.groups(runs)
    kinds = [(run.manifest.reward or "reward", run.manifest.algorithm or "run") for run in runs]
    found = []
    for run, group, (reward, algorithm) in zip(runs, groups, kinds, strict=True):
        alike = list(dict.fromkeys(g for g, kind in zip(groups, kinds, strict=True) if kind == (reward, algorithm)))
        number = f"_{alike.index(group) + 1}" if len(alike) > 1 else ""
        found.append(Named(run.path, re.sub(r"[^A-Za-z0-9_-]+", "_", reward), algorithm + number))
    return found


def _base_samples(workdir: Path) -> States:
    """The measurements of the base model's samples that belong to the run's evaluations; {} if there are none."""
    (run,) = source.read([workdir])
    measured = evaluated(run.evaluations, source.starts_from_lora(run.manifest))
    return {} if measured is None else kept_base_states(workdir / BASE_SAMPLES, measured.what)


def _metrics(kept: States, workdir: Path) -> list[Coverage]:
    """The metrics that compute their figures from the kept measurements alone."""
    coverage, (run,) = Coverage(), source.read([workdir])
    measured = evaluated(run.evaluations, source.starts_from_lora(run.manifest))
    if measured is None or coverage.name not in kept:
        return []
    try:
        coverage.prepare(measured.what["prompts"])
    except NotAvailable:
        return []
    return [coverage]


def _of_base(kept: States, points: Sequence[Record]) -> list[Record]:
    """The base model's row: the first point of its frontier, with the standard error of log R."""
    if not points:
        return []
    samples = next(state for state in kept.values() if TOTAL in state.values).by_prompt()
    error = float(Strata(samples.prompt).mean_and_error(samples.values[TOTAL].astype(np.float64))[1])
    figures = {name: value for name, value in points[0].items() if name not in ("exponent", "effective_samples")}
    model = {"method": tables.BASE_MODEL, "label": "base model", "status": tables.DONE, "updates": 0}
    nats = {"spent": 0.0, "base_samples": len(samples.prompt)}
    return [model | figures | nats | {f"{TOTAL}_se": error}]


def _seed(workdir: Path) -> int:
    return int(source.read([workdir])[0].manifest.config["seed"])
