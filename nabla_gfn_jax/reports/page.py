"""Writes the report of runs: one HTML file that holds all of its data, and opens without a network."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from nabla_gfn_jax import __version__
from nabla_gfn_jax.checkpoints.files import plain, write_whole
from nabla_gfn_jax.reports import about, source
from nabla_gfn_jax.reports.beside import beside
from nabla_gfn_jax.reports.curves import charts
from nabla_gfn_jax.reports.evaluated import Evaluated, evaluated
from nabla_gfn_jax.reports.gallery import Gallery, gallery
from nabla_gfn_jax.reports.plane import plane
from nabla_gfn_jax.reports.source import Run
from nabla_gfn_jax.runs import loras

NAME = "report.html"
_SCRIPTS = ("kit.js", "charts.js", "beside.js", "pictures.js", "main.js")
_DIGITS = 5  # significant digits of a number
_TAG = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write(file: Path, workdirs: Sequence[Path]) -> None:
    """Writes the report of the runs in the workdirs to `file`. Raises `UserError` if a workdir holds no run."""
    write_whole(file, page(contents(source.read(workdirs))).encode())


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the report of the runs shows, in types of JSON."""
    groups = source.groups(runs)
    measured = [evaluated(run.evaluations, source.starts_from_lora(run.manifest)) for run in runs]
    tradeoff, shown = plane(runs, measured), gallery(runs)
    return {
        "title": ", ".join(run.name for run in runs),
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [
            {"name": run.name, "summary": about.summary(run.manifest), "group": group}
            for run, group in zip(runs, groups, strict=True)
        ],
        "alarms": [
            (f"{run.name}, " if len(runs) > 1 else "") + f"after {alarm.updates} updates: {alarm.text}"
            for run in runs
            for alarm in run.alarms
        ],
        "notes": _notes(runs, groups, measured),
        "charts": [_short(asdict(chart)) for chart in charts(runs, groups, measured)],
        "plane": None if tradeoff is None else _short(asdict(tradeoff)),
        "beside": [_short(asdict(figure)) for figure in beside(measured)],
        "pictures": None if shown is None else _pictures(shown),
        "manifest": [entry._asdict() for entry in about.table(runs)],
    }


def page(data: Mapping[str, Any]) -> str:
    """The HTML. Its policy forbids every request and every script but the report's own, which it knows by hash."""
    parts = resources.files("nabla_gfn_jax.reports") / "template"
    read = lambda name: (parts / name).read_text(encoding="utf-8")  # noqa: E731
    script = '"use strict";\n(() => {\n' + "".join(map(read, _SCRIPTS)) + "})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "title": html.escape(str(data["title"])),
        "digest": digest,
        "style": read("style.css"),
        "data": embedded(data),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], read("page.html"))


def embedded(data: Mapping[str, Any]) -> str:
    """The data as JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(plain(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(_TAG.get(letter, letter) for letter in text) if any(tag in text for tag in _TAG) else text


def _pictures(shown: Gallery) -> dict[str, Any]:
    return {
        "of": [asdict(picture) for picture in shown.of],
        "sheets": [_short(asdict(each)) for each in shown.sheets],
        "policies": [[list(item) for item in policies.items()] for policies in shown.policies],
        "bases": shown.bases,
    }


def _notes(runs: Sequence[Run], groups: Sequence[int], measured: Sequence[Evaluated | None]) -> list[str]:
    """What a reader should know before comparing, and what is missing and how to get it."""
    notes = []
    noise = [(r.manifest.model, r.manifest.sampler, r.manifest.num_steps, r.manifest.guidance) for r in runs]
    if len(set(noise)) > 1:
        notes.append("The runs differ in base model, sampler, steps or guidance: pictures are not of the same noise.")
    for run, of_run in zip(runs, measured, strict=True):
        missing = [updates for updates in loras.saved(run.path) if updates not in run.pictures]
        if missing:
            notes.append(
                f"{run.name}: {len(missing)} saved LoRAs have no pictures yet; nabla-gfn report --draw draws them."
            )
        if of_run is None:
            notes.append(f"{run.name}: no nats yet; nabla-gfn evaluate measures them.")
    sizes = [groups.count(group) for group in dict.fromkeys(groups)]
    if max(sizes) > 1:
        notes.append("Bands: mean ± standard deviation over runs that differ only by the seed.")
    return notes


def _short(value: Any) -> Any:
    """The value with numbers of few digits, so that the file is small; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
