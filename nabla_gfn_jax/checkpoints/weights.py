"""Tensors by name from whatever file holds them; a pickled file is converted once and kept as safetensors."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nabla_gfn_jax.checkpoints import torch_pickle
from nabla_gfn_jax.checkpoints.files import TensorFiles, write_json, write_safetensors
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.user_cache import user_cache


def read_state_dict(path: Path) -> Mapping[str, np.ndarray]:
    """Tensors by name, as stored, of safetensors or of a pickled state dict, alone or under "state_dict".

    Each is read when it is asked for. Raises `UserError` naming a file that is missing, damaged or holds none.
    """
    if path.suffix == ".safetensors":
        return TensorFiles(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    kept = _kept(path)
    if kept is not None:
        return kept
    tensors = _unpickle(path)
    try:
        _keep(path, tensors)
    except OSError:  # no room, or a home that cannot be written: the next start converts again
        return tensors
    return TensorFiles(_copy(path))


def _unpickle(path: Path) -> dict[str, np.ndarray]:
    tree = torch_pickle.read(path)
    state = tree.get("state_dict", tree) if isinstance(tree, dict) else {}
    tensors = {name: array for name, array in state.items() if isinstance(array, np.ndarray)}
    if not tensors:
        raise UserError(f"{path} holds no state dict; download it again")
    return tensors


def _copy(path: Path) -> Path:
    """Where the converted copy of `path` is."""
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return user_cache("weights") / f"{path.stem}-{where}.safetensors"


def _keep(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    copy = _copy(path)
    write_safetensors(copy, tensors)
    write_json(copy.with_suffix(".json"), _origin(path) | {"sha256": _checksum(copy)})


def _kept(path: Path) -> TensorFiles | None:
    """The converted copy, if it is of this very file and undamaged."""
    copy = _copy(path)
    try:
        note = json.loads(copy.with_suffix(".json").read_text())
        if note != _origin(path) | {"sha256": _checksum(copy)}:
            return None
        return TensorFiles(copy)
    except (OSError, ValueError, UserError):
        return None


def _origin(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"source": str(path.resolve()), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _checksum(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
