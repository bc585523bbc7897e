"""The tables and figures of the notebooks, from results that `reading` has read. Needs the extra `[notebooks]`."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nabla_gfn_jax.inference.table import show
from nabla_gfn_jax.metrics.tilt import FEW, Estimate
from nabla_gfn_jax.reproduction import tables
from nabla_gfn_jax.reproduction.cells import FIRST, TUNING
from nabla_gfn_jax.reproduction.reading import Results, known
from nabla_gfn_jax.runs.pictures import Pictures

COST = ("updates", "trajectories", "tflop", "seconds", "cpu_seconds", "samples", "base_samples", "epoch")
NATS = ("exponent", "needed", "spent", "efficiency", "gap")
_SHARES = ("effective_share", "log_weight_std", "concept_accuracy")
_NOT_DIVERSITY = (*COST, *NATS, *_SHARES, "log_reward", "seed", "learning_rate")
TITLES = {
    "reward_mean": "log R of the training samples",
    "log_reward": "log R",
    "tflop": "TFLOP of training, counted",
    "cpu_seconds": "CPU seconds of training",
    "updates": "updates",
    "spent": "nats spent",
    "drawing_entropy": "entropy over drawings, nats",
    "vendor_entropy": "entropy over vendors, nats",
    "concept_accuracy": "shows its prompt",
}
_SIGNS = "osD^v<>Phd*X"


def diversity(results: Results) -> list[str]:
    """The measured figures that are neither reward, cost nor nats: entropies, FID, DreamSim, ..., as far as present."""
    names = dict.fromkeys(name for row in results.rows for name, value in row.items() if known(value))
    skipped = ("tilted_base_", "as_few_samples_", "log_reward")
    return [n for n in names if n not in _NOT_DIVERSITY and not n.startswith(skipped) and not n.endswith("_se")]


def what(results: Results) -> str:
    """What the results are of, in Markdown: the grid, its runs, commands, dates, versions."""
    about, lines = results.about, list[str]()
    if "cells" in about:
        of = {kind: len(names) for kind, names in about["cells"].items()}
        named = f"Grid `{about['grid']}`" if about["grid"] else "Collected runs"
        lines += [f"{named}: {of['done']} runs done, {of['failed']} failed, {of['missing']} missing.", ""]
        told = ("failed", "missing") if about["grid"] else ("done",)
        lines += [f"- {kind}: {'; '.join(about['cells'][kind])}" for kind in told if of[kind]]
        lines += ["", f"CPU time of the command's starts: {about['cpu_seconds'] / 60:.1f} minutes."]
    for start in about.get("starts", [])[-1:]:
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        date = start.get("written", start.get("time", ""))[:16].replace("T", " ")
        lines += ["", f"Last start: `{start.get('command', 'train')}`, {date} UTC, {versions}."]
    return "\n".join(lines)


def curves(results: Results, columns: Sequence[str], x: str = "updates") -> Figure:
    """A row of axes for each base, an axis for each column: mean ± spread over seeds, a line for each method."""
    bases = results.bases
    size = (4.6 * len(columns), 3.4 * len(bases))
    figure, axes = plt.subplots(len(bases), len(columns), figsize=size, squeeze=False, layout="constrained")
    for base, row in zip(bases, axes, strict=True):
        for column, axis in zip(columns, row, strict=True):
            for number, method in enumerate(results.methods(base)):
                points = results.over(x, column, base, method)
                _line(axis, points, number, results.label(base, method))
            _level(axis, results, base, column)
            axis.set(xlabel=TITLES.get(x, x), title=TITLES.get(column, column.replace("_", " ")))
        row[0].set_ylabel(results.label(base))
    _legend(figure, axes[0][0])
    return figure


def plane(results: Results, x: str, y: str) -> Figure:
    """Figure `y` against figure `x`: a line of points for each method, and the curve of the tilted base model.

    The curve is dashed where fewer than 20 effective base samples of a prompt carry it.
    """
    bases = results.bases
    figure, axes = plt.subplots(1, len(bases), figsize=(6.4 * len(bases), 4.4), squeeze=False, layout="constrained")
    for base, axis in zip(bases, axes[0], strict=True):
        _frontier(axis, results, base, x, "needed" if y == "spent" else y)
        for number, method in enumerate(results.methods(base)):
            rows = [r for r in results.chosen(results.rows, base, method) if known(r.get(x)) and known(r.get(y))]
            for seed in dict.fromkeys(row["seed"] for row in rows):
                mine = sorted((r for r in rows if r["seed"] == seed), key=lambda r: r["updates"])
                _points(axis, mine, x, y, number, results.label(base, method))
        for row in results.rows:
            if row["base"] == base and row["method"] == tables.BASE_MODEL and known(row.get(x)) and known(row.get(y)):
                axis.plot(row[x], row[y], "k+", markersize=12, label="base model")
        axis.set(xlabel=TITLES.get(x, x), ylabel=TITLES.get(y, y.replace("_", " ")), title=results.label(base))
    _legend(figure, axes[0][0])
    return figure


def gallery(results: Results, base: str, columns: int = 8, reward: float | None = None) -> Figure:
    """Rows of pictures with the same noise: the base model, then each method.

    With `reward`, each method is shown at the update whose pictures have the mean log R nearest to it; without, at its
    last.
    """
    methods = [m for m in results.methods(base) if results.pictures(base, m)]
    start = next((p for m in methods for u, p in results.pictures(base, m).items() if u == 0), None)
    rows: list[tuple[str, Pictures]] = [] if start is None else [("base model", start)]
    for method in methods:
        shown = {u: p for u, p in results.pictures(base, method).items() if u > 0}
        if shown:
            updates = max(shown) if reward is None else min(shown, key=lambda u: abs(_mean(shown[u]) - reward))
            rows.append((f"{results.label(base, method)}\n{updates} updates", shown[updates]))
    if not rows:
        raise ValueError(f"there are no pictures of {base}")
    of = [picture for picture in rows[0][1].of if all(picture in shown.of for _, shown in rows)][:columns]
    figure, axes = plt.subplots(len(rows), len(of), figsize=(1.1 * len(of) + 2, 1.25 * len(rows)), squeeze=False)
    for (name, pictures), line in zip(rows, axes, strict=True):
        pictures = pictures.only(of)
        for axis, image, score in zip(line, pictures.images, pictures.scores["log_reward"], strict=True):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{score:.2f}", fontsize=7, pad=2)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.28, right=0.99, top=0.97, bottom=0.01, wspace=0.05, hspace=0.25)
    return figure


def table(results: Results, columns: Sequence[str]) -> str:
    """A Markdown table for each base: the last LoRA of each method, mean ± spread over seeds."""
    lines = []
    for base in results.bases:
        names = [TITLES.get(column, column.replace("_", " ")) for column in columns]
        lines += [f"**{results.label(base)}**", "", f"| method | rate | seeds | {' | '.join(names)} |"]
        lines += ["|---" * (len(columns) + 3) + "|"]
        for method in (tables.BASE_MODEL, *results.methods(base)):
            rows = results.last(base, method)
            if rows:
                rate = f"{rows[0]['learning_rate']:g}" if "learning_rate" in rows[0] else ""
                seeds = str(len(rows)) if rate else ""
                cells = [_cell(results.figure(column, rows), column) for column in columns]
                lines.append(f"| {results.label(base, method)} | {rate} | {seeds} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def tuning(results: Results, figure: str) -> str:
    """A Markdown table of the runs that chose the learning rates: the figure at each rate, the chosen one in bold."""
    lines = [f"| config | method | {figure.replace('_', ' ')} at each learning rate |", "|---|---|---|"]
    for base in results.bases:
        for method in results.methods(base):
            mine = [r for r in results.rows if (r["base"], r["method"]) == (base, method) and "updates" in r]
            tried = [r for r in mine if r.get("stage", FIRST) in (FIRST, TUNING)]
            rates = dict.fromkeys(r["learning_rate"] for r in tried)
            last = [max((r for r in tried if r["learning_rate"] == rate), key=lambda r: r["updates"]) for rate in rates]
            cells = [f"{r['learning_rate']:g}: {r.get(figure, math.nan):.3g}" for r in last]
            shown = [f"**{cell}**" if r["chosen"] else cell for cell, r in zip(cells, last, strict=True)]
            if len(shown) > 1:
                lines.append(f"| {results.label(base)} | {results.label(base, method)} | {', '.join(shown)} |")
    return "\n".join(lines) if len(lines) > 2 else "No learning rate was chosen: each method has one."


def _line(axis: Axes, points: list[tuple[float, Estimate, int]], number: int, label: str) -> None:
    if not points:
        return
    at, y = [p[0] for p in points], np.array([p[1].value for p in points])
    (drawn,) = axis.plot(at, y, markersize=4, linewidth=1.2, label=label, **_look(number))
    error = np.array([p[1].error for p in points])
    if np.isfinite(error).all():
        axis.fill_between(at, y - error, y + error, color=drawn.get_color(), alpha=0.15, linewidth=0)


def _points(axis: Axes, rows: list[dict[str, Any]], x: str, y: str, number: int, label: str) -> None:
    at, up = ([row[name] for row in rows] for name in (x, y))
    across, along = ([row.get(f"{name}_se", 0.0) for row in rows] for name in (x, y))
    look: dict[str, Any] = {"markersize": 5, "linewidth": 0.9, "elinewidth": 0.6, **_look(number)}
    axis.errorbar(at, up, yerr=along, xerr=across, label=label, **look)


def _frontier(axis: Axes, results: Results, base: str, x: str, y: str) -> None:
    points = [r for r in results.frontier if r["base"] == base and known(r.get(x)) and known(r.get(y))]
    sure = [r for r in points if r["effective_samples"] >= FEW]
    for some, style in ((points, ":"), (sure, "-")):
        label = "base model, weighted by R^b" if style == "-" else None
        axis.plot([r[x] for r in some], [r[y] for r in some], f"k{style}", linewidth=1.2, label=label)


def _level(axis: Axes, results: Results, base: str, column: str) -> None:
    """A dashed line at the base model's figure."""
    values = [r.get(column) for r in results.rows if r["base"] == base and r["method"] == tables.BASE_MODEL]
    if values and known(values[0]):
        axis.axhline(float(values[0] or 0.0), color="black", linestyle="--", linewidth=0.8, label="base model")


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside right center", fontsize=8, frameon=False)


def _look(number: int) -> dict[str, Any]:
    """Colour and sign of a method."""
    return {"color": plt.get_cmap("tab20")(number % 20), "marker": _SIGNS[number % len(_SIGNS)]}


def _mean(pictures: Pictures) -> float:
    return float(np.mean(pictures.scores["log_reward"]))


def _cell(estimate: Estimate | None, column: str) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.4g}" if column in COST else show(estimate)
