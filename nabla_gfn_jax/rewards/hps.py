"""Human Preference Score v2.1 and v2.0 (Wu et al. 2023, arXiv 2306.09341): OpenCLIP ViT-H-14 tuned on human choices.

The released files of the two versions have the same tensors in the same shapes. Only the name of a file tells its
version, so each version is read from a file of its own name.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.open_clip import VIT_H_14, Embeddings, OpenCLIPConfig, OpenCLIPText, OpenCLIPVision
from nabla_gfn_jax.models.open_clip_tokenizer import load_open_clip_tokenizer
from nabla_gfn_jax.models.preprocess import clip_normalise, fit_longer_side
from nabla_gfn_jax.models.tokenizer import vocabulary_files
from nabla_gfn_jax.rewards.prompt_features import prompt_encoder, unit
from nabla_gfn_jax.rewards.reward import Reward, abstract_reward
from nabla_gfn_jax.typing import Images, Params, PerSample, Resized

_UNUSED = "logit_scale"
FILES = {"hps": "HPS_v2.1_compressed.pt", "hps_v2": "HPS_v2_compressed.pt"}  # of the rewards for v2.1 and v2.0


def hps() -> Reward:
    """log R = cosine of the features of image and prompt, -1 to 1, with the released weights of v2.1.

    Raises `UserError` that names a missing file and says how to get it.
    """
    return _released("hps", other="hps_v2")


def hps_v2() -> Reward:
    """The same with the released weights of v2.0."""
    return _released("hps_v2", other="hps")


def _released(name: str, other: str) -> Reward:
    try:
        file = hub.find("hps", FILES[name], repo="xswu/HPSv2")
    except UserError as error:
        there = hub.own_file("hps", FILES[other])
        if there is None:
            raise
        raise UserError(f"{there} is the reward {other}, another version than {name}; {error}") from error
    words = hub.find("hps", "tokenizer.json", repo="openai/clip-vit-large-patch14")
    return from_files(file, words.parent)


def from_files(file: Path, tokenizer: Path, config: OpenCLIPConfig = VIT_H_14) -> Reward:
    """The reward from files: `file` has a state dict of open_clip's CLIP, `tokenizer` is the folder of CLIP's
    tokenizer.
    """
    tokenize = load_open_clip_tokenizer(tokenizer, config.text.max_position_embeddings)
    params = from_state_dict(
        weights.read_state_dict(file),
        _shapes(config),
        str(file),
        "OpenCLIP's layout",
        ignore=lambda name: name.endswith(_UNUSED),
    )
    visual = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float32)), params.pop("visual"))
    text = OpenCLIPText(config.text, config.embed_dim)
    files = (file, *vocabulary_files(tokenizer))

    def features(params: Params, ids: Int[Array, "batch tokens"]) -> Embeddings:
        return jnp.asarray(text.apply({"params": params}, ids))

    return Reward(visual, prompt_encoder(features, params, tokenize), _scorer(config), files)


def abstract(config: OpenCLIPConfig = VIT_H_14) -> Reward:
    """The reward with shapes instead of weights."""
    features = jax.ShapeDtypeStruct((config.embed_dim,), jnp.float32)
    return abstract_reward(_shapes(config)["visual"], features, _scorer(config))


def _shapes(config: OpenCLIPConfig) -> Params:
    """The shapes of the text tower's parameters and, under "visual", of the image tower's."""
    vision, text = OpenCLIPVision(config.vision, config.embed_dim), OpenCLIPText(config.text, config.embed_dim)
    size = config.vision.image_size

    def init(key: Array) -> Params:
        ids = jnp.zeros((1, config.text.max_position_embeddings), jnp.int32)
        return {"visual": vision.init(key, jnp.zeros((1, size, size, 3)))["params"], **text.init(key, ids)["params"]}

    shapes: Params = jax.eval_shape(init, jax.random.key(0))
    return shapes


def _scorer(config: OpenCLIPConfig) -> Callable[[Params, Images, Embeddings], PerSample]:
    vision = OpenCLIPVision(config.vision, config.embed_dim)

    def score(params: Params, images: Images, prompts: Embeddings) -> PerSample:
        with jax.default_matmul_precision("highest"):
            features = vision.apply({"params": params}, preprocess(images, config.vision.image_size))
        return jnp.sum(unit(jnp.asarray(features)) * prompts, axis=-1)

    return score


def preprocess(images: Images, size: int) -> Resized:
    """Resizes the longer side to `size`, pads the shorter side with black, and applies CLIP's normalisation.

    The original package does the same, except that it does not pad an image whose longer side already is `size`.
    """
    return clip_normalise(fit_longer_side(images.astype(jnp.float32), size))
