"""Human Preference Score v2.1 (Wu et al. 2023, arXiv 2306.09341): OpenCLIP ViT-H-14 finetuned on people's choices."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.models.open_clip import VIT_H_14, Embeddings, OpenCLIPConfig, OpenCLIPText, OpenCLIPVision
from nabla_gfn_jax.models.open_clip_tokenizer import load_open_clip_tokenizer
from nabla_gfn_jax.models.preprocess import clip_normalise, fit_longer_side
from nabla_gfn_jax.models.tokenizer import vocabulary_files
from nabla_gfn_jax.rewards.reward import Reward, abstract_reward
from nabla_gfn_jax.typing import Images, Params, PerSample, Resized

_ENCODED_TOGETHER = 32  # prompts
_UNUSED = "logit_scale"


def hps() -> Reward:
    """log R = cosine of the image's and the prompt's features, -1 to 1, from the released files.

    Raises `UserError` naming a file that is not there, and how to get it.
    """
    file = hub.find("hps", "HPS_v2.1_compressed.pt", repo="xswu/HPSv2")
    words = hub.find("hps", "tokenizer.json", repo="openai/clip-vit-large-patch14")
    return from_files(file, words.parent)


def from_files(file: Path, tokenizer: Path, config: OpenCLIPConfig = VIT_H_14) -> Reward:
    """`file`: a state dict of open_clip's CLIP, alone or under "state_dict"; `tokenizer`: the folder of CLIP's."""
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
    return Reward(visual, _prompt_encoder(text, params, tokenize), _scorer(config), files)


def abstract(config: OpenCLIPConfig = VIT_H_14) -> Reward:
    """The reward without its weights: shapes in the place of arrays."""
    features = jax.ShapeDtypeStruct((config.embed_dim,), jnp.float32)
    return abstract_reward(_shapes(config)["visual"], features, _scorer(config))


def _shapes(config: OpenCLIPConfig) -> Params:
    """Of the image tower's parameters, under "visual", and the text tower's beside it."""
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
        return jnp.sum(_unit(jnp.asarray(features)) * prompts, axis=-1)

    return score


def preprocess(images: Images, size: int) -> Resized:
    """The longer side made `size`, black to the left and right or above and below, CLIP's normalisation.

    As the package's own transform, which leaves an image whose longer side is `size` as it is: here it is padded too.
    """
    return clip_normalise(fit_longer_side(images.astype(jnp.float32), size))


def _prompt_encoder(
    text: OpenCLIPText, params: Params, tokenize: Callable[[Sequence[str]], Int[np.ndarray, "batch tokens"]]
) -> Callable[[list[str]], Embeddings]:
    """Prompts to unit features (B, embedding), float32. A prompt is encoded once.

    The weights stay in the host's memory, as stored.
    """
    known: dict[str, np.ndarray] = {}

    @jax.jit
    def run(params: Params, ids: Int[Array, "batch tokens"]) -> Embeddings:
        exact = jax.tree.map(lambda a: a.astype(jnp.float32), params)
        with jax.default_matmul_precision("highest"):
            return _unit(jnp.asarray(text.apply({"params": exact}, ids)))

    def encode(prompts: list[str]) -> Embeddings:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        on_device = jax.device_put(params) if new else None
        for start in range(0, len(new), _ENCODED_TOGETHER):
            batch = new[start : start + _ENCODED_TOGETHER]
            padded = batch + [""] * (_ENCODED_TOGETHER - len(batch))
            features = np.asarray(run(on_device, tokenize(padded)))
            known.update(zip(batch, features, strict=False))
        return jnp.stack([known[prompt] for prompt in prompts])

    return encode


def _unit(features: Embeddings) -> Embeddings:
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
