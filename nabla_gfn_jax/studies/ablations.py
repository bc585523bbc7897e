"""Asks of residual ∇-DB what each of its choices does, in the plane, in nats.

    python -m nabla_gfn_jax.studies.ablations --out=docs/ablations.jsonl

Problem, network, cost and figures are those of `bench2d`: the doubled reward, ten million evaluations of the network,
and again half of them. All variants of a question differ in one option. The three seeds of a variant are trained
together. The learning rate is .01, the best of bench2d's three for most of these variants. Rows are appended to the
file, and rows that it already has are not computed again.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nabla_gfn_jax.algorithms.nabla_db import ResidualNablaDB
from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.options import Checked, option
from nabla_gfn_jax.studies.bench2d import FIGURES, TIMES, Row, add, bench, mean_of, rows_in
from nabla_gfn_jax.studies.plane import BATCH, Judge, Lane, Method, Programs

SETTING, SEEDS, RATE = "doubled", (0, 1, 2), 1e-2
Variants = Mapping[str, Method]


def _variant(clip: float = 1.0, **options: object) -> Method:
    return Method(ResidualNablaDB(beta=1.0, **options), clip=clip)  # type: ignore[arg-type]


QUESTIONS: dict[str, Variants] = {
    "The forward term alone, or a learned correction too (γ = ᾱ)": {
        "guess: no g_φ": _variant(credit="guess"),
        "lookahead: g_φ learns from both terms, the paper's default": _variant(),
        "lookahead: g_φ learns from the reverse term": _variant(correction_from_forward=False),
    },
    "γ, the trust in the one-step guess": {
        "guess, γ = ᾱ": _variant(credit="guess"),
        "guess, γ = √ᾱ": _variant(credit="guess", gamma="sqrt_alpha_bar"),
        "guess, γ = 1": _variant(credit="guess", gamma="one"),
        "lookahead, γ = ᾱ": _variant(),
        "lookahead, γ = √ᾱ": _variant(gamma="sqrt_alpha_bar"),
        "lookahead, γ = 1": _variant(gamma="one"),
    },
    "The credit, at equal cost": {
        "lookahead, γ = ᾱ": _variant(),
        "guess, γ = 1": _variant(credit="guess", gamma="one"),
        "adjoint": _variant(credit="adjoint", clip=np.inf),
    },
    "The share of a trajectory's transitions that an update uses (guess, γ = 1)": {
        f"{share:g}": _variant(credit="guess", gamma="one", transition_fraction=share)
        for share in (0.04, 0.1, 0.2, 0.5)
    },
    "The weight σ² of the forward term (guess, γ = 1)": {
        "off, the paper's": _variant(credit="guess", gamma="one"),
        "on": _variant(credit="guess", gamma="one", variance_weighted=True),
    },
    "Clipping the gradient's norm (adjoint)": {
        f"{clip:g}": _variant(credit="adjoint", clip=clip) for clip in (np.inf, 1.0, 0.1)
    },
}


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The file for the rows, and the cost."""

    out: Path = option(meaning="file of JSON lines to which rows are added", file="output", endings=(".jsonl",))
    budget: float = option(5e6, "half of the cost, in evaluations of the network", above=0)


def distinct() -> Iterator[Method]:
    """Each method of the questions once."""
    seen: list[Method] = []
    for variants in QUESTIONS.values():
        for method in variants.values():
            if method not in seen:
                seen.append(method)
                yield method


def name_of(method: Method) -> str:
    """The name of a method in the rows: the options in which it differs from the paper's default."""
    default, mine = vars(ResidualNablaDB(beta=1.0)), vars(method.algorithm)
    changed = [f"{name}={mine[name]}" for name in default if mine[name] != default[name]]
    return ", ".join([*changed, *([] if method.clip == 1.0 else [f"clip={method.clip:g}"])]) or "default"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each question: means over the seeds ± standard errors, after the whole cost."""
    parts = []
    for question, variants in QUESTIONS.items():
        lines = [
            "| variant | evaluations an update | KL(p‖q) | KL(q‖p) | exponent | spent | efficiency | gap at half "
            "the cost | gap |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label, method in variants.items():
            mine = [row for row in rows if row["method"] == name_of(method)]
            half, whole = ([row for row in mine if row["times"] == times] for times in TIMES)
            if whole:
                cost = f"{whole[0]['evaluations'] / (whole[0]['updates'] * BATCH):.0f}"
                cells = [
                    cost,
                    *(mean_of(whole, figure) for figure in FIGURES),
                    mean_of(half, "gap"),
                    mean_of(whole, "gap"),
                ]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        parts.append(f"**{question}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Runs the variants that the file lacks, appends their rows and prints the tables."""
    options = parse(argv, Options, __doc__)
    use_compilation_cache()
    rows, judge = rows_in(options.out), Judge()
    for method in distinct():
        name, lanes = name_of(method), [Lane(SETTING, seed, RATE) for seed in SEEDS]
        if not any(row["method"] == name and row["times"] == TIMES[-1] for row in rows):
            add(options.out, rows, bench(name, Programs(method), judge, lanes, options.budget))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv)
