"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977): BLIP-large and a linear head, trained on human rankings.

A prompt is tokenised once. As in the released program, its first token is BERT's [CLS], not BLIP's [ENC]. The features
of a prompt cannot be computed once, because the text encoder attends to the image. BERT therefore runs for every image.
"""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from nabla_gfn_jax.checkpoints import hub, weights
from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.models.bert_tokenizer import load_bert_tokenizer
from nabla_gfn_jax.models.blip import VIT_L_16, BertConfig, BLIPText, BLIPVision, Mask
from nabla_gfn_jax.models.layers import Dense
from nabla_gfn_jax.models.preprocess import clip_normalise, crop_longer_side
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.rewards.reward import Reward, abstract_reward
from nabla_gfn_jax.typing import Images, Params, PerSample, Resized, TokenIds

TOKENS = 35  # per prompt, including [CLS] and [SEP], as in the training of the paper's model
# Mean and standard deviation of the raw scores on the training set; log R is standardised with them.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
# The widths of the head's layers by their place in the checkpoint. Only dropout is between them, no nonlinearity.
_HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
# Only these tensors are used. All others are ignored, as in the released program.
_USED = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
_BUFFER = "position_ids"


class ImageRewardModel(nn.Module):
    """Normalised images (B, image_size, image_size, 3), token ids and mask (B, 35) → scores (B,)."""

    vision: VisionConfig
    text: BertConfig

    @nn.compact
    def __call__(self, images: Images, ids: TokenIds, mask: Mask) -> PerSample:
        tokens = BLIPVision(self.vision, name="blip.visual_encoder")(images)
        x = BLIPText(self.text, name="blip.text_encoder")(ids, mask, tokens)[:, 0]
        for place, features in _HEAD.items():
            x = Dense(features, name=f"mlp.layers.{place}")(x)
        return (x[:, 0] - _MEAN) / _STD


def image_reward() -> Reward:
    """log R = the standardised score, which has mean 0 and standard deviation 1 on the model's training data.

    Raises `UserError` that names a missing file and says how to get it.
    """

    def find(file: str, repo: str = "THUDM/ImageReward") -> Path:
        return hub.find("image_reward", file, repo=repo)

    words = find("vocab.txt", repo="google-bert/bert-base-uncased")
    return from_files(find("ImageReward.pt"), find("med_config.json"), words)


def from_files(file: Path, med_config: Path, vocabulary: Path, vision: VisionConfig = VIT_L_16) -> Reward:
    """The reward from a state dict of the released program's model, its `med_config.json` and BERT's `vocab.txt`."""
    model = ImageRewardModel(vision, BertConfig.from_json(read_json(med_config), str(med_config)))
    tokenizer = load_bert_tokenizer(vocabulary, TOKENS)
    params = from_state_dict(
        weights.read_state_dict(file),
        _shapes(model),
        str(file),
        f"BLIP and {med_config}",
        place=lambda a: jnp.asarray(a, jnp.float32),
        ignore=lambda name: not name.startswith(_USED) or name.endswith(_BUFFER),
    )

    def encode(prompts: list[str]) -> dict[str, Array]:
        ids, mask = tokenizer(prompts)
        return {"ids": jnp.asarray(ids), "mask": jnp.asarray(mask)}

    return Reward(params, encode, _scorer(model), (file, med_config, vocabulary))


def abstract() -> Reward:
    """The reward with shapes instead of weights."""
    model = ImageRewardModel(VIT_L_16, BertConfig())  # the defaults are those of the released file
    features = {"ids": jax.ShapeDtypeStruct((TOKENS,), jnp.int32), "mask": jax.ShapeDtypeStruct((TOKENS,), jnp.bool_)}
    return abstract_reward(_shapes(model), features, _scorer(model))


def _shapes(model: ImageRewardModel) -> Params:
    size = model.vision.image_size

    def init(key: Array) -> Params:
        ids = jnp.zeros((1, TOKENS), jnp.int32)
        return model.init(key, jnp.zeros((1, size, size, 3)), ids, ids == 0)["params"]

    shapes: Params = jax.eval_shape(init, jax.random.key(0))
    return shapes


def _scorer(model: ImageRewardModel) -> Callable[[Params, Images, dict[str, Array]], PerSample]:
    def score(params: Params, images: Images, prompts: dict[str, Array]) -> PerSample:
        images = preprocess(images, model.vision.image_size)
        with jax.default_matmul_precision("highest"):
            return jnp.asarray(model.apply({"params": params}, images, prompts["ids"], prompts["mask"]))

    return score


def preprocess(images: Images, size: int) -> Resized:
    """Crops the middle square of each image, resizes it to `size` pixels, and applies CLIP's normalisation."""
    return clip_normalise(crop_longer_side(images.astype(jnp.float32), size))
