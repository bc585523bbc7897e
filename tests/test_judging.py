"""A run that measures itself: when, what it keeps, what alarms it, and that a resume changes nothing of it."""

import json

import pytest

from nabla_gfn_jax.metrics import tilt
from nabla_gfn_jax.runs import alarms, best, evaluations, loras, metrics_log

MEASURED = (
    "--config.evaluation.images=4",
    "--config.evaluation.every_updates=4",
    "--config.evaluation.cross_rewards=jpeg",
    "--config.evaluation.stop_on_alarm=True",
    "--config.logging.checkpoint_every=3",
    "--config.logging.keep_loras=1",
    "--config.training.num_epochs=5",
    "--config.algorithm.beta=3",
)
TOO_FAST = "--config.training.learning_rate=0.3"  # the policy leaves the base model, and its target


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch):
    monkeypatch.setattr(tilt, "REPLICATES", 20)


@pytest.mark.thorough
def test_an_alarm_ends_the_run_and_the_same_command_goes_on(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        command(tmp_path, *MEASURED, TOO_FAST)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "ALARM after 4 updates: " in said
    assert "error: an alarm ends the run after 4 updates, which are saved; see " in said
    raised = alarms.read(tmp_path)
    assert {alarm.updates for alarm in raised} == {4}
    assert "gap" in {alarm.name for alarm in raised}
    measured = evaluations.read(tmp_path)
    assert [row["model"] for row in measured] == ["base", "lora/00004"]
    assert all("log_reward_jpeg" in row["figures"] for row in measured)
    report = (tmp_path / "report.html").read_text()

    command(tmp_path, *MEASURED, TOO_FAST)
    assert "ALARM after 4 updates" not in capsys.readouterr().err
    models = [row["model"] for row in evaluations.read(tmp_path)]
    assert models == ["base", "lora/00004", "lora/00008", "lora/00010"]  # at every fourth update, and at the end
    assert alarms.read(tmp_path)[: len(raised)] == raised
    assert [row["epoch"] for row in metrics_log.read(tmp_path)] == list(range(7))
    assert all("reward_std_prompt" in row for row in metrics_log.read(tmp_path))
    assert raised[0].text[:40] in (tmp_path / "report.html").read_text()
    assert report != (tmp_path / "report.html").read_text()

    assert list(loras.saved(tmp_path)) == [10]
    rows = {evaluations.updates_of(row): row for row in evaluations.read(tmp_path)}
    smallest = min((n for n in rows if n), key=lambda n: rows[n]["certificate"]["at_beta"]["gap"]["value"])
    assert best.kept(tmp_path) == (smallest, "gap")
    assert json.loads((tmp_path / "lora/best/about.json").read_text())["updates"] == smallest
