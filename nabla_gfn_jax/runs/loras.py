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
    """The folder for the LoRA after `updates` updates, whether or not it exists."""
    return workdir / f"lora/{updates:05d}"


def saved(workdir: Path) -> dict[int, Path]:
    """The folders of the complete LoRAs by their number of updates, in ascending order."""
    found = [path for path in workdir.glob("lora/*") if _FOLDER.fullmatch(path.name)]
    return {int(path.name): path for path in sorted(found, key=lambda p: int(p.name)) if (path / DIFFUSERS).is_file()}


def latest(workdir: Path) -> Path | None:
    """The folder of the LoRA with the most updates; None if there is no LoRA."""
    return next(reversed(saved(workdir).values()), None)


def save(workdir: Path, updates: int, lora: Params, about: Mapping[str, Any], keep: int = 0) -> None:
    """Writes the LoRA after `updates` updates in both layouts, and keeps the newest `keep` LoRAs (0: all).

    `about` is the result of `Manifest.about_lora`. It is written to the headers of both files and to about.json.
    """
    place = folder(workdir, updates)
    write_json(place / ABOUT, about)
    save_kohya(place / KOHYA, lora, about)
    save_lora(place / DIFFUSERS, lora, about)  # written last: its existence marks a complete LoRA
    if keep:
        others = [path for n, path in saved(workdir).items() if n < updates]
        for path in others[: max(0, len(others) - (keep - 1))]:
            shutil.rmtree(path)
