"""How much of a log value's gradient a policy follows: figures against closed forms, and c against its definition."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax.algorithms.value_memory import Fit
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import following
from nabla_gfn_jax.studies.following import Follower, judge, of_state
from nabla_gfn_jax.studies.foresight import base_paths, fit_value
from nabla_gfn_jax.studies.images import ImageOptions, Images


def test_the_figures_of_a_policy_that_does_a_part_of_what_it_is_told():
    """δ = s · E[c|x] + u with u ⊥ E[c|x]: gain (s − s²/2) ‖E[c|x]‖² − ‖u‖²/2."""
    rng = np.random.default_rng(0)
    states, size, noises, s, chance = 400, 12, 60, 0.4, 0.7
    mean = rng.normal(size=(states, size))
    c = mean + chance * rng.normal(size=(noises, states, size))
    aside = rng.normal(size=(states, size))
    aside -= mean * ((aside * mean).sum(1) / (mean**2).sum(1))[:, None]
    row = judge(3, c, s * mean + aside)
    square, other = (mean**2).sum(1).mean(), (aside**2).sum(1).mean()
    tolerance = 4 * np.sqrt(size * chance**2 / (noises * states) * square)
    assert row.step == 3
    assert row.signal == pytest.approx(square / 2, abs=tolerance)
    assert row.noise == pytest.approx(size * chance**2 / 2, rel=0.02)
    assert row.spent == pytest.approx((s**2 * square + other) / 2, rel=1e-12)
    assert row.gain == pytest.approx((s - s**2 / 2) * square - other / 2, abs=tolerance)
    assert row.cosine == pytest.approx(s * square / np.sqrt(square * (s**2 * square + other)), rel=0.02)
    assert row.scale == pytest.approx(s * square / (s**2 * square + other), rel=0.02)


def test_a_policy_that_is_the_base_model_and_pure_noise():
    c = np.random.default_rng(1).normal(size=(50, 300, 4))
    row = judge(1, c, np.zeros((300, 4)))
    assert row.spent == row.gain == row.gain_error == 0
    assert np.isnan(row.cosine)
    assert np.isnan(row.scale)
    assert abs(row.signal) < 4 * np.sqrt(2 * 4 / (50 * 49 * 300)) / 2  # four standard errors
    assert row.noise == pytest.approx(2.0, rel=0.02)


@pytest.fixture
def images(tiny_model, monkeypatch):
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    model = load_model(str(tiny_model), jnp.float32)
    options = ImageOptions(model=str(tiny_model), reward="bright", num_steps=4, beta=20.0)
    return Images(model, REWARDS["bright"](), ("a face", "a cat"), options)


@pytest.fixture
def lora(images):
    made = init_lora(jax.random.key(0), images.base.params["unet"], rank=2)
    return jax.tree.map(lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), made)


@pytest.mark.thorough
@pytest.mark.parametrize(("guess", "step"), [(True, 1), (False, 2), (True, 3)])
def test_c_is_the_slope_of_v_by_finite_differences(images, lora, guess, step):
    """c·direction = σ dV(y + s direction)/ds, for the V that was fitted; the last step leads to a sample."""
    fit = Fit(places=32, components=3, features=20, length=1.5, ridge=0.5, weight_clip=20.0)
    memory = fit_value(fit, base_paths(images, 0, 32, 16, guess=guess), 20.0, 2)
    keys, ids = images.keys(1, 0, 4)
    follower = Follower(images, lora, ids, guess=guess)
    x = follower.states(keys)[step]
    one, noises = of_state(memory, step + 1), jax.random.split(jax.random.key(5), 2)
    c, delta = follower.told(x, step, noises, fit, one)
    model, number = images.model(images.frozen), np.asarray(ids)
    now = model.chain[step]
    base, output = (model.predict(which, x, now.at.each(4), ids) for which in (None, lora))
    np.testing.assert_allclose(
        delta, np.asarray(now.mean_o / now.sigma * (output - base)).reshape(4, -1), rtol=1e-4, atol=1e-4
    )

    def value(y):
        clean = y if step == 3 else now.to.clean(model.predict(None, y, now.to.each(4), ids), y)
        log_reward = model.log_reward(clean, ids) if guess else jnp.zeros(4)
        seen = following.Seen(np.asarray(clean).reshape(4, 1, -1), np.asarray(log_reward)[:, None])
        return fit.values(one, seen, number)[:, 0].astype(np.float64)

    for of_noise, key in zip(c, noises, strict=True):
        y = now.mean(output, x) + now.sigma * jax.random.normal(key, x.shape)
        direction = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
        slope = (value(y + 1e-2 * direction) - value(y - 1e-2 * direction)) / 2e-2
        found = (of_noise * np.asarray(direction).reshape(4, -1)).sum(axis=1)
        np.testing.assert_allclose(found, float(now.sigma) * slope, rtol=0.02, atol=0.02 * np.abs(found).max())


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_step(tiny_model, images, lora, tmp_path, capsys):
    save_lora(tmp_path / "lora", lora)
    flags = [f"--lora={tmp_path / 'lora'}", f"--model={tiny_model}", "--reward=bright", "--beta=20", "--num_steps=4"]
    flags += ["--until_step=3", "--paths=32", "--together=16", "--features=20", "--states=3", "--noises=4"]
    following.main(["following", f"--out={tmp_path}", "--guess=True", *flags])
    rows = [json.loads(line) for line in (tmp_path / "following.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert min(row["spent"] for row in rows) > 0
    assert capsys.readouterr().out == (tmp_path / "following.md").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--until_step=5"], "--until_step = 5 is more than --num_steps = 4; lower it"),
        (["--until_step=2", "--steps=1,3"], "--steps: the policy takes no step 3; its last is 2"),
    ],
)
def test_steps_that_are_not_there(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        following.main(["following", f"--lora={__file__}", "--out=out", "--num_steps=4", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
