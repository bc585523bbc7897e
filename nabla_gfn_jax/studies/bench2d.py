"""Compares all algorithms on a problem in the plane with an exact target, at equal cost, in nats.

    python -m nabla_gfn_jax.studies.bench2d --out=docs/bench2d.jsonl

Base, chain and reward are those of `mixture2d`, with a third, harder setting: eight modes, of which the one with the
highest reward is rare. The target P_base(x) R(x) and log Z are known in closed form, so only means over the policy's
samples are estimated.

The *cost* is the number of evaluations of the network: one for each state at which the policy or the base model is
evaluated, in sampling, credit and update, and one more for each pull-back (`evaluations`). The reward and small heads
are not counted. All methods are evaluated after the same cost, and again after twice this cost; a method that has
converged changes little in between.

A method's learning rate is constant. It is the one in `--rates` with the smallest final gap for the mild reward at seed
0. The evaluated policy is a running mean over about the last tenth of the updates. Rows are appended to the file, and
rows that it already has are not computed again.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nabla_gfn_jax.algorithms.awm import Awm
from nabla_gfn_jax.algorithms.dag_db import DagDB
from nabla_gfn_jax.algorithms.ddpo import Ddpo
from nabla_gfn_jax.algorithms.draft import Draft
from nabla_gfn_jax.algorithms.eam import Eam
from nabla_gfn_jax.algorithms.fitted_value import FittedValue
from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.algorithms.nft import Nft
from nabla_gfn_jax.algorithms.path_regression import PathRegression
from nabla_gfn_jax.algorithms.plain_nabla_db import PlainNablaDB
from nabla_gfn_jax.algorithms.ram import Ram
from nabla_gfn_jax.algorithms.refl import Refl
from nabla_gfn_jax.algorithms.residual_db import ResidualDB
from nabla_gfn_jax.algorithms.value_gradient import ValueGradient
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.options import LARGEST_SEED, Checked, option
from nabla_gfn_jax.studies.plane import (
    BATCH,
    LANES,
    SETTINGS,
    Judge,
    Lane,
    Method,
    Programs,
    Training,
    World,
    evaluations,
)

TIMES = (1, 2)  # multiples of the budget after which a policy is evaluated
BASE, TILTED = "the base model", "the tilted mixture's own network"
TUNED = ("mild", 0)  # setting and seed for which a method's learning rate is chosen
DIVERGED = 10_000.0  # a larger gap, in nats, counts as divergence
FIGURES = ("kl_policy_target", "kl_target_policy", "exponent", "spent", "efficiency")
Row = dict[str, Any]

METHODS: dict[str, Method] = {
    "residual ∇-DB, lookahead": Method(ResidualNablaDB(beta=1.0)),
    "residual ∇-DB, guess, γ = 1": Method(ResidualNablaDB(beta=1.0, credit="guess", gamma="one")),
    "residual ∇-DB, adjoint": Method(ResidualNablaDB(beta=1.0, credit="adjoint"), clip=np.inf),
    "residual ∇-DB, terminal": Method(ResidualNablaDB(beta=1.0, credit="terminal")),
    "residual ∇-DB, terminal, γ = 1": Method(ResidualNablaDB(beta=1.0, credit="terminal", gamma="one")),
    "path regression, adjoint": Method(PathRegression(beta=1.0, credit="adjoint"), clip=np.inf),
    "path regression, innovation": Method(PathRegression(beta=1.0, credit="innovation"), clip=np.inf),
    "value gradient": Method(ValueGradient(beta=1.0)),
    "value gradient, no gradient of R": Method(ValueGradient(beta=1.0, guess=False)),
    "fitted value": Method(FittedValue(beta=1.0, steps=4, memory=2048, components=2, width=64, fit_batch=512)),
    "residual DB": Method(ResidualDB(beta=1.0)),
    "EAM": Method(Eam(beta=1.0)),
    "RAM": Method(Ram(beta=1.0)),
    "RAM, no negative weights": Method(Ram(beta=1.0, baseline="least")),
    "AWM": Method(Awm()),
    "DiffusionNFT": Method(Nft()),
    "DDPO": Method(Ddpo()),
    "ReFL": Method(Refl(margin=1e6)),
    "DRaFT-1": Method(Draft()),
    "DRaFT-10": Method(Draft(last_steps=10)),
    "DRaFT-LV": Method(Draft(lv_samples=2)),
    "plain ∇-DB, given P_base R": Method(PlainNablaDB(beta=1.0), times_base=True),
    "DAG-DB, given P_base R": Method(DagDB(beta=1.0), times_base=True),
}


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The methods, settings and seeds to run, and the file for the rows."""

    out: Path = option(meaning="file of JSON lines to which rows are added", file="output", endings=(".jsonl",))
    only: str = option("", "only the methods whose name contains this text", empty=True)
    settings: tuple[str, ...] = option(tuple(SETTINGS), "the settings", choices=SETTINGS)
    seeds: tuple[int, ...] = option((0, 1, 2), "the seeds", minimum=0, maximum=LARGEST_SEED)
    rates: tuple[float, ...] = option((1e-3, 3e-3, 1e-2), "learning rates from which the best is chosen", above=0)
    budget: float = option(5e6, "the equal cost, in evaluations of the network", above=0)


def rows_in(file: Path) -> list[Row]:
    """The rows in the file; an empty list if there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def best_rate(rows: Iterable[Row], method: str) -> float | None:
    """The learning rate with the smallest final gap for the mild reward at seed 0; None if there are no rows."""
    found = [r for r in rows if (r["method"], r["setting"], r["seed"], r["times"]) == (method, *TUNED, TIMES[-1])]
    return min(found, key=lambda r: r.get("gap", np.inf))["rate"] if found else None


def plan(options: Options, methods: Mapping[str, Method], rows: list[Row]) -> Iterator[tuple[str, list[Lane]]]:
    """The runs in order: first the rates, then every setting at the first seed, then the other seeds."""
    for name in methods:
        yield name, [Lane(*TUNED, rate) for rate in options.rates]
    ways = [(setting, seed) for seed in options.seeds for setting in options.settings if (setting, seed) != TUNED]
    for first in range(0, len(ways), LANES):
        for name in methods:
            rate = best_rate(rows, name) or options.rates[0]
            yield name, [Lane(setting, seed, rate) for setting, seed in ways[first : first + LANES]]


def bench(name: str, programs: Programs, judge: Judge, lanes: Sequence[Lane], budget: float) -> Iterator[Row]:
    """Trains the lanes, and evaluates each after the budget and after twice the budget."""
    training, start = Training(programs, lanes), time.process_time()
    cost = evaluations(programs.method.algorithm) * BATCH
    for times in TIMES:
        training.train(round(times * budget / cost))
        for index, lane in enumerate(lanes):
            yield {
                "method": name,
                **lane._asdict(),
                "budget": budget,
                "times": times,
                "updates": training.made,
                "evaluations": round(training.made * cost),
                "cpu_seconds": round((time.process_time() - start) / LANES, 1),
                **judge(training.policy(index), SETTINGS[lane.setting]),
            }


def references(judge: Judge) -> Iterator[Row]:
    """The reference rows. The tilted mixture's network is the optimal policy in the limit of many small steps."""
    for name, setting in SETTINGS.items():
        tilted = World.of(setting._replace(data=setting.data.tilted(setting.k)))
        for method, policy in ((BASE, None), (TILTED, tilted)):
            row = {"method": method, **Lane(name, 0, 0.0)._asdict(), "times": TIMES[-1], "updates": 0, "evaluations": 0}
            yield row | judge(policy, setting)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each setting: figures after twice the budget, as means over seeds with standard errors."""
    names = (BASE, TILTED, *METHODS)
    parts = []
    for setting in SETTINGS:
        lines = [
            "| method | rate | evaluations an update | KL(p‖q) | KL(q‖p) | exponent | spent | efficiency | gap at half "
            "the cost | gap | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name in names:
            rate = best_rate(rows, name)
            mine = [r for r in rows if (r["method"], r["setting"], r["rate"]) == (name, setting, rate)]
            half, whole = ([r for r in mine if r["times"] == times] for times in TIMES)
            if whole:
                lines.append(f"| {name} | {_line(half, whole)} |")
        parts.append(f"**{setting}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(half: Sequence[Row], whole: Sequence[Row]) -> str:
    per_update = [r["evaluations"] / (r["updates"] * BATCH) for r in whole if r["updates"]]
    cells = [f"{whole[0]['rate']:g}" if per_update else "", f"{per_update[0]:.0f}" if per_update else ""]
    cells += [mean_of(whole, name) for name in FIGURES]
    return " | ".join([*cells, mean_of(half, "gap"), mean_of(whole, "gap"), str(len(whole))])


def mean_of(rows: Sequence[Row], name: str) -> str:
    """The mean over seeds ± its standard error; "" if there is no such figure."""
    if any(r.get("gap", np.inf) > DIVERGED for r in rows):
        return "diverged"
    values = [r[name] for r in rows if r.get(name) is not None]
    if not values:
        return ""
    digits = 3 if name != "exponent" else 2
    error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def add(file: Path, rows: list[Row], more: Iterable[Row]) -> None:
    """Appends rows to the file and to the list after all of them are computed, so that no row is ever repeated."""
    for row in list(more):
        rows.append(row)
        with file.open("a") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(*(f"{name} {v:.4g}" if isinstance(v, float) else v for name, v in row.items()), flush=True)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Runs what the file lacks, appends the rows and prints the tables."""
    options = parse(argv, Options, __doc__)
    methods = {name: method for name, method in METHODS.items() if options.only in name}
    if not methods:
        raise UserError(f"--only={options.only!r} names no method; the methods are: {'; '.join(METHODS)}")
    rows = rows_in(options.out)
    if other := {r["budget"] for r in rows if "budget" in r} - {options.budget}:
        raise UserError(f"--budget={options.budget:g} and {options.out} has rows of {other.pop():g}; name another file")
    use_compilation_cache()
    judge, programs = Judge(), {name: Programs(method) for name, method in methods.items()}
    if not any(row["method"] == BASE for row in rows):
        add(options.out, rows, references(judge))
    for name, lanes in plan(options, methods, rows):
        done = {(r["setting"], r["seed"], r["rate"]) for r in rows if r["method"] == name and r["times"] == TIMES[-1]}
        lanes = [lane for lane in lanes if lane not in done]
        if lanes:
            add(options.out, rows, bench(name, programs[name], judge, lanes, options.budget))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv)
