"""CLIP score and PickScore against transformers' CLIP with the same weights: small, and, slow, at full size.

`pytest -n 0 -m slow tests/test_clip_score.py` makes random weights of ViT-L/14 and ViT-H/14 in float32.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from torch_oracle import CAPTIONS, compile_quickly, nchw, nhwc, relative

from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards import clip_score
from nabla_gfn_jax.rewards.clip_score import VIT_H, VIT_L, CLIPConfig

PROMPTS = ["a cat", "", "two dogs and a frog's pond", "a smiling face with heart eyes " * 30]
SMALL = CLIPConfig(
    vision=VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=42
    ),
    text=CLIPTextConfig(
        vocab_size=600,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="gelu",
    ),
    embed_dim=20,
)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)


def write(config, folder):
    """Writes transformers' model with its own `save_pretrained`, and the tokenizer of a small vocabulary."""
    torch.manual_seed(0)
    vision, text = vars(config.vision), vars(config.text)
    train_tokenizer(CAPTIONS, folder / "words", 600, 77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words")
    tokenizer.save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(text) | ends, vision_config=dict(vision), projection_dim=config.embed_dim
        )
    ).eval()
    for parameter in model.parameters():  # as initialised, features hardly depend on the input
        if config is SMALL:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return SimpleNamespace(model=model, tokenizer=tokenizer, folder=folder)


def expected_scores(case, x, size, scaled):
    """The scores by transformers' classes, from pixels as its processor makes them: a central square crop."""
    height, width = x.shape[2:]
    new = [size * side // min(height, width) for side in (height, width)]
    x = torch.nn.functional.interpolate(x, new, mode="bicubic", align_corners=False, antialias=True)
    top, left = ((side - size) // 2 for side in new)
    pixels = (x[:, :, top : top + size, left : left + size] - MEAN) / STD
    words = case.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    image = case.model.visual_projection(case.model.vision_model(pixel_values=pixels).pooler_output)
    text = case.model.text_projection(case.model.text_model(input_ids=words.input_ids).pooler_output)
    cosine = torch.nn.functional.cosine_similarity(image, text)
    return cosine * case.model.logit_scale.exp() if scaled else cosine


def agree(config, folder, size, scaled, tolerance):
    case = write(config, folder)
    reward = clip_score.from_files(folder / "model.safetensors", folder, config, scaled=scaled)
    images = np.random.default_rng(0).uniform(size=(len(PROMPTS), *size, 3)).astype(np.float32)
    with torch.enable_grad():
        x = nchw(images).requires_grad_()
        expected = expected_scores(case, x, config.vision.image_size, scaled)
        expected.sum().backward()

    def score(params, images, prompts):
        scores = reward.score(params, images, prompts)
        return scores.sum(), scores

    arguments = reward.params, images, reward.encode_prompts(PROMPTS)
    (_, ours), gradient = compile_quickly(jax.value_and_grad(score, argnums=1, has_aux=True), *arguments)(*arguments)
    assert relative(ours, expected.detach()) < tolerance
    assert relative(gradient, nhwc(x.grad)) < 10 * tolerance
    shapes = clip_score.abstract(config)
    assert jax.tree.map(lambda a: a.shape, shapes.params) == jax.tree.map(lambda a: a.shape, reward.params)
    return ours


@pytest.mark.parametrize(("size", "scaled"), [((60, 60), True), ((50, 76), False)])
@pytest.mark.thorough
def test_score_and_gradient(size, scaled, tmp_path):
    assert np.ptp(agree(SMALL, tmp_path, size, scaled, 1e-5)) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("config", "scaled"), [(VIT_L, False), (VIT_H, True)], ids=["clip", "pick_score"])
def test_at_full_size(config, scaled, tmp_path):
    agree(config, tmp_path, (256, 256), scaled, 1e-4)


def test_another_file_is_named(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is not a CLIP in transformers' layout"):
        clip_score.from_files(tmp_path / "model.pt", tmp_path, SMALL)
