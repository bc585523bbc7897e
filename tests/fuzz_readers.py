"""Gives damaged and hostile files to all readers: `python tests/fuzz_readers.py 1000000 [SEED [READER…]]`.

Each input is a small valid file with a few random edits. A reader may return, or raise a `UserError` of one line.
Anything else is a failure: another exception, a crash, more than 5 s of processor time, or more memory than `_MEMORY`.
Each reader runs in a process of its own. The program prints the failures, and a row of numbers for each reader.
"""

import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fuzz_cases import CASES, ODD, Case

from nabla_gfn_jax.errors import UserError

_MEMORY = 2**29  # bytes that a reader may take, for files of a few kB
_SECONDS = 5  # of the processor
_SHOWN = 3  # failures of each kind

Edit = tuple[int, float, int]  # what is done, where (0 to 1), and with what
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damaged(contents: bytes, edits: Sequence[Edit], words: Sequence[bytes] = ()) -> bytes:
    """The contents after the edits."""
    for kind, where, what in edits:
        contents = _KINDS[kind % len(_KINDS)](contents, int(where * len(contents)), what, words)
    return contents


def _flip(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << what % 8)]) + data[at + 1 :] if at < len(data) else data


def _byte(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + bytes([what % 256]) + data[at + 1 :]


def _leave_out(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + data[at + 1 + what % 40 :]


def _repeat(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[: at + 1 + what % 40] + data[at:]


def _cut(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[:at]


def _number(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    size, number = (1, 2, 4, 8)[what % 4], _NUMBERS[what // 4 % len(_NUMBERS)]
    return data[:at] + (number % 256**size).to_bytes(size, "little") + data[at + size :]


def _word(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    return data[:at] + words[what % len(words)] + data[at:] if words else _byte(data, at, what, words)


def _json(data: bytes, at: int, what: int, words: Sequence[bytes]) -> bytes:
    """Replaces one value, or one name, in a JSON file, or in the header of a safetensors file."""
    start, end = 0, len(data)
    if len(data) > 8 and int.from_bytes(data[:8], "little") <= len(data) - 8:
        start, end = 8, 8 + int.from_bytes(data[:8], "little")
    try:
        tree = json.loads(data[start:end])
    except (ValueError, RecursionError):
        return data
    places = list(_places(tree))
    node, key = places[at % len(places)] if places else (None, None)
    odd = ODD[what % len(ODD)]
    if node is None:
        tree = odd
    elif isinstance(node, dict) and what % 7 == 0:
        node[str(odd)] = node.pop(key)
    elif what % 11 == 0:
        del node[key]
    else:
        node[key] = odd
    text = json.dumps(tree).encode()
    return text if start == 0 else len(text).to_bytes(8, "little") + text + data[end:]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inner):
        yield tree, key
        yield from _places(value)


_KINDS = (_flip, _byte, _leave_out, _repeat, _cut, _number, _word, _word, _json, _json, _json)


def random_edits(chance: random.Random) -> list[Edit]:
    """One to four edits."""
    return [
        (chance.randrange(99), chance.random(), chance.randrange(2**32)) for _ in range(chance.choice((1, 1, 2, 4)))
    ]


def attempt(case: Case, folder: Path, name: str, contents: bytes) -> str:
    """Gives a file's new contents to the reader: "read" or "refused". Raises what the reader must not raise."""
    (folder / name).write_bytes(contents)
    try:
        case.read(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or not text.isprintable():
            raise AssertionError(f"not one line: {text!r}") from error
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise AssertionError("asked for too much memory") from error
            cause = cause.__context__
        return "refused"
    return "read"


def try_many(name: str, count: int, seed: int, folder: Path) -> tuple[Counter[str], dict[str, list[str]]]:
    """Gives `count` inputs to a reader: how many it read and refused, and the failures by kind."""
    case, chance = CASES[name], random.Random(f"{seed} {name}")
    ends: Counter[str] = Counter()
    failures: dict[str, list[str]] = {}
    write(case, folder)
    case.read(folder)
    limit_memory()
    for _ in range(count):
        file = chance.choice(list(case.files))
        contents = damaged(case.files[file], random_edits(chance), case.words)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
            ends[attempt(case, folder, file, contents)] += 1
        except BaseException as error:
            kind = f"{type(error).__name__}: {str(error)[:150]} at {where(error)}"
            failures.setdefault(kind, []).append(f"{file}: {contents[:400]!r}")
            ends["failed"] += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if len(case.files) > 1:
            (folder / file).write_bytes(case.files[file])
    ends["KiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ends, failures


def write(case: Case, folder: Path) -> None:
    """Writes the valid files."""
    for file, contents in case.files.items():
        (folder / file).write_bytes(contents)


def where(error: BaseException) -> str:
    """The line of this package in which an exception was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "nabla_gfn_jax" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


class Slow(BaseException):
    """An input took too long."""


def limit_memory() -> None:
    """Limits the memory of this process to what it has and `_MEMORY`, and the time of an input to `_SECONDS`."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, resource.RLIM_INFINITY))

    def slow(*_: Any) -> None:
        raise Slow(f"more than {_SECONDS} s")

    signal.signal(signal.SIGVTALRM, slow)


def in_child(name: str, count: int, seed: int) -> int:
    """Runs `try_many` in a process of its own and prints what it found. Returns the number of failures."""
    reading, writing = os.pipe()
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(try_many(name, count, seed, folder), stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if status or not answer:
        print(f"{name}: the process died (status {status}); its last input is in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    ends, failures = pickle.loads(answer)
    seconds = time.monotonic() - begun
    numbers = f"{count} inputs: {ends['read']} read, {ends['refused']} refused, {ends['failed']} failed"
    print(f"{name}: {numbers}, {ends['KiB'] // 1024} MiB, {seconds:.0f} s", flush=True)
    for kind, inputs in failures.items():
        print(f"    {len(inputs)} x {kind}")
        for shown in inputs[:_SHOWN]:
            print(f"        {shown}", flush=True)
    return ends["failed"]


def main(count: int, seed: int = 0, names: Sequence[str] = ()) -> int:
    """Divides `count` inputs among the readers. Returns the number of failures."""
    warnings.simplefilter("ignore")
    shares = {name: CASES[name].share for name in names or CASES}
    counts = {name: math.ceil(count * share / sum(shares.values())) for name, share in shares.items()}
    failed = sum(in_child(name, some, seed) for name, some in counts.items())
    print(f"{sum(counts.values())} inputs, {failed} failures", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:])))
