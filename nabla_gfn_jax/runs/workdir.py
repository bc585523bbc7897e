"""The folder of a run: its lock, its manifest and its LoRAs."""

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
from nabla_gfn_jax.runs import loras, pictures
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
_OLDER = ("config.json", "checkpoints", "metrics.jsonl")  # a run of an older version has one of these


class Workdir:
    """A workdir that this program has claimed. Only the process with `writes` writes into it."""

    def __init__(self, path: Path, manifest: Manifest, *, writes: bool):
        self.path, self.manifest, self.writes = path, manifest, writes

    def record_inputs(self, inputs: Mapping[str, Input]) -> None:
        """Records the run's inputs, files or lists of texts by name, in the manifest.

        On a resume, raises `UserError` if the contents of an input have changed since the run began.
        """
        found = describe_inputs(inputs)
        if not self.writes and (self.path / NAME).exists():
            self.manifest = read(self.path)
        if self.manifest.inputs:
            changed = compare_inputs(self.manifest.inputs, found)
            if changed:
                reason = "; ".join(changed)
                raise UserError(
                    f"inputs of the run in {self.path} have changed: {reason}; restore them or choose another --workdir"
                )
        elif self.writes:
            self.manifest = replace(self.manifest, inputs=found)
            self.manifest.write(self.path)

    def save_lora(self, updates: int, lora: Params, *, keep: int = 0) -> None:
        """Writes the LoRA after `updates` updates in both layouts, and keeps the newest `keep` LoRAs (0: all)."""
        if self.writes:
            loras.save(self.path, updates, lora, self.manifest.about_lora(updates), keep)

    def lora(self, updates: int) -> Path:
        """The folder for the LoRA after `updates` updates."""
        return loras.folder(self.path, updates)

    def loras(self) -> dict[int, Path]:
        """The folders of the LoRAs by their number of updates, in ascending order."""
        return loras.saved(self.path)

    def latest_lora(self) -> Path | None:
        """The folder of the LoRA with the most updates; None if there is no LoRA."""
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
    """Creates the workdir, or checks that it holds a run of these settings; keeps it locked within the context.

    If an earlier run has written only its manifest, the new settings replace it, so that a mistake in the first command
    has no consequence. The operating system releases the lock however the program ends.

    Args:
        path: the workdir.
        settings: the run's settings by dotted name.
        free: names of settings that may differ from those of an earlier run in the workdir.
        about: the fields of `Manifest` that repeat some of the settings.
        write: true for one process of the run. The other processes take no lock and only compare.

    Raises:
        UserError: another program holds the lock, the folder cannot be written, or it holds another run.
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
    except UserError:
        raise
    except (OSError, NotImplementedError) as error:
        raise UserError(f"workdir {path} cannot be used ({error}); choose another --workdir") from error
    try:
        yield Workdir(path, manifest, writes=write)
    finally:
        lock.release()


def _manifest(
    path: Path, settings: Mapping[str, Any], free: Collection[str], about: Mapping[str, Any], *, write: bool
) -> Manifest:
    """The updated manifest of the run in the folder, or a new one. It is written if this process writes."""
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
        several = (*(path / "lora").glob("*"), *(path / "checkpoints").glob("*"))
        for folder in (path, path / "samples", path / pictures.FOLDER, *several):
            remove_unfinished(folder)
        manifest.write(path)
    return manifest


def _has_results(path: Path) -> bool:
    """Whether the folder has files other than the manifest and hidden files such as the lock."""
    return any(file.is_file() and file.name != NAME and file.name[0] != "." for file in path.rglob("*"))


def _tell_of_other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [f"{name} {before[name]} → {now.get(name)}" for name in before if before[name] != now.get(name)]
    if changed:
        print(f"the run resumes with other versions than before: {', '.join(changed)}", file=sys.stderr)


def _by_whom(path: Path) -> str:
    try:
        start = read(path).starts[-1]
        return f" by process {start['process']} on {start['host']}, started {start['time']}"
    except (UserError, IndexError, KeyError):
        return " by another program"
