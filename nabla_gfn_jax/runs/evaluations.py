"""Measurements of a run's models, one row per model in `WORKDIR/evaluations.jsonl`."""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import plain
from nabla_gfn_jax.metrics.tilt import FEW, Estimate

NAME = "evaluations.jsonl"
BASE = "base"  # the name of the base model in a row
_DROPPED = ("figures", "certificate", "at_beta")  # groups whose figures keep their own name
_LEFT_OUT = ("at_exponent", "log_z", "spent_by_step", "spent_by_step_error", "warnings")
_LORA = re.compile(r"lora/(\d{5,})")


def append(workdir: Path, row: Mapping[str, Any]) -> None:
    """Appends a row in a single write, so that rows of simultaneous programs do not mix."""
    file = workdir / NAME
    line = json.dumps(plain(row), allow_nan=False) + "\n"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # keeps a row that a crash cut short on its own line
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(workdir: Path) -> list[dict[str, Any]]:
    """All rows, except those that a crash cut short or that are damaged."""
    rows = []
    file = workdir / NAME
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def name_of(updates: int) -> str:
    """The name, in a row, of the run's LoRA after `updates` updates."""
    return f"lora/{updates:05d}"


def updates_of(row: Mapping[str, Any]) -> int | None:
    """The number of updates of the row's model, 0 for the base model; None if it is not the run's own LoRA."""
    model = row.get("model")
    lora = _LORA.fullmatch(model) if isinstance(model, str) else None
    return 0 if model == BASE else int(lora[1]) if lora else None


def estimate(row: Mapping[str, Any], *names: str) -> Estimate | None:
    """The figure under nested names, such as ("certificate", "spent"); None if it does not exist or is not finite."""
    found: Any = row
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return None
    try:
        value, error = float(found["value"]), float(found["std_error"])
    except (KeyError, TypeError, ValueError):
        return None
    return Estimate(value, error) if math.isfinite(value) else None


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a row of evaluations.jsonl by name, with their standard errors. Other groups begin the name."""
    found: dict[str, Any] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if name in _LEFT_OUT or not isinstance(value, Mapping):
                continue
            if "value" in value and "std_error" in value:
                found[prefix + name], found[f"{prefix}{name}_se"] = _float(value["value"]), _float(value["std_error"])
            else:
                walk(value, prefix if name in _DROPPED else f"{prefix}{name}_")

    walk({name: value for name, value in row.items() if isinstance(value, Mapping) and name != "sampling"}, "")
    certificate = row.get("certificate") or {}
    for name in ("samples", "base_samples"):
        if name in certificate:
            found[name] = certificate[name]
    effective = ((certificate.get("at_beta") or {}).get("log_z") or {}).get("effective")
    if effective is not None:
        found["gap_is_bound"] = float(effective) < FEW
    return found


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
