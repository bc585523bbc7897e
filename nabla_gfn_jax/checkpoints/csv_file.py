"""Writes tables as CSV files."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import replace_contents


def write(file: Path, rows: Iterable[Mapping[str, Any]], leading: Sequence[str] = ()) -> None:
    """Writes the rows with the columns of all: first those of `leading`, the others in the order of appearance.

    A number has six digits. A row has an empty cell where it has no value.
    """
    listed = list(rows)
    found = dict.fromkeys(name for row in listed for name in row)
    columns = [*(name for name in leading if name in found), *(name for name in found if name not in leading)]
    contents = io.StringIO()
    writer = csv.DictWriter(contents, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: _cell(value) for name, value in row.items()} for row in listed])
    replace_contents(file, contents.getvalue().encode())


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
