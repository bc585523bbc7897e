"""Diversity counted by the nearest drawing: closed forms, and drawings that were made to be told apart."""

import json

import numpy as np
import pytest

from nabla_gfn_jax import evaluate
from nabla_gfn_jax.emoji import drawings as emoji
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics import coverage


def drawings_of(name):
    """Numbers of the drawings of one emoji."""
    return np.flatnonzero(coverage.atlas().concept == coverage.atlas().names.index(name))


def test_entropy_is_the_closed_form_of_a_binomial():
    p = 0.3
    expected = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert coverage.entropy(np.array([30, 0, 70])) == pytest.approx(expected, rel=1e-12)
    assert coverage.entropy(np.array([0, 5])) == 0.0


def test_three_vendors_equally_often_have_entropy_ln_3():
    tiger = drawings_of("tiger")
    assert len(tiger) == 3
    assert coverage.vendor_entropy(np.repeat(tiger, 7)) == pytest.approx(np.log(3))
    assert coverage.vendor_entropy(tiger[[0, 0, 0]]) == 0.0
    assert coverage.drawing_entropy(np.repeat(tiger, 7)) == pytest.approx(np.log(3))


def test_a_weight_counts_as_that_many_samples():
    rng = np.random.default_rng(0)
    drawings, times = rng.integers(0, 40, 50), rng.integers(0, 4, 50)
    for entropy in (coverage.vendor_entropy, coverage.drawing_entropy):
        assert entropy(drawings, times / times.sum()) == pytest.approx(entropy(np.repeat(drawings, times)))


def test_a_drawing_shows_what_its_captions_say_and_nothing_else():
    tiger, cat = drawings_of("tiger")[:1], drawings_of("cat")[:1]
    shown = coverage.shows_prompt(np.concatenate([tiger, tiger, cat, cat]), ["a tiger", "a cat", "an animal", "a face"])
    assert shown.tolist() == [True, False, True, False]
    with pytest.raises(UserError, match="a sonnet"):
        coverage.shows_prompt(tiger, ["a sonnet"])


def test_every_concept_has_a_caption_that_describes_it():
    known = coverage.atlas()
    for number, caption in enumerate(coverage.concept_captions()):
        assert number in known.captioned(caption)


def test_the_tilt_of_two_values_is_solved_by_hand():
    # p e^b / (p e^b + 1 − p) = q
    values, goal = np.array([0.0] * 3 + [1.0]), 0.6
    weights, exponent = evaluate.tilt(values, goal)
    assert weights @ values == pytest.approx(goal, abs=1e-9)
    np.testing.assert_allclose(weights, [(1 - goal) / 3] * 3 + [goal], rtol=1e-6)
    assert exponent == pytest.approx(np.log(goal / (1 - goal) * 3), rel=1e-6)


def test_the_tilt_of_a_gaussian_shifts_it_by_b_variances():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 0.5, 200_000)
    weights, exponent = evaluate.tilt(values, 2.5)
    slope = np.polyfit(values, np.log(weights), 1)[0]
    assert exponent == pytest.approx(slope, rel=1e-6)
    assert slope == pytest.approx((2.5 - 2.0) / 0.5**2, rel=0.02)


def test_the_tilt_reaches_no_further_than_the_samples():
    values = np.array([0.1, 0.2, 0.7])
    assert evaluate.tilt(values, 5.0)[0] @ values == pytest.approx(0.7, abs=1e-3)


@pytest.mark.skipif(not (emoji.default_folder() / "pictures.npz").exists(), reason="the drawings are not downloaded")
def test_a_blurred_shifted_drawing_is_nearest_to_itself():
    base = emoji.load_drawings().base()
    chosen = np.random.default_rng(0).choice(len(base.images), 128, replace=False)
    images = base.images[chosen].astype(np.float32) / np.float32(255.0)
    moved = np.roll(images, (2, -1), axis=(1, 2))
    blurred = (moved + np.roll(moved, 1, axis=1) + np.roll(moved, 1, axis=2)) / np.float32(3.0)
    assert np.mean(coverage.nearest_drawing(blurred) == chosen) > 0.95


def test_each_models_rewards_stand_beside_its_diversity(tmp_path, capsys):
    out = tmp_path / "table.json"
    evaluate.main(["evaluate", "--num=4", "--steps=2", f"--out={out}"])
    assert "base" in capsys.readouterr().out
    row = json.loads(out.read_text())["base"]
    assert set(row) >= {"reward", "concept_accuracy", "vendor_entropy", "drawing_entropy"}
    assert -1.0 <= row["reward"] <= 1.0


@pytest.mark.parametrize("flag", ["--num_prompts=1000", "--lora=/nowhere", "--reward=beauty", "--numbr=3", "--num=0"])
def test_bad_input_is_one_line_and_exit_code_2(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["evaluate", flag])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert flag.partition("=")[2] in lines[0] or flag.partition("=")[0].lstrip("-") in lines[0]
