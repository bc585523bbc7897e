"""`report --draw` on a run of the tiny model: the pictures are those that training draws itself."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax import report
from nabla_gfn_jax.base_models.base import predictor
from nabla_gfn_jax.base_models.names import load_model
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.diffusion.sampler import sample
from nabla_gfn_jax.inference.sampling import ImageSampler, image_keys
from nabla_gfn_jax.inference.subject import SubjectOptions, find_subject
from nabla_gfn_jax.reports import drawing
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs import loras, pictures

pytestmark = pytest.mark.thorough

PROMPTS = ["a face", "an animal", "a cat"]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """A run of one epoch of two updates, with pictures before and after, from 16 samples of 3 prompts."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command(
        folder / "run", f"--config.prompts={folder / 'prompts.txt'}", "--config.training.num_epochs=1", reward="1.0"
    )
    return folder / "run"


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))


def chances_by_density(run, of):
    """log p_θ(path)/p_#(path) of the base model's paths, from the two networks' means at the states of the paths."""
    subject = find_subject(SubjectOptions(workdir=run, seed=pictures.SEED))
    model = load_model(subject.model)
    lora = load_lora(loras.folder(run, 2) / loras.DIFFUSERS, model.params["unet"], model.params["text_encoder"])
    chain = model.chain(subject.how.steps, sampler=subject.how.sampler)
    place, number = (np.asarray([getattr(picture, name) for picture in of]) for name in ("place", "number"))
    predict = predictor(model, model.frozen_params, model.encode_prompts(PROMPTS), subject.how.guidance)
    keys, prompt = image_keys(pictures.SEED, place, number), jnp.asarray(place)
    states = sample(predict, None, chain, keys, model.latent_shape, prompt).latents
    found = np.zeros(len(of))
    for k in range(chain.num_steps):
        means = [
            np.asarray(chain[k].mean(predict(which, states[k], chain[k].at.each(len(of)), prompt), states[k]), float)
            for which in (None, lora)
        ]
        squares = [((np.asarray(states[k + 1], float) - mean) ** 2).sum((1, 2, 3)) for mean in means]
        found += (squares[0] - squares[1]) / (2 * float(chain[k].sigma) ** 2)
    return found


def test_what_is_missing_is_drawn_as_training_draws_it(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "pictures")
    report.main(["report", str(run)])
    assert "2 saved models have no pictures yet" in capsys.readouterr().out
    report.main(["report", str(run), "--draw", "--batch=8"])
    assert "no pictures yet" not in capsys.readouterr().out
    assert list(pictures.saved(run)) == [0, 2]
    for name in ("00000.png", "00002.png"):
        ours, theirs = (pictures.read(folder / "pictures" / name) for folder in (run, trained))
        assert ours.of == theirs.of
        assert [(p.prompt, p.number) for p in ours.of[:4]] == [*((text, 0) for text in PROMPTS), (PROMPTS[0], 1)]
        assert len(ours.of) == 15
        assert np.abs(ours.images.astype(int) - theirs.images.astype(int)).max() <= 1
        assert ours.scores["log_reward"] == pytest.approx(theirs.scores["log_reward"], rel=2e-6)
    assert pictures.CHANCE not in pictures.read(run / "pictures/00000.png").scores
    chances = np.asarray(pictures.read(run / "pictures/00002.png").scores[pictures.CHANCE])
    # The densities are of states that are rounded to float32, which makes 3e-4 after the division by σ.
    np.testing.assert_allclose(chances, chances_by_density(run, ours.of), rtol=1e-3, atol=6e-4)
    assert np.abs(chances).max() > 0.05
    base, policy = (np.asarray(pictures.read(run / f"pictures/{n:05d}.png").scores["log_reward"]) for n in (0, 2))
    assert np.abs(policy / base - 1).min() > 1e-5  # two updates change little, but more than rounding does

    def refuse(*_, **__):
        raise AssertionError("nothing is missing, so nothing is loaded")

    monkeypatch.setattr(ImageSampler, "__init__", refuse)
    assert drawing.draw(run) == 0


def test_other_prompts_in_the_same_file_are_refused(trained, capsys):
    (trained / "pictures/00002.png").unlink()
    prompts = trained.parent / "prompts.txt"
    prompts.write_text("a dog\n")
    with pytest.raises(SystemExit) as stop:
        report.main(["report", str(trained), "--draw"])
    assert stop.value.code == 2
    assert "have changed since the run; restore them" in capsys.readouterr().err
