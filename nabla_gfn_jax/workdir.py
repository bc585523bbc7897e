"""The claim of a run on its workdir."""

import json
import os
from pathlib import Path
from typing import Any

from nabla_gfn_jax import options
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.errors import UserError


def claim_workdir(workdir: Path, settings: Any, *, write: bool = True) -> None:
    """Makes the folder and its config.json, or, unless `write`, only looks.

    Raises `UserError` if it is not writable or holds another run.
    """
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(workdir, os.W_OK):
            raise PermissionError("no permission")
        if file.exists():
            _compare(json.loads(file.read_text()), settings, workdir)
        if write:
            write_json(file, options.plain(settings))  # other processes may be reading the one before
    except (OSError, ValueError) as error:
        raise UserError(f"workdir {workdir} cannot be used ({error}); choose another --workdir") from error


def _compare(old: dict[str, Any], settings: Any, workdir: Path) -> None:
    before, now, free = _flat(old), _flat(options.plain(settings)), options.free_names(settings)
    changed = sorted(k for k in before | now if before.get(k) != now.get(k) and k not in free)
    if changed:
        shown = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in changed[:5])
        raise UserError(f"workdir {workdir} holds a run of another config: {shown}; choose another --workdir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
