"""Small pictures of a grid's runs, all of the same prompts and noise: `results/thumbnails/BASE/METHOD/00080.png`."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nabla_gfn_jax.runs import pictures
from nabla_gfn_jax.runs.pictures import Pictures, shrunk

FOLDER = "thumbnails"
LARGEST = 7_000_000  # bytes of all files together
_MOST = 16  # pictures of a policy
_SIDES = (96, 64, 48, 32)  # pixels of a picture's longer side, tried in this order


def write(workdirs: Mapping[tuple[str, str], Path], out: Path) -> None:
    """Writes the pictures of the runs, by base and method.

    If they are too large together, they are made smaller; in the last resort only the last update of a run is kept.
    """
    chosen = {key: pictures.saved(workdir) for key, workdir in workdirs.items()}
    for side in _SIDES:
        for only_last in (False, True) if side == _SIDES[-1] else (False,):
            if _write(chosen, out, side, only_last) <= LARGEST:
                return


def _write(chosen: dict[tuple[str, str], dict[int, Path]], out: Path, side: int, only_last: bool) -> int:
    """Replaces the files in `out`, and returns their size in bytes."""
    shutil.rmtree(out, ignore_errors=True)
    size = 0
    for (base, method), files in chosen.items():
        for updates, file in list(files.items())[-1 if only_last else 0 :]:
            found = pictures.read(file)
            if found is None:
                continue
            place = out / base / method / f"{updates:05d}.png"
            pictures.save(place, _reduced(found, side))
            size += place.stat().st_size
    return size


def _reduced(found: Pictures, side: int) -> Pictures:
    kept = found.only(found.of[:_MOST])
    return replace(kept, images=shrunk(kept.images, side))
