"""Alarms, and the best LoRA, from rows of the log and of measurements whose figures are chosen."""

import json

import numpy as np
import pytest

from nabla_gfn_jax.runs import alarms, best, evaluations, loras
from nabla_gfn_jax.runs.alarms import SPREAD
from nabla_gfn_jax.training.loop import spread_of_prompts


def estimate(value, error=0.01):
    return {"value": value, "std_error": error}


def row(reward=0.2, needed=0.0, spent=0.0, efficiency=float("nan"), gap=1.0, **more):
    """A row of evaluations.jsonl, of the base model unless figures are given."""
    certificate = {
        "log_reward": estimate(reward),
        "needed": estimate(needed),
        "spent": estimate(spent),
        "efficiency": estimate(efficiency, 0.02),
        "at_beta": {"beta": 8.0, "gap": estimate(gap)},
    }
    return {"certificate": certificate, "figures": {"log_reward": estimate(reward)} | more.pop("figures", {})} | more


GOOD = row(0.3, needed=0.1, spent=0.2, efficiency=0.5, gap=0.6)
BAD = {
    "gap": row(0.3, needed=0.9, spent=1.2, efficiency=0.75, gap=1.2),
    "efficiency": row(0.3, needed=0.1, spent=0.9, efficiency=0.11, gap=0.9),
}


@pytest.mark.parametrize("name", BAD)
def test_nats_raise_an_alarm(name):
    (alarm,) = alarms.of_evaluations({0: row(), 40: GOOD, 80: BAD[name]})
    assert (alarm.updates, alarm.name) == (80, name)


def test_what_could_be_chance_or_is_cheap_raises_none():
    a_little_farther = row(0.3, needed=0.5, spent=1.0, efficiency=0.5, gap=1.04)
    few_nats = row(0.21, needed=0.001, spent=0.05, efficiency=0.02)
    no_error = row(0.3, gap=5.0)
    no_error["certificate"]["at_beta"]["gap"]["std_error"] = "nan"
    for rows in ({0: row(), 8: a_little_farther}, {0: row(), 8: few_nats}, {0: row(), 8: no_error}, {8: BAD["gap"]}):
        assert alarms.of_evaluations(rows) == []


def test_a_condition_that_lasts_is_one_alarm():
    rows = {0: row(), 1: BAD["gap"], 2: BAD["gap"], 3: GOOD, 4: BAD["gap"]}
    assert [a.updates for a in alarms.of_evaluations(rows)] == [1, 4]


def crossed(reward, other):
    return row(reward, figures={"log_reward_jpeg": estimate(other)}, cross_rewards=["jpeg"])


@pytest.mark.parametrize(("reward", "other", "count"), [(0.4, -3.0, 1), (0.4, -1.0, 0), (0.2, -3.0, 0), (0.1, -3.0, 0)])
def test_the_reward_rises_and_another_falls(reward, other, count):
    """Parts of the reward itself, which are no cross rewards, may fall."""
    later = crossed(reward, other)
    later["figures"]["log_reward_part"] = estimate(-9.0)
    first = crossed(0.2, -1.0)
    first["figures"]["log_reward_part"] = estimate(9.0)
    found = alarms.of_evaluations({0: first, 4: later})
    assert [alarm.name for alarm in found] == ["log_reward_jpeg"] * count
    assert all("jpeg has fallen from -1 ± 0.01 to -3 ± 0.01" in alarm.text for alarm in found)


@pytest.mark.parametrize("name", ["vendor_entropy", "clip_distance_x100", "concept_accuracy", "clip_score"])
def test_samples_that_are_alike_or_show_another_thing(name):
    """The comparison is with the base model tilted to the same reward, not with the base model itself."""
    low, high = {name: estimate(0.4)}, {name: estimate(0.9)}
    alike = row(0.3, figures=low, tilted_base=high)
    as_tilted = row(0.3, figures=low, tilted_base=low)
    assert [a.name for a in alarms.of_evaluations({0: row(figures=high), 1: alike})] == [name]
    assert alarms.of_evaluations({0: row(figures=high), 1: as_tilted}) == []
    few = row(0.3, figures=high, as_few_samples=low, tilted_base=high)  # an entropy counts at equal sample sizes
    assert [a.name for a in alarms.of_evaluations({0: row(), 1: few})] == [name]


def log(spreads):
    return [{"epoch": i, "step": 4 * i, SPREAD: spread} for i, spread in enumerate(spreads)]


def test_the_spread_within_prompts_is_gone():
    wide = np.random.default_rng(0).uniform(0.8, 1.2, 12)
    found = alarms.of_log(log([*wide, *np.full(9, 0.05)]))
    assert [a.name for a in found] == ["spread"]
    assert found[0].updates == 4 * 14  # three of the last five epochs are narrow
    assert alarms.of_log(log([*wide, 0.01, 0.01, *wide])) == []
    assert alarms.of_log([{"epoch": 0, "step": 0}, *log([None, None])]) == []


def test_the_spread_within_prompts_is_not_that_between_them():
    reward = np.array([1.0, 3.0, 10.0, 10.0, 10.0, 99.0])
    found = spread_of_prompts(reward, np.array([0, 0, 1, 1, 1, 2]))
    assert found == {"reward_std_prompt": pytest.approx(1.0)}  # variances 2 and 0; the third prompt has one sample
    assert spread_of_prompts(reward, np.arange(6)) == {}


def test_the_file_has_each_alarm_once(tmp_path):
    said = []
    rows = {0: row(), 1: BAD["gap"]}
    new = alarms.add(tmp_path, alarms.of_evaluations(rows), said.append)
    assert alarms.read(tmp_path) == new
    assert said == [f"ALARM after 1 updates: {new[0].text}"]
    with (tmp_path / alarms.NAME).open("a") as file:
        file.write('[1]\n{"updates": 3')
    assert alarms.add(tmp_path, alarms.of_evaluations(rows), said.append) == []
    assert len(said) == 1
    assert alarms.read(tmp_path) == new


def test_the_best_by_each_figure():
    rows = {0: row(gap=0.1), 4: GOOD, 8: row(0.9, efficiency=0.1, gap=2.0), 12: GOOD}
    assert best.best_of(rows, "gap") == (4, (0.6, 0.01))
    assert best.best_of(rows, "log_reward").updates == 8
    assert best.best_of(rows, "efficiency").updates == 4
    assert best.best_of(rows, "log_reward_cvar") is None
    assert best.best_of({0: row()}, "gap") is None


def lora_of(folder, updates):
    for name in (loras.ABOUT, loras.KOHYA, loras.DIFFUSERS):
        file = loras.folder(folder, updates) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{name} {updates}")


def test_the_best_lora_is_kept(tmp_path):
    """It is copied again if another LoRA or another figure is the best, and no LoRA of the run is called `best`."""
    for updates in (4, 8):
        lora_of(tmp_path, updates)
    rows = {4: GOOD, 8: row(0.9, gap=2.0)}
    for criterion, updates in (("gap", 4), ("log_reward", 8)):
        best.keep(tmp_path, best.best_of(rows, criterion), criterion)
        assert (tmp_path / "lora/best" / loras.KOHYA).read_text() == f"{loras.KOHYA} {updates}"
        assert best.kept(tmp_path) == (updates, criterion)
    assert json.loads((tmp_path / "lora/best" / best.ABOUT).read_text())["value"] == 0.9
    (loras.folder(tmp_path, 4) / loras.DIFFUSERS).unlink()  # removed by logging.keep_loras
    best.keep(tmp_path, best.best_of(rows, "gap"), "gap")
    assert best.kept(tmp_path) == (8, "log_reward")
    assert list(loras.saved(tmp_path)) == [8]


def test_the_name_of_a_model_and_back():
    assert evaluations.updates_of({"model": evaluations.name_of(80)}) == 80
    assert evaluations.updates_of({"model": evaluations.BASE}) == 0
    for model in ("lora/00080 x 2", "other.safetensors", None, 3):
        assert evaluations.updates_of({"model": model}) is None
