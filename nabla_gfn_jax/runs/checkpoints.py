"""Saves and restores a training run with Orbax. A save is atomic. The newest saves are kept, and some older ones.

Each save has a file `about.json`, written after it, with the SHA-256 of the save's files and with facts about the run.
A damaged save is noticed by these hashes, and the save before it is used.

A run of one process copies its arrays and goes on while a thread writes them. Several processes write together, and
wait for each other.
"""

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN, PreservationPolicy

from nabla_gfn_jax.checkpoints.files import cannot_write, flush, reason_of, write_json
from nabla_gfn_jax.checkpoints.hashes import read_sha256
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.processes import is_first

ABOUT = "about.json"
ASIDE = ".damaged"  # the ending of the folder that a damaged save is moved to


class Restored(NamedTuple):
    """A save that was read."""

    step: int
    tree: Any
    about: dict[str, Any]  # what `save` was told; {} if the save has no `about.json`


class Checkpoints:
    """The saves of one tree of arrays under `folder`, by step. An interrupted save is never the latest.

    This is a context manager, which waits for the save that is being written and frees the threads. The newest `keep`
    saves are kept and, if `keep_every` is not 0, those of steps that it divides.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0):
        kept: list[PreservationPolicy] = [LatestN(keep)]
        kept += [EveryNSteps(keep_every)] if keep_every else []
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept), enable_async_checkpointing=False
        )
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with suppress(UserError) if kind else nullcontext():  # an error that is on its way says more
                self.wait()
        finally:
            self._writer.shutdown()
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest save; None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises `WriteError` if it could not be written. The saves before are then whole.
        """
        writing, self._writing = self._writing, None  # an error is raised once
        if writing is not None:
            writing.result()

    def save(self, step: int, tree: Any, about: Mapping[str, Any] | None = None) -> None:
        """Begins to write `tree`, and the facts `about` the run, unless there is a save of this step or a later one.

        The tree may change afterwards: it has been copied. Raises `WriteError` if this save, or the last, cannot be
        written; a save that is written in the background raises it in `wait`.
        """
        if self.latest is not None and step <= self.latest:
            return
        state = jax.tree.map(_copy, flax.serialization.to_state_dict(tree))
        if jax.process_count() > 1:
            self._write(step, state, about or {})
        else:
            self._writing = self._writer.submit(self._write, step, state, dict(about or {}))

    def _write(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        place = self._folder / str(step)
        try:
            with _without_orbax_log():
                self._manager.save(step, args=ocp.args.StandardSave(state))
            if is_first():
                write_json(place / ABOUT, {"files": _hashes(place), **about})
        except jax.errors.JaxRuntimeError:
            raise  # not the disk: another process is gone
        except Exception as error:  # Orbax raises many kinds
            raise cannot_write(place, error) from error

    def restore(self, like: Any) -> Restored:
        """The newest whole save as a tree like `like`. Newer damaged saves are reported and moved aside.

        Raises `UserError` if no save is whole, or if a whole save has another structure.
        """
        state = flax.serialization.to_state_dict(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            damage, about = _agreed(lambda step=step: _inspect(self._folder / str(step)))
            if damage is None:
                try:
                    with _without_orbax_log():
                        read = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
                except jax.errors.JaxRuntimeError:
                    raise  # the save is not to blame
                except Exception as error:  # Orbax raises many kinds
                    damage = reason_of(error)
                    if "files" in about:  # the files are as they were written
                        raise UserError(
                            f"{self._folder / str(step)} is of another version of the program ({damage}); "
                            "choose another --workdir"
                        ) from error
                else:
                    self._put_aside(damaged, step)
                    about.pop("files", None)
                    return Restored(step, flax.serialization.from_state_dict(like, read), about)
            damaged[step] = damage
        reasons = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
        raise UserError(
            f"no save in {self._folder} can be restored ({reasons}); delete the folder to start the run from its "
            "beginning, or choose another --workdir"
        )

    def _put_aside(self, damaged: Mapping[int, str], used: int) -> None:
        """Moves damaged saves out of Orbax's sight, because the run will save these steps again."""
        for step, damage in damaged.items():
            place = self._folder / str(step)
            aside = place.with_name(place.name + ASIDE)
            if is_first():
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)
                print(f"{place} is damaged ({damage}): it is now {aside.name}, and {used} is used", file=sys.stderr)
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged saves are aside")
            self._manager.reload()


def _inspect(place: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with the files of a save, None if nothing is, and the contents of its `about.json`.

    A save without this file was made by an older version, or its program was killed just after it.
    """
    try:
        about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        expected = dict(about["files"])
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{ABOUT} cannot be read: {reason_of(error)}", {}
    try:
        found = _hashes(place, flushed=False)
    except OSError as error:
        return reason_of(error), {}
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    if not changed:
        return None, about
    more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{changed[0]} {'has changed' if changed[0] in found else 'is missing'}{more}", {}


def _hashes(place: Path, *, flushed: bool = True) -> dict[str, str]:
    """The SHA-256 of each file of a save by its path within it. With `flushed`, waits until they are on the disk."""
    files = sorted(file for file in place.rglob("*") if file.is_file() and file != place / ABOUT)
    for file in files if flushed else ():
        flush(file)
    return {file.relative_to(place).as_posix(): read_sha256(file) for file in files}


def _agreed(inspect: Any) -> tuple[str | None, dict[str, Any]]:
    """What process 0 found, in every process."""
    if jax.process_count() == 1:
        found: tuple[str | None, dict[str, Any]] = inspect()
        return found
    text = json.dumps(inspect()).encode() if is_first() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(length), np.uint8)[:length] if is_first() else np.zeros(length, np.uint8)
    damage, about = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    return damage, about


@contextmanager
def _without_orbax_log() -> Iterator[None]:
    """A context in which Orbax's threads print no tracebacks; the error is raised as well."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    level = log.level
    log.setLevel(logging.CRITICAL)
    # TensorStore calls back into an event loop that Orbax has closed after the first error.
    sys.unraisablehook = lambda found: None if "loop is closed" in str(found.exc_value) else hook(found)
    try:
        yield
    finally:
        log.setLevel(level)
        sys.unraisablehook = hook


def _copy(array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A copy on the host, unless parts of the array are in other processes.

    Of an array that all devices have, Orbax would write one shard per device, which takes six times as long.
    """
    elsewhere = isinstance(array, jax.Array) and not (array.is_fully_replicated or array.is_fully_addressable)
    return array if elsewhere else np.array(array)
