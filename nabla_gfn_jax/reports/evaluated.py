"""The measurements of a run's saved LoRAs, from its `evaluations.jsonl`."""

import json
from dataclasses import dataclass

from nabla_gfn_jax.inference.evaluation import DESCRIBED
from nabla_gfn_jax.reports.source import Row
from nabla_gfn_jax.runs.evaluations import updates_of


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
    known = [(updates, row) for row in rows if (updates := updates_of(row)) is not None]
    if starts_from_lora:
        known = [(updates, row) for updates, row in known if updates > 0]
    if not known:
        return None
    newest = next((row for _, row in reversed(known) if row.get("certificate")), known[-1][1])
    alike = {updates: row for updates, row in known if _key(row) == _key(newest)}
    return Evaluated(_what(newest), dict(sorted(alike.items())))


def _what(row: Row) -> Row:
    return {name: row.get(name) for name in DESCRIBED}


def _key(row: Row) -> str:
    return json.dumps(_what(row), sort_keys=True)
