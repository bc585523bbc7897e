"""JSON and safetensors files, read and written so that a bad one is named in one line."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nabla_gfn_jax.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's object. Raises `UserError` naming a file that is missing or not a JSON object."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; download the model again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file} holds no JSON object; download the model again")
    return contents


def write_whole(file: Path, contents: bytes) -> None:
    """Writes `contents` and whatever folders lead to `file`, which no reader, nor a crash, ever sees half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_bytes(contents)
    os.replace(unfinished, file)


def write_json(file: Path, contents: Mapping[str, Any]) -> None:
    """Writes `contents` as `write_whole` does."""
    write_whole(file, (json.dumps(contents, indent=2) + "\n").encode())


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a safetensors file, as stored, and its header's metadata.

    Raises `UserError` naming a file that is missing, truncated or damaged.
    """
    tensors = dict(TensorFiles(file))
    with safe_open(file, framework="np") as opened:
        return tensors, opened.metadata() or {}


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of safetensors files as stored, each read when it is asked for, so that nothing is held twice.

    Raises `UserError` naming a file that is missing, truncated or damaged.
    """

    def __init__(self, *files: Path):
        self._file_of: dict[str, Path] = {}
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing; check the path, or download it again")
            try:
                with safe_open(file, framework="np") as tensors:
                    self._file_of |= dict.fromkeys(tensors.keys(), file)
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{file} is truncated or no safetensors file ({error}); download it again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        # Opened anew for each: the pages that have been read stay mapped, and counted, as long as the file is open.
        with safe_open(self._file_of[name], framework="np") as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` as `write_whole` does, marked as PyTorch's for the programs that ask."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    write_whole(file, save(contiguous, metadata={"format": "pt"}))
