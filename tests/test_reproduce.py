"""A grid of runs on the tiny model: its order, its results, a run that fails, and a kill in the middle."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax import reproduce
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.reproduction import cost, figures, tables
from nabla_gfn_jax.reproduction.cells import planned
from nabla_gfn_jax.reproduction.grid import read
from nabla_gfn_jax.reproduction.reading import load
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs import evaluations, loras, metrics_log, pictures

HERE = Path(__file__).parent
PROMPTS = ["a sonnet", "an ode"]
NUM = 6
GRID = """
seeds = [0]
updates = 6
evaluation.num = {num}

[fields]
model = "{model}"
reward = "1.0"
prompts = "{prompts}"
sampling.num_steps = 10
training.trajectories = 16
training.micro_batches = 2
training.updates_per_epoch = 2
logging.samples_every = 3
logging.checkpoint_every = 1

[bases.bright]
config = "emoji"
label = "brightness"
fields.algorithm.beta = 30.0

[methods.draft]
label = "DRaFT"
config = "draft:emoji"
rates = [0.005, 0.002]
updates = 4
fields.algorithm.last_steps = 1

[methods.broken]
config = "draft:emoji"
rates = [1e30]
fields.algorithm.last_steps = 1
"""


def start(grid: Path, out: Path, kill_at: str = "never", within: str = "") -> subprocess.CompletedProcess:
    """The ended command, which kills itself at a change of a file whose path in `out` begins with `within`."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "KILL_AT": kill_at,
    }
    command = [sys.executable, str(HERE / "grid_process.py"), str(out / within), str(grid), f"--out={out}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=7200)


@pytest.fixture(scope="module")
def grid(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    file = folder / "tiny.toml"
    file.write_text(GRID.format(model=tiny_model, prompts=folder / "prompts.txt", num=NUM))
    return file


@pytest.fixture(scope="module")
def whole(grid):
    """The folder of a grid that was left alone, and what the command printed."""
    out = grid.parent / "whole"
    return out, start(grid, out)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.thorough
def test_a_run_that_fails_is_told_in_one_line_and_the_grid_goes_on(whole):
    out, ended = whole
    assert ended.returncode == 0, ended.stderr
    told = [line for line in ended.stderr.replace("\r", "\n").splitlines() if "failed:" in line]
    assert len(told) == 1
    assert told[0].startswith("error: broken on bright, rate 1e+30, seed 0 failed:")
    assert "are not finite" in told[0]
    assert told[0].endswith("the grid goes on")
    assert ended.stdout.splitlines()[-1] == (
        f"done. results: {out / 'results'}; 1 runs failed, the same command tries them again"
    )
    failed = of(rows_of(out / "results/results.csv"), status="failed")
    assert [row["method"] for row in failed] == ["broken"]
    assert all("are not finite" in row["error"] and not row["log_reward"] for row in failed)
    about = json.loads((out / "results/manifest.json").read_text())
    assert {kind: len(names) for kind, names in about["cells"].items()} == {"done": 2, "failed": 1, "missing": 0}


@pytest.mark.thorough
def test_the_results_are_those_of_the_runs(whole, tiny_model):
    """Mean log R of a saved LoRA is computed here from its images; curves are compared with the run's log."""
    rows, curves = (rows_of(whole[0] / "results" / name) for name in ("results.csv", "curves.csv"))
    mine = of(rows, method="draft", stage="first")
    assert [row["updates"] for row in mine] == ["2", "4"]
    assert [row["trajectories"] for row in mine] == ["16", "32"]
    workdir = whole[0] / "cells/bright/draft/rate0.005/seed0"
    model = load_model(str(tiny_model))
    lora = load_lora(loras.folder(workdir, 4) / loras.DIFFUSERS, model.params["unet"], model.params["text_encoder"])
    sampler = ImageSampler(model, PROMPTS, Sampling(steps=10, guidance=2.0))
    reward = brightness(1.0)
    drawn = np.concatenate([batch.images for batch in sampler.images(lora, NUM)])
    expected = float(np.mean(reward.score(reward.params, drawn, {})))
    np.testing.assert_allclose(float(mine[-1]["log_reward"]), expected, rtol=1e-4)

    log = metrics_log.read(workdir)
    found = of(curves, method="draft", stage="first")
    np.testing.assert_allclose([float(r["reward_mean"]) for r in found], [r["reward_mean"] for r in log], rtol=1e-5)
    assert [int(r["updates"]) for r in found] == [r["step"] for r in log]
    flops = [row["flops_per_second"] * row["seconds"] * 2 / 1e12 for row in log]  # of two devices
    np.testing.assert_allclose([float(r["tflop"]) for r in found], np.cumsum([0, *flops[:-1]]), rtol=1e-4)
    assert all(0 < float(row["cpu_seconds"]) < 1000 for row in mine)


@pytest.mark.thorough
def test_the_rate_of_the_smallest_gap_is_chosen(whole):
    rows = of(rows_of(whole[0] / "results/results.csv"), method="draft", updates="4")
    gap = {row["learning_rate"]: float(row["gap"]) for row in rows}
    assert gap.keys() == {"0.005", "0.002"}
    assert [row["stage"] for row in rows] == ["first", "tuning"]
    best = min(gap, key=gap.__getitem__)
    assert {row["learning_rate"]: row["chosen"] for row in rows} == {rate: str(rate == best) for rate in gap}


@pytest.mark.thorough
def test_the_results_are_read_again(whole):
    results = load(whole[0])
    assert results.bases == ["bright"]
    assert results.methods("bright") == ["draft"]  # the other has failed
    assert results.label("bright", "draft") == "DRaFT"
    (row,) = [row for row in results.last("bright", "draft")]
    rate, best = row["learning_rate"], f"rate{row['learning_rate']:g}"
    (*_, (at, reward, seeds)) = results.over("updates", "log_reward", "bright", "draft")
    assert (at, reward, seeds) == (4, (row["log_reward"], row["log_reward_se"]), 1)
    workdir = whole[0] / "cells/bright/draft" / best / "seed0"
    kept, shown = pictures.read(pictures.place(workdir, 4)), results.pictures("bright", "draft")[4]
    np.testing.assert_array_equal(shown.images, kept.images[:16])
    alone = load(workdir)  # the workdir of a run is read as a grid of one run
    (same,) = alone.last("1.0", "draft")
    assert (same["updates"], same["learning_rate"]) == (4, rate)
    np.testing.assert_allclose(same["log_reward"], row["log_reward"], rtol=1e-5)
    points = results.frontier  # weighted by R^b, the base model's mean grows from its own, and so do the nats
    (base,) = [row for row in results.rows if row["method"] == tables.BASE_MODEL]
    np.testing.assert_allclose(points[0]["log_reward"], base["log_reward"], rtol=1e-5)
    assert points[0]["needed"] == 0
    assert len(points) > 1
    for name in ("log_reward", "needed"):
        assert (np.diff([point[name] for point in points]) > 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("within", "kill_at"),
    [
        ("cells/bright/draft/rate0.002", "file:40"),  # while the run trains
        pytest.param("cells/bright/draft/rate0.002/seed0/evaluations.jsonl", "file:2", marks=pytest.mark.slow),
        pytest.param("results", "file:9", marks=pytest.mark.slow),
    ],
)
def test_a_killed_grid_goes_on_and_ends_with_the_same_results(whole, grid, within, kill_at):
    out = grid.parent / f"killed_in_{within.replace('/', '_')}"
    killed = start(grid, out, kill_at, within)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {file: file.stat().st_mtime_ns for file in out.glob("cells/*/*/*/*/lora/*/*")}
    done = [file.parent for file in out.glob("cells/*/*/*/*/cell.json") if "measured" in file.read_text()]
    assert done
    assert start(grid, out).returncode == 0
    for name in ("results.csv", "curves.csv", "frontier.csv"):
        found, expected = (list(map(without_time, rows_of(folder / "results" / name))) for folder in (out, whole[0]))
        assert found == expected
    for file, time in before.items():
        if any(workdir in file.parents for workdir in done):
            assert file.stat().st_mtime_ns == time  # a finished run is not made again
    thumbnails = sorted(file.relative_to(out) for file in out.glob("results/thumbnails/*/*/*.png"))
    assert thumbnails
    assert all((out / file).read_bytes() == (whole[0] / file).read_bytes() for file in thumbnails)


@pytest.mark.thorough
def test_the_plan_counts_what_the_runs_log(whole, grid, monkeypatch):
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))
    for cell in planned(read(str(grid)))[:1]:
        log = metrics_log.read(whole[0] / cell.folder)
        logged = sum(row["flops_per_second"] * row["seconds"] for row in log) * 2  # on two devices
        np.testing.assert_allclose(cost.of_run(cell, NUM).training.total(), logged, rtol=1e-6)
    text = cost.show(read(str(grid)), whole[0], "v5e:2x4")
    assert "3 runs = 1 configs × 2 methods × (learning rates + 0 more seeds); 2 are done" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| bright | draft |")]
    assert line.startswith("| bright | draft | 2 | 4 | 32 |")  # 2 epochs of 16 trajectories


@pytest.mark.thorough
def test_the_figures_of_the_notebooks_show_every_method(whole):
    matplotlib.use("Agg")
    for results in (load(whole[0]), load(whole[0] / "cells/bright/draft/rate0.005/seed0")):
        plots = [figures.curves(results, ["reward_mean", "log_reward"]), figures.plane(results, "log_reward", "spent")]
        for drawn in plots:
            shown = {text.get_text() for text in drawn.legends[0].get_texts()}
            assert {results.label(base, m) for base in results.bases for m in results.methods(base)} <= shown
        for base in results.bases:
            assert len(figures.gallery(results, base, columns=4).axes) == 4 * (1 + len(results.methods(base)))
        printed = figures.table(results, ["log_reward", "gap"])
        assert all(f"| {results.label(results.bases[0], m)} |" in printed for m in results.methods(results.bases[0]))
    assert "**0.00" in figures.tuning(load(whole[0]), "gap")
    assert "each method has one" in figures.tuning(results, "gap")  # of the run alone
    assert "2 runs done, 1 failed, 0 missing" in figures.what(load(whole[0]))


@pytest.mark.thorough
def test_runs_that_exist_are_collected(whole, tmp_path):
    """The tables are those of the grid that made the runs; the base model's row is made of its kept samples."""
    workdirs = [tmp_path / rate for rate in ("rate0.005", "rate0.002")]
    for workdir in workdirs:
        shutil.copytree(whole[0] / "cells/bright/draft" / workdir.name / "seed0", workdir)
    shutil.copytree(whole[0] / "bases/bright/base_samples", workdirs[0] / "base_samples")
    out = tmp_path / "out"
    reproduce.main(["nabla-gfn reproduce", *map(str, workdirs), "--collect", f"--out={out}"])
    found, expected = (rows_of(folder / "results.csv") for folder in (out, whole[0] / "results"))
    assert [row["method"] for row in found] == ["base", *["draft_1"] * 2, *["draft_2"] * 2]
    ours = [row["log_reward"] for row in found]
    assert ours == [row["log_reward"] for row in expected if row["method"] != "broken"]
    assert [point["needed"] for point in rows_of(out / "frontier.csv")] == [
        point["needed"] for point in rows_of(whole[0] / "results/frontier.csv")
    ]
    assert sorted(file.parent.name for file in out.glob("thumbnails/1_0/*/00004.png")) == ["draft_1", "draft_2"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["nabla-gfn reproduce", str(tmp_path), "--collect", f"--out={out}"])
    assert stop.value.code == 2


def without_time(row):
    return {name: value for name, value in row.items() if name not in ("seconds", "cpu_seconds")}


def test_the_figures_of_an_evaluation_have_plain_names():
    row = {
        "model": "lora/00002",
        "figures": {"drawing_entropy": {"value": 1.5, "std_error": 0.1}},
        "certificate": {
            "samples": 12,
            "spent": {"value": 2.0, "std_error": 0.2},
            "exponent": {"value": "inf", "std_error": "nan"},
            "at_exponent": {"gap": {"value": 7.0, "std_error": 7.0}},
            "at_beta": {"gap": {"value": 0.5, "std_error": 0.3}, "log_z": {"value": 1.0, "effective": 19.0}},
            "spent_by_step": [1.0, 1.0],
        },
        "tilted_base": {"drawing_entropy": {"value": 1.6, "std_error": 0.1}},
        "sampling": {"steps": 10},
    }
    found = evaluations.figures(row)
    assert found.pop("exponent") == np.inf
    assert np.isnan(found.pop("exponent_se"))
    assert found == {
        "samples": 12,
        "drawing_entropy": 1.5,
        "drawing_entropy_se": 0.1,
        "spent": 2.0,
        "spent_se": 0.2,
        "gap": 0.5,
        "gap_se": 0.3,
        "gap_is_bound": True,
        "tilted_base_drawing_entropy": 1.6,
        "tilted_base_drawing_entropy_se": 0.1,
    }
