"""Alarms: what a run's log and its measurements say has gone wrong while the reward rises.

An alarm is raised when its condition holds and did not hold at the measurement before. `WORKDIR/alarms.jsonl` has one
line per alarm. Differences count as real above three standard errors.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nabla_gfn_jax.checkpoints.files import append
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.runs.evaluations import estimate

NAME = "alarms.jsonl"
SPREAD = "reward_std_prompt"  # the column of the log
ERRORS = 3.0  # standard errors above which a difference counts as real
WASTE = 0.25  # a smaller efficiency is an alarm,
SPENT = 0.5  # if the policy spends more nats than this
GONE = 0.1  # so much is left of a spread that is gone
EPOCHS = 5  # the spread is a median over so many epochs
_LIKE = ("_entropy", "_distance_x100")  # the endings of the names of diversities
_SHOWN = ("concept_accuracy", "clip_score")  # how well images show their prompt
_DO = "look at the pictures, use an earlier LoRA, or lower algorithm.beta or training.learning_rate"

Row = Mapping[str, Any]


class Alarm(NamedTuple):
    """An alarm after `updates` updates. `text` has the figure and says what to do."""

    updates: int
    name: str
    text: str


def of_log(rows: Sequence[Row]) -> list[Alarm]:
    """The alarms of the log's rows, in their order: the log rewards of a prompt's samples do not differ any more."""
    spreads = [(int(row["step"]), row[SPREAD]) for row in rows if row.get(SPREAD) is not None and "step" in row]
    medians = [float(np.median([s for _, s in spreads[max(0, i - EPOCHS + 1) : i + 1]])) for i in range(len(spreads))]
    found, before = [], False
    for (updates, _), now in list(zip(spreads, medians, strict=True))[EPOCHS:]:
        first = medians[EPOCHS - 1]
        gone = now < GONE * first
        if gone and not before:
            text = (
                f"the log rewards of a prompt's samples have a standard deviation of {now:.2g}, and of {first:.2g} at "
                f"the beginning: the samples of a prompt have become alike; {_DO}"
            )
            found.append(Alarm(updates, "spread", text))
        before = gone
    return found


def of_evaluations(rows: Mapping[int, Row]) -> list[Alarm]:
    """The alarms of measurements that were made alike, by number of updates; at 0 those of the base model."""
    found: list[Alarm] = []
    before: set[str] = set()
    for updates in sorted(rows):
        now = list(_holding(rows[updates], rows.get(0))) if updates else []
        found += [Alarm(updates, name, text) for name, text in now if name not in before]
        before = {name for name, _ in now}
    return found


def _holding(row: Row, base: Row | None) -> Iterator[tuple[str, str]]:
    for condition in (_farther_than_the_base_model, _wasteful, _only_the_reward_rises, _unlike_the_tilted_base):
        yield from condition(row, base or {})


def _farther_than_the_base_model(row: Row, base: Row) -> Iterator[tuple[str, str]]:
    gap, own = (estimate(r, "certificate", "at_beta", "gap") for r in (row, base))
    if gap and own and _above(gap, own):
        beta = row["certificate"]["at_beta"]["beta"]
        yield (
            "gap",
            f"the gap to P_base · R^{beta:g} is {_show(gap)} nats, and the base model's own is {_show(own)}: "
            f"the policy is farther from its target than the base model is; {_DO}",
        )


def _wasteful(row: Row, base: Row) -> Iterator[tuple[str, str]]:
    spent, needed, share = (estimate(row, "certificate", name) for name in ("spent", "needed", "efficiency"))
    if spent and needed and share and spent.value > SPENT and _above(Estimate(WASTE, 0.0), share):
        yield (
            "efficiency",
            f"the policy spends {_show(spent)} nats, and {_show(needed)} would do for its log R: most of its change "
            f"does not serve the reward; {_DO}",
        )


def _only_the_reward_rises(row: Row, base: Row) -> Iterator[tuple[str, str]]:
    now, first = (estimate(r, "certificate", "log_reward") for r in (row, base))
    if not (now and first and _above(now, first)):
        return
    for name in (f"log_reward_{label}" for label in row.get("cross_rewards", ())):
        other, before = (estimate(r, "figures", name) for r in (row, base))
        if other and before and _above(before, other):
            yield (
                name,
                f"log R has risen from {_show(first)} to {_show(now)}, but {name} has fallen from {_show(before)} to "
                f"{_show(other)}: the policy may exploit the reward; {_DO}",
            )


def _unlike_the_tilted_base(row: Row, base: Row) -> Iterator[tuple[str, str]]:
    tilted = row.get("tilted_base") or {}
    mine = dict(row.get("figures", {})) | dict(row.get("as_few_samples") or {})
    for name in tilted:
        what = "its samples are more alike" if name.endswith(_LIKE) else "its images show their prompt less well"
        here, there = (estimate({"": its}, "", name) for its in (mine, tilted))
        if (name.endswith(_LIKE) or name in _SHOWN) and here and there and _above(there, here):
            yield (
                name,
                f"{name} is {_show(here)}, and {_show(there)} for the base model tilted to the same log R: {what} than "
                f"the reward asks for; {_DO}",
            )


def _above(one: Estimate, other: Estimate) -> bool:
    """Whether `one` is larger than `other` by more than chance."""
    error = math.hypot(one.error, other.error)
    return math.isfinite(error) and one.value - other.value > ERRORS * error


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ± {estimate.error:.2g}"


def add(workdir: Path, alarms: Sequence[Alarm], tell: Callable[[str], None]) -> list[Alarm]:
    """Appends those alarms that the file lacks, tells them, and returns them. Raises `OSError` on a full disk."""
    known = {(alarm.updates, alarm.name) for alarm in read(workdir)}
    new = [alarm for alarm in alarms if (alarm.updates, alarm.name) not in known]
    for alarm in new:
        tell(f"ALARM after {alarm.updates} updates: {alarm.text}")
    if new:
        lines = "".join(json.dumps(alarm._asdict(), ensure_ascii=False) + "\n" for alarm in new)
        append(workdir / NAME, lines.encode())
    return new


def read(workdir: Path) -> list[Alarm]:
    """The alarms of a run in their order, without damaged lines."""
    file = workdir / NAME
    found = []
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            found.append(Alarm(int(row["updates"]), str(row["name"]), str(row["text"])))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return found
