"""Tensors by name from whatever file holds them; a pickled file is converted once and kept as safetensors."""

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

PICKLED = (".bin", ".ckpt", ".pt", ".pth")  # how the names of PyTorch's own files end
_WAIT = 600  # seconds for another program that converts the same file


def read_state_dict(path: Path) -> Mapping[str, np.ndarray]:
    """Tensors by name, as stored, of safetensors or of a pickled state dict, alone or under "state_dict".

    Each is read when it is asked for; those of a pickle only once its converted copy is in the user's cache. Several
    programs may ask at once: one converts, the others wait for its copy. Raises `UserError` naming a file that is
    missing, damaged or holds no tensors.
    """
    if path.suffix not in PICKLED:
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
        raise UserError(f"{path} holds no state dict; download it again")
    return tensors


class _Copy:
    """The converted copy of a file, and a note beside it, written last, that says what the copy must be.

    Their names say which state of the file they are of: a file that changes gets another copy, so that a program
    which is still reading the old one never mixes the two.
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
        """Held by one program at a time. Where there is no lock to be had, each program converts for itself."""
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
        """The copy, if it is there and undamaged. Its bytes are read only if it was touched since it was written."""
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
        """Writes the copy, in the place of those of earlier states of the file. Does nothing where it cannot."""
        try:
            for old in self._tensors.parent.glob(f"{self._of_path}-*"):
                if old.stem != self._tensors.stem:
                    old.unlink(missing_ok=True)
            write_safetensors(self._tensors, tensors)
            self._write_note(read_sha256(self._tensors))
        except OSError as error:  # no room, or a home that cannot be written: the next start converts again
            logging.getLogger(__name__).info("%s is not kept: %s", self._tensors, error)

    def _write_note(self, sha256: str) -> None:
        write_json(self._note, self._source | {"sha256": sha256, "copy": _touched(self._tensors)})


def _touched(file: Path) -> list[int]:
    """What changes when a file is written to: its size in bytes and when it was modified, in ns."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
