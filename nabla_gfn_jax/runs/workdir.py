"""A run's folder: who may write into it, and what is in it."""

import os
import socket
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nabla_gfn_jax.checkpoints.files import check_can_write, plain, remove_unfinished
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.runs import loras
from nabla_gfn_jax.runs.manifest import (
    NAME,
    Input,
    Manifest,
    compare_configs,
    compare_inputs,
    describe_inputs,
    devices,
    read,
    unflatten,
    versions,
)
from nabla_gfn_jax.typing import Params

_LOCK = ".lock"
_OLDER = ("config.json", "checkpoints", "metrics.jsonl")  # of these a run without a manifest has one


class Workdir:
    """A workdir that this program has claimed. Only the process with `writes` writes into it."""

    def __init__(self, path: Path, manifest: Manifest, *, writes: bool):
        self.path, self.manifest, self.writes = path, manifest, writes

    def record_inputs(self, inputs: Mapping[str, Input]) -> None:
        """Writes what the run reads into the manifest: by name files, or texts.

        On a resume raises `UserError`, one line, if any of them holds something else than when the run began.
        """
        found = describe_inputs(inputs)
        if not self.writes and (self.path / NAME).exists():
            self.manifest = read(self.path)
        if self.manifest.inputs:
            changed = compare_inputs(self.manifest.inputs, found)
            if changed:
                reason = "; ".join(changed)
                raise UserError(
                    f"what the run in {self.path} reads has changed: {reason}; restore it, or choose another --workdir"
                )
        elif self.writes:
            self.manifest = replace(self.manifest, inputs=found)
            self.manifest.write(self.path)

    def save_lora(self, updates: int, lora: Params, *, keep: int = 0) -> None:
        """Writes the LoRA after so many updates in both layouts, and removes all but the newest `keep`, if not 0."""
        if self.writes:
            loras.save(self.path, updates, lora, self.manifest.about_lora(updates), keep)

    def lora(self, updates: int) -> Path:
        """The folder of the LoRA after so many updates."""
        return loras.folder(self.path, updates)

    def loras(self) -> dict[int, Path]:
        """The folders of the LoRAs that are there, by updates, the first first."""
        return loras.saved(self.path)

    def latest_lora(self) -> Path | None:
        """The folder of the one with the most updates."""
        return loras.latest(self.path)


@contextmanager
def claim(
    path: Path,
    settings: Mapping[str, Any],
    free: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
    *,
    write: bool = True,
) -> Iterator[Workdir]:
    """Makes the folder and its manifest, or checks that a run of these settings is in it, and holds its lock meanwhile.

    A run that has left nothing but its manifest is forgotten, so that a mistake in a first command binds nobody.

    `settings`: by dotted name, of which those in `free` may differ from the run's. `about`: the fields of `Manifest`
    that repeat some of them. The lock is the operating system's, which releases it however the program ends. Of a run
    in several processes, one writes; the others, with `write` False, take no lock and only compare.

    Raises `UserError`, one line, if another program has the lock, the folder cannot be written, or it holds another
    run.
    """
    lock = FileLock(path / _LOCK, timeout=0, thread_local=False)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if write:
            check_can_write(path / NAME)
            lock.acquire()
        manifest = _manifest(path, settings, free, about or {}, write=write)
    except Timeout:
        raise UserError(f"workdir {path} is in use{_by_whom(path)}; wait for it to end, or choose another") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"workdir {path} cannot be used ({error}); choose another --workdir") from error
    try:
        yield Workdir(path, manifest, writes=write)
    finally:
        lock.release()


def _manifest(
    path: Path, settings: Mapping[str, Any], free: Collection[str], about: Mapping[str, Any], *, write: bool
) -> Manifest:
    """The run's that is in the folder, brought up to date, or a new one; written if this process writes."""
    config = plain(unflatten(settings))
    if (path / NAME).exists() and _has_results(path):
        found = read(path)
        changed = compare_configs(found.config, config, set(free))
        if changed:
            reason = "; ".join(changed)
            raise UserError(f"workdir {path} holds a run of another config: {reason}; choose another --workdir")
    else:
        if write and not (path / NAME).exists() and any((path / name).exists() for name in _OLDER):
            raise UserError(f"workdir {path} holds a run of an older version, without {NAME}; choose another --workdir")
        found = Manifest(id=uuid.uuid4().hex, config=config)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "versions": versions(),
        "devices": devices(),
    }
    manifest = replace(found, config=config, **about, starts=(*found.starts, start))
    if write:
        _tell_of_other_versions(found.versions, manifest.versions)
        for folder in (path, *loras.saved(path).values()):
            remove_unfinished(folder)
        manifest.write(path)
    return manifest


def _has_results(path: Path) -> bool:
    """Whether a run has left any file but its manifest and its lock."""
    return any(file.is_file() and file.name != NAME and file.name[0] != "." for file in path.rglob("*"))


def _tell_of_other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [f"{name} {before[name]} → {now.get(name)}" for name in before if before[name] != now.get(name)]
    if changed:
        print(f"the run goes on with other versions than before: {', '.join(changed)}", file=sys.stderr)


def _by_whom(path: Path) -> str:
    try:
        start = read(path).starts[-1]
        return f" by process {start['process']} on {start['host']}, started {start['time']}"
    except (UserError, IndexError, KeyError):
        return " by another program"
