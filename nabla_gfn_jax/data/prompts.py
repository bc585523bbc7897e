"""Prompt sets by name: the prompts for training, and the prompts held out for evaluation.

| name | prompts | held out |
|---|---|---|
| `simple_animals` | the 45 animals of DDPO (arXiv 2305.13301) | none, as in the paper |
| `a_face` | "a face": this prompt fits a hundred faces by three vendors, so diversity can be counted | none |
| `hpd_photo`, `hpd_paintings`, `hpd_anime`, `hpd_concept_art` | HPDv2's benchmark (arXiv 2306.09341) | the first 10 |
| `hpd_photo_paintings` | photo and paintings together, as in the paper | the first 10 of each |
| `drawbench` | DrawBench (arXiv 2205.11487) without Misspellings and Rare Words | the first 2 of each category |
| `imagenet_animals` | the 398 animals among ImageNet's classes | none |
| a path, or `…:COLUMN`, `…:COLUMN,WEIGHTS` | a file that `prompt_files` reads | none |
| `hub:OWNER/NAME/FILE`, or with columns | such a file of a data set on the hub | none |

Evaluation uses the training prompts of a set that holds out none.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.data.prompt_files import cell, read_json, read_prompts, read_rows
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
_IMAGENET_ANIMALS = 398  # ImageNet's first classes
_HUB_FILE = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^:]+)(?::(?P<column>.+))?")
_FOLDER = "prompts"  # the subfolder of the user's folder of weights


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order. `held_out` is for evaluation only; it equals `train` if the set holds out none.

    `weights` has the relative frequencies with which training draws the prompts of `train`; None: all the same.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def prompt_set(name: str) -> PromptSet:
    """The set called `name`. Raises `UserError` for a name, file or column that does not exist, or an empty set."""
    if name in PROMPT_SETS:
        found = PROMPT_SETS[name]()
    elif match := _HUB_FILE.fullmatch(name):
        file = hub.find(_FOLDER, match["file"], repo=match["repo"], repo_type="dataset")
        found = _from_file(file, match["column"])
    elif local := _local(name):
        found = _from_file(*local)
    else:
        names = ", ".join(sorted(PROMPT_SETS))
        near = did_you_mean(name, PROMPT_SETS)
        kinds = f"a file, FILE:COLUMN[,WEIGHTS] of a table, hub:OWNER/NAME/FILE[:COLUMN] or one of {names}"
        raise UserError(f"prompts = {name!r} is unknown{near}; use {kinds}")
    if not found.train:
        raise UserError(f"prompts = {name!r} has no prompts")
    if found.weights is not None and not any(found.weights):
        raise UserError(f"prompts = {name!r} gives every prompt the weight 0; at least one weight must be above 0")
    return found


def _local(name: str) -> tuple[Path, str | None] | None:
    """Splits `FILE` or `FILE:COLUMN` into file and column; None if there is no such file."""
    whole, (path, _, column) = Path(name).expanduser(), name.rpartition(":")
    if whole.is_file():
        return whole, None
    file = Path(path).expanduser()
    return (file, column) if path and column and file.is_file() else None


def _from_file(file: Path, columns: str | None) -> PromptSet:
    prompts, weights = read_prompts(file, columns)
    return PromptSet(tuple(prompts), tuple(prompts), tuple(weights) if weights else None)


def _without_split(prompts: list[str]) -> PromptSet:
    return PromptSet(tuple(prompts), tuple(prompts))


def _hpd(*styles: str) -> PromptSet:
    files = [hub.find(_FOLDER, f"benchmark/{s}.json", repo="zhwang/HPDv2", repo_type="dataset") for s in styles]
    lists = [read_prompts(file)[0] for file in files]
    return PromptSet(
        tuple(p for prompts in lists for p in prompts[_HPD_HELD_OUT:]),
        tuple(p for prompts in lists for p in prompts[:_HPD_HELD_OUT]),
    )


def _drawbench() -> PromptSet:
    file = hub.find(_FOLDER, "DrawBench Prompts - Sheet1.csv", repo="sayakpaul/drawbench", repo_type="dataset")
    train: list[str] = []
    held_out: list[str] = []
    seen: dict[str, int] = {}
    for row in read_rows(file):
        prompt, category = cell(file, row, "Prompts"), cell(file, row, "Category")
        if category in _DRAWBENCH_LEFT_OUT:
            continue
        seen[category] = seen.get(category, 0) + 1
        (held_out if seen[category] <= _DRAWBENCH_HELD_OUT else train).append(prompt)
    return PromptSet(tuple(train), tuple(held_out))


def _imagenet_animals() -> PromptSet:
    """The first name of each animal class."""
    file = hub.find(_FOLDER, "imagenet-1k-id2label.json", repo="huggingface/label-files", repo_type="dataset")
    labels = read_json(file)
    try:
        return _without_split([labels[str(i)].split(",")[0] for i in range(_IMAGENET_ANIMALS)])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} does not name ImageNet's classes by number; download it again") from error


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
