"""A run of every algorithm from start to end on the tiny model."""

import jax
import numpy as np
import pytest
from test_parallel import without_images
from test_training import rows, without_time

from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.config_files import load_config, split_variant
from nabla_gfn_jax.runs.metrics_log import COLUMNS

pytestmark = pytest.mark.thorough

# By name: the config, fields of the algorithm for a path of 10 steps, and a column that its updates write.
RUNS = {
    "awm": ("awm:emoji", {}, "loss_policy"),
    "dag_db": ("dag_db:emoji", {}, "loss_balance"),
    "ddpo": ("ddpo:emoji", {"min_count": 2}, "ratios_clipped"),
    "draft": ("draft:emoji", {"last_steps": 2}, "loss_reward"),
    "draft_1": ("draft:emoji", {"last_steps": 1}, "loss_reward"),
    "draft_lv": ("draft:emoji", {"last_steps": 1, "lv_samples": 2}, "loss_reward"),
    "eam": ("eam:emoji", {}, "loss_adjoint"),
    "fitted_value": ("emoji_exact", {"after": 0, "guess": False}, "loss_steps"),
    "fitted_value_guess": ("emoji_exact", {"after": 0, "guess": True}, "loss_steps"),
    "fitted_value_mean_shift": ("emoji_exact", {"after": 0, "follow": "mean_shift"}, "loss_steps"),
    "nabla_db": ("emoji", {}, "loss_forward"),
    "nabla_db_guess": ("emoji", {"credit": "guess"}, "loss_forward"),
    "nabla_db_lookahead": ("emoji", {"credit": "lookahead"}, "loss_forward"),
    "nft": ("nft:emoji", {"min_count": 2}, "loss_contrast"),
    "path_regression": ("path_regression", {}, "loss_paths"),
    "path_regression_innovation": ("path_regression:innovation", {}, "loss_paths"),
    "plain_nabla_db": ("plain_nabla_db:emoji", {}, "loss_forward"),
    "ram": ("ram:emoji", {}, "loss_matching"),
    "refl": ("refl:emoji", {"late_steps": 3}, "loss_reward"),
    "residual_db": ("residual_db:emoji", {}, "loss_balance"),
    "terminal": ("terminal:emoji", {}, "loss_forward"),
    "value_gradient": ("emoji_exact:network", {"states": 4}, "loss_steps"),
}


@pytest.fixture(autouse=True)
def forget_programs():
    """The compiled programs of twenty runs would fill the memory."""
    yield
    jax.clear_caches()


def test_the_table_has_every_algorithm():
    assert {load_config(*split_variant(config)).algorithm.name for config, _, _ in RUNS.values()} == set(ALGORITHMS)


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(command, monkeypatch, tmp_path, name):
    """A row has its loss and a gradient. An on-policy algorithm has no first epoch that only samples: each row's update
    uses the samples of the same row.
    """
    without_images(monkeypatch)
    config, fields, column = RUNS[name]
    flags = [f"--config={config}", *(f"--config.algorithm.{key}={value}" for key, value in fields.items())]
    flags += ["--config.sampling.lora_until_step=", "--config.logging.checkpoint_every=2"]
    command(tmp_path, *flags, "--config.training.num_epochs=2")
    log = rows(tmp_path)
    trained = [row for row in log if column in row]
    assert len(trained) >= 2
    assert log[-1]["step"] == 4
    assert all(np.isfinite(row["loss"]) and row["grad_norm_lora"] > 0 for row in trained)
    assert {key for row in log for key in row} <= {known.name for known in COLUMNS}
    if ALGORITHMS[load_config(*split_variant(config)).algorithm.name].on_policy:
        assert [(row["epoch"], row["step"], row["updates"]) for row in log] == [(1, 0, 2), (2, 2, 4), (3, 4, 4)]
        assert column in log[0]
        assert "grad_norm_correction" not in log[0]


def test_ddpo_resumes_with_the_rewards_that_it_remembers(command, monkeypatch, tmp_path):
    without_images(monkeypatch)
    logs = []
    for workdir, epochs in (("whole", (2,)), ("resumed", (1, 2))):
        for count in epochs:
            flags = ("--config=ddpo:emoji", "--config.algorithm.min_count=2", f"--config.training.num_epochs={count}")
            command(tmp_path / workdir, *flags)
        logs.append([without_time(row) for row in rows(tmp_path / workdir)])
    assert [(row["epoch"], row["step"]) for row in logs[0]] == [(1, 0), (2, 2), (3, 4)]
    assert logs[0] == logs[1]
