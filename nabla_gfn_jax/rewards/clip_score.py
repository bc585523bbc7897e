"""CLIP score and PickScore: the agreement of image and prompt by CLIP, from weights in transformers' layout.

CLIP score is the cosine similarity of the features (Hessel et al. 2021, arXiv 2104.08718, without its factor).
PickScore (Kirstain et al. 2023, arXiv 2305.01569) is the cosine times the scale of a CLIP ViT-H/14 that was finetuned
on human choices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.clip_vision import VIT_L_14, VIT_L_14_DIM, CLIPVisionModelWithProjection
from nabla_gfn_jax.models.open_clip import Embeddings
from nabla_gfn_jax.models.preprocess import clip_normalise, crop_longer_side
from nabla_gfn_jax.models.tokenizer import END, START, CLIPTokenizer, make_encoder, read_vocabulary, vocabulary_files
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards.prompt_features import prompt_encoder, unit
from nabla_gfn_jax.rewards.reward import Reward, abstract_reward
from nabla_gfn_jax.typing import Images, Params, PerSample, Resized

CLIP_L, CLIP_H, PICK = (
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "yuvalkirstain/PickScore_v1",
)
_FILE = "model.safetensors"
_TEXT, _IMAGE, _BUFFER = "text_model.", ("vision_model.", "visual_projection."), "position_ids"


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The sizes of a CLIP's two towers."""

    vision: VisionConfig
    text: CLIPTextConfig
    embed_dim: int


VIT_L = CLIPConfig(vision=VIT_L_14, text=CLIPTextConfig(), embed_dim=VIT_L_14_DIM)
VIT_H = CLIPConfig(
    vision=VisionConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, patch_size=14
    ),
    text=CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
    ),
    embed_dim=1024,
)


def clip() -> Reward:
    """log R = cosine by OpenAI's CLIP ViT-L/14, -1 to 1. Raises `UserError` naming a file that is missing."""
    return _found("clip", CLIP_L, VIT_L)


def clip_h() -> Reward:
    """log R = cosine by LAION's CLIP ViT-H/14, -1 to 1. Raises `UserError` naming a file that is missing."""
    return _found("clip_h", CLIP_H, VIT_H)


def pick_score() -> Reward:
    """log R = PickScore v1, about 16 to 26. Raises `UserError` naming a file that is missing."""
    return _found("pick_score", PICK, VIT_H, scaled=True)


def _found(name: str, repo: str, config: CLIPConfig, *, scaled: bool = False) -> Reward:
    file = hub.find(name, _FILE, repo=repo)
    words = hub.find(name, "tokenizer.json", repo=CLIP_L)
    return from_files(file, words.parent, config, scaled=scaled)


def from_files(file: Path, tokenizer: Path, config: CLIPConfig, *, scaled: bool = False) -> Reward:
    """The reward from files.

    Args:
        file: transformers' CLIP.
        tokenizer: folder of CLIP's tokenizer.
        config: sizes of the two towers.
        scaled: multiply the cosine by the file's scale.

    Raises:
        UserError: a file is damaged or is not such a CLIP.
    """
    state = weights.read_state_dict(file)
    if not {"logit_scale", "text_projection.weight"} <= state.keys():
        raise UserError(f"{file} is not a CLIP in transformers' layout: it has no logit_scale or no text_projection")
    shapes = _shapes(config)
    text = {
        "tower": from_state_dict(
            state,
            shapes["text"],
            str(file),
            "the text tower",
            ignore=lambda name: not name.startswith(_TEXT) or name.endswith(_BUFFER),
        ),
        "projection": state["text_projection.weight"],
    }
    image = image_tower(state, shapes["image"], str(file))
    scale = float(np.exp(np.asarray(state["logit_scale"], np.float64))) if scaled else 1.0
    tokenize = _tokenizer(tokenizer, config.text.max_position_embeddings)
    encode = prompt_encoder(_text_tower(config.text, tokenize.padding_id), text, tokenize)
    params = {"image": image, "scale": jnp.float32(scale)}
    return Reward(params, encode, _scorer(config), (file, *vocabulary_files(tokenizer)))


def image_tower(state: Mapping[str, np.ndarray], shapes: Params, source: str) -> Params:
    """The image tower's parameters in float32 from the tensors of transformers' CLIP."""
    return from_state_dict(
        state,
        shapes,
        source,
        "the image tower",
        place=lambda a: jnp.asarray(a, jnp.float32),
        ignore=lambda name: not name.startswith(_IMAGE) or name.endswith(_BUFFER),
    )


def image_features(config: CLIPConfig, params: Params, images: Images) -> Embeddings:
    """The features of norm 1 of images in [0, 1], by the image tower's parameters."""
    tower = CLIPVisionModelWithProjection(config.vision, config.embed_dim)
    with jax.default_matmul_precision("highest"):
        seen = preprocess(images, config.vision.image_size)
        return unit(jnp.asarray(tower.apply({"params": params}, seen)))


def abstract(config: CLIPConfig) -> Reward:
    """The reward with shapes instead of weights."""
    params = {"image": _shapes(config)["image"], "scale": jax.ShapeDtypeStruct((), jnp.float32)}
    return abstract_reward(params, jax.ShapeDtypeStruct((config.embed_dim,), jnp.float32), _scorer(config))


def _shapes(config: CLIPConfig) -> Params:
    size = config.vision.image_size

    def init(key: Array) -> Params:
        image = CLIPVisionModelWithProjection(config.vision, config.embed_dim)
        ids = jnp.zeros((1, 2), jnp.int32)
        return {
            "image": image.init(key, jnp.zeros((1, size, size, 3)))["params"],
            "text": CLIPTextModel(config.text).init(key, ids)["params"],
        }

    shapes: Params = jax.eval_shape(init, jax.random.key(0))
    return shapes


def _tokenizer(folder: Path, tokens: int) -> CLIPTokenizer:
    vocabulary, merges = read_vocabulary(folder)
    return CLIPTokenizer(make_encoder(vocabulary, merges, [START, END]), tokens, vocabulary[END])


def _text_tower(
    config: CLIPTextConfig, end: int
) -> Callable[[Params, Int[Array, "batch tokens"]], Float[Array, "batch embedding"]]:
    """A function from token ids to features: the projected state at the first end token. Later tokens are padding."""

    def tower(params: Params, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch embedding"]:
        states = jnp.asarray(CLIPTextModel(config).apply({"params": params["tower"]}, ids))
        last = jnp.argmax(ids == end, axis=1)
        return states[jnp.arange(len(ids)), last] @ params["projection"].T

    return tower


def _scorer(config: CLIPConfig) -> Callable[[Params, Images, Embeddings], PerSample]:
    def score(params: Params, images: Images, prompts: Embeddings) -> PerSample:
        features = image_features(config, params["image"], images)
        return params["scale"] * jnp.sum(features * prompts, axis=-1)

    return score


def preprocess(images: Images, size: int) -> Resized:
    """As CLIP's processor: resizes the shorter side to `size`, crops the middle of the longer side, and normalises."""
    return clip_normalise(crop_longer_side(images.astype(jnp.float32), size))
