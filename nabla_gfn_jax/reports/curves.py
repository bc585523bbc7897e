"""The curves of a report: a line for each run, and a band for runs that differ only by the seed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.reports.evaluated import Evaluated
from nabla_gfn_jax.reports.source import Row, Run
from nabla_gfn_jax.runs.evaluations import estimate
from nabla_gfn_jax.runs.metrics_log import COLUMNS, POLICY, Column

RESULTS, TRAINING = "Reward, nats and diversity", "Training"  # the sections
_POINTS = 300  # of a line; a longer log is averaged over neighbouring rows
_PART = "reward_mean_"
_X = ("epoch", "step", "updates")


@dataclass(frozen=True)
class Line:
    """y of a run at x updates. `error` is a standard error; it is empty if there is none."""

    run: int
    name: str  # "" if the chart has one line for each run
    x: list[float]
    y: list[float]
    error: list[float]


@dataclass(frozen=True)
class Band:
    """The mean over the runs of a group, and their standard deviation, at the x that all of them have."""

    group: int
    name: str
    runs: int
    x: list[float]
    y: list[float]
    spread: list[float]


@dataclass(frozen=True)
class Chart:
    """Lines over the number of updates."""

    section: str
    title: str
    unit: str
    about: str
    lines: list[Line] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)


def charts(runs: Sequence[Run], groups: Sequence[int], measured: Sequence[Evaluated | None]) -> list[Chart]:
    """All charts, results first, without those that are 0 throughout. `measured` belongs to `runs`."""
    found = [*_of_evaluations(measured), *_of_logs(runs)]
    found = [chart for chart in found if any(y != 0 for line in chart.lines for y in line.y)]
    for chart in found:
        chart.bands.extend(_bands(chart.lines, groups))
    return sorted(found, key=lambda chart: chart.section != RESULTS)


def _of_logs(runs: Sequence[Run]) -> Iterator[Chart]:
    columns = {column.name: column for column in COLUMNS}
    names = dict.fromkeys(name for name in columns if name not in _X)
    names |= dict.fromkeys(name for run in runs for row in run.rows for name in row if name not in (*names, *_X))
    for name in names:
        column = columns.get(name) or _unlisted(name)
        lines = [_line(number, run, column) for number, run in enumerate(runs)]
        chart = Chart(RESULTS if column.of == POLICY else TRAINING, name, column.unit, _meaning(column))
        chart.lines.extend(line for line in lines if line.x)
        yield chart


def _unlisted(name: str) -> Column:
    """A column that `COLUMNS` does not list by its name: a part of the reward, or one of an algorithm of the user."""
    if name.startswith(_PART):
        part = next(column for column in COLUMNS if column.name == "reward_mean_PART")
        return part._replace(name=name)
    return Column(name, "", "the update", "a column that the run's algorithm adds")


def _meaning(column: Column) -> str:
    """The meaning, without the names of the algorithms that have the column."""
    declared = [getattr(cls, "columns", {}) for cls in ALGORITHMS.values()]
    return next((str(columns[column.name]) for columns in declared if column.name in columns), column.meaning)


def _line(number: int, run: Run, column: Column) -> Line:
    """The column over the updates before the policy sampled, or after the epoch. Rows with the same x are averaged."""
    at, samples = "step" if column.of == POLICY else "updates", _samples(run)
    points: dict[float, list[Estimate]] = {}
    for row in run.rows:
        y, x = _number(row.get(column.name)), _number(row.get(at))
        spread = _number(row.get("reward_std")) if column.name == "reward_mean" else None
        if y is not None and x is not None:
            error = spread / math.sqrt(samples) if spread is not None and samples else math.nan
            points.setdefault(x, []).append(Estimate(y, error))
    return _thinned(number, [(x, *_mean(several)) for x, several in sorted(points.items())])


def _samples(run: Run) -> int:
    training = run.manifest.config.get("training")
    found = training.get("trajectories") if isinstance(training, dict) else None
    return found if isinstance(found, int) else 0


def _thinned(number: int, points: list[tuple[float, float, float]]) -> Line:
    if len(points) > _POINTS:
        parts = np.array_split(np.asarray(points), _POINTS)
        points = [(p[:, 0].mean(), *_mean([Estimate(y, e) for _, y, e in p.tolist()])) for p in parts]
    return _make(number, "", points)


def _make(number: int, name: str, points: Sequence[tuple[float, float, float]]) -> Line:
    x, y, error = ([point[i] for point in points] for i in range(3))
    return Line(number, name, x, y, error if all(map(math.isfinite, error)) else [])


def _mean(several: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    count = len(several)
    return Estimate(sum(e.value for e in several) / count, math.sqrt(sum(e.error**2 for e in several)) / count)


def _of_evaluations(measured: Sequence[Evaluated | None]) -> Iterator[Chart]:
    lines = lambda *names: _measured(measured, "", *names)  # noqa: E731
    reward = "mean log R of the measured samples, ± standard error"
    yield Chart(RESULTS, "log R, measured", "log R", reward, lines("certificate", "log_reward"))
    both = [
        *_measured(measured, "spent", "certificate", "spent"),
        *_measured(measured, "needed", "certificate", "needed"),
    ]
    spent = "spent by the model (solid), and needed for its mean log R (dashed)"
    yield Chart(RESULTS, "spent and needed", "nats", spent, both)
    yield Chart(RESULTS, "efficiency", "", "needed / spent; 1: nothing is wasted", lines("certificate", "efficiency"))
    gap = "KL of the model's paths from those of P_base · R^β; 0 at the target"
    yield Chart(RESULTS, "gap", "nats", gap, lines("certificate", "at_beta", "gap"))
    share = "effective share of the path weights; 1 at the target"
    yield Chart(RESULTS, "share", "", share, lines("certificate", "at_beta", "effective_share"))
    of = [e for e in measured if e is not None]
    for name in dict.fromkeys(name for e in of for name in e.figures()):
        if name != "log_reward" or all(estimate(row, "certificate", name) is None for e in of for row in e.of.values()):
            title = name.replace("_", " ")
            yield Chart(RESULTS, title, "", "of the measured samples, ± standard error", lines("figures", name))


def _measured(measured: Sequence[Evaluated | None], name: str, *path: str) -> list[Line]:
    found = []
    for number, evaluated in enumerate(measured):
        at: Callable[[Row], Estimate | None] = lambda row: estimate(row, *path)  # noqa: E731
        rows = {} if evaluated is None else {updates: at(row) for updates, row in evaluated.of.items()}
        points = [(float(updates), *point) for updates, point in rows.items() if point is not None]
        if points:
            found.append(_make(number, name, points))
    return found


def _bands(lines: Sequence[Line], groups: Sequence[int]) -> Iterator[Band]:
    of_group: dict[tuple[int, str], list[Line]] = {}
    for line in lines:
        of_group.setdefault((groups[line.run], line.name), []).append(line)
    for (group, name), alike in of_group.items():
        common = sorted(set.intersection(*(set(line.x) for line in alike)))
        if len(alike) > 1 and common:
            y = np.array([[dict(zip(line.x, line.y, strict=True))[x] for x in common] for line in alike])
            yield Band(group, name, len(alike), common, y.mean(0).tolist(), y.std(0, ddof=1).tolist())


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
