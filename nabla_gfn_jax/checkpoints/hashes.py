"""SHA-256 of files, without reading gigabytes at every start."""

import hashlib
import json
import re
import time
from contextlib import suppress
from pathlib import Path

from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.user_cache import user_cache

_LARGE = 2**26  # bytes; a smaller file takes less than a tenth of a second to hash
_SETTLED = 2.0  # seconds since the last write after which another write shows in the file's time
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal. Raises `OSError` if it cannot be read.

    A large file is not read again where its hash is known: the hub's cache names the file by it, and ours remembers it
    by the file's path, size and time of modification.
    """
    path = file.resolve()
    if path.parent.name == "blobs" and _SHA256.fullmatch(path.name):
        return path.name
    status = path.stat()
    if status.st_size < _LARGE:
        return read_sha256(path)
    state = {"file": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns, "inode": status.st_ino}
    known = user_cache("hashes") / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        note = json.loads(known.read_text(encoding="utf-8"))
        if isinstance(note, dict) and note == state | {"sha256": note.get("sha256")}:
            return str(note["sha256"])
    except (OSError, ValueError):
        pass
    found = read_sha256(path)
    if time.time() - status.st_mtime > _SETTLED:
        with suppress(OSError):  # a home that cannot be written: the next start reads the file again
            write_json(known, state | {"sha256": found})
    return found


def read_sha256(file: Path) -> str:
    """A file's SHA-256, of its contents as they are now. Raises `OSError` if it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
