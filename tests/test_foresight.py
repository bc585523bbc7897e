"""The foresight of a log value: in a Gaussian walk everything has a closed form."""

import json

import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax.algorithms.value_memory import Fit, Seen
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import foresight
from nabla_gfn_jax.studies.foresight import Ends, fit_value, judge

BETA, STATES = 0.8, 3


def walks(count, seed):
    """A walk of two standard normal steps, and log R its end in the first of two dimensions; prompts do not matter."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=(count, STATES, 2)) * np.asarray([[0], [1], [1]])
    clean = steps.cumsum(axis=1).astype(np.float32)
    none, ids = np.zeros((count, STATES), np.float32), random.integers(0, 2, count)
    return Ends(Seen(clean, none), clean[:, -1, 0], ids, Seen(clean - 2 * steps.astype(np.float32), none))


def exact(states):
    """V − log Z of a state k: β x − β² k/2, because the rest adds β² (2 − k)/2 and log Z is β²."""
    return BETA * states.clean[..., 0].astype(np.float64) - BETA**2 * np.arange(STATES) / 2


def judged(value, held):
    """What `value`, a function of states, says."""
    return judge(value(held.states), value(held.opposite), held, BETA, 0)


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
            np.testing.assert_allclose([row.followed, row.gain], BETA**2 / 2, atol=0.02)
            assert row.gain_error < 0.01
        else:
            assert row.followed == row.gain == 0


def test_a_wrong_value_knows_less():
    """Noise in V costs nats and says nothing."""
    held = walks(40_000, 1)
    noise = np.random.default_rng(2)
    right, wrong = judged(exact, held), judged(lambda at: exact(at) + noise.normal(size=(40_000, STATES)), held)
    for one, other in zip(right[1:], wrong[1:], strict=True):
        assert other.known < one.known - 0.3
        assert other.efficiency < 0.8 * one.efficiency
        # Half the difference of two noises has the variance 1/2, and E_*[d] does not see it.
        np.testing.assert_allclose(other.followed - one.followed, 0.25, atol=0.02)
        np.testing.assert_allclose(one.gain - other.gain, 0.25, atol=0.04)
    assert right[0].spent == 0
    assert np.isnan(right[0].efficiency)


def test_the_fitted_value_is_near_the_exact_one():
    fit = Fit(places=4000, components=2, features=100, length=3.0, ridge=1.0, weight_clip=50.0)
    paths, held = walks(4000, 3), walks(20_000, 4)
    memory = fit_value(fit, paths, BETA, 2)
    found, right = judged(lambda at: fit.values(memory, at, held.prompt_id), held), judged(exact, held)
    for one, other in zip(found[1:], right[1:], strict=True):
        assert one.known > other.known - 0.02
        assert one.gain > other.gain - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["false", "true"])
def test_the_command_writes_a_line_for_each_state(guess, tiny_model, tmp_path, monkeypatch, capsys):
    """The last state is the sample: nothing is known better than there."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [
        "--num_steps=4",
        "--paths=48",
        "--held_out=32",
        "--together=32",
        "--beta=20",
        "--features=20",
        f"--guess={guess}",
    ]
    foresight.main(["foresight", f"--out={tmp_path}", f"--model={tiny_model}", "--reward=bright", *flags])
    rows = [json.loads(line) for line in (tmp_path / "foresight.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["known"] > rows[0]["known"]
    assert rows[0]["followed"] == 0
    assert all(row["followed"] > 0 and np.isfinite(row["gain"]) for row in rows[1:])
    assert capsys.readouterr().out == (tmp_path / "foresight.md").read_text()
