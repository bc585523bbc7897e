"""The pictures of a run that its report shows: `WORKDIR/pictures/00080.png` has those of the policy after 80 updates.

All files of a run have the same prompts and the same noise. A file is one sheet of small pictures; a text field of the
PNG has the prompt, the noise and the log rewards of each. Pictures of the same place, prompt and number, from the same
base model and sampler, have the same noise in every run.
"""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nabla_gfn_jax.checkpoints.files import plain, write_whole
from nabla_gfn_jax.images import levels

FOLDER = "pictures"
BASE = "base"  # the file of the base model, if the run starts from a LoRA, so that update 0 has another policy
CHANCE = "log_chance"  # the name of a score, see `Pictures`
SEED = 0  # of the noise, the same for every run
_PROMPTS, _MOST = 8, 32  # the most prompts, and the most pictures of a policy
_SIDE = 192  # larger pictures are reduced to this number of pixels
_COLUMNS = 8  # of a sheet
_FIELD = "nabla_gfn_jax"
_NAME = re.compile(r"\d{5,}")


@dataclass(frozen=True)
class Picture:
    """What a picture shows. `number` is the number of its noise among the noises of its prompt."""

    place: int  # of the prompt in the run's list of prompts
    prompt: str
    number: int


@dataclass(frozen=True)
class Pictures:
    """The pictures of one policy.

    `scores` has log R of each as "log_reward", and the parts of a sum of rewards. With `CHANCE`, it also has
    log p_θ(path)/p_#(path) of the path that led the base model to its picture of the same noise.
    """

    of: tuple[Picture, ...]
    images: UInt8[np.ndarray, "n height width 3"]
    scores: dict[str, tuple[float, ...]]

    def only(self, wanted: Iterable[Picture]) -> "Pictures":
        """The pictures `wanted`, in this order."""
        rows = [self.of.index(picture) for picture in wanted]
        scores = {name: tuple(values[row] for row in rows) for name, values in self.scores.items()}
        return replace(self, of=tuple(self.of[row] for row in rows), images=self.images[rows], scores=scores)


def arranged(num_prompts: int, count: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The prompt's place and the number of the noise of each of `count` pictures.

    There are at most 8 prompts, so that each has several noises. The prompts change fastest.
    """
    index = np.arange(count, dtype=np.int32)
    prompts = min(num_prompts, _PROMPTS, count)
    return index % prompts, index // prompts


def kept(prompts: Sequence[str], count: int) -> tuple[Picture, ...]:
    """The pictures to keep of `count` pictures: at most 32, equally many of each prompt."""
    place, number = arranged(len(prompts), count)
    each = min(count, _MOST) // (int(place.max()) + 1)
    return tuple(Picture(int(p), prompts[p], int(n)) for p, n in zip(place, number, strict=True) if n < each)


def save(file: Path, pictures: Pictures) -> None:
    """Writes the pictures in one step and replaces an earlier file."""
    images = _reduced(pictures.images)
    of = [vars(p) | {n: v[i] for n, v in pictures.scores.items()} for i, p in enumerate(pictures.of)]
    info = PngInfo()
    info.add_itxt(_FIELD, json.dumps(plain({"size": images.shape[1:3], "pictures": of}), allow_nan=False))
    contents = io.BytesIO()
    Image.fromarray(sheet(images)).save(contents, "PNG", pnginfo=info)
    write_whole(file, contents.getvalue())


def place(workdir: Path, updates: int | str) -> Path:
    """The file for the policy after `updates` updates, or for `BASE`."""
    return workdir / FOLDER / (f"{updates}.png" if isinstance(updates, str) else f"{updates:05d}.png")


def saved(workdir: Path) -> dict[int, Path]:
    """The files by the number of updates, in ascending order."""
    files = [file for file in (workdir / FOLDER).glob("*.png") if _NAME.fullmatch(file.stem)]
    return {int(file.stem): file for file in sorted(files, key=lambda file: int(file.stem))}


def read(file: Path) -> Pictures | None:
    """The pictures in a file; None if there is no such file or it is damaged."""
    try:
        with Image.open(file) as opened:
            about: Mapping[str, Any] = json.loads(opened.text[_FIELD])  # type: ignore[attr-defined]
            pixels = np.asarray(opened.convert("RGB"))
        height, width = about["size"]
        rows = about["pictures"]
        of = tuple(Picture(int(row.pop("place")), str(row.pop("prompt")), int(row.pop("number"))) for row in rows)
        scores = {str(name): tuple(float(row[name]) for row in rows) for name in rows[0]}
        grid = pixels.reshape(pixels.shape[0] // height, height, -1, width, 3).swapaxes(1, 2)
        return Pictures(of, grid.reshape(-1, height, width, 3)[: len(of)], scores)
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        SyntaxError,
        Image.DecompressionBombError,
    ):
        return None


def sheet(images: UInt8[np.ndarray, "n height width 3"]) -> UInt8[np.ndarray, "rows columns 3"]:
    """The images in rows of 8, without a margin. The places that are left are black."""
    count, height, width, _ = images.shape
    rows = -(-count // _COLUMNS)
    padded = np.zeros((rows * _COLUMNS, height, width, 3), np.uint8)
    padded[:count] = images
    grid = padded.reshape(rows, _COLUMNS, height, width, 3).swapaxes(1, 2)
    return grid.reshape(rows * height, _COLUMNS * width, 3)


def _reduced(images: np.ndarray) -> UInt8[np.ndarray, "n height width 3"]:
    """The images as uint8, reduced so that no side is longer than `_SIDE`."""
    return shrunk(images if images.dtype == np.uint8 else levels(images), _SIDE)


def shrunk(images: UInt8[np.ndarray, "n height width 3"], side: int) -> UInt8[np.ndarray, "n height width 3"]:
    """The images, reduced so that no side is longer than `side` pixels."""
    height, width = images.shape[1:3]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])
