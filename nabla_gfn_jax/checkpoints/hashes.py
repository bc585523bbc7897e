"""SHA-256 of files, remembered for large files so that a start need not read gigabytes."""

import hashlib
import json
import re
import time
from contextlib import suppress
from pathlib import Path

from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.user_cache import user_cache

_LARGE = 2**26  # bytes; a smaller file takes less than a tenth of a second to hash
_SETTLED = 2.0  # seconds since the last write after which another write changes the file's time
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal. Raises `OSError` if it cannot be read.

    The hash of a large file is taken from its name in the hub's cache, or from the user's cache, which remembers it by
    path, size and modification time. Otherwise the file is read.
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
        with suppress(OSError):  # if the cache cannot be written, the next start reads the file again
            write_json(known, state | {"sha256": found})
    return found


def read_sha256(file: Path) -> str:
    """The SHA-256 of a file's present contents, in hexadecimal. Raises `OSError` if it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
