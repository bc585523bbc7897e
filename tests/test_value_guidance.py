"""The policy that follows V itself: its steps against the host's gradients, the bank that is kept, its command."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_run import brightness

from nabla_gfn_jax.algorithms.fitted_value import told_by
from nabla_gfn_jax.algorithms.value_memory import Fit, Seen
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import value_guidance
from nabla_gfn_jax.studies.bank import Bank, clean_of, fit_halves, sample_bank
from nabla_gfn_jax.studies.images import Images
from nabla_gfn_jax.studies.value_guidance import Options, following

SMALL = {"num_steps": 6, "until_step": 5, "paths": 24, "held_out": 12, "together": 8}
SMALL |= {"components": 3, "width": 8, "fit_updates": 20, "fit_batch": 32}


@pytest.fixture(scope="module")
def images(tiny_model, tmp_path_factory):
    options = Options(out=tmp_path_factory.mktemp("guidance"), beta=40.0, **SMALL)
    return Images(load_model(str(tiny_model), jnp.float32), brightness(1.0), ("a face", "an animal"), options)


@pytest.fixture(scope="module")
def bank(images):
    return sample_bank(images, 4, SMALL["paths"], SMALL["together"])


@pytest.mark.thorough
def test_its_steps_are_those_of_the_host(images, bank):
    """s c of the host's gradients, the mean of both halves', pulled back by `told_by`; then the base model's.

    Of the policy's 11 steps, every second one has a time of the bank's, and the others are between two, or before all.
    """
    clean = clean_of(images.base.chain(6), bank)
    fit, ids = Fit(images.options, 24), jnp.asarray(bank.prompt_id)
    memories = fit_halves(fit, clean, bank, 40.0, 2)
    coarse = images.base.chain(6)
    model = replace(images.model(images.frozen), chain=images.base.chain(12))
    times = np.asarray(coarse.at.time, np.float32)[:4]
    assert times.tolist() == [831, 665, 499, 333]
    change_of = following(model, 1.3, times)
    for k in range(12):
        x, step, now = jnp.asarray(bank.x[:, min(k // 2, 5)]), model.chain[k], float(model.chain.at.time[k])
        output, change = change_of(memories, x, step.at.each(24), ids)
        np.testing.assert_allclose(output, model.predict(None, x, step.at.each(24), ids), rtol=1e-4, atol=1e-5)
        if now < 333:
            assert not jnp.abs(change).max()
            continue
        at_x = np.repeat(np.asarray(step.at.clean(output, x)).reshape(24, 1, -1), 7, axis=1)
        asked = Seen(at_x, np.zeros(at_x.shape[:2], np.float32)), bank.prompt_id
        slopes = np.mean([fit.gradients(memory, *asked)[0] for memory in memories], axis=0)
        position = min(max((831 - now) / 166, 0.0), 3.0)
        before, weight = int(position), position - int(position)
        between = (1 - weight) * slopes[:, before] + weight * slopes[:, before + 1]
        c = told_by(model, x, jnp.full(24, k), ids, jnp.asarray(between.reshape(x.shape), jnp.float32))
        expected = 1.3 * c * step.sigma / step.mean_o
        np.testing.assert_allclose(change / jnp.abs(expected).max(), expected / jnp.abs(expected).max(), atol=1e-4)


@pytest.fixture
def few(images, monkeypatch):
    """A function that samples ten paths, four together, and the numbers of those that were sampled anew."""
    started, keys = [], Images.keys
    monkeypatch.setattr(Images, "keys", lambda self, *which: started.append(which[1]) or keys(self, *which))

    def sampled(folder, count=10, **other):
        return sample_bank(replace(images, options=replace(images.options, **other)), 4, count, 4, folder)

    return sampled, started


def same(one: Bank, other: Bank) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.thorough
def test_a_kept_bank_goes_on(few, tmp_path):
    """What is there is read; what is missing or damaged is sampled again, to the same bits."""
    sampled, started = few
    whole = sampled(None)
    assert same(sampled(tmp_path / "bank"), whole)
    assert started == [0, 4, 8] * 2
    files = sorted((tmp_path / "bank").glob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:1000])
    files[2].unlink()
    assert same(sampled(tmp_path / "bank"), whole)
    assert started[6:] == [0, 8]
    assert same(sampled(tmp_path / "bank"), whole)
    assert started[8:] == []
    fewer, more = sampled(tmp_path / "bank", 9), sampled(tmp_path / "bank", 12)
    assert started[8:] == [8]  # its last file had two paths, and four are asked for
    assert same(fewer, Bank(*(a[:9] for a in whole)))
    for ours, theirs in zip(more, whole, strict=True):  # of another batch
        np.testing.assert_allclose(ours[:10], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_a_bank_of_other_paths_is_refused(few, tmp_path):
    sampled, _ = few
    sampled(tmp_path)
    with pytest.raises(UserError, match=r"has base paths of another guidance and seed; choose another --bank"):
        sampled(tmp_path, guidance=3.0, seed=1)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(UserError, match=r"about.json cannot be used .*; choose another --bank"):
        sampled(tmp_path)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reward=jpeg", "--prompts=simple_animals", "--paths=6"], "--paths = 6 is less than two of each prompt"),
        (["--sampler=ddpm_early", "--steps=3"], "num_steps is 3; the sampler ddpm_early can take 4 to 333"),
    ],
)
def test_what_is_refused_before_a_path_is_sampled(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        value_guidance.main(["value_guidance", f"--out={tmp_path / 'out'}", *flags])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    """With a strong reward the policy gains, and spends nothing after its last step."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    flags += ["--reward=bright", "--beta=40", "--steps=9", "--sampler=ddpm_early", f"--bank={tmp_path / 'bank'}"]
    value_guidance.main(["value_guidance", *flags, f"--model={tiny_model}", f"--out={tmp_path / 'out'}"])
    judged = json.loads((tmp_path / "out/certificate.json").read_text())
    assert len(judged["spent_by_step"]) == 9
    assert judged["spent_by_step"][0] > 0 == judged["spent_by_step"][-1]
    rows = np.asarray(Image.open(tmp_path / "out/samples.png"), np.float32)
    base, policy = np.split(rows, [len(rows) // 2])
    assert policy.mean() > base.mean() + 1  # of 255
    assert "the policy that follows V: log reward " in capsys.readouterr().out
