"""CMMD: features against transformers' CLIP, the estimate against sums over all pairs, errors against draws."""

import numpy as np
import pytest
import torch
import transformers
from torch_oracle import nchw, relative

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics import cmmd
from nabla_gfn_jax.metrics.base import Batch, Samples
from nabla_gfn_jax.metrics.cmmd import CMMD
from nabla_gfn_jax.models.vision_transformer import VisionConfig

SMALL = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=14,
    image_size=42,
    hidden_act="quick_gelu",
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)


@pytest.mark.thorough
def test_features_are_those_of_clip(tmp_path):
    """Stretched to the tower's square, normalised, and of norm 1, from a file as on the hub."""
    torch.manual_seed(0)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=dict(vars(SMALL)), projection_dim=20)
    ).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / cmmd.FILE)
    images = np.random.default_rng(0).uniform(size=(3, 40, 60, 3)).astype(np.float32)
    saved = np.round(images * 255).astype(np.float32) / np.float32(255)
    x = torch.nn.functional.interpolate(nchw(saved), (42, 42), mode="bicubic", antialias=True)
    expected = model.visual_projection(model.vision_model(pixel_values=(x - MEAN) / STD).pooler_output)
    expected = expected / expected.norm(dim=1, keepdim=True)
    metric = CMMD(cmmd.load(tmp_path / cmmd.FILE, SMALL, 20), SMALL, 20)
    found = metric.update(Batch(images, np.array([0, 1, 0]))).values["features"]
    assert relative(found, expected) < 1e-4
    assert relative(found[0] - found[1], expected[0] - expected[1]) < 1e-4
    with pytest.raises(UserError, match=r"does not match the image tower"):
        cmmd.load(tmp_path / cmmd.FILE)


def features(rng, count, shift=0.0, width=6):
    """Unit features with more spread than CLIP's, so that the kernel's nonlinearity matters."""
    drawn = rng.normal(size=(count, width)) + shift * np.eye(width)[0] + 2.0 * np.eye(width)[1]
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def kernel(x, y):
    return np.exp(-((x[:, None].astype(float) - y[None].astype(float)) ** 2).sum(-1) / 200.0)


def compared(prompt, x, y):
    return CMMD.compare(object.__new__(CMMD), *(Samples(prompt, {"features": f}) for f in (x, y)))


def test_the_estimate_is_a_sum_over_pairs(monkeypatch):
    monkeypatch.setattr(cmmd, "_ROWS", 7)
    rng = np.random.default_rng(0)
    x, y = features(rng, 30, 0.5), features(rng, 30)
    n = len(x)
    within = [(kernel(z, z).sum() - n) / (n * (n - 1)) for z in (x, y)]
    found = compared(np.zeros(n, int), x, y)
    expected = 1000 * (sum(within) - 2 * kernel(x, y).mean())
    assert found["cmmd_pooled"].value == pytest.approx(expected, rel=1e-9)
    assert found["cmmd_per_prompt"].value == pytest.approx(expected, rel=1e-9)
    released = 1000 * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    own = 1000 * sum(1 - w for w in within) / n  # what each image's pair with itself adds
    assert released == pytest.approx(expected + own, rel=1e-9)


def test_prompts_are_averaged_or_pooled():
    rng = np.random.default_rng(1)
    prompt = np.arange(40) % 2
    x, y = features(rng, 40, 0.5), features(rng, 40)
    found = compared(prompt, x, y)
    each = [compared(np.zeros(20, int), x[prompt == p], y[prompt == p])["cmmd_pooled"].value for p in (0, 1)]
    assert found["cmmd_per_prompt"].value == pytest.approx(np.mean(each), rel=1e-9)
    assert found["cmmd_pooled"].value == pytest.approx(compared(prompt * 0, x, y)["cmmd_pooled"].value, rel=1e-9)
    assert compared(np.arange(40), x, y).keys() == {"cmmd_pooled"}


@pytest.mark.thorough
@pytest.mark.parametrize(("shift", "most"), [(0.8, 1.2), (0.0, 1.7)])
def test_no_bias_and_the_standard_error_of_repeated_draws(shift, most):
    """For equal distributions the error may be too large, never too small."""
    rng = np.random.default_rng(2)
    prompt = np.repeat([0, 1], 20)
    found = [compared(prompt, features(rng, 40, shift), features(rng, 40)) for _ in range(300)]
    x, y = features(rng, 3000, shift), features(rng, 3000)
    truth = compared(np.zeros(3000, int), x, y)["cmmd_pooled"]
    for name in ("cmmd_per_prompt", "cmmd_pooled"):
        values, errors = (np.array(column) for column in zip(*(draw[name] for draw in found), strict=True))
        spread = values.std(ddof=1)
        assert values.mean() == pytest.approx(truth.value, abs=4 * (spread / 300**0.5 + truth.error))
        assert 0.8 < errors.mean() / spread < most
