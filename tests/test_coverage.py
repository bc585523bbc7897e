"""Diversity by the nearest drawing, compared with closed forms and tested on artificial drawings."""

import numpy as np
import pytest

from nabla_gfn_jax.data.prompts import PROMPT_SETS, PromptSet
from nabla_gfn_jax.emoji import drawings as emoji
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.evaluation import EVERY_CONCEPT, prompts_to_judge
from nabla_gfn_jax.metrics import coverage
from nabla_gfn_jax.metrics.base import Batch, NotAvailable, Samples, Weighting
from nabla_gfn_jax.metrics.coverage import Coverage


def drawings_of(name):
    """The indices of the drawings of one emoji."""
    return np.flatnonzero(coverage.atlas().concept == coverage.atlas().names.index(name))


def state_of(drawing, prompt=None, prompts=("a face",)):
    """The prepared metric, and its state as if the samples showed these drawings."""
    metric = Coverage()
    metric.prepare(prompts)
    prompt = np.zeros(len(drawing), int) if prompt is None else prompt
    right = [c in metric._concepts[p] for c, p in zip(coverage.atlas().concept[drawing], prompt, strict=True)]
    return metric, Samples(prompt, {"drawing": drawing, "right": np.array(right)})


def test_three_vendors_equally_often_have_entropy_ln_3():
    tiger = drawings_of("tiger")
    assert len(tiger) == 3
    found = Coverage.compute(*state_of(np.repeat(tiger, 400), prompts=["a tiger"]))
    for name in ("vendor_entropy", "drawing_entropy"):
        assert found[name].value == pytest.approx(np.log(3), abs=2e-3)
        assert 0 < found[name].error < 2e-3
    assert found["concept_accuracy"].value == pytest.approx(1.0)
    one = Coverage.compute(*state_of(np.repeat(tiger[:1], 50), prompts=["a tiger"]))
    assert one["vendor_entropy"] == (0.0, 0.0)


def test_a_drawing_shows_what_its_captions_say_and_nothing_else():
    tiger, cat = drawings_of("tiger")[0], drawings_of("cat")[0]
    prompts = ["a tiger", "a cat", "an animal", "a face"]
    _, state = state_of(np.array([tiger, tiger, cat, cat]), np.arange(4), prompts)
    assert state.values["right"].tolist() == [True, False, True, False]


def test_prompts_that_are_no_captions_are_refused_before_any_image():
    with pytest.raises(NotAvailable, match="a sonnet"):
        Coverage().prepare(["a tiger", "a sonnet"])


def test_the_states_of_batches_merge_to_that_of_all():
    images = np.random.default_rng(0).random((5, 64, 64, 3)).astype(np.float32)
    metric, prompt = Coverage(), np.array([1, 0, 1, 1, 0])
    metric.prepare(["a tiger", "a face"])
    whole = metric.update(Batch(images, prompt))
    merged = metric.update(Batch(images[:2], prompt[:2])).merge(metric.update(Batch(images[2:], prompt[2:])))
    np.testing.assert_array_equal(whole.values["drawing"], merged.values["drawing"])
    assert metric.compute(whole) == metric.compute(merged)


def test_as_few_samples_are_compared_with_as_few():
    """Both are uniform over 200 drawings. The tilted base has fewer effective samples and misses more drawings."""
    rng = np.random.default_rng(1)
    base_reward = rng.normal(size=600)
    base = Samples(np.zeros(600, int), {"log_reward": base_reward})
    policy = Samples(np.zeros(600, int), {"log_reward": rng.normal(1.2, 1.0, 600)})
    weighting = Weighting.tilted(base, policy)
    assert weighting.weights @ base_reward == pytest.approx(policy.values["log_reward"].mean())
    assert 60 < weighting.effective < 250
    metric, tilted_state = state_of(rng.integers(0, 200, 600))
    tilted = metric.compute(tilted_state, weighting)["drawing_entropy"]
    state = state_of(rng.integers(0, 200, 600))[1]
    alone, alike = metric.compute(state)["drawing_entropy"], metric.compute_as(state, weighting)["drawing_entropy"]
    assert alone.value > np.log(200) - 0.05
    assert tilted.value < alone.value - 0.1  # an artefact of few samples
    assert tilted.value == pytest.approx(alike.value, abs=3 * (tilted.error**2 + alike.error**2) ** 0.5)


def test_every_concept_has_a_caption_that_describes_it():
    known = coverage.atlas()
    for number, caption in enumerate(coverage.concept_captions()):
        assert number in known.captioned(caption)


def test_each_split_of_a_set(monkeypatch):
    monkeypatch.setitem(PROMPT_SETS, "poems", lambda: PromptSet(train=("an ode", "a sonnet"), held_out=("a haiku",)))
    assert prompts_to_judge("poems", 0, 0) == ["a haiku"]
    assert prompts_to_judge("poems", 0, 0, "train") == ["an ode", "a sonnet"]
    with pytest.raises(UserError, match="--num_prompts=2, but poems has 1"):
        prompts_to_judge("poems", 2, 0)


def test_some_of_all_captions_are_the_same_for_a_seed():
    some = prompts_to_judge(EVERY_CONCEPT, 5, seed=1)
    assert len(set(some)) == 5
    assert set(some) <= set(coverage.concept_captions())
    assert some == prompts_to_judge(EVERY_CONCEPT, 5, seed=1) != prompts_to_judge(EVERY_CONCEPT, 5, seed=2)
    Coverage().prepare(some)


@pytest.mark.skipif(not (emoji.default_folder() / "pictures.npz").exists(), reason="the drawings are not downloaded")
def test_a_blurred_shifted_drawing_is_nearest_to_itself():
    base = emoji.load_drawings().base()
    chosen = np.random.default_rng(0).choice(len(base.images), 128, replace=False)
    images = base.images[chosen].astype(np.float32) / np.float32(255.0)
    moved = np.roll(images, (2, -1), axis=(1, 2))
    blurred = (moved + np.roll(moved, 1, axis=1) + np.roll(moved, 1, axis=2)) / np.float32(3.0)
    assert np.mean(coverage.nearest_drawing(blurred) == chosen) > 0.95
