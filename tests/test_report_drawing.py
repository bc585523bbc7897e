"""`report --draw` on a run of the tiny model: the pictures are those that training draws itself."""

import shutil

import numpy as np
import pytest
from tiny_run import brightness

from nabla_gfn_jax import report
from nabla_gfn_jax.inference.sampling import ImageSampler
from nabla_gfn_jax.reports import drawing
from nabla_gfn_jax.rewards import REWARDS
from nabla_gfn_jax.runs import pictures

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
