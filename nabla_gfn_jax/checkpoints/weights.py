"""Reads tensors by name from safetensors or pickles.

A pickle is converted once, and the copy is kept as safetensors.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from nabla_gfn_jax.checkpoints import torch_pickle
from nabla_gfn_jax.checkpoints.files import TensorFiles, remove_unfinished, write_json, write_safetensors
from nabla_gfn_jax.checkpoints.hashes import read_sha256
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.user_cache import user_cache

PICKLED = (".bin", ".ckpt", ".pt", ".pth")  # endings of PyTorch's own files
_WAIT = 600  # seconds to wait for another program that converts the same file


def read_state_dict(path: Path) -> Mapping[str, np.ndarray]:
    """Tensors by name, in their stored types, from safetensors or a pickled state dict (also under "state_dict").

    Each tensor is read when it is accessed. A pickle is first converted to a copy in the user's cache. If several
    programs read the same pickle simultaneously, one converts it and the others wait. Raises `UserError` naming a file
    that is missing, damaged or has no tensors.
    """
    if not path.name.endswith((*PICKLED, ".pth.tar")):
        return TensorFiles(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    copy = _Copy(path)
    with copy.lock():
        kept = copy.read()
        if kept is not None:
            return kept
        tensors = _unpickle(path)
        copy.write(tensors)
    return tensors


def _unpickle(path: Path) -> dict[str, np.ndarray]:
    tree = torch_pickle.read(path)
    state = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tensors = {name: array for name, array in state.items() if isinstance(array, np.ndarray)}
    if not tensors:
        raise UserError(f"{path} has no state dict; download it again")
    return tensors


class _Copy:
    """The converted copy of a file, and a note beside it with the copy's hash, which is written last.

    Their names depend on the size and the time of the file. A changed file therefore gets another copy, and a program
    that is still reading the old copy is not disturbed.
    """

    def __init__(self, source: Path):
        status, path = source.stat(), source.resolve()
        self._source = {"source": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
        self._of_path = f"{source.stem}-{_short_hash(str(path))}"
        folder = user_cache("weights")
        self._tensors = folder / f"{self._of_path}-{_short_hash(str(self._source))}.safetensors"
        self._note = self._tensors.with_suffix(".json")
        self._lock = folder / f"{self._of_path}.lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A lock that one program holds at a time. If locking is not possible, each program converts for itself."""
        lock = FileLock(self._lock)
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_WAIT)
            remove_unfinished(self._lock.parent, f"{self._of_path}-*")
        except (OSError, NotImplementedError, Timeout) as error:
            logging.getLogger(__name__).info("converting without a lock: %s", error)
        try:
            yield
        finally:
            lock.release()

    def read(self) -> TensorFiles | None:
        """The copy; None if it is missing or damaged. Its hash is checked only if its size or time has changed."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            if note.get("copy") != _touched(self._tensors):
                if note.get("sha256") != read_sha256(self._tensors):
                    return None
                self._write_note(note["sha256"])
            return TensorFiles(self._tensors)
        except (OSError, ValueError, UserError, AttributeError):
            return None

    def write(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes the copy and removes copies of earlier states of the file. Does nothing if it cannot be written."""
        try:
            for old in self._tensors.parent.glob(f"{self._of_path}-*"):
                if old.stem != self._tensors.stem:
                    old.unlink(missing_ok=True)
            write_safetensors(self._tensors, tensors)
            self._write_note(read_sha256(self._tensors))
        except OSError as error:  # the disk is full or read-only; the next start converts again
            logging.getLogger(__name__).info("%s is not kept: %s", self._tensors, error)

    def _write_note(self, sha256: str) -> None:
        write_json(self._note, self._source | {"sha256": sha256, "copy": _touched(self._tensors)})


def _touched(file: Path) -> list[int]:
    """A file's size in bytes and modification time in ns, which change when it is written."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
