"""Very many prompts: only the features of those in use are in memory, and the numbers of a run stay."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fitting, flags, make_model

from nabla_gfn_jax import train
from nabla_gfn_jax.base_models.base import FEW_PROMPTS, window
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.files import read_safetensors
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference import sampling
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling
from nabla_gfn_jax.rewards import REWARDS, Reward, load_reward
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training import prompts as training_prompts
from nabla_gfn_jax.training.build import build

TIMES = {"seconds", "images_per_second", "flops_per_second", "device_hours", "device_memory_gib"}
TEXTS = [f"a face {letter}" for letter in "abcdefghijklmnopqrstuvwx"]  # more than an epoch has samples


def test_a_window_has_the_prompts_that_are_asked_for():
    rng = np.random.default_rng(0)
    for size in (1, 7, 40):
        ids = rng.integers(0, 100_000, size)
        ids[: size // 2] = ids[0]
        rows, places = window(ids, size)
        assert rows.shape == (size,)
        np.testing.assert_array_equal(rows[places], ids)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose predictions depend on the prompt."""
    return make_model(tmp_path_factory.mktemp("model"), attention="", text_scale=30.0)


def weight_of(prompts):
    return jnp.asarray([0.5 + ord(prompt[-1]) % 5 for prompt in prompts], jnp.float32)


def of_prompt():
    """log R = mean pixel, times a number that depends on the prompt."""
    return Reward({}, weight_of, lambda params, images, weight: weight * images.mean(axis=(1, 2, 3)))


def run(model, workdir, *more):
    """Trains; returns the rows of the log without its times, and the LoRA files."""
    prompts = workdir.parent / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    train.main(["train", *fitting([*flags(model, workdir, "of_prompt"), f"--config.prompts={prompts}", *more])])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = {path.parent.name: read_safetensors(path)[0] for path in workdir.glob("lora/*/diffusers.safetensors")}
    assert files
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows], files


@pytest.mark.thorough
@pytest.mark.parametrize("config", [(), ("--config=ddpo:emoji",)], ids=["off policy", "on policy"])
def test_a_run_stays_as_it_is(model, tmp_path, monkeypatch, config):
    """Also a run that is resumed, whose data belong to the prompts of the epoch before: to the bit.

    A text encoder rounds otherwise in a batch of another size, so the run with all features in one table is equal to
    rounding only.
    """
    monkeypatch.setitem(REWARDS, "of_prompt", of_prompt)
    for name in ("table", "few", "cut"):
        (tmp_path / name).mkdir()
    of_table, _ = run(model, tmp_path / "table/run", *config)
    monkeypatch.setattr(training_prompts, "FEW_PROMPTS", 4)
    rows, files = run(model, tmp_path / "few/run", *config)
    run(model, tmp_path / "cut/run", "--config.training.num_epochs=2", *config)
    again, resumed = run(model, tmp_path / "cut/run", *config)
    assert again == rows
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(resumed[name][key], tensor)
    assert len({row["reward_mean"] for row in rows}) == len(rows)
    for row, other in zip(rows, of_table, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_prompts(tmp_path):
    """The features of 97,000 prompts more would be 770 MB on the emoji model; their texts are some 10 MB."""

    def measured(count):
        file = tmp_path / f"{count}.txt"
        file.write_text("\n".join(f"a face number {number}" for number in range(count)))
        settings = load_settings(Settings, "emoji", {"prompts": str(file)})
        tracemalloc.start()
        trainer = build(settings)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        ids = np.asarray([0, count - 1] * (settings.training.trajectories // 2))
        frozen, rows = trainer.seeing(ids)
        assert trainer.num_prompts == count
        np.testing.assert_array_equal(rows, ids > 0)
        context = frozen["table"]["base"].context
        assert context.shape[0] == settings.training.trajectories
        alone = trainer.base.encode_prompts([f"a face number {count - 1}", *"bc"]).context[0]
        np.testing.assert_allclose(context[1], alone, rtol=1e-5, atol=1e-6)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.frozen)), peak, context[0].nbytes

    (frozen, peak, each), (of_more, peak_of_more, _) = measured(3_000), measured(100_000)
    assert of_more == frozen
    assert peak_of_more - peak < 97_000 * 400 < 97_000 * each / 10


def test_a_prompt_that_the_reward_rejects_is_named_before_the_run(tmp_path):
    reward = load_reward("recognisability:0.5+valence")
    reward.check_prompts(["a cat"] * (FEW_PROMPTS + 1))
    with pytest.raises(UserError, match="cannot judge the prompt 'a unicorn'"):
        reward.check_prompts([*["a cat"] * FEW_PROMPTS, "a unicorn"])


@pytest.mark.thorough
def test_sampled_images_stay(model, monkeypatch):
    loaded, how = load_folder(model), Sampling(steps=3, guidance=4.0)
    expected = [batch.images for batch in ImageSampler(loaded, TEXTS[:6], how, batch=8).images(None, 3)]
    monkeypatch.setattr(sampling, "FEW_PROMPTS", 2)
    asked = []
    sampler = ImageSampler(loaded, TEXTS[:6], how, batch=8)
    encode = sampler._encode
    sampler._encode = lambda lora, prompts: asked.append(len(prompts)) or encode(lora, prompts)
    found = [batch.images for batch in sampler.images(None, 3)]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-6)
    assert asked == [8] * 3
    first = np.concatenate(expected)[::3]
    assert np.abs(first[0] - first[1]).max() > 1e-3
