"""The accelerator benchmark at small sizes on a CPU: every line ends with numbers, and a line that hangs is ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accelerator.report import ratios

ROOT = Path(__file__).parents[1]


def measure(folder, *flags):
    """The rows and the table of a run with small sizes."""
    out = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "accelerator", "--small", f"--out={out}", *flags]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, timeout=900)
    return json.loads(out.read_text())["rows"], out.with_suffix(".md").read_text()


@pytest.mark.thorough
def test_lines_say_what_they_measured(tmp_path):
    rows, table = measure(tmp_path, "--only=environment")
    assert not [row for row in rows if "failed" in row["note"] or "exit code" in row["note"]]
    assert {"device", "versions"} < {row["what"] for row in rows}
    assert table.count("\n") == len(rows) + 2


def test_what_is_unfinished_is_said(tmp_path):
    start = time.monotonic()
    rows, _ = measure(tmp_path, "--only=environment,attention", "--seconds=0.5", "--jobs=1")
    assert time.monotonic() - start < 30
    assert [row["note"] for row in rows] == ["not finished when the time was over", "not begun when the time was over"]


def test_ratios_of_the_same_work():
    def row(line, what, **numbers):
        return {"line": line, "what": what, "numbers": {k.replace("_", " "): v for k, v in numbers.items()}, "note": ""}

    rows = [row("released", "PyTorch", seconds_a_transition=0.3), row("update", "update", seconds_a_transition=0.1)]
    rows.append(row("update_guess", "update", seconds_a_transition=0.05))  # another loss: no ratio
    (found,) = ratios(rows)
    assert found["numbers"] == {"PyTorch / here": pytest.approx(3.0)}


@pytest.mark.slow
def test_every_line(tmp_path):
    rows, _ = measure(tmp_path, "--seconds=800")
    notes = ("failed", "exit code", "cut", "not begun", "not finished", "NOT finite")
    assert not [row for row in rows if any(note in row["note"] for note in notes)]
    assert {"environment", "parity_unet", "parity_vae", "parity_hps", "attention", "update_guess", "released"} == {
        row["line"] for row in rows
    }
    exact = [row for row in rows if row["what"] == "here, float32, highest precision"]
    assert len(exact) == 3
    assert all(error < 1e-5 for row in exact for error in row["numbers"].values())


@pytest.mark.slow
def test_the_carried_change_is_carried(tmp_path):
    """In bfloat16, the change of the score by a small LoRA is lost if outputs are subtracted, and kept if carried."""
    rows, _ = measure(tmp_path, "--only=precision", "--seconds=800")
    errors = {}
    for way in ("subtracted", "carried"):
        (row,) = [row for row in rows if way in row["what"] and row["what"].endswith("ε by 0.001")]
        errors[way] = max(row["numbers"].values())
    assert errors["subtracted"] > 1
    assert errors["carried"] < 0.2
