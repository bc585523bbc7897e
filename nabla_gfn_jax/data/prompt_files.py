"""Reads prompts from files.

| ending | prompts | |---|---| | `.txt` | one per line; empty lines and lines that begin with # are skipped | | `.csv`,
`.tsv`, `.jsonl`, `.parquet` | one per row, from the named column, else from `prompt`, else from the only column | |
`.json` | a list of texts, or of objects as rows |

A second column may have weights: the relative frequencies with which training draws the prompts.
"""

import codecs
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from nabla_gfn_jax.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (".txt", ".json", ".jsonl", ".parquet", *_SEPARATORS)
_USUAL = "prompt"  # the column that is read if none is named


def read_prompts(file: Path, columns: str | None = None) -> tuple[list[str], list[float] | None]:
    """The prompts of a file in its order, and their weights, or None if there are none.

    Args:
        file: a file with one of `ENDINGS`.
        columns: `PROMPTS` or `PROMPTS,WEIGHTS`, names of columns of a table.

    Raises:
        UserError: the file cannot be read, or has no such column.
    """
    prompts, weights = _read(file, columns)
    wrong = next((number for number, prompt in enumerate(prompts, 1) if not _is_text(prompt)), None)
    if wrong is not None:
        raise UserError(
            f"{file}: prompt {wrong} has a NUL or half a character and is no text; mend it: {prompts[wrong - 1][:40]!r}"
        )
    return prompts, weights


def _is_text(prompt: str) -> bool:
    """Whether no character is NUL or a surrogate, which JSON can write but no tokenizer can read."""
    return "\0" not in prompt and not any("\ud800" <= c <= "\udfff" for c in prompt)


def _read(file: Path, columns: str | None) -> tuple[list[str], list[float] | None]:
    if file.suffix == ".txt":
        lines = [line.strip() for line in read_text(file).split("\n")]
        return [line for line in lines if line and not line.startswith("#")], None
    if file.suffix not in ENDINGS:
        raise UserError(f"prompts of {file.name} cannot be read; use a file that ends in {', '.join(ENDINGS)}")
    found: Any = read_json(file) if file.suffix == ".json" else read_rows(file)
    if isinstance(found, list) and found and all(isinstance(prompt, str) for prompt in found) and columns is None:
        return found, None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{file} is not a list of prompts")
    name, _, weights = (columns or _only_column(file, found)).partition(",")
    prompts = [cell(file, row, name) for row in found]
    return prompts, [_weight(file, row, weights) for row in found] if weights else None


def _only_column(file: Path, rows: list[dict[Any, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    if _USUAL in names or not names:
        return _USUAL
    if len(names) > 1:
        shown = ", ".join(map(str, names))
        raise UserError(
            f"{file.name} is a table; name the column of prompts, as in …/{file.name}:COLUMN; it has {shown}"
        )
    return str(names[0])


def read_rows(file: Path) -> list[Any]:
    """The rows of a table as dicts by column. Raises `UserError` if the file is not a table."""
    if file.suffix in _SEPARATORS:
        text = io.StringIO(read_text(file), newline="")
        try:
            return list(csv.DictReader(text, strict=True, delimiter=_SEPARATORS[file.suffix]))
        except csv.Error as error:
            kind = file.suffix[1:].upper()
            raise UserError(f"{file} is not valid {kind} ({error}); a quote may be left open") from error
    if file.suffix == ".parquet":
        return _parquet(file)
    try:
        # Not `splitlines`, because JSON texts may contain other characters that it takes for line ends.
        return [json.loads(line) for line in read_text(file).split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON lines ({error}); download it again") from error


def _parquet(file: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise UserError(f"{file.name} needs pyarrow; pip install 'nabla_gfn_jax[prompts]'") from None
    try:
        rows: list[Any] = read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{file} is not a parquet file ({str(error).splitlines()[0]}); download it again") from error
    return rows


def cell(file: Path, row: Any, column: str) -> str:
    """The text in a column of a row. Raises `UserError` if there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        has = ", ".join(str(name) for name in row) if isinstance(row, dict) else "no columns"
        raise UserError(f"{file} has no text in column {column!r} of every row; it has {has}")
    return row[column]


def _weight(file: Path, row: dict[Any, Any], column: str) -> float:
    try:
        weight = float(row[column])
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        found = repr(row[column]) if column in row else f"no such column; it has {', '.join(map(str, row))}"
        raise UserError(f"{file}: a weight in column {column!r} is not a number of 0 or more: {found}") from None
    return weight


def read_json(file: Path) -> Any:
    """The contents of a JSON file. Raises `UserError` if the file is not valid JSON."""
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again") from error


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. Raises `UserError` if it cannot be read."""
    try:
        contents = file.read_bytes()
        marked = contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = contents.decode("utf-16" if marked else "utf-8-sig")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise UserError(f"{file} is no text: line {line} has a NUL; save it in UTF-8")
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); save it in UTF-8") from error
