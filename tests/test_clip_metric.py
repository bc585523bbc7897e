"""CLIP score and diversity, with the small CLIP of the reward's tests."""

import numpy as np
import pytest
from test_clip_score import PROMPTS, SMALL, expected_scores, write
from torch_oracle import nchw, relative

from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.clip import CLIP
from nabla_gfn_jax.rewards import clip_score


@pytest.mark.thorough
def test_the_score_and_the_distance_of_the_same_features(tmp_path):
    case = write(SMALL, tmp_path)
    reward = clip_score.from_files(tmp_path / "model.safetensors", tmp_path, SMALL)
    metric = CLIP(reward, SMALL)
    metric.prepare(PROMPTS)
    images = np.random.default_rng(0).uniform(size=(8, 50, 60, 3)).astype(np.float32)
    saved = np.round(images * 255).astype(np.float32) / np.float32(255)
    expected = [expected_scores(case, nchw(part), SMALL.vision.image_size, False) for part in (saved[:4], saved[4:])]
    state = metric.update(Batch(images, np.tile(np.arange(4), 2)))
    assert relative(state.values["score"], np.concatenate(expected)) < 1e-4
    found = metric.compute(state)
    assert found["clip_score"].value == pytest.approx(np.concatenate(expected).mean(), rel=1e-4)
    e = state.values["features"]
    np.testing.assert_allclose(np.linalg.norm(e, axis=1), 1.0, rtol=1e-5)
    distances = 1 - (e[:4] * e[4:]).sum(1)
    assert found["clip_distance_x100"].value == pytest.approx(100 * distances.mean(), rel=1e-3)
