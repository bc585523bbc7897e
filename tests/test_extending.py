"""Runs the example of docs/extending.md."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import flags, last_of_each

from nabla_gfn_jax import train
from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.rewards import REWARDS

PAGE = Path(__file__).parents[1] / "docs/extending.md"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The file `my_run.py` with its prompts beside it. Its registrations are removed after the test."""
    before = dict(REWARDS), dict(ALGORITHMS)
    (tmp_path / "my_run.py").write_text("\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)))
    (tmp_path / "prompts.txt").write_text("a red face\na blue face\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "my_run.py"
    for registry, names in zip((REWARDS, ALGORITHMS), before, strict=True):
        for name in set(registry) - set(names):
            del registry[name]


@pytest.fixture
def example(config):
    """The names that the file defines."""
    names: dict = {"__name__": "my_run"}
    exec(compile(config.read_text(), config, "exec"), names)
    return names


@pytest.mark.thorough
def test_the_run_of_the_page_trains(config, tiny_model):
    """The update evaluates the network once, so it compiles in seconds."""
    kept = ("model", "correction", "sampling", "training.trajectories", "training.micro_batches", "training.num_epochs")
    small = [f for f in flags(tiny_model, config.parent / "run") if f.startswith(tuple(f"--config.{k}" for k in kept))]
    train.main(["train", *last_of_each([*small, f"--config={config}", f"--workdir={config.parent / 'run'}"])])
    rows = [json.loads(line) for line in (config.parent / "run/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["reward_mean"]) for row in rows)
    trained = [row for row in rows if "loss_regression" in row]
    assert len(trained) == 3
    assert all(row["grad_norm_lora"] > 0 for row in trained)


def test_an_option_out_of_range_is_one_line(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["train", f"--config={config}", "--config.algorithm.temperature=-1", f"--workdir={tmp_path}"])
    assert stop.value.code == 2
    assert "algorithm.temperature" in capsys.readouterr().err


def test_the_reward_wants_what_the_prompt_says(example):
    reward = example["colour"]()
    images = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
    features = reward.encode_prompts(["a red face", "a blue face"])
    red, _, blue = images.mean(axis=(1, 2)).T
    np.testing.assert_allclose(reward.score({}, images, features), [red[0] - blue[0], blue[1] - red[1]], rtol=1e-5)
    gradient = jax.grad(lambda x: reward.score({}, x, features).sum())(jnp.asarray(images))
    assert gradient[0, ..., 0].min() > 0 > gradient[1, ..., 0].max()
    with pytest.raises(UserError, match="a grey face"):
        reward.encode_prompts(["a red face", "a grey face"])


def test_the_weights_are_the_tempered_rewards(example):
    algorithm = example["RewardWeightedRegression"](temperature=0.5)
    log_reward = np.array([0.0, 1.0, -2.0])
    weight, _ = algorithm.weigh({}, {"log_reward": log_reward}, np.zeros(3, int))
    np.testing.assert_allclose(weight, np.exp(2 * log_reward) / np.exp(2 * log_reward).mean(), rtol=1e-6)


def test_the_metric_is_a_mean_over_images(example):
    metric = example["Contrast"]()
    images = np.random.default_rng(0).random((6, 4, 4, 3)).astype(np.float32)
    states = [metric.update(Batch(images[part], np.array([0, 1, 0]))) for part in (slice(3), slice(3, 6))]
    found = metric.compute(states[0].merge(states[1]))["contrast"]
    contrast = images.std(axis=(1, 2, 3))
    order = np.array([0, 2, 3, 5]), np.array([1, 4])  # prompts count alike
    assert found.value == pytest.approx(np.mean([contrast[rows].mean() for rows in order]), rel=1e-5)
