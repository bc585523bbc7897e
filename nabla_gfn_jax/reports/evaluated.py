"""The measurements of a run's saved LoRAs, from its `evaluations.jsonl`."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from nabla_gfn_jax.inference.evaluation import DESCRIBED
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.reports.source import Row

_LORA = re.compile(r"lora/(\d{5,})")


@dataclass(frozen=True)
class Evaluated:
    """The newest measurements that were made alike. `what` is everything that they depend on except the LoRA."""

    what: Row
    of: dict[int, Row]  # by the number of updates, in ascending order; at 0 the base model

    def figures(self) -> list[str]:
        """The names of all figures, without those of the certificate."""
        return list(dict.fromkeys(name for row in self.of.values() for name in row.get("figures", {})))


def evaluated(rows: list[Row], starts_from_lora: bool) -> Evaluated | None:
    """The measurements of the run's own LoRAs at strength 1; None if there are none.

    Rows of different prompts, samplers or rewards are not comparable. Those that are like the newest row with a
    certificate are taken or, if no row has one, those like the newest row. If the run starts from a LoRA, update 0 is
    not the base model, which is then left out.
    """
    known = [(updates, row) for row in rows if (updates := _updates(row, starts_from_lora)) is not None]
    if not known:
        return None
    newest = next((row for _, row in reversed(known) if row.get("certificate")), known[-1][1])
    alike = {updates: row for updates, row in known if _key(row) == _key(newest)}
    return Evaluated(_what(newest), dict(sorted(alike.items())))


def estimate(row: Row, *names: str) -> Estimate | None:
    """The figure under nested names, such as ("certificate", "spent"); None if it does not exist or is not finite."""
    found: Any = row
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        return None
    try:
        value, error = float(found["value"]), float(found["std_error"])
    except (KeyError, TypeError, ValueError):
        return None
    return Estimate(value, error) if math.isfinite(value) else None


def _updates(row: Row, starts_from_lora: bool) -> int | None:
    model = row.get("model")
    if model == "base":
        return None if starts_from_lora else 0
    lora = _LORA.fullmatch(model) if isinstance(model, str) else None
    return int(lora[1]) if lora else None


def _what(row: Row) -> Row:
    return {name: row.get(name) for name in DESCRIBED}


def _key(row: Row) -> str:
    return json.dumps(_what(row), sort_keys=True)
