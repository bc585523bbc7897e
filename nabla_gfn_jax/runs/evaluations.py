"""What was measured of a run's models: a row of `WORKDIR/evaluations.jsonl` each."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import plain

NAME = "evaluations.jsonl"


def append(workdir: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, in one write: programs that do so at the same time do not cut each other's rows."""
    file = workdir / NAME
    line = json.dumps(plain(row), allow_nan=False) + "\n"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a row that a crash cut short stays a line of its own
            line = "\n" + line
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(workdir: Path) -> list[dict[str, Any]]:
    """All rows but such as a crash cut short."""
    rows = []
    file = workdir / NAME
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
