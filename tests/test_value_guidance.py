"""The policy that follows V itself: its steps against the host's gradients, its file, the bank that is kept, its
commands.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_run import brightness

from nabla_gfn_jax import api, evaluate, sample
from nabla_gfn_jax.algorithms.fitted_value import told_by
from nabla_gfn_jax.algorithms.value_guide import Known, ValueGuide, following, load_guide, save_guide
from nabla_gfn_jax.algorithms.value_memory import Fit, Seen
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.files import write_safetensors
from nabla_gfn_jax.checkpoints.lora_file import read_about
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.studies import value_guidance
from nabla_gfn_jax.studies.bank import Bank, clean_of, fit_halves, sample_bank
from nabla_gfn_jax.studies.images import Images
from nabla_gfn_jax.studies.value_guidance import Options

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
    guide, change_of = ValueGuide.of(memories, times, 1.3), following(model.predict, model.chain)
    for k in range(12):
        x, step, now = jnp.asarray(bank.x[:, min(k // 2, 5)]), model.chain[k], float(model.chain.at.time[k])
        output, change = change_of(guide, x, step.at.each(24), ids)
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


PROMPTS = ("a face", "an animal")


@pytest.fixture(scope="module")
def guide(images):
    """A guide of random numbers, for 3 components of the tiny model's latents and four states."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.normal(size=shape).astype(np.float32)

    elements = int(np.prod(images.base.latent_shape))
    layers = [(array(3 + 1 + 13, 8), array(8)), (array(8, 8), array(8))]
    weights = {"layers": layers, "prompts": array(2, 8), "out": (array(8), array())}
    known = [Known(array(elements), array(elements, 3), array(5, 3), np.exp(array(5)), weights) for _ in range(2)]
    return ValueGuide(tuple(known), np.float32([831, 665, 499, 333]), np.float32(1.3), np.float32(0.7))


def test_a_step_spends_no_more_than_it_may(images, guide):
    """Each sample's δ has the direction that it has without a limit, and ‖δ‖²/2 is the limit where it was more."""
    model = images.model(images.frozen)
    change_of, level = following(model.predict, model.chain), model.chain[1].at.each(8)
    x, ids = jax.random.normal(jax.random.key(1), (8, *images.base.latent_shape)), jnp.arange(8) % 2
    free = np.asarray(change_of(guide.replace(most=np.float32(np.inf)), x, level, ids)[1]).reshape(8, -1)
    to_delta = float(model.chain.mean_o[1] / model.chain.sigma[1])
    spent = (to_delta * free) ** 2 @ np.ones(free.shape[1]) / 2
    limit = np.median(spent)
    bound = np.asarray(change_of(guide.replace(most=np.float32(limit)), x, level, ids)[1]).reshape(8, -1)
    assert (spent > limit).sum() == (spent < limit).sum() == 4
    assert np.isfinite(limit)
    np.testing.assert_allclose(bound, free * np.sqrt(np.minimum(1, limit / spent))[:, None], rtol=1e-4)


def test_a_guide_is_read_as_it_was_written(images, guide, tmp_path):
    """To the bit, for the prompts in another order, and with another factor."""
    file, elements = tmp_path / "value.safetensors", guide.known[0].centre.size
    save_guide(file, guide, PROMPTS, {"beta": 8.0, "num_steps": 12})
    same, turned = load_guide(file, PROMPTS, elements), load_guide(file, PROMPTS[::-1], elements, 0.5)
    assert jax.tree.structure(same) == jax.tree.structure(guide)
    jax.tree.map(np.testing.assert_array_equal, same, guide)
    assert jax.tree.map(np.shape, same) == jax.tree.map(np.shape, guide)
    assert float(turned.scale) == 0.5
    clean, ids = jax.random.normal(jax.random.key(0), (4, *images.base.latent_shape)), jnp.array([0, 1, 1, 0])
    now = jnp.float32(600.0)
    np.testing.assert_array_equal(turned.slope(clean, now, 1 - ids), guide.slope(clean, now, ids))
    assert np.abs(turned.slope(clean, now, ids) - guide.slope(clean, now, ids)).max() > 1e-3
    assert read_about(file) == {"kind": "value", "known_prompts": [*PROMPTS], "beta": 8.0, "num_steps": 12}


def test_what_a_guide_refuses(guide, tmp_path):
    file, elements = tmp_path / "value.safetensors", guide.known[0].centre.size
    save_guide(file, guide, [*PROMPTS, *"abcdef"], {})
    with pytest.raises(UserError, match=r"knows no value for the prompt 'a cat'; choose among 'a face', .* and 3 more"):
        load_guide(file, ["a cat"], elements)
    with pytest.raises(UserError, match=rf"is for latents of {elements} numbers, and this model's have 7"):
        load_guide(file, PROMPTS, 7)
    with pytest.raises(UserError, match=r"none.safetensors is missing; check the path"):
        load_guide(tmp_path / "none.safetensors", PROMPTS, elements)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"value.safetensors is truncated"):
        load_guide(file, PROMPTS, elements)
    write_safetensors(file, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match=r"has no log value; name the value.safetensors that"):
        load_guide(file, PROMPTS, elements)
    short = guide.known[0]._replace(middle=np.zeros((5, 2), np.float32))
    save_guide(file, guide.replace(known=(short,)), PROMPTS, {})
    with pytest.raises(UserError, match=r"is damaged \(TypeError\); run studies.value_guidance again"):
        load_guide(file, PROMPTS, elements)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([f"--lora={__file__}"], "--value and --lora are two policies; give one of them"),
        (["--lora_until_step=3"], "--value follows its own steps; leave --lora_from_step and --lora_until_step out"),
        (["--eta=0"], "--value moves the noise of a step, and --eta = 0 has none; give an --eta above 0"),
    ],
)
def test_what_does_not_go_with_a_value(flags, said, capsys):
    with pytest.raises(SystemExit) as caught:
        sample.main(["sample", f"--value={__file__}", *flags])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


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
    about = json.loads((tmp_path / "about.json").read_text())
    of_unet = "model/unet/diffusion_pytorch_model.safetensors"
    about["model files"][of_unet] = about["model files"][of_unet][::-1]
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"has base paths of another model files; choose another --bank"):
        sampled(tmp_path)
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
    """The policy spends, and nothing after its last step; its file says to `evaluate` and `sample` how it is meant."""
    monkeypatch.setitem(REWARDS, "bright", lambda: brightness(1.0))
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    flags += ["--reward=bright", "--beta=40", "--steps=9", "--sampler=ddpm_early", f"--bank={tmp_path / 'bank'}"]
    value_guidance.main(["value_guidance", *flags, f"--model={tiny_model}", f"--out={tmp_path / 'out'}"])
    judged = json.loads((tmp_path / "out/certificate.json").read_text())
    assert len(judged["spent_by_step"]) == 9
    assert judged["spent_by_step"][0] > 0 == judged["spent_by_step"][-1]
    rows = np.asarray(Image.open(tmp_path / "out/samples.png"), np.float32)
    margin = (4 * rows.shape[0] - rows.shape[1]) // 3  # two rows of eight squares, with margins around each
    size = (rows.shape[0] - 3 * margin) // 2
    base, policy = (rows[start : start + size] for start in (margin, 2 * margin + size))
    assert 0 < np.abs(policy - base).mean() < 20  # from the same noise
    base = json.loads((tmp_path / "out/base.json").read_text())
    assert base["spent"][0] == 0 < base["at_beta"]["gap"][0]
    out = capsys.readouterr().out
    assert "the base model: log reward " in out
    assert "the policy that follows V: log reward " in out

    value, model = f"--value={tmp_path / 'out/value.safetensors'}", f"--model={tiny_model}"
    evaluate.main(["evaluate", value, "--num=8", "--value_scale=0,1.1", f"--out={tmp_path / 'figures.json'}"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sampling"] | {"sampler": "ddpm_early", "steps": 9, "guidance": 2.0} == figures["sampling"]
    base, still, followed = (figures[name]["certificate"] for name in list(figures) if "certificate" in figures[name])
    assert len(followed["spent_by_step"]) == 9
    assert followed["log_reward"]["value"] != base["log_reward"]["value"] == still["log_reward"]["value"]
    assert followed["spent"]["value"] > 0 == still["spent"]["value"]
    assert "trained on another base model" not in capsys.readouterr().err

    out = f"--out={tmp_path / 'grid.png'}"
    sample.main(["sample", value, "--num=4", out, f"--each={tmp_path / 'each'}"])
    with Image.open(tmp_path / "each/0000.png") as picture:
        recipe = json.loads(picture.text["nabla_gfn_jax"])
    assert recipe["value"] == {str(tmp_path / "out/value.safetensors"): pytest.approx(1.1)}
    assert (recipe["loras"], recipe["steps"], recipe["prompt"]) == ({}, 9, "a face")
    loaded = api.load_model(str(tiny_model))
    guide = api.load_value(tmp_path / "out/value.safetensors", loaded, ["a face"])
    how = {"sampler": "ddpm_early", "steps": 9, "guidance": 2.0}
    drawn = levels(api.sample(loaded, ["a face"], num=4, lora=guide, **how)[0])
    saved = [np.asarray(Image.open(tmp_path / f"each/000{i}.png")) for i in range(4)]
    assert np.abs(drawn.astype(int) - np.stack(saved)).max() <= 1
    sample.main(["sample", value, model, "--num=4", "--value_scale=0", f"--out={tmp_path / 'still.png'}"])
    grids = [np.asarray(Image.open(tmp_path / name), np.float32) for name in ("grid.png", "still.png")]
    assert 0 < np.abs(grids[0] - grids[1]).mean() < 20
