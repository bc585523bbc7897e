"""The foresight of a log value: in a Gaussian walk everything has a closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax.algorithms.base import Rollout
from nabla_gfn_jax.algorithms.fitted_value import told_by
from nabla_gfn_jax.algorithms.transitions import take
from nabla_gfn_jax.algorithms.value_memory import Fit, FitOptions, Seen
from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import foresight
from nabla_gfn_jax.studies.foresight import Ends, clean_beside, fit_value, judge
from nabla_gfn_jax.studies.images import ImageOptions, Images

BETA, STATES = 0.8, 3


def walks(count, seed):
    """A walk of two standard normal steps, and log R its end in the first of two dimensions; prompts do not matter."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=(count, STATES, 2)) * np.asarray([[0], [1], [1]])
    clean = steps.cumsum(axis=1).astype(np.float32)
    none, ids = np.zeros((count, STATES), np.float32), random.integers(0, 2, count)
    half, before = steps[:, 1:].astype(np.float32) / 2, clean[:, :-1]
    beside = (Seen(before + half, none[:, 1:]), Seen(before - half, none[:, 1:]))
    return Ends(Seen(clean, none), clean[:, -1, 0], ids, beside)


def exact(states):
    """V − log Z of a state k: β x − β² k/2, because the rest adds β² (2 − k)/2 and log Z is β²."""
    x = states.clean[..., 0].astype(np.float64)
    return BETA * x - BETA**2 * np.arange(x.shape[1]) / 2


def judged(value, held):
    """What `value`, a function of states, says."""
    up, down = map(value, held.beside)
    return judge(value(held.states), up - down, held, BETA, 0)


def test_figures_of_the_exact_value():
    """States k are N(0, k): the target's are moved by β k, KL β² k/2. Weighted by e^V the end moves as far."""
    held = walks(100_000, 0)
    for k, row in enumerate(judged(exact, held)):
        kl = BETA**2 * k / 2
        assert abs(row.known - kl) < 4 * row.known_error + 1e-9
        assert row.known_error < 0.02
        np.testing.assert_allclose([row.spent, row.lost], kl, atol=0.02)
        np.testing.assert_allclose(row.log_reward, BETA * k, atol=0.03)
        np.testing.assert_allclose(row.exponent, BETA * k / 2, atol=0.02)  # the end's variance is 2
        np.testing.assert_allclose(row.needed, (BETA * k) ** 2 / 4, atol=0.02)
        if k:
            np.testing.assert_allclose(row.efficiency, k / 2, atol=0.05)
        if k < STATES - 1:
            np.testing.assert_allclose([row.followed, row.gain], BETA**2 / 2, atol=0.02)
            np.testing.assert_allclose(row.scale, 1, atol=0.03)
            assert row.gain_error < 0.01
        else:
            assert row.followed == row.gain == 0
            assert np.isnan(row.scale)


def test_a_wrong_value_knows_less():
    """Noise in V costs nats and says nothing."""
    held = walks(40_000, 1)
    noise = np.random.default_rng(2)
    right, wrong = judged(exact, held), judged(lambda at: exact(at) + noise.normal(size=at.guess.shape), held)
    for one, other in zip(right[1:], wrong[1:], strict=True):
        assert other.known < one.known - 0.3
        assert other.efficiency < 0.8 * one.efficiency
    for one, other in zip(right[:-1], wrong[:-1], strict=True):
        # The difference of two noises has the variance 2, and E_*[d] does not see it.
        np.testing.assert_allclose(other.followed - one.followed, 1.0, atol=0.05)
        np.testing.assert_allclose(one.gain - other.gain, 1.0, atol=0.07)
        np.testing.assert_allclose(other.scale, BETA**2 / (BETA**2 + 2), atol=0.02)
    assert right[0].spent == 0
    assert np.isnan(right[0].efficiency)


def test_the_fitted_value_is_near_the_exact_one():
    fit = Fit(FitOptions(components=2, width=64, fit_updates=foresight.ONCE, fit_batch=1024, weight_clip=50.0), 4000)
    paths, held = walks(4000, 3), walks(20_000, 4)
    memory = fit_value(fit, paths, BETA, 2)
    found, right = judged(lambda at: fit.values(memory, at, held.prompt_id), held), judged(exact, held)
    for one, other in zip(found[1:], right[1:], strict=True):
        assert one.known > other.known - 0.02
    for one, other in zip(found[1:-1], right[1:-1], strict=True):
        assert one.gain > other.gain - 0.02


@pytest.mark.thorough
def test_a_state_is_moved_along_the_noise_of_its_step(tiny_model, monkeypatch):
    """The slope of v·x̂ there, by finite differences, is what `fitted_value` tells the step, times the noise."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    images = Images.load(ImageOptions(model=str(tiny_model), reward="bright", num_steps=4))
    keys, ids = images.keys(0, 0, 8)
    model, index = images.model(images.frozen), jnp.asarray([0, 1, 2, 3] * 2)
    path = sample(model.predict, None, model.chain, keys, images.base.latent_shape, ids)
    now = take(index, Rollout(path, jnp.zeros(8), ids, keys))
    step = model.chain[now.index]
    v, share = jax.random.normal(jax.random.key(1), now.x.shape), 1e-2
    noise = (now.y - step.mean(now.output, now.x)) / expand(step.sigma, now.x)
    expected = np.asarray((told_by(model, now.x, now.index, now.prompt_id, v) * noise).sum(axis=(1, 2, 3)))
    up, down = (clean_beside(model, now, sign * share) for sign in (1, -1))
    found = np.asarray((v * (up - down)).sum(axis=(1, 2, 3))) / (2 * share)
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["false", "true"])
def test_the_command_writes_a_line_for_each_state(guess, tiny_model, tmp_path, monkeypatch, capsys):
    """V has learned something of held-out paths; in this model, the first noise decides nearly all."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [
        "--num_steps=4",
        "--paths=48",
        "--held_out=32",
        "--together=32",
        "--beta=20",
        "--width=20",
        "--fit_updates=400",
        "--fit_batch=256",
        "--fit_rate=.003",
        f"--guess={guess}",
    ]
    foresight.main(["foresight", f"--out={tmp_path}", f"--model={tiny_model}", "--reward=bright", *flags])
    rows = [json.loads(line) for line in (tmp_path / "foresight.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["known"] > 2 * rows[-1]["known_error"] > 0
    assert rows[-1]["followed"] == 0
    assert all(row["followed"] > 0 and np.isfinite(row["gain"]) for row in rows[:-1])
    assert capsys.readouterr().out == (tmp_path / "foresight.md").read_text()
