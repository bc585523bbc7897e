"""The functions for notebooks and other programs give the same results as the commands, on the tiny model."""

import json

import numpy as np
import pytest
from tiny_run import flags

from nabla_gfn_jax import __version__, api
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling

pytestmark = pytest.mark.thorough

PROMPTS = ["a face", "an animal"]
REWARD = """
def bright(images):
    return images.mean(axis=(1, 2, 3))
"""


@pytest.fixture(scope="module")
def model(tiny_model):
    return api.load_model(str(tiny_model))


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of two epochs, the rows that its callback saw, and the reward's name."""
    folder, seen = tmp_path_factory.mktemp("run"), []
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    reward = f"{folder}/mine.py:bright"
    given = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags(tiny_model, folder / "run", reward)[2:])
    fields = {name: json.loads(v) if v[0].isdigit() else v for name, v in given.items() if "correction" not in name}
    fields |= {"algorithm.name": "ddpo", "prompts": str(folder / "prompts.txt"), "training.num_epochs": 1}
    del fields["algorithm.transition_fraction"]
    where = api.finetune("ddpo:emoji", folder / "run", fields, on_epoch=seen.append)
    return where, seen, reward, fields


def test_sample_and_score(model, tiny_model, run):
    images = api.sample(model, PROMPTS, num=2, steps=3, guidance=2.0, seed=5)
    assert images.shape == (2, 2, *model.image_shape)
    how = Sampling(steps=3, guidance=2.0, seed=5)
    expected = np.concatenate([b.images for b in ImageSampler(load_folder(tiny_model), PROMPTS, how).images(None, 2)])
    np.testing.assert_array_equal(images.reshape(expected.shape), expected)
    scores = api.score(run[2], expected, [p for p in PROMPTS for _ in range(2)])
    np.testing.assert_allclose(scores, expected.mean((1, 2, 3)), rtol=1e-5)


def test_finetune_calls_back_and_goes_on(run):
    where, seen, _, fields = run
    assert [row["epoch"] for row in seen] == [1, 2]
    assert {row["reward_mean"] for row in seen} == {
        json.loads(line)["reward_mean"] for line in (where / "metrics.jsonl").read_text().splitlines()
    }
    again = []
    api.finetune("ddpo:emoji", where, fields, on_epoch=again.append)  # it is finished
    assert not again


def test_load_lora_and_evaluate(model, run):
    where, _, reward, _ = run
    lora = api.load_lora(where / "lora/00002", model)
    found = api.evaluate(model, PROMPTS, reward=reward, lora=lora, num=4, cross_rewards=["jpeg"], steps=3, guidance=2.0)
    assert found.certificate.spent.value > 0
    assert {"log_reward", "log_reward_jpeg"} <= found.figures.keys()
    changed = api.sample(model, PROMPTS, lora=lora, steps=3, guidance=2.0)
    assert np.abs(changed - api.sample(model, PROMPTS, steps=3, guidance=2.0)).max() > 0


def test_errors_are_one_line(model):
    with pytest.raises(UserError, match="there is no reward 'beauty'"):
        api.score("beauty", np.zeros((1, 8, 8, 3), np.float32), ["a face"])
    with pytest.raises(UserError, match=r"training\.num_epoch is unknown|num_epoch"):
        api.finetune("emoji", None, {"training.num_epoch": 3})
    assert __version__
