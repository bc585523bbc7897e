"""The uptake of a LoRA: in a linear Gaussian chain with a linear reward, the target's steps have a closed form."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_microscope import BETA, SLOPE, linear_steps
from test_microscope import model as base_model
from tiny_run import brightness

from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import uptake
from nabla_gfn_jax.studies.uptake import Products, judge, products

PATHS = 40_000


@pytest.fixture(scope="module")
def gaussian():
    """The chain with a policy whose "LoRA" is how much of the target's shift each step makes, and base paths of it."""
    base = base_model(0.0)
    a, _, sigma = linear_steps()
    pulled = np.asarray([a[k + 1 :].prod() for k in range(len(a))])  # ∇_y of the log value is β · pulled · SLOPE
    shift = sigma**2 * BETA / 20 * pulled / np.asarray(base.chain.mean_o, np.float64)
    times = np.asarray(base.chain.at.time)

    def predict(lora, x, level, ids):
        output = base.predict(None, x, level, ids)
        if lora is None:
            return output
        k = jnp.argmax(jnp.asarray(times)[:, None] == level.time[None], axis=0)
        return output + (lora * jnp.asarray(shift, jnp.float32))[k][:, None] * jnp.asarray(SLOPE, jnp.float32)[None]

    model, ids = dataclasses.replace(base, predict=predict), jnp.zeros(PATHS, jnp.int32)
    path = sample(predict, None, model.chain, jax.random.split(jax.random.key(0), PATHS), (2,), ids)
    square = (sigma * BETA / 20 * pulled) ** 2 * (SLOPE @ SLOPE)  # ‖δ‖² of the target
    return model, path, ids, square


def test_gains_have_a_closed_form(gaussian):
    """A policy with s times the target's shift gains (s − s²/2) ‖δ_*‖², at the scale 1/s, step by step."""
    model, path, ids, square = gaussian
    s = np.random.default_rng(0).uniform(0.3, 1.8, len(square)).astype(np.float32)
    found = Products(*map(np.asarray, products(model, jnp.asarray(s), path, ids)))
    rows = judge(found, BETA / 20 * np.asarray(path.samples) @ SLOPE, np.asarray(ids), len(square))
    for row, of_step, expected in zip(rows, s, square, strict=True):
        np.testing.assert_allclose(row.spent, of_step**2 * expected / 2, rtol=1e-3)
        assert abs(row.gain - (of_step - of_step**2 / 2) * expected) < 4 * row.gain_error
        assert row.gain_error < 0.1 * of_step * expected**0.5
        np.testing.assert_allclose(row.scale, 1 / of_step, atol=4 * row.gain_error / (of_step**2 * expected))


def test_parts_are_sums_of_steps_and_prompts_count_alike():
    rng = np.random.default_rng(1)
    found = Products(rng.normal(size=(7, 60)), rng.uniform(size=(7, 60)))
    log_w, prompt = rng.normal(size=60), np.repeat([2, 0], [45, 15])
    rows = judge(found, log_w, prompt, 3)
    assert [row.steps for row in rows] == ["1-3", "4-5", "6-7"]
    for row, steps in zip(rows, (slice(0, 3), slice(3, 5), slice(5, 7)), strict=True):
        each = (found.with_noise - found.square / 2)[steps].sum(axis=0)
        means = [np.average(each[prompt == p], weights=np.exp(log_w[prompt == p])) for p in (0, 2)]
        np.testing.assert_allclose(row.gain, np.mean(means), rtol=1e-9)


def test_a_policy_that_is_the_base_model_gains_nothing(gaussian):
    model, path, ids, square = gaussian
    found = Products(*map(np.asarray, products(model, jnp.zeros(len(square)), path, ids)))
    (row,) = judge(found, np.zeros(PATHS), np.asarray(ids), 1)
    assert row.spent == row.gain == row.gain_error == 0
    assert np.isnan(row.scale)


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_part(tiny_model, tmp_path, monkeypatch, capsys):
    """A random LoRA spends in every part."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    lora = init_lora(jax.random.key(0), load_model(str(tiny_model), jnp.float32).params["unet"], rank=2)
    lora = jax.tree.map(lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), lora)
    save_lora(tmp_path / "lora", lora)
    flags = [f"--lora={tmp_path / 'lora'}", "--num_steps=4", "--paths=24", "--together=16", "--beta=20", "--parts=2"]
    flags.append("--until_step=3")
    uptake.main(["uptake", f"--out={tmp_path}", f"--model={tiny_model}", "--reward=bright", *flags])
    rows = [json.loads(line) for line in (tmp_path / "uptake.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == ["1-2", "3-3"]
    assert min(row["spent"] for row in rows) > 0
    assert capsys.readouterr().out == (tmp_path / "uptake.md").read_text()


def test_steps_that_are_not_there(capsys):
    with pytest.raises(SystemExit):
        uptake.main(["uptake", f"--lora={__file__}", "--out=out", "--num_steps=4", "--until_step=5"])
    assert "--until_step = 5 is more than --num_steps = 4; lower it" in capsys.readouterr().err
