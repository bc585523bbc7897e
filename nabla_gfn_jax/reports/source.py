"""Reads what a report shows from the workdirs of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import leaves
from nabla_gfn_jax.runs import alarms, evaluations, manifest, metrics_log, pictures
from nabla_gfn_jax.runs.alarms import Alarm
from nabla_gfn_jax.runs.manifest import Manifest
from nabla_gfn_jax.runs.pictures import Pictures
from nabla_gfn_jax.settings import Settings

_PARTS = 2  # of a workdir's path that its name has at least

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The contents of a workdir."""

    path: Path
    name: str
    manifest: Manifest
    rows: list[Row]  # of the log
    evaluations: list[Row]
    pictures: dict[int, Pictures]  # by the number of updates, in ascending order
    base: Pictures | None  # of the base model
    alarms: list[Alarm]


def read(paths: Sequence[Path]) -> list[Run]:
    """The runs in the workdirs. Raises `UserError` if one holds no run, or is given twice."""
    names = names_of(paths)
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    about = manifest.read(path)
    found = {updates: pictures.read(file) for updates, file in pictures.saved(path).items()}
    shown = {updates: those for updates, those in found.items() if those is not None}
    base = pictures.read(pictures.place(path, pictures.BASE)) if starts_from_lora(about) else shown.get(0)
    measured = [row for row in evaluations.read(path) if isinstance(row, dict)]
    return Run(path, name, about, metrics_log.read(path), measured, shown, base, alarms.read(path))


def starts_from_lora(about: Manifest) -> bool:
    """Whether the policy at update 0 is not the base model."""
    return bool(manifest.flatten(about.config).get("lora.start_from"))


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name of each workdir: the last parts of its path, as many as distinguish all."""
    parts = [path.absolute().resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path, its in zip(paths, parts, strict=True) if parts.count(its) > 1)
        raise UserError(f"{twice} is given twice; give each workdir once")
    for count in range(_PARTS, max(map(len, parts)) + 1):
        names = ["/".join(part.strip("/") for part in its[-count:]).strip("/") for its in parts]
        if len(set(names)) == len(names):
            break
    return names


def groups(runs: Sequence[Run]) -> list[int]:
    """The number of each run's group. Runs of one group differ only by the seed, or in fields that change no number."""
    keys = [repr(sorted(_determining(run.manifest).items(), key=lambda item: item[0])) for run in runs]
    order = list(dict.fromkeys(keys))
    return [order.index(key) for key in keys]


def _determining(about: Manifest) -> Row:
    """The fields of the config that determine a run's numbers, except the seed, by dotted name."""
    flat = manifest.flatten(about.config)
    free = {name for name, leaf in leaves(Settings, about.config).items() if leaf.option.free}
    return {name: value for name, value in flat.items() if name not in free | {"seed"}} | {"": _hashes(about)}


def _hashes(about: Manifest) -> dict[str, str]:
    return {name: given.get("sha256", "") for name, given in sorted(about.inputs.items())}
