"""LAION's aesthetic score: image features of CLIP ViT-L/14, and a head fitted to human ratings of 1 to 10.

It is a reward of DDPO (arXiv 2305.13301) and of the paper's first experiment, and ignores the prompt. Source: Schuhmann
2022, "improved aesthetic predictor", weights `sac+logos+ava1-l14-linearMSE.pth`.
"""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.models.clip_vision import VIT_L_14, VIT_L_14_DIM, CLIPVisionModelWithProjection
from nabla_gfn_jax.models.layers import Dense
from nabla_gfn_jax.models.preprocess import clip_normalise
from nabla_gfn_jax.models.resize import resize
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards.reward import Reward, abstract_reward
from nabla_gfn_jax.typing import Images, Params, PerSample, Resized

CLIP = "openai/clip-vit-large-patch14"
# The widths of the head's layers by their place in the checkpoint. Only dropout is between them, no nonlinearity.
_HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
_IMAGE_TOWER = ("vision_model.", "visual_projection.")
_BUFFER = "position_ids"


class AestheticModel(nn.Module):
    """Normalised images (B, image_size, image_size, 3) → scores (B,)."""

    vision: VisionConfig
    embed_dim: int

    @nn.compact
    def __call__(self, images: Images) -> PerSample:
        x = CLIPVisionModelWithProjection(self.vision, self.embed_dim, name="clip")(images)
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        for i, width in _HEAD.items():
            x = Dense(width, name=f"layers.{i}")(x)
        return x[:, 0]


def aesthetic() -> Reward:
    """log R = the score, about 1 to 10, with the released weights. Raises `UserError` naming a file that is missing."""
    clip = hub.find("aesthetic", "model.safetensors", repo=CLIP)
    head = hub.find("aesthetic", "aesthetic-model.pth", repo="trl-lib/ddpo-aesthetic-predictor")
    return from_files(clip, head)


def from_files(clip: Path, head: Path, vision: VisionConfig = VIT_L_14, embed_dim: int = VIT_L_14_DIM) -> Reward:
    """The reward from weights files: `clip` is transformers' CLIP (its image tower is read), `head` is LAION's head."""
    model = AestheticModel(vision, embed_dim)
    expected = _shapes(model)
    tower = from_state_dict(
        weights.read_state_dict(clip),
        expected.pop("clip"),
        str(clip),
        "CLIP ViT-L/14's image tower",
        place=_float32,
        ignore=lambda name: not name.startswith(_IMAGE_TOWER) or name.endswith(_BUFFER),
    )
    layers = from_state_dict(
        weights.read_state_dict(head), expected, str(head), "LAION's aesthetic head", place=_float32
    )
    return Reward({"clip": tower, **layers}, lambda prompts: {}, _scorer(model), (clip, head))


def abstract() -> Reward:
    """The reward with shapes instead of weights."""
    model = AestheticModel(VIT_L_14, VIT_L_14_DIM)
    return abstract_reward(_shapes(model), {}, _scorer(model))


def _shapes(model: AestheticModel) -> Params:
    size = model.vision.image_size
    shapes: Params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return shapes


def _scorer(model: AestheticModel) -> Callable[[Params, Images, dict[str, Array]], PerSample]:
    def score(params: Params, images: Images, prompts: dict[str, Array]) -> PerSample:
        with jax.default_matmul_precision("highest"):
            return jnp.asarray(model.apply({"params": params}, preprocess(images, model.vision.image_size)))

    return score


def preprocess(images: Images, size: int) -> Resized:
    """Stretches images to `size` x `size` (bicubic, no antialiasing) and applies CLIP's normalisation."""
    return clip_normalise(resize(images.astype(jnp.float32), size, size, antialias=False))


def _float32(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32)
