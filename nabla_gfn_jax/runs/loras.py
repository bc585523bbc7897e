"""The LoRA files of a run: `WORKDIR/lora/00080/` holds the LoRA after 80 updates, in both layouts."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.checkpoints.lora_file import save_kohya, save_lora
from nabla_gfn_jax.typing import Params

DIFFUSERS, KOHYA, ABOUT = "diffusers.safetensors", "kohya.safetensors", "about.json"
_FOLDER = re.compile(r"\d{5,}")


def folder(workdir: Path, updates: int) -> Path:
    """Where the LoRA after so many updates is, or would be."""
    return workdir / f"lora/{updates:05d}"


def saved(workdir: Path) -> dict[int, Path]:
    """The folders of the LoRAs that are there, whole, by updates, the first first."""
    found = [path for path in workdir.glob("lora/*") if _FOLDER.fullmatch(path.name)]
    return {int(path.name): path for path in sorted(found, key=lambda p: int(p.name)) if (path / DIFFUSERS).is_file()}


def latest(workdir: Path) -> Path | None:
    """The folder of the LoRA with the most updates."""
    return next(reversed(saved(workdir).values()), None)


def save(workdir: Path, updates: int, lora: Params, about: Mapping[str, Any], keep: int = 0) -> None:
    """Writes the LoRA after so many updates, and removes those with fewer but the newest `keep`, or none if 0.

    `about` is what `Manifest.about_lora` says of it; it stands in the headers of both files, and beside them.
    """
    place = folder(workdir, updates)
    write_json(place / ABOUT, about)
    save_kohya(place / KOHYA, lora, about)
    save_lora(place / DIFFUSERS, lora, about)  # the last: with it, the LoRA is there
    if keep:
        others = [path for n, path in saved(workdir).items() if n < updates]
        for path in others[: max(0, len(others) - (keep - 1))]:
            shutil.rmtree(path)
