"""The study of fits to a log value: its teachers against plain formulas, its command from end to end."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_run import brightness

from nabla_gfn_jax.algorithms.mean_shift import mean_shifts
from nabla_gfn_jax.algorithms.value_memory import Fit
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import value_fit
from nabla_gfn_jax.studies.bank import clean_of, fit_halves, sample_bank, values_of
from nabla_gfn_jax.studies.value_fit import Options, Teacher, drawn, shifts

SMALL = {"num_steps": 6, "until_step": 5, "paths": 24, "held_out": 12, "together": 8, "updates": 50, "batch": 8}
SMALL |= {"rank": 2, "components": 3, "width": 8, "fit_updates": 20, "fit_batch": 32}


@pytest.fixture(scope="module")
def images(tiny_model, tmp_path_factory):
    options = Options(out=tmp_path_factory.mktemp("shift"), beta=40.0, **SMALL)
    return value_fit.Images(load_model(str(tiny_model), jnp.float32), brightness(1.0), ("a face", "an animal"), options)


@pytest.fixture(scope="module")
def bank(images):
    return sample_bank(images, 4, SMALL["paths"], SMALL["together"])


@pytest.mark.thorough
def test_the_mean_shifts(images, bank):
    """c = r a m with a of the change of μ by x̂, r by regression of the drawn noise, m of the bank's own moves."""
    chain = images.base.chain(SMALL["num_steps"])
    clean = clean_of(chain, bank)
    value = np.random.default_rng(0).normal(size=clean.shape[:2])
    told, follows = shifts(chain, bank, clean, value)
    moved_by = mean_shifts(value, 0 * value, clean)
    keys, _ = images.keys(4, 0, SMALL["paths"])
    shape = images.base.latent_shape
    for k in (0, 3, 5):
        step, x, output = chain[k], bank.x[:, k], bank.base_output[:, k]
        at = images.base.chain(SMALL["num_steps"])[k].at
        np.testing.assert_allclose(clean[:, k], at.clean(output, x).reshape(len(x), -1), rtol=1e-4, atol=1e-5)
        more = output + 1.0  # x̂ and μ are linear in the output, so a is the ratio of their changes, by σ
        moved = (step.mean(more, x) - step.mean(output, x)) / step.sigma
        a = float((moved / (at.clean(more, x) - at.clean(output, x))).mean())
        drew = jax.vmap(lambda key, k=k: jax.random.normal(jax.random.fold_in(key, k + 1), shape))(keys)
        rest = a * (bank.x[:, -1] - np.asarray(at.clean(output, x)))
        slope = float(np.sum(np.asarray(drew, np.float64) * rest) / np.sum(np.square(rest, dtype=np.float64)))
        np.testing.assert_allclose(follows[k], slope, rtol=1e-3)
        np.testing.assert_allclose(told[:, k], slope * a * moved_by[:, k], rtol=2e-3, atol=1e-5)


@pytest.mark.thorough
def test_no_path_is_told_by_a_v_that_has_seen_it(images, bank):
    """Another reward of one path changes V and its gradient in the other half alone, and its own V at the sample."""
    clean = clean_of(images.base.chain(SMALL["num_steps"]), bank)
    fit = Fit(images.options, 24)
    changed = bank._replace(log_reward=bank.log_reward + 0.02 * (np.arange(24) == 4))  # prompt 0, the first half
    before, slopes = values_of(fit, fit_halves(fit, clean, bank, 40.0, 2), clean, bank, 40.0, 2)
    after, others = values_of(fit, fit_halves(fit, clean, changed, 40.0, 2), clean, changed, 40.0, 2)
    moved, turned = np.abs(after - before)[:, :-1].max(axis=1), np.abs(others - slopes).max(axis=(1, 2))
    first = np.arange(24) // 2 % 2 == 0
    for change in (moved, turned):
        assert change[~first].min() > 1e-5
        assert not change[first].any()


def test_half_of_the_states_are_drawn_by_their_value():
    """With all value on one path, half of the draws are of it, and the others even."""
    sums = np.tile(np.cumsum(np.arange(10) == 7).astype(float), (3, 1))
    paths, steps = drawn(Teacher(np.zeros((10, 3, 1)), sums), 3, 4000, np.random.default_rng(0))
    assert (paths[:2000] == 7).all()
    assert np.abs(np.bincount(paths[2000:], minlength=10) - 200).max() < 60
    assert np.abs(np.bincount(steps, minlength=3) - 1333).max() < 120


def test_a_bank_without_two_paths_of_each_prompt_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        value_fit.main(
            ["value_fit", f"--out={tmp_path}", "--reward=jpeg", "--prompts=simple_animals", "--paths=6", "--held_out=2"]
        )
    assert caught.value.code == 2
    assert "--paths = 6 is less than two of each prompt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("follow", ["gradient", "mean_shift"])
def test_the_command(follow, tiny_model, tmp_path, monkeypatch, capsys):
    """The LoRA that it writes has learned something, and its certificate has no nats after its last step."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    value_fit.main(
        [
            "value_fit",
            *flags,
            f"--follow={follow}",
            f"--out={tmp_path}",
            f"--model={tiny_model}",
            "--reward=bright",
            "--beta=40",
            "--rate=.003",
        ]
    )
    lora = load_lora(tmp_path / "lora.safetensors", load_model(str(tiny_model), jnp.float32).params["unet"])
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(lora)) > 0
    judged = json.loads((tmp_path / "certificate.json").read_text())
    assert judged["spent"][0] > 0
    assert judged["spent_by_step"][-1] == 0
    assert (tmp_path / "value_fit.md").read_text().count("\n") == 2 + 5 + 1
    out = capsys.readouterr().out
    assert ("r is " in out) == (follow == "mean_shift")
    assert re.search(r"update 50 of 50: loss -?\d\.\d+, teacher \d\.\d+ nats", out)
    height, width, _ = np.asarray(Image.open(tmp_path / "samples.png")).shape
    assert 12 < width / height < 13  # a row of twelve, with margins
    assert "own samples: log reward " in out
