"""The microscope: its statistics are unbiased, and in a linear Gaussian chain it finds what has a closed form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax.algorithms.base import Model
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import microscope
from nabla_gfn_jax.studies.microscope import Credits, continue_paths, credits_of, look, product_of_means, summary

STEPS, FROM, BETA = 6, 2, 3.0
MEAN, STD = 0.7, 0.5  # of the base model's Gaussian
SLOPE, CURVE = np.asarray([0.8, -0.5]), 1.3  # log R(z) = SLOPE·z − CURVE ‖z‖²/2


def model(curve):
    """A base model of the Gaussian N(MEAN, STD²) in two dimensions, from step `FROM` on, with a quadratic log R."""

    def predict(lora, x, level, ids):
        signal = level.signal[:, None]
        return jnp.sqrt(1 - signal) * (x - jnp.sqrt(signal) * MEAN) / (signal * STD**2 + 1 - signal)

    def log_reward(z, ids):
        return z @ jnp.asarray(SLOPE, jnp.float32) - curve * jnp.square(z).sum(axis=1) / 2

    chain = stable_diffusion_chain(STABLE_DIFFUSION, STEPS)
    return Model(chain[FROM:], predict, log_reward, {})


def linear_steps():
    """(a, b, σ) of every step: y ~ N(a x + b, σ²), in float64."""
    chain = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model(0.0).chain)
    root = np.sqrt(1 - chain.at.signal) / (chain.at.signal * STD**2 + 1 - chain.at.signal)
    return chain.mean_x + chain.mean_o * root, -chain.mean_o * root * np.sqrt(chain.at.signal) * MEAN, chain.sigma


def look_at(x, curve, continuations, seed=0):
    keys = jax.random.split(jax.random.key(seed), continuations)
    ids = jnp.zeros(continuations, jnp.int32)
    start = jnp.broadcast_to(jnp.asarray(x, jnp.float32), (continuations, 2))
    rollout = continue_paths(model(curve), start, keys, ids)
    return credits_of(model(curve), rollout, BETA), BETA * np.asarray(rollout.log_reward, np.float64)


def test_products_of_means_have_no_bias():
    """The mean over many draws of ten vectors is the product of the true means, with noise that both share."""
    rng = np.random.default_rng(0)
    w, v = rng.uniform(0.2, 1, 10), rng.uniform(0.2, 1, 10)
    found = []
    for _ in range(20000):
        noise = rng.normal(size=(10, 3))
        found.append(product_of_means(noise + np.asarray([1, 0, 0.5]), w, noise - np.asarray([0, 1, 0.5]), v))
    assert abs(np.mean(found) + 0.25) < 4 * np.std(found) / len(found) ** 0.5


def test_credits_of_a_linear_reward():
    """All pull-backs are then products of numbers, the same for every continuation: there is no noise."""
    a, _, sigma = linear_steps()
    credits, log_w = look_at([0.3, -1.1], 0.0, 16)
    to = jax.tree.map(lambda leaf: float(leaf[0]), model(0.0).chain.to)
    clean = np.sqrt(to.signal) * STD**2 / (to.signal * STD**2 + 1 - to.signal)  # ∂x̂/∂y
    for credit, pulled in zip(credits, (a[1:].prod(), clean, 1.0), strict=True):
        expected = np.broadcast_to(sigma[0] * BETA * pulled * SLOPE, credit.shape)
        np.testing.assert_allclose(credit, expected, rtol=1e-4)
    found = summary([look(credits, log_w)["adjoint"]])
    signal = (sigma[0] * BETA * a[1:].prod()) ** 2 * (SLOPE @ SLOPE) / 2
    np.testing.assert_allclose([found[name] for name in ("true_signal", "signal", "gain")], signal, rtol=1e-4)
    np.testing.assert_allclose([found["cosine"], found["size"]], 1, rtol=1e-5)
    assert abs(found["noise"]) < 1e-5 * signal


def test_the_true_signal_of_a_curved_reward():
    """The log value of a quadratic log R is quadratic: its gradient's mean over the target's step is known."""
    a, b, sigma = linear_steps()
    x = np.asarray([0.3, -1.1])
    gain, offset, variance = 1.0, 0.0, 0.0  # of the sample given y: N(gain·y + offset, variance)
    for a_k, b_k, s_k in zip(a[1:], b[1:], sigma[1:], strict=True):
        gain, offset, variance = a_k * gain, a_k * offset + b_k, a_k**2 * variance + s_k**2
    slope, curve = BETA * SLOPE, BETA * CURVE
    flat = 1 / (1 + curve * variance)  # ∇V(y) = flat · gain · (slope − curve (gain·y + offset))
    mu, s2 = a[0] * x + b[0], sigma[0] ** 2
    bend = flat * gain**2 * curve  # −V'' at y
    y = (mu + s2 * flat * gain * (slope - curve * offset)) / (1 + s2 * bend)  # the mean of the target's step
    u = flat * gain * (slope - curve * (gain * y + offset))
    credits, log_w = look_at(x, CURVE, 20000)
    found = summary([look(credits, log_w)["adjoint"]])
    assert found["true_signal"] == pytest.approx(s2 * (u @ u) / 2, rel=0.03)
    assert found["noise"] > 0.1 * found["true_signal"]  # the adjoint varies, and without weights its mean is another
    assert abs(found["signal"] / found["true_signal"] - 1) > 0.1


def test_no_signal_is_no_number():
    """Without a reward there is no direction, and nothing that has none is called 0."""
    nothing = Credits(*(np.zeros((8, 2)),) * 3)
    found = summary([look(nothing, np.zeros(8))["guess"]] * 2)
    assert found["true_signal"] == found["gain"] == 0
    assert np.isnan([found["cosine"], found["size"], found["largest"]]).all()


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_credit(tiny_model, tmp_path, monkeypatch, capsys):
    """At the last step all three credits are the same."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = ["--num_steps=4", "--steps=1,3", "--states=2", "--continuations=8", "--beta=40", "--prompts=a_face"]
    microscope.main(["microscope", f"--out={tmp_path}", f"--model={tiny_model}", "--reward=bright", *flags])
    rows = [json.loads(line) for line in (tmp_path / "microscope.jsonl").read_text().splitlines()]
    assert [(row["step"], row["credit"]) for row in rows] == [(k, c) for k in "13" for c in Credits._fields]
    assert all(row["signal"] > 0 for row in rows)
    for row in rows[4:]:
        assert row["signal"] == pytest.approx(rows[3]["signal"], rel=1e-4)
    assert capsys.readouterr().out == (tmp_path / "microscope.md").read_text()


def test_a_step_that_does_not_exist_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        microscope.main(["microscope", f"--out={tmp_path}", "--num_steps=20", "--steps=3,20"])
    assert stopped.value.code == 2
    assert "--steps has 20" in capsys.readouterr().err
