"""Prints evaluations as tables with legends, and converts them to JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nabla_gfn_jax.inference.evaluation import Evaluation, Figures
from nabla_gfn_jax.metrics.certificate import AtBeta, Certificate
from nabla_gfn_jax.metrics.tilt import Estimate, LogZ

NATS_LEGEND = """\
exponent    b for which P_base · R^b has this mean log R
needed      nats (KL from the base model) of this P_base · R^b: the least that any model with this mean log R spends
spent       nats that the model spends: KL of its sampling paths from the base model's paths
efficiency  needed / spent; 1 for P_base · R^b itself
gap         KL of the model's paths from those of P_base · R^β: 0 if and only if it samples from P_base · R^β
share       effective share of the weights that turn its paths into those of P_base · R^β; 1: all weights are equal
std log w   standard deviation of the logarithms of these weights; 0 for P_base · R^β itself"""
COMPARED = ("fid", "cmmd")  # the beginnings of the names of figures that compare with the base model
COMPARED_LEGEND = """\
fid and cmmd compare with images of the base model from other noise. The base model's own figures are therefore the
noise floor: a model whose figure is not above it cannot be told from the base model."""
TILTED_LEGEND = """\
A line follows each model: the base model's samples weighted by R^b to the same mean log R. This is the model nearest to
the base model that reaches this mean log R."""
IMAGES_LEGEND = """\
Two lines follow each model. The first has the base model's samples weighted by R^b to the same mean log R. The second
has the model's own entropies at the effective sample size of the first. Compare these two lines with each other."""


def print_evaluations(evaluations: Mapping[str, Evaluation]) -> None:
    """Prints all tables for which the evaluations have figures."""
    certificates = {name: e.certificate for name, e in evaluations.items() if e.certificate is not None}
    if certificates:
        print_nats(certificates)
    print_figures(evaluations)


def print_nats(certificates: Mapping[str, Certificate], parts: int = 10) -> None:
    """Prints the certificates, one line per model, and the nats spent in each of `parts` parts of the path."""
    first = next(iter(certificates.values()))
    beta = "b" if first.at_beta is None else f"β = {first.at_beta.beta:g}"
    columns = ["log R", "exponent", "needed", "spent", "efficiency", f"gap, {beta}", "share", "std log w"]
    print_columns(columns, {name: _nats_row(c) for name, c in certificates.items()})
    print(f"\n{NATS_LEGEND}")
    spending = {name: c for name, c in certificates.items() if c.spent.value > 0}
    if spending:
        pieces = np.array_split(np.arange(len(first.spent_by_step)), min(parts, len(first.spent_by_step)))
        print("\nspent, from the first steps (noise) to the last (details):")
        rows = {n: [_number(c.spent_by_step[p].sum(), 0.005) for p in pieces] for n, c in spending.items()}
        print_columns([f"{p[0] + 1}-{p[-1] + 1}" for p in pieces], rows)
    for name, certificate in certificates.items():
        for warning in certificate.warnings:
            print(f"\nnote, {name}: {warning}")


def print_figures(evaluations: Mapping[str, Evaluation]) -> None:
    """Prints the figures of the other metrics, with the tilted base model under each model."""
    rows: dict[str, Figures] = {}
    for name, evaluation in evaluations.items():
        rows[name] = evaluation.figures
        if evaluation.tilted is not None:
            rows[f"  base tilted to {name}"] = evaluation.tilted
        if evaluation.tilted is not None and evaluation.as_few is not None:
            worth = evaluation.tilted["effective_samples"].value
            rows[f"  {name} as {worth:.0f} samples"] = evaluation.as_few
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if all(e.certificate for e in evaluations.values()):
        columns.remove("log_reward")  # it is in the table of nats
    if not columns:
        return
    print()
    cells = {name: [show(row[c]) if c in row else "" for c in columns] for name, row in rows.items()}
    print_columns([c.replace("_", " ") for c in columns], cells)
    if any(e.tilted for e in evaluations.values()):
        print(f"\n{IMAGES_LEGEND if any(e.as_few for e in evaluations.values()) else TILTED_LEGEND}")
    if any(column.startswith(COMPARED) for column in columns):
        print(f"\n{COMPARED_LEGEND}")


def print_columns(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Prints right-aligned cells after the names of the rows."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows.values(), strict=True)]
    left = max(map(len, rows))
    for name, cells in {"": columns, **rows}.items():
        print("  ".join([name.ljust(left), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))]).rstrip())


def show(estimate: Estimate) -> str:
    """`value ± standard error`, to two digits of the error."""
    if math.isnan(estimate.value):
        return "-"
    if math.isinf(estimate.value):
        return "beyond"
    if not estimate.error > 0:  # none, or exact
        return f"{estimate.value:.3g}"
    return f"{_number(estimate.value, estimate.error)} ± {_number(estimate.error, estimate.error)}"


def _number(value: float, error: float) -> str:
    decimals = max(0, 1 - math.floor(math.log10(error))) if math.isfinite(error) else 3
    return f"{value:.{min(decimals, 4)}f}"


def _nats_row(certificate: Certificate) -> list[str]:
    c, at = certificate, certificate.at_beta or certificate.at_exponent
    cells = [show(e) for e in (c.log_reward, c.exponent, c.needed, c.spent, c.efficiency)]
    if at is None:
        return [*cells, "", "", ""]
    bound = "≥ " * at.log_z.is_lower_bound
    return [*cells, bound + show(at.gap), show(at.effective_share), show(at.log_weight_std)]


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """All figures of an evaluation as nested dicts, with the nats of each step, for `files.plain`."""
    found = {"figures": evaluation.figures, "certificate": evaluation.certificate}
    found |= {"tilted_base": evaluation.tilted, "as_few_samples": evaluation.as_few}
    return {name: _tree(value) for name, value in found.items() if value is not None}


def _tree(value: Any) -> Any:
    if isinstance(value, Certificate | AtBeta):
        return {name: _tree(v) for name, v in vars(value).items() if v is not None}
    if isinstance(value, Estimate):
        return {"value": value.value, "std_error": value.error}
    if isinstance(value, LogZ):
        return value._asdict()
    if isinstance(value, Mapping):
        return {name: _tree(v) for name, v in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
