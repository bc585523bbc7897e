"""The ablations: the variants differ as their names say, a run goes on where it was, and the docs have the table."""

from pathlib import Path

import pytest

from nabla_gfn_jax.studies import ablations, plane
from nabla_gfn_jax.studies.ablations import QUESTIONS, SEEDS, distinct, name_of, table
from nabla_gfn_jax.studies.bench2d import FIGURES, rows_in

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "ablations.jsonl"


def test_variants_of_a_question_differ_and_have_names_of_their_own():
    names = [name_of(method) for method in distinct()]
    assert len(set(names)) == len(names)
    assert "default" in names
    for variants in QUESTIONS.values():
        assert len({name_of(method) for method in variants.values()}) == len(variants)


def test_the_table_has_means_over_the_seeds():
    row = {"method": "default", "updates": 10, "evaluations": 10 * 83 * plane.BATCH} | dict.fromkeys(FIGURES, 0.5)
    rows = [row | {"seed": s, "times": t, "gap": 0.1 * s * t} for s in SEEDS for t in (1, 2)]
    lines = [line for line in table(rows).splitlines() if line.startswith("| lookahead")]
    assert len(lines) == sum("default" in map(name_of, variants.values()) for variants in QUESTIONS.values())
    assert all("| 83 |" in line for line in lines)
    assert lines[0].endswith("| 0.100 ± 0.058 | 0.200 ± 0.115 |")


@pytest.mark.thorough
def test_the_command_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plane, "JUDGED", 500)
    first, second = list(distinct())[:2]
    monkeypatch.setattr(ablations, "distinct", lambda: iter([first]))
    given = ["ablations", f"--out={tmp_path / 'rows.jsonl'}", "--budget=30000"]
    ablations.main(given)
    rows = rows_in(tmp_path / "rows.jsonl")
    assert [(row["method"], row["seed"], row["times"]) for row in rows] == [
        (name_of(first), seed, times) for times in (1, 2) for seed in SEEDS
    ]
    monkeypatch.setattr(ablations, "distinct", lambda: iter([first, second]))
    ablations.main(given)
    more = rows_in(tmp_path / "rows.jsonl")
    assert more[: len(rows)] == rows
    assert {row["method"] for row in more[len(rows) :]} == {name_of(second)}
    assert "| guess: no g_φ |" in capsys.readouterr().out


def test_the_docs_have_the_files_table():
    assert table(rows_in(ROWS)) in (DOCS / "ablations.md").read_text()
