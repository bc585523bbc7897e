"""Runs of the on-policy algorithms from start to end on the tiny model."""

import pytest
from test_parallel import without_images
from test_training import rows, without_time

from nabla_gfn_jax.runs.metrics_log import COLUMNS

pytestmark = pytest.mark.thorough

BASELINES = {
    "ddpo": ("algorithm.min_count=2", "ratios_clipped"),
    "refl": ("algorithm.late_steps=3", "loss_reward"),
    "draft": ("algorithm.last_steps=2", "loss_reward"),
    "nft": ("algorithm.min_count=2", "loss_contrast"),
}


@pytest.mark.parametrize("name", [*BASELINES])
def test_baselines_train_on_their_own_samples(command, monkeypatch, tmp_path, name):
    """There is no first epoch that only samples, and each row's update uses the samples of the same row."""
    without_images(monkeypatch)
    field, term = BASELINES[name]
    command(tmp_path, f"--config={name}:emoji", f"--config.{field}", "--config.training.num_epochs=1")
    log = rows(tmp_path)
    assert [(row["epoch"], row["step"], row["updates"]) for row in log] == [(1, 0, 2), (2, 2, 2)]
    assert term in log[0]
    assert set(log[0]) <= {column.name for column in COLUMNS}
    assert log[0]["grad_norm_lora"] > 0
    assert "grad_norm_correction" not in log[0]
    if name == "ddpo":  # which remembers its prompts' rewards
        command(tmp_path, f"--config={name}:emoji", f"--config.{field}", "--config.training.num_epochs=2")
        assert [(row["epoch"], row["step"]) for row in rows(tmp_path)] == [(1, 0), (2, 2), (3, 4)]
        assert without_time(rows(tmp_path)[0]) == without_time(log[0])
