"""LAION's aesthetic score: layout, score and gradient, against transformers' CLIP and a torch head.

The released head is tested where NABLA_GFN_JAX_AESTHETIC names its file, sac+logos+ava1-l14-linearMSE.pth.
`pytest -n 0 -m slow tests/test_aesthetic.py -s`: ViT-L/14 with random weights and the released head, transformers
5.23.0, torch 2.13.0+cpu, four images of 512x512, two cores: score 4.8e-7, gradient 2.1e-6; 39 s, peak 8.8 GiB.
"""

import os
import resource
import time
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from reward_oracle import make_random, normalised
from torch_oracle import compile_quickly, nchw, nhwc, relative

from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip_vision import VIT_L_14, VIT_L_14_DIM
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards import aesthetic, load_reward

SMALL = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=14,
    image_size=42,
    hidden_act="quick_gelu",
)
SMALL_DIM = 20
RELEASED = os.environ.get("NABLA_GFN_JAX_AESTHETIC", "")


class Aesthetic(torch.nn.Module):
    """transformers' CLIP with LAION's head."""

    def __init__(self, config: VisionConfig, embed_dim: int):
        super().__init__()
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.clip = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=dict(vars(config)), projection_dim=embed_dim)
        ).eval()
        dense = [torch.nn.Linear(a, b) for a, b in pairwise((embed_dim, 1024, 128, 64, 16, 1))]
        dropout = [torch.nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        self.head = torch.nn.Module()
        self.head.layers = torch.nn.Sequential(
            dense[0], dropout[0], dense[1], dropout[1], dense[2], dropout[2], *dense[3:]
        )
        self.size = config.image_size
        make_random(self, 0)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = torch.nn.functional.interpolate(images, (self.size, self.size), mode="bicubic")
        pooled = self.clip.vision_model(pixel_values=normalised(pixels)).pooler_output
        features = self.clip.visual_projection(pooled)
        return self.head.layers(features / features.norm(dim=-1, keepdim=True))[:, 0]

    def save(self, folder: Path) -> tuple[Path, Path]:
        """CLIP and head, each in its released layout."""
        self.clip.save_pretrained(folder)
        torch.save(self.head.state_dict(), folder / "head.pth")
        return folder / "model.safetensors", folder / "head.pth"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    theirs = Aesthetic(SMALL, SMALL_DIM)
    return theirs, theirs.save(tmp_path_factory.mktemp("aesthetic"))


def compare(theirs: Aesthetic, reward, images, compiled=jax.jit) -> tuple[float, float]:
    """The largest difference of a score, and the relative error of the gradient."""
    with torch.enable_grad():
        x = nchw(images).requires_grad_()
        expected = theirs(x)
        expected.sum().backward()

    def score(params, images):
        scores = reward.score(params, images, reward.encode_prompts([""] * len(images)))
        return scores.sum(), scores

    run = jax.value_and_grad(score, argnums=1, has_aux=True)
    (_, ours), gradient = compiled(run)(reward.params, images)
    assert np.ptp(ours) > 0.01
    return float(np.abs(np.asarray(ours) - expected.detach().numpy()).max()), relative(gradient, nhwc(x.grad))


@pytest.mark.parametrize("size", [(60, 60), (75, 50), (31, 84)])
@pytest.mark.thorough
def test_score_and_gradient(case, size):
    theirs, files = case
    images = np.random.default_rng(0).uniform(size=(4, *size, 3)).astype(np.float32)

    def compiled(function):
        return lambda *arguments: compile_quickly(function, *arguments)(*arguments)

    score, gradient = compare(theirs, aesthetic.from_files(*files, SMALL, SMALL_DIM), images, compiled)
    assert score < 1e-5
    assert gradient < 1e-4


def test_a_clip_of_another_size(case):
    with pytest.raises(UserError, match=r"model\.safetensors does not match CLIP ViT-L/14's image tower: .*has shape"):
        aesthetic.from_files(*case[1])


def test_the_released_files_are_looked_for(monkeypatch):
    asked = []

    def find(name, file, *, repo, revision="main"):
        asked.append((file, repo))
        return Path(file)

    monkeypatch.setattr(hub, "find", find)
    with pytest.raises(UserError, match="missing"):
        load_reward("aesthetic")
    assert asked == [
        ("model.safetensors", "openai/clip-vit-large-patch14"),
        ("aesthetic-model.pth", "trl-lib/ddpo-aesthetic-predictor"),
    ]


@pytest.mark.skipif(not RELEASED, reason="NABLA_GFN_JAX_AESTHETIC names no released head")
def test_the_released_head(tmp_path):
    """Uses a small CLIP whose features have the width of the released CLIP."""
    theirs = Aesthetic(SMALL, VIT_L_14_DIM)
    clip, _ = theirs.save(tmp_path)
    theirs.head.load_state_dict(torch.load(RELEASED, map_location="cpu"))
    images = np.random.default_rng(0).uniform(size=(4, 64, 64, 3)).astype(np.float32)
    score, gradient = compare(theirs, aesthetic.from_files(clip, Path(RELEASED), SMALL), images)
    assert score < 1e-4
    assert gradient < 1e-3


@pytest.mark.slow
def test_full_size(tmp_path):
    theirs = Aesthetic(VIT_L_14, VIT_L_14_DIM)
    if RELEASED:
        theirs.head.load_state_dict(torch.load(RELEASED, map_location="cpu"))
    files = theirs.save(tmp_path)
    reward = aesthetic.from_files(*files)
    files[0].unlink()  # pytest keeps the folders of its last three runs
    assert sum(a.size for a in jax.tree.leaves(reward.params["clip"])) == 303_966_208
    images = np.random.default_rng(0).uniform(size=(4, 512, 512, 3)).astype(np.float32)
    images[1:3] = images[1:3, 256:264, 256:264].repeat(64, axis=1).repeat(64, axis=2)  # two coarse, two fine
    start = time.time()
    score, gradient = compare(theirs, reward, images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nscore {score:.1e}, gradient {gradient:.1e}; {time.time() - start:.0f} s, peak {peak:.1f} GiB")
    assert score < 1e-4
    assert gradient < 1e-3
