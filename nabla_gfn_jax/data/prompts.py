"""Prompt sets, by name: what training draws from, and what is held out for evaluation.

| name | prompts | held out |
|---|---|---|
| `simple_animals` | the 45 animals of DDPO (arXiv 2305.13301) | none, as in the paper |
| `a_face` | "a face": one prompt, a hundred faces times three vendors to draw, so diversity is counted | none |
| `hpd_photo`, `hpd_paintings`, `hpd_anime`, `hpd_concept_art` | HPDv2's benchmark (arXiv 2306.09341) | the first 10 |
| `hpd_photo_paintings` | two of them, as the paper has it | the first 10 of each |
| `drawbench` | DrawBench (arXiv 2205.11487) but Misspellings and Rare Words | the first 2 of each category |
| `imagenet_animals` | the 398 animals among ImageNet's classes | none |
| a path, or `…:COLUMN` | a .txt, .json, .jsonl or .csv file | none |
| `hub:OWNER/NAME/FILE` or `…:COLUMN` | such a file of a data set | none |
"""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import did_you_mean

# fmt: off
SIMPLE_ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep",
    "deer", "cow", "goat", "lion", "tiger", "bear", "raccoon", "fox", "wolf",
    "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel",
    "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee",
    "pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)
# fmt: on
_HPD_HELD_OUT = 10
_DRAWBENCH_HELD_OUT = 2
_DRAWBENCH_LEFT_OUT = ("Misspellings", "Rare Words")
_IMAGENET_ANIMALS = 398  # its first classes
_HUB_FILE = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^:]+)(?::(?P<column>.+))?")
_FOLDER = "prompts"  # in the user's folder of weights


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; `held_out` are for evaluation alone, and are `train` where a set has none."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def prompt_set(name: str) -> PromptSet:
    """The set called `name`. Raises `UserError` for a name, file or column that does not exist, or an empty set."""
    if name in PROMPT_SETS:
        found = PROMPT_SETS[name]()
    elif match := _HUB_FILE.fullmatch(name):
        file = hub.find(_FOLDER, match["file"], repo=match["repo"], repo_type="dataset")
        found = _without_split(_read(file, match["column"]))
    elif local := _local(name):
        found = _without_split(_read(*local))
    else:
        names = ", ".join(sorted(PROMPT_SETS))
        near = did_you_mean(name, PROMPT_SETS)
        kinds = f"a file, FILE:COLUMN of a table, hub:OWNER/NAME/FILE[:COLUMN] or one of {names}"
        raise UserError(f"prompts = {name!r} is unknown{near}; use {kinds}")
    if not found.train:
        raise UserError(f"prompts = {name!r} has no prompts")
    return found


def _local(name: str) -> tuple[Path, str | None] | None:
    """The file and column that `FILE` or `FILE:COLUMN` names, if there is such a file."""
    whole, (path, _, column) = Path(name).expanduser(), name.rpartition(":")
    if whole.is_file():
        return whole, None
    file = Path(path).expanduser()
    return (file, column) if path and column and file.is_file() else None


def _without_split(prompts: list[str]) -> PromptSet:
    return PromptSet(tuple(prompts), tuple(prompts))


def _hpd(*styles: str) -> PromptSet:
    lists = [_read(hub.find(_FOLDER, f"benchmark/{s}.json", repo="zhwang/HPDv2", repo_type="dataset")) for s in styles]
    return PromptSet(
        tuple(p for prompts in lists for p in prompts[_HPD_HELD_OUT:]),
        tuple(p for prompts in lists for p in prompts[:_HPD_HELD_OUT]),
    )


def _drawbench() -> PromptSet:
    file = hub.find(_FOLDER, "DrawBench Prompts - Sheet1.csv", repo="sayakpaul/drawbench", repo_type="dataset")
    train: list[str] = []
    held_out: list[str] = []
    seen: dict[str, int] = {}
    for row in _rows(file):
        prompt, category = _cell(file, row, "Prompts"), _cell(file, row, "Category")
        if category in _DRAWBENCH_LEFT_OUT:
            continue
        seen[category] = seen.get(category, 0) + 1
        (held_out if seen[category] <= _DRAWBENCH_HELD_OUT else train).append(prompt)
    return PromptSet(tuple(train), tuple(held_out))


def _imagenet_animals() -> PromptSet:
    """The first name of each class."""
    file = hub.find(_FOLDER, "imagenet-1k-id2label.json", repo="huggingface/label-files", repo_type="dataset")
    labels = _json(file)
    try:
        return _without_split([labels[str(i)].split(",")[0] for i in range(_IMAGENET_ANIMALS)])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not name ImageNet's classes by number; download it again") from error


def _read(file: Path, column: str | None = None) -> list[str]:
    """A file's prompts in its order: lines of text, a JSON list, or the cells of a column."""
    if file.suffix in (".csv", ".jsonl"):
        if column is None:
            raise UserError(f"{file.name} is a table; name the column of prompts, as in …/{file.name}:COLUMN")
        prompts: Any = [_cell(file, row, column) for row in _rows(file)]
    elif file.suffix == ".json":
        prompts = _json(file)
        if column is not None and isinstance(prompts, list):
            prompts = [_cell(file, row, column) for row in prompts]
    elif file.suffix == ".txt":
        prompts = [line.strip() for line in _text(file).split("\n") if line.strip()]
    else:
        raise UserError(f"prompts of {file.name} cannot be read; use a .txt, .json, .jsonl or .csv file")
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"{file} is not a list of prompts")
    return prompts


def _rows(file: Path) -> list[Any]:
    if file.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(_text(file), newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"{file} is no CSV ({error}); a quote may be left open") from error
    try:
        return [json.loads(line) for line in _text(file).split("\n") if line.strip()]  # JSON may hold other line ends
    except ValueError as error:
        raise UserError(f"{file} is no JSON lines ({error}); download it again") from error


def _cell(file: Path, row: Any, column: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        has = ", ".join(str(name) for name in row) if isinstance(row, dict) else "no columns"
        raise UserError(f"{file} has no text in column {column!r} of every row; it has {has}")
    return row[column]


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); download it again") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error})") from error


PROMPT_SETS: dict[str, Callable[[], PromptSet]] = {
    "simple_animals": lambda: _without_split(list(SIMPLE_ANIMALS)),
    "a_face": lambda: _without_split(["a face"]),
    "hpd_photo": lambda: _hpd("photo"),
    "hpd_paintings": lambda: _hpd("paintings"),
    "hpd_anime": lambda: _hpd("anime"),
    "hpd_concept_art": lambda: _hpd("concept-art"),
    "hpd_photo_paintings": lambda: _hpd("photo", "paintings"),
    "drawbench": _drawbench,
    "imagenet_animals": _imagenet_animals,
}
