"""Reads the one tensor of a pickled file in a separate process: `python tests/cache_process.py FILE SHA256 [FAULT]`.

Prints "converted" or "kept". FAULTS: "no lock" has none to be had; "killed" is killed with half of the copy written;
"stopped" with the copy written, but not its note.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from nabla_gfn_jax.checkpoints import files, weights


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(file: Path, expected: str, fault: str = "") -> None:
    converted = []
    read, write = weights.torch_pickle.read, weights.write_safetensors

    def slowly(path):
        converted.append(path)
        time.sleep(0.3)  # all programs meet here unless a lock keeps them apart
        return read(path)

    def half(path, tensors):
        with files.replacing(path) as unfinished:
            write(unfinished, tensors)
            os.truncate(unfinished, unfinished.stat().st_size // 2)
            die()

    def no_lock(*_, **__):
        raise NotImplementedError("this file system has no locks")

    weights.torch_pickle.read = slowly
    if fault == "no lock":
        weights.FileLock.acquire = no_lock
    elif fault == "killed":
        weights.write_safetensors = half
    elif fault == "stopped":
        weights.write_json = die
    state = weights.read_state_dict(file)
    assert hashlib.sha256(state["a"].tobytes()).hexdigest() == expected
    print("converted" if converted else "kept")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
