"""Measurements of a run's models, one row per model in `WORKDIR/evaluations.jsonl`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import plain

NAME = "evaluations.jsonl"


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
