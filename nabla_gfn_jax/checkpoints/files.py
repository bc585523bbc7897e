"""Reads and writes JSON and safetensors files. A damaged file is reported in one line."""

import errno
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nabla_gfn_jax.errors import UserError

_UNFINISHED = ".unfinished"  # the ending of files that are being written
_SYSTEM_ERROR = re.compile(r"os error (\d+)|os_error_code='(\d+)'")  # in messages of safetensors and TensorStore


class WriteError(UserError, OSError):
    """A file that cannot be written, mostly because the disk is full or read-only."""


def cannot_write(file: Path, error: BaseException) -> WriteError:
    """The error that says so. Its text is one line that names the file, the reason and the remedy."""
    return WriteError(
        f"{file} cannot be written ({reason_of(error)}); make space or allow writing, then run the same command again"
    )


def reason_of(error: BaseException) -> str:
    """An error as a phrase; a system error that a library wraps by its usual name."""
    wrapped = _SYSTEM_ERROR.search(str(error))
    if wrapped:
        return os.strerror(int(wrapped.group(1) or wrapped.group(2)))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if the file is missing or is not a JSON object."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; download the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error
    if not isinstance(contents, dict):
        raise UserError(f"{file} holds no JSON object; download the model again")
    return contents


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields the path of a new file for the block to write. At the end of the block, this file replaces `file`.

    Creates the parent folders. A reader always finds either the complete old or the complete new contents, even after a
    crash or a power cut. If several processes write simultaneously, the last to finish wins. An error leaves `file`
    unchanged. Raises `WriteError` if the disk is full or the folder cannot be written.
    """
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, file)
        flush(file.parent)
    except (OSError, SafetensorError) as error:
        raise cannot_write(file, error) from error
    finally:
        with suppress(OSError):  # on a disk that has become read-only
            unfinished.unlink(missing_ok=True)


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes unfinished files called `name` in `folder`, which killed processes left.

    Only the single writer of these files may call it.
    """
    for file in folder.glob(f".{name}.*{_UNFINISHED}"):
        file.unlink(missing_ok=True)


def check_can_write(file: Path) -> None:
    """Raises `UserError` if `file` cannot be written. Call it before the work whose results go into the file."""
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}); choose another place") from error


def write_whole(file: Path, contents: bytes) -> None:
    """Writes `contents` as `replacing` does."""
    with replacing(file) as unfinished:
        unfinished.write_bytes(contents)


def replace_contents(file: Path, contents: bytes) -> None:
    """Writes `contents` as `replacing` does, unless the file holds them already: then a full disk does not matter."""
    if not file.is_file() or file.read_bytes() != contents:
        write_whole(file, contents)


def append(file: Path, contents: bytes) -> None:
    """Appends `contents` and waits until they are on the disk. Raises `OSError` if they cannot be written.

    The file is then as before, without a part of `contents`.
    """
    with file.open("ab", buffering=0) as stream:
        size, rest = stream.seek(0, os.SEEK_END), memoryview(contents)
        try:
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            with suppress(OSError):
                stream.truncate(size)
            raise


def write_json(file: Path, contents: Mapping[str, Any]) -> None:
    """Writes `plain(contents)` as `replacing` does."""
    write_whole(file, (json.dumps(plain(contents), indent=2, allow_nan=False) + "\n").encode())


def plain(value: Any) -> Any:
    """`value` in types of JSON: tuples become lists, paths become text, scalars of NumPy and JAX become Python's.

    JSON has no infinity and no NaN. They become the texts "inf", "-inf" and "nan", which `float` reads.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def flush(path: Path) -> None:
    """Waits until the contents of a file, or the names in a folder, are on the disk.

    Some systems cannot open folders.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def read_safetensors(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file in their stored types, and the metadata in its header.

    Raises `UserError` naming a file that is missing, truncated or damaged.
    """
    return dict(TensorFiles(file)), read_metadata(file)


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file. Raises `UserError` as `TensorFiles` does."""
    TensorFiles(file)
    with safe_open(file, framework="np") as opened:
        return opened.metadata() or {}


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of safetensors files in their stored types. Each is read when it is accessed, to save memory.

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
        # The file is opened for each tensor, because pages that were read stay mapped while the file is open.
        with safe_open(self._file_of[name], framework="np") as tensors:
            return tensors.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, found without reading the tensor."""
        with safe_open(self._file_of[name], framework="np") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes `tensors` as `replacing` does, with `metadata` in the header.

    Without `metadata` the header marks the tensors as PyTorch's, because some programs require it. Give at most one
    entry: the library writes several in random order, so that the same tensors would make different files.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(file) as unfinished:
        save_file(contiguous, unfinished, metadata=dict(metadata or {"format": "pt"}))
