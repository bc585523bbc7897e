"""The study of fits on a fixed bank: its policy equals the LoRA's, its gains follow the formula, its command runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tiny_run import brightness

from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import bank_fit
from nabla_gfn_jax.studies.bank_fit import Bench, Options, adapt, clip_of, gains, init_pairs

pytestmark = pytest.mark.thorough

SMALL = {"num_steps": 10, "paths": 32, "held_out": 16, "together": 16, "updates": 100, "batch": 16, "rank": 2}


@pytest.fixture(scope="module")
def bench(tiny_model, tmp_path_factory):
    options = Options(out=tmp_path_factory.mktemp("bank"), beta=40.0, **SMALL)
    return Bench(load_model(str(tiny_model), jnp.float32), brightness(1.0), ("a face", "an animal"), options)


@pytest.fixture(scope="module")
def bank(bench):
    return bench.bank(2, SMALL["paths"])


def random_pairs(bench, layers):
    rng = np.random.default_rng(0)
    pairs = init_pairs(bench.base.params, layers, 2, jax.random.key(0))
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape).astype(np.float32), pairs)


def test_pairs_on_attention_are_the_lora(bench):
    """Pairs added to the kernels equal the `lora` collection. With all layers, they include convolutions."""
    pairs = random_pairs(bench, "attention")
    lora = unflatten_dict({tuple(name.split("/")[:-1]): pair for name, pair in pairs.items()})
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *bench.base.latent_shape)), jnp.float32)
    model, ids = bench.model(bench.frozen), jnp.arange(2)
    adapted = bench.model(bench.frozen | {"base": adapt(bench.frozen["base"], pairs)})
    level = model.chain[3].at.each(2)
    expected = model.predict(lora, x, level, ids)
    assert float(jnp.abs(expected - model.predict(None, x, level, ids)).max()) > 1e-2
    np.testing.assert_allclose(adapted.predict(None, x, level, ids), expected, rtol=1e-4, atol=1e-5)
    assert any("conv" in name for name in random_pairs(bench, "all"))


def test_gains_are_differences_of_squares(bench, bank):
    """δ·c − ‖δ‖²/2 = ‖c‖²/2 − ‖c − δ‖²/2, with δ by the means of both models; none without a LoRA."""
    clip = clip_of(bank, 40.0, 0.8)
    size = 40.0 * np.sqrt(np.square(np.asarray(bank.credit)).reshape(10, 32, -1).mean(axis=-1))
    np.testing.assert_allclose(clip, np.quantile(size, 0.8, axis=1), rtol=1e-5)
    nothing = gains(bench, init_pairs(bench.base.params, "attention", 2, jax.random.key(0)), bank, clip)
    np.testing.assert_allclose(nothing["as_it_is"], 0.0, atol=1e-5)

    pairs, k, rows = random_pairs(bench, "all"), 4, np.arange(8)
    model = bench.model(bench.frozen)
    adapted = bench.model(bench.frozen | {"base": adapt(bench.frozen["base"], pairs)})
    step, x, ids = model.chain[k], bank.x[k, rows], bank.prompt_id[rows]
    means = [step.mean(m.predict(None, x, step.at.each(8), ids), x) for m in (adapted, model)]
    delta = np.asarray((means[0] - means[1]) / step.sigma, np.float64).reshape(8, -1)
    c = np.asarray(40.0 * bank.credit[k, rows], np.float64).reshape(8, -1)
    expected = (c**2).sum(1) / 2 - ((c - delta) ** 2).sum(1) / 2
    steps = jnp.full(8, k)
    found = bank_fit.nats(bench, bench.frozen, pairs, bank, 40.0 * bank.credit[steps, rows], steps, jnp.asarray(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_fit(tiny_model, tmp_path, monkeypatch, capsys):
    """Fits two kinds of layers at one rate. The loss falls, and the certificate has the spent nats of every step."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    named = [f"--out={tmp_path}", f"--model={tiny_model}", "--reward=bright", "--beta=40", "--rates=0.003"]
    bank_fit.main(["bank_fit", *flags, *named])
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["layers"] for row in rows] == ["attention", "all"]
    for row in rows:
        assert row["losses"][-1] < row["losses"][0]
        assert len(row["gain"]["clipped"]) == 10
        assert len(row["certificate"]["spent_by_step"]) == 10
        assert row["certificate"]["spent"][0] > 0
    assert capsys.readouterr().out.count("held-out gain") == 2
