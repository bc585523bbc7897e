"""The best of a run's measured LoRAs: `WORKDIR/lora/best/` holds a copy of it, and says by which figure it is best."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nabla_gfn_jax.checkpoints.files import write_json, write_whole
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.runs import loras
from nabla_gfn_jax.runs.evaluations import estimate

Criterion = Literal["gap", "log_reward", "efficiency", "log_reward_cvar"]
ABOUT = "best.json"
_WHERE: dict[str, tuple[str, ...]] = {
    "gap": ("certificate", "at_beta", "gap"),
    "log_reward": ("certificate", "log_reward"),
    "efficiency": ("certificate", "efficiency"),
    "log_reward_cvar": ("figures", "log_reward_cvar"),
}


class Best(NamedTuple):
    """The LoRA after `updates` updates, and the figure by which it is the best."""

    updates: int
    figure: Estimate


def best_of(rows: Mapping[int, Mapping[str, Any]], criterion: Criterion) -> Best | None:
    """The best of the rows of evaluations.jsonl, by number of updates; None if no row has the figure.

    The smallest gap is the best, and of any other figure the largest. Of equal ones it is the earliest.
    """
    found = {updates: estimate(row, *_WHERE[criterion]) for updates, row in rows.items() if updates > 0}
    known = [Best(updates, figure) for updates, figure in sorted(found.items()) if figure is not None]
    sign = -1.0 if criterion == "gap" else 1.0
    return max(known, key=lambda best: sign * best.figure.value, default=None)


def keep(workdir: Path, best: Best, criterion: Criterion) -> None:
    """Copies the LoRA to lora/best, unless it is there. It stays there when its own folder is removed."""
    source, place = loras.folder(workdir, best.updates), workdir / "lora/best"
    about = {"updates": best.updates, "criterion": criterion, "value": best.figure.value}
    about |= {"std_error": best.figure.error}
    if kept(workdir) == (best.updates, criterion) or not (source / loras.DIFFUSERS).is_file():
        return
    for name in (loras.ABOUT, loras.KOHYA, loras.DIFFUSERS):
        write_whole(place / name, (source / name).read_bytes())
    write_json(place / ABOUT, about)


def kept(workdir: Path) -> tuple[int, str] | None:
    """The number of updates of the LoRA in lora/best, and its criterion; None if there is none or it is unreadable."""
    try:
        about = json.loads((workdir / "lora/best" / ABOUT).read_text())
        return int(about["updates"]), str(about["criterion"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
