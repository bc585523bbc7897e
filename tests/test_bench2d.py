"""The comparison in the plane: its closed forms, its cost, its resume, and the table in the docs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax.studies import bench2d, plane
from nabla_gfn_jax.studies.bench2d import METHODS, rows_in, table
from nabla_gfn_jax.studies.mixture2d import make_model
from nabla_gfn_jax.studies.plane import SETTINGS, Judge, World, evaluations, needed_for

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "bench2d.jsonl"
# Sampling has 50 evaluations; the rest of an update for each trajectory, a pull-back counting one more.
BY_HAND = {
    "residual ∇-DB, guess, γ = 1": 5 * (2 + 1 + 2) + (2 + 1) - 5,  # at y, base, at x; the last step has none at y
    "residual ∇-DB, adjoint": 50 * 2 + 6 * 2,
    "residual ∇-DB, terminal": 6 * (1 + 2),
    "path regression, innovation": 50 + 6 * 2,
    "value gradient": 50 + 4 * (1 + 2),  # the base model at all states; R and head are linear: no output at y is needed
    "fitted value": 50 + 4 * (1 + 2),  # the same
    "residual DB": 5 * (1 + 1 + 2) + (1 + 2),
    "EAM": 1 + 6 * 2,
    "RAM": 8 * (1 + 1 + 2),
    "AWM": 6 * (1 + 1 + 2),
    "DiffusionNFT": 10 * (1 + 1 + 2),
    "DDPO": 50 * 2,
    "ReFL": 2,
    "DRaFT-10": 10 * 2,
    "DAG-DB, given P_base R": 5 * (1 + 2) + 2,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_cost_is_counted(name):
    assert evaluations(METHODS[name].algorithm) == 50 + BY_HAND[name]


@pytest.mark.parametrize("setting", ["mild", "rare"])
def test_a_setting_as_arrays_is_the_same_model(setting):
    """Modes without weight have no effect, and `times_base` adds log P_base to the reward."""
    of, rng = SETTINGS[setting], np.random.default_rng(0)
    world, plain = World.of(of), make_model(of.k, data=of.data)
    x, level = jnp.asarray(2 * rng.normal(size=(6, 2)), jnp.float32), plane.CHAIN.at[np.array([0, 9, 25, 40, 48, 49])]
    ids = jnp.zeros(6, jnp.int32)
    expected = plain.predict(None, x, level, ids)
    np.testing.assert_allclose(world.model(False).predict(None, x, level, ids), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(world.model(False).log_reward(x, ids), x @ of.k.astype(np.float32), rtol=1e-5)
    squares = ((np.asarray(x, np.float64)[:, None] - of.base.means) ** 2).sum(-1) / (2 * of.base.std**2)
    log_p = np.log(np.exp(-squares) @ of.base.weights / (2 * np.pi * of.base.std**2))
    difference = world.model(True).log_reward(x, ids) - world.model(False).log_reward(x, ids)
    np.testing.assert_allclose(difference, log_p, rtol=1e-3, atol=1e-3)


def test_nats_that_a_reward_needs():
    """Compares with the base model tilted by hand, and log Z with a mean over samples."""
    for setting in SETTINGS.values():
        tilted = setting.base.tilted(0.6 * setting.k)
        reward = float(tilted.mean() @ setting.k)
        needed, exponent = needed_for(reward, setting)
        assert exponent == pytest.approx(0.6, rel=1e-6)
        draws = np.exp(setting.base.sample(np.random.default_rng(0), 400_000) @ (0.6 * setting.k))
        error = draws.std() / draws.mean() / np.sqrt(len(draws))
        assert needed == pytest.approx(0.6 * reward - np.log(draws.mean()), abs=5 * error)
    assert needed_for(-1e12, setting)[0] > 0  # far beyond the samples there is an exponent too


@pytest.mark.thorough
def test_the_judge_of_the_base_and_of_the_tilted_mixtures_network(monkeypatch):
    monkeypatch.setattr(plane, "JUDGED", 4000)
    judge, of = Judge(), SETTINGS["mild"]
    base = judge(None, of)
    assert (base["spent"], base["efficiency"]) == (0.0, None)
    exact = of.base.log_z(of.k) - float(of.base.mean() @ of.k)
    assert base["gap"] == pytest.approx(exact, abs=4 * base["gap_error"])
    assert base["kl_policy_target"] == pytest.approx(exact, rel=0.1)  # KL(base ‖ tilt), which is the gap
    tilted = judge(World.of(of._replace(data=of.data.tilted(of.k))), of)
    assert tilted["kl_policy_target"] < 0.02
    assert 0.8 < tilted["efficiency"] < 1
    assert 0 < tilted["gap"] < 0.08
    nowhere = jax.tree.map(lambda a: jnp.full_like(a, jnp.inf), plane.init_mlp(jax.random.key(0), 4, width=plane.WIDTH))
    assert judge(nowhere, of) == {}


@pytest.mark.thorough
def test_the_command_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plane, "JUDGED", 500)
    out = tmp_path / "rows.jsonl"
    given = ["bench2d", f"--out={out}", "--only=terminal, γ", "--budget=20000", "--rates=0.001,0.003"]
    bench2d.main([*given, "--settings=mild,doubled", "--seeds=0"])
    rows = rows_in(out)
    assert [(r["setting"], r["seed"], r["rate"], r["times"]) for r in rows if r["times"] and r["updates"]] == [
        *(("mild", 0, rate, times) for times in (1, 2) for rate in (1e-3, 3e-3)),
        *(("doubled", 0, bench2d.best_rate(rows, "residual ∇-DB, terminal, γ = 1"), times) for times in (1, 2)),
    ]
    assert {r["updates"] for r in rows} == {0, 2, 5}
    assert all(r["evaluations"] == r["updates"] * 68 * 128 for r in rows)
    capsys.readouterr()
    bench2d.main([*given, "--settings=mild,doubled", "--seeds=0"])
    assert rows_in(out) == rows
    assert "| residual ∇-DB, terminal, γ = 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench2d.main([*given[:-2], "--budget=30000"])
    assert "has rows of 20000" in capsys.readouterr().err


def test_a_method_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench2d.main(["bench2d", f"--out={tmp_path / 'rows.jsonl'}", "--only=nothing"])
    assert "--only='nothing' names no method" in capsys.readouterr().err


def test_means_and_errors_of_the_table():
    row = {"method": "EAM", "setting": "mild", "rate": 1e-3, "updates": 10, "evaluations": 10 * 63 * 128}
    figures = dict.fromkeys((*bench2d.FIGURES, "gap"), 0.25)
    rows = [row | figures | {"seed": s, "times": t, "spent": 0.1 * s} for s in (0, 1, 2) for t in (1, 2)]
    (line,) = [line for line in table(rows).splitlines() if line.startswith("| EAM")]
    assert line.split(" | ")[1:3] == ["0.001", "63"]
    assert "| 0.100 ± 0.058 |" in line
    rows[-1]["gap"] = 1e9
    assert "diverged" in table(rows)


def test_the_docs_have_the_files_table():
    assert table(rows_in(ROWS)) in (DOCS / "exact_target.md").read_text()
    assert all(json.loads(line)["method"] for line in ROWS.read_text().splitlines())
